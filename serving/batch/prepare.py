"""Posts read, decoded and brought to the model's size in worker processes, ahead of the engine.

A worker hands over the square that the checkpoint's own image processor would make of the picture,
before it is scaled to floats. Doing that twice changes nothing (`Fitting.of` makes sure), so the
engine sees the very pixels that the server sees, and a photo of 12 megapixels crosses as 100 kB.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import numpy as np
from PIL import Image

from serving.batch.outcomes import Failure
from serving.errors import BadRequestError, SieveError
from serving.images import ImageLimits, decode_image
from serving.posts import Post


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A post that the engine can take.

    Attributes:
        images: RGB, as `(height, width, 3)` uint8.
        key: digest of its encoded images.
    """

    images: tuple[np.ndarray, ...]
    key: bytes

    def pictures(self) -> list[Image.Image]:
        """For the engine."""
        return [Image.fromarray(image) for image in self.images]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How images are brought to the model's size before they cross to the engine's process.

    Attributes:
        model: the checkpoint whose image processor does it; None leaves images as they are.
    """

    model: str | None

    @classmethod
    def of(cls, model: str) -> Fitting:
        """Fits where processing a fitted image gives the same pixels, to the bit."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(model)
        noise = np.random.default_rng(0)
        for size in ((331, 470), (77, 60)):
            image = Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8))
            fitted = Image.fromarray(_fit(processor, image))
            if not np.array_equal(_pixels(processor, image), _pixels(processor, fitted)):
                return cls(model=None)
        return cls(model=model)

    def load(self) -> Any:
        """The checkpoint's image processor; None where images stay as they are."""
        if self.model is None:
            return None
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.model)


def _pixels(processor: Any, image: Image.Image) -> np.ndarray:
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def _fit(processor: Any, image: Image.Image) -> np.ndarray:
    square = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)
    return np.ascontiguousarray(square["pixel_values"][0].transpose(1, 2, 0), dtype=np.uint8)


def prepare(post: Post, limits: ImageLimits, processor: Any = None) -> Prepared:
    """Reads and decodes a post's images.

    Raises:
        Failure: stage `read` or `decode`.
    """
    if len(post.images) > limits.max_images:
        raise Failure(
            "prompt",
            f"{len(post.images)} images, allowed are {limits.max_images} a post",
            code="too_many_images",
        )
    digest = hashlib.blake2b(digest_size=16)
    images = []
    for item in post.images:
        raw = _read(item)
        digest.update(len(raw).to_bytes(8, "little") + raw)
        images.append(_decode(raw, limits, processor))
    return Prepared(images=tuple(images), key=digest.digest())


def _read(item: Any) -> bytes:
    try:
        return item if isinstance(item, bytes) else item.read_bytes()
    except SieveError as error:
        raise Failure.of("read", error) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Failure(
            "read",
            f"image {item.name!r} cannot be read: {reason}",
            code="image_unreadable",
            can_retry=not isinstance(error, FileNotFoundError | ValueError),
        ) from error


def _decode(raw: bytes, limits: ImageLimits, processor: Any) -> np.ndarray:
    try:
        if len(raw) > limits.max_bytes:
            raise BadRequestError(
                f"image has {len(raw)} bytes, allowed are {limits.max_bytes}; scale it down",
                code="image_too_large",
            )
        image = decode_image(raw, limits)
    except SieveError as error:
        raise Failure.of("decode", error) from error
    return np.asarray(image) if processor is None else _fit(processor, image)


class Preparer:
    """A bounded pool of worker processes that prepares posts.

    A picture that kills its worker costs that worker: the posts that were in work are tried again
    one by one, and the one that does it again is a failure.

    Args:
        limits: what is admitted.
        fitting: how images are fitted.
        num_workers: processes.
    """

    def __init__(self, limits: ImageLimits, fitting: Fitting, *, num_workers: int) -> None:
        self._start = (limits, fitting)
        self.num_workers = num_workers
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *(_HEAVY if fitting.model else ())])
        self._pool = self._new_pool(num_workers)
        self._alone = asyncio.Lock()

    def _new_pool(self, num_workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            num_workers, self._context, initializer=_begin, initargs=self._start
        )

    def start(self) -> None:
        """Starts the workers, which takes seconds, before there are posts."""
        self._pool.submit(_work, [])

    async def prepare(self, posts: Sequence[Post]) -> list[Prepared | Failure]:
        """Prepares posts, in order; those without images at once."""
        if not any(post.images for post in posts):
            return [Prepared(images=(), key=b"") for _ in posts]
        loop = asyncio.get_running_loop()
        pool = self._pool
        try:
            return await loop.run_in_executor(pool, _work, list(posts))
        except BrokenProcessPool:
            async with self._alone:
                if pool is self._pool:
                    pool.shutdown(wait=False)
                    self._pool = self._new_pool(self.num_workers)
                return await self._one_by_one(posts)

    async def _one_by_one(self, posts: Sequence[Post]) -> list[Prepared | Failure]:
        """A worker of its own for posts of which one may end it."""
        loop, done = asyncio.get_running_loop(), list[Prepared | Failure]()
        pool = self._new_pool(1)
        try:
            for post in posts:
                try:
                    done += await loop.run_in_executor(pool, _work, [post])
                except BrokenProcessPool:
                    done.append(
                        Failure("decode", "its image ended the worker", code="worker_crashed")
                    )
                    pool.shutdown(wait=False)
                    pool = self._new_pool(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return done

    def close(self) -> None:
        """Ends the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)


_HEAVY = ("torch", "torchvision", "transformers.models.auto.image_processing_auto")
"""Imported once, by the process that workers are forked from: else seconds for each of them."""

_limits = ImageLimits()
_processor: Any = None


def _begin(limits: ImageLimits, fitting: Fitting) -> None:
    """Starts a worker: one thread, and an end with the process it works for."""
    global _limits, _processor
    _limits = limits
    _processor = fitting.load()
    if _processor is not None:
        import torch

        torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker with the process it works for, which may be killed.

    The sentinel is a pipe that the parent holds: it closes at once, also where nobody reaps the
    killed process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(posts: Sequence[Post]) -> list[Prepared | Failure]:
    done: list[Prepared | Failure] = []
    for post in posts:
        try:
            done.append(prepare(post, _limits, _processor))
        except Failure as failure:
            done.append(failure)
    return done
