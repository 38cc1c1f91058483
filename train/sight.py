"""What the frozen tower makes of images, computed once and kept on disk.

Letters: N images, P patches, L tower layers, D tower width.

The tower is never trained, so an image's features are the same in every epoch, at every
retention ratio, and in every study on the same checkpoint. They are kept by the image's content:
a picture that stands in two posts, or in two data sets, is seen once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from patches.selection import PatchView, image_seed, num_kept, select
from serving.errors import BadRequestError, ConfigError
from serving.images import ImageLimits, decode_image
from serving.manifest import fingerprint
from serving.posts import ImageSource, Post
from train.model import Llava

BATCH_SIZE = {"cpu": 4, "cuda": 32}  # images at once; small ones stay in a CPU's caches
LIMITS = ImageLimits()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One image as the tower sees it.

    Attributes:
        features: `(P, D)` of the feature layer, without [CLS].
        cls_attention: `(L, P)` float32, see `patches.selection.PatchView`.
        feature_layer: the attention row that belongs to `features`.
        seed: of the selector `random`, the same number the server draws for this image.
    """

    features: Tensor
    cls_attention: Tensor
    feature_layer: int
    seed: int

    def keep(self, ratio: float, selector: str) -> Tensor:
        """Features of the kept patches, `(K, D)`."""
        num_patches = len(self.features)
        if ratio == 1.0:
            return self.features
        view = PatchView(
            features=self.features,
            cls_attention=self.cls_attention,
            feature_layer=self.feature_layer,
            num_kept=num_kept(num_patches, ratio),
            seed=self.seed,
        )
        return self.features[select(selector, view)]


class Sight:
    """Posts' images as a checkpoint's frozen tower sees them.

    Args:
        model: whose tower and image processor.
        folder: where what was seen is kept for later runs; None keeps it for this one.

    Raises:
        ConfigError: `folder` cannot be written.
    """

    def __init__(self, model: Llava, folder: Path | None = None) -> None:
        self.model = model
        self._own = tempfile.TemporaryDirectory() if folder is None else None
        root = Path(self._own.name) if self._own else folder
        assert root is not None
        self._folder = root / self._identity()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--cache {folder}: {error.strerror}", param="cache") from error
        self._keys: dict[ImageSource | bytes, str] = {}
        self._rows: dict[str, tuple[int, int]] = {}  # key to row and seed
        self._index_end = 0  # bytes of whole lines
        self._read_index()

    def see(self, posts: Iterable[Post]) -> None:
        """Runs the tower on the images that were not seen before, with a progress bar.

        Raises:
            ConfigError: an image is missing or does not open; names the post.
        """
        missing = self._missing(posts)
        if not missing:
            return
        self._check_space(len(missing))
        with self._locked():
            self._read_index()
            todo = [(key, raw) for key, raw in missing.items() if key not in self._rows]
            bar = tqdm(total=len(todo), desc="images", unit="image", disable=None)
            size = BATCH_SIZE.get(self.model.device.type, 16)
            try:
                for start in range(0, len(todo), size):
                    self._add(dict(todo[start : start + size]))
                    bar.update(len(todo[start : start + size]))
            except OSError as error:
                raise ConfigError(
                    f"--cache: what the tower saw cannot be written ({error.strerror}); free some "
                    "room or name another folder",
                    param="cache",
                ) from error
            finally:
                bar.close()

    def of(self, post: Post) -> list[Seen]:
        """The images of a post that `see` was given, in order."""
        return [self.at(image) for image in post.images]

    def at(self, image: ImageSource | bytes) -> Seen:
        """An image that `see` was given."""
        row, seed = self._rows[self._key(image)]
        raw = torch.from_numpy(self._memory[row, self._feature_bytes :].copy())
        return Seen(
            features=self._features(row),
            cls_attention=raw.view(torch.float32).view(-1, self.model.num_patches),
            feature_layer=self.model.feature_layer,
            seed=seed,
        )

    def row_of(self, image: ImageSource | bytes) -> int:
        """Place of an image in `features_at`."""
        return self._rows[self._key(image)][0]

    def features_at(self, rows: Sequence[int]) -> Tensor:
        """Features of several images at once, `(N, P, D)`."""
        return torch.stack([self._features(row) for row in rows])

    @property
    def bytes_per_image(self) -> int:
        """Room that an image takes on disk."""
        return self._feature_bytes + self._attention_bytes

    def _features(self, row: int) -> Tensor:
        raw = torch.from_numpy(self._memory[row, : self._feature_bytes].copy())
        return raw.view(self.model.dtype).view(self.model.num_patches, -1)

    @property
    def _feature_bytes(self) -> int:
        width = self.model.config.vision_config.hidden_size
        return int(self.model.num_patches * width * self.model.dtype.itemsize)

    @property
    def _attention_bytes(self) -> int:
        return int(self.model.config.vision_config.num_hidden_layers * self.model.num_patches * 4)

    def _identity(self) -> str:
        """Two checkpoints, image processings or precisions never share a folder."""
        checkpoint = self.model.checkpoint
        tower = fingerprint(checkpoint) if checkpoint.is_dir() else str(checkpoint)
        parts = (tower, self.model.processor.to_json_string(), str(self.model.dtype))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def _key(self, image: ImageSource | bytes) -> str:
        key = self._keys.get(image)
        if key is None:
            raw = image if isinstance(image, bytes) else image.read_bytes()
            key = self._keys[image] = hashlib.blake2b(raw, digest_size=16).hexdigest()
        return key

    def _missing(self, posts: Iterable[Post]) -> dict[str, tuple[str, ImageSource | bytes]]:
        """Images not seen yet, by key, with the post that holds them."""
        found = {}
        for post in posts:
            for image in post.images:
                try:
                    key = self._key(image)
                except (BadRequestError, OSError) as error:
                    raise _bad_image(post.id, image, _reason(error)) from error
                if key not in self._rows:
                    found[key] = (post.id, image)
        return found

    def _add(self, batch: dict[str, tuple[str, ImageSource | bytes]]) -> None:
        pixels = self.pixels(list(batch.values()))
        seen = see_pixels(self.model, pixels.to(self.model.device, self.model.dtype))
        rows = [
            _as_bytes(features) + _as_bytes(attention)
            for features, attention in zip(*seen, strict=True)
        ]
        seeds = [image_seed(one) for one in pixels]
        first = len(self._rows)
        with (self._folder / "images.bin").open("r+b" if first else "wb") as file:
            file.seek(first * self.bytes_per_image)
            file.write(b"".join(rows))
        lines = "".join(
            json.dumps({"key": key, "row": first + i, "seed": seed}) + "\n"
            for i, (key, seed) in enumerate(zip(batch, seeds, strict=True))
        ).encode()
        # Only what the index names counts: a row without its line is written over later, and so
        # is the half line that a kill may leave.
        with (self._folder / "index.jsonl").open("r+b" if self._index_end else "wb") as file:
            file.seek(self._index_end)
            file.write(lines)
            file.truncate()
        self._index_end += len(lines)
        self._rows |= {key: (first + i, seeds[i]) for i, key in enumerate(batch)}
        self.__dict__.pop("_memory", None)

    def pixels(self, images: Sequence[tuple[str, ImageSource | bytes]]) -> Tensor:
        """Processed pixels of images, `(N, 3, H, W)` float32, decoded as the server does.

        Args:
            images: a post's id (for errors) and its image.

        Raises:
            ConfigError: one does not open; names the post.
        """
        pictures = []
        for post, image in images:
            try:
                raw = image if isinstance(image, bytes) else image.read_bytes()
                pictures.append(decode_image(raw, LIMITS))
            except (BadRequestError, OSError) as error:
                raise _bad_image(post, image, _reason(error)) from error
        return self.model.processor(images=pictures, return_tensors="pt")["pixel_values"].float()

    @cached_property
    def _memory(self) -> np.ndarray:
        """All rows, `(N, bytes_per_image)` uint8; the file system keeps what is in use."""
        shape = (len(self._rows), self.bytes_per_image)
        return np.memmap(self._folder / "images.bin", dtype=np.uint8, mode="r", shape=shape)

    def _read_index(self) -> None:
        path = self._folder / "index.jsonl"
        if not path.exists():
            return
        rows: dict[str, tuple[int, int]] = {}
        end = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or entry["row"] != len(rows):
                break
            rows[entry["key"]] = (entry["row"], entry["seed"])
            end += len(line)
        self._index_end = end
        if len(rows) > len(self._rows):
            self._rows = rows
            self.__dict__.pop("_memory", None)

    def _check_space(self, count: int) -> None:
        needed, free = count * self.bytes_per_image, shutil.disk_usage(self._folder).free
        if needed > 0.95 * free:
            raise ConfigError(
                f"--cache: {count} images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                "free; name another folder",
                param="cache",
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time adds images."""
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@torch.inference_mode()
def see_pixels(model: Llava, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """From `(N, 3, H, W)` pixels to `(N, P, D)` features and `(N, L, P)` float32 attention.

    Only [CLS]'s row of each layer is computed: `output_attentions=True` would hold 490 MB an
    image of CLIP-L/336.
    """
    rows: list[Tensor] = []
    queries: list[Tensor] = []

    def keep_query(module: nn.Module, inputs: object, output: Tensor) -> None:
        queries.append(output[:, :1])

    def attend(module: nn.Module, inputs: object, output: Tensor) -> None:
        num_heads = model.config.vision_config.num_attention_heads
        rows.append(_cls_row(queries.pop(), output, num_heads))

    hooks = []
    for name, module in model.tower.named_modules():
        if name.endswith("self_attn.q_proj"):
            hooks.append(module.register_forward_hook(keep_query))
        elif name.endswith("self_attn.k_proj"):
            hooks.append(module.register_forward_hook(attend))
    try:
        output = model.tower(pixels, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    features = output.hidden_states[model.config.vision_feature_layer][:, 1:]
    return features, torch.stack(rows, dim=1)


def _cls_row(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Mean over heads of softmax(q_cls K^T), without the [CLS] column, `(N, P)` float32."""
    num, _, width = key.shape
    head = width // num_heads
    query, key = (
        one.float().view(num, -1, num_heads, head).transpose(1, 2) for one in (query, key)
    )
    weights = (query @ key.transpose(2, 3) * head**-0.5).softmax(dim=-1)
    return weights[:, :, 0, 1:].mean(dim=1)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def broken_image(image: ImageSource | bytes) -> str | None:
    """Why an image cannot be used, or None where it can."""
    try:
        decode_image(image if isinstance(image, bytes) else image.read_bytes(), LIMITS)
    except (BadRequestError, OSError) as error:
        return _reason(error)
    return None


def _reason(error: BadRequestError | OSError) -> str:
    return error.message if isinstance(error, BadRequestError) else str(error.strerror or error)


def _bad_image(post: str, image: ImageSource | bytes, reason: str) -> ConfigError:
    name = "its image" if isinstance(image, bytes) else f"image {image.name!r}"
    return ConfigError(
        f"post {post!r}: {name} cannot be used: {reason}; mend it or leave the post out "
        "(--skip-broken)",
        param="data",
    )
