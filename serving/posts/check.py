"""What is wrong with a post, told and not dropped: files that are missing, empty or broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serving.errors import BadRequestError
from serving.images import ImageLimits, decode_image
from serving.posts.post import ImageSource, Post
from serving.structures import LabelStructure

FAULTS: Mapping[str, str] = {
    "missing_image": "image files that are not there",
    "empty_image": "images of 0 bytes",
    "unreadable_image": "image files that cannot be read",
    "broken_image": "images that the server would refuse",
    "empty_text": "posts without text",
    "empty_post": "posts with neither text nor image",
    "missing_label": "posts without a label of the structure",
    "unknown_label": "labels outside the structure",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a post.

    Attributes:
        kind: a name in `FAULTS`.
        detail: what it is about, such as the name of a file.
    """

    kind: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A post's faults, and those of its images that are files with something in them."""

    faults: tuple[Fault, ...]
    images: tuple[bytes, ...]


def check_post(
    post: Post, *, structure: LabelStructure | None = None, limits: ImageLimits | None = None
) -> Checked:
    """Reads a post's images and says what is wrong with it.

    Args:
        post: the post.
        structure: whose labels it should have; None leaves labels unchecked.
        limits: decode the images, under the server's limits; None leaves them undecoded.
    """
    faults = [*_text_faults(post), *(_label_faults(post, structure) if structure else ())]
    images: list[bytes] = []
    for image in post.images:
        raw = _read(image)
        if isinstance(raw, bytes):
            images.append(raw)
            faults += _image_faults(raw, _name(image), limits)
        else:
            faults.append(raw)
    return Checked(faults=tuple(faults), images=tuple(images))


def _text_faults(post: Post) -> list[Fault]:
    if post.text:
        return []
    return [Fault(kind="empty_text" if post.images else "empty_post")]


def _label_faults(post: Post, structure: LabelStructure) -> list[Fault]:
    faults = []
    for field, allowed in structure.fields.items():
        label = post.labels.get(field)
        if label is None:
            faults.append(Fault(kind="missing_label", detail=field))
        elif label not in allowed:
            faults.append(Fault(kind="unknown_label", detail=f"{field}={label!r:.40}"))
    return faults


def _read(image: ImageSource | bytes) -> bytes | Fault:
    try:
        raw = image if isinstance(image, bytes) else image.read_bytes()
    except FileNotFoundError:
        return Fault(kind="missing_image", detail=_name(image))
    except BadRequestError as error:
        return Fault(kind="broken_image", detail=error.message)
    except OSError as error:
        return Fault(kind="unreadable_image", detail=f"{_name(image)} ({error.strerror})")
    return raw or Fault(kind="empty_image", detail=_name(image))


def _image_faults(raw: bytes, name: str, limits: ImageLimits | None) -> list[Fault]:
    if limits is None:
        return []
    try:
        decode_image(raw, limits, name)
    except BadRequestError as error:
        return [Fault(kind="broken_image", detail=error.message)]
    return []


def _name(image: ImageSource | bytes) -> str:
    return "image" if isinstance(image, bytes) else image.name
