"""What can be said of a picture without learning: colours, edges and a thumbnail.

Letters: N images, S side of the square image, D numbers an image.
"""

from __future__ import annotations

import numpy as np

_THUMB = 8
_CELLS = 7
_ORIENTATIONS = 9


def describe_images(pixels: np.ndarray) -> np.ndarray:
    """Descriptors of `(N, 3, S, S)` uint8 images, `(N, D)` float32.

    A joint histogram of hue, saturation and value (8 x 4 x 4, its square root), gradient
    orientations in 7 x 7 cells (HOG, Dalal and Triggs 2005, without block overlap), a thumbnail
    of 8 x 8, and eight figures on flatness, light and saturation: flat areas tell drawings and
    pictures of text from photographs.
    """
    parts = [_describe(image.astype(np.float32) / 255) for image in pixels]
    return np.stack(parts).astype(np.float32)


def _describe(image: np.ndarray) -> np.ndarray:
    hue, saturation, value = _to_hsv(image)
    grey = image.mean(axis=0)
    strength, angle = _gradients(grey)
    return np.concatenate(
        [
            _color_histogram(hue, saturation, value),
            _orientations(strength, angle),
            _means(image, _THUMB).ravel(),
            _summary(grey, strength, saturation),
        ]
    )


def _to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue, saturation and value in [0, 1) of an RGB image in [0, 1]."""
    red, green, blue = image
    value, least = image.max(axis=0), image.min(axis=0)
    spread = value - least
    safe = np.where(spread > 0, spread, 1)
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    saturation = spread / np.where(value > 0, value, 1)
    return hue / 6 % 1, saturation, value


def _color_histogram(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    places = [
        np.minimum((channel * bins).astype(int), bins - 1)
        for channel, bins in ((hue, 8), (saturation, 4), (value, 4))
    ]
    joint = (places[0] * 4 + places[1]) * 4 + places[2]
    return np.sqrt(np.bincount(joint.ravel(), minlength=128) / joint.size)


def _gradients(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strength and orientation in [0, 1) of each pixel's gradient."""
    down, across = np.gradient(grey * 2)
    return np.hypot(across, down), np.arctan2(down, across) % np.pi / np.pi % 1


def _orientations(strength: np.ndarray, angle: np.ndarray) -> np.ndarray:
    bins = (angle * _ORIENTATIONS).astype(int)
    layers = np.stack([strength * (bins == index) for index in range(_ORIENTATIONS)])
    side = strength.shape[0]
    cells = _means(layers, _CELLS) * (side // _CELLS) ** 2
    return (cells / np.sqrt((cells**2).sum(axis=0) + 1)).ravel()


def _means(layers: np.ndarray, count: int) -> np.ndarray:
    """Means of `(K, S, S)` over a grid, `(K, count, count)`; what does not divide is cut off."""
    step = layers.shape[-1] // count
    cut = layers[:, : step * count, : step * count]
    return cut.reshape(len(layers), count, step, count, step).mean(axis=(2, 4))


def _summary(grey: np.ndarray, strength: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    return np.array(
        [
            (strength < 0.02).mean(),
            strength.mean(),
            grey.mean(),
            grey.std(),
            saturation.mean(),
            saturation.std(),
            (grey > 0.95).mean(),
            (grey < 0.05).mean(),
        ]
    )
