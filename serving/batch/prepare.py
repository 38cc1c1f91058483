"""Posts read, decoded and brought to the model's size in worker processes, ahead of the engine.

How they are brought to its size is `serving.fitting`'s: the engine sees the pixels the server sees.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from serving.batch.outcomes import Failure
from serving.errors import BadRequestError, SieveError
from serving.fitting import HEAVY, Fitting, fit
from serving.images import ImageLimits, decode_image
from serving.posts import Post
from serving.worker_process import end_with_parent, fork_server


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
    return fit(processor, image)


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
        self._context = fork_server([__name__, *(HEAVY if fitting.model else ())])
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


_limits = ImageLimits()
_processor: Any = None


def _begin(limits: ImageLimits, fitting: Fitting) -> None:
    """Starts a worker: one thread, and an end with the process it works for."""
    global _limits, _processor
    _limits = limits
    _processor = fitting.load()
    end_with_parent()


def _work(posts: Sequence[Post]) -> list[Prepared | Failure]:
    done: list[Prepared | Failure] = []
    for post in posts:
        try:
            done.append(prepare(post, _limits, _processor))
        except Failure as failure:
            done.append(failure)
    return done
