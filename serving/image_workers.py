"""Images of requests decoded in a few processes with a deadline: a hostile one costs its process.

The server's own process opens no image. It hands encoded bytes to a worker and gets the square that
the engine takes (`serving.fitting`). A worker that crashes or does not answer in time is killed and
replaced, its request is a 400, the others do not notice.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from PIL import Image

from serving.app import image_limits
from serving.errors import BadRequestError, OverloadedError
from serving.fitting import Fitting
from serving.image_worker import ImageWorker, WorkerLostError
from serving.images import Decoder, ImageDecoder, ImageLimits, image_names
from serving.metrics import Metrics
from serving.settings import Settings

logger = logging.getLogger("sieve")

_FIRST_GUESS_S = 0.05
_START_AGAIN_S = 1.0


class ImageWorkers:
    """A bounded pool of decoding processes.

    Args:
        limits: what is admitted.
        fitting: how images are fitted.
        num_workers: processes.
        timeout_s: an image may take so long, and may wait so long for a worker.
        on_loss: told why a worker was lost: `deadline`, `crash` or `outside`.
    """

    def __init__(
        self,
        limits: ImageLimits,
        fitting: Fitting,
        *,
        num_workers: int,
        timeout_s: float,
        on_loss: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.limits, self.timeout_s = limits, timeout_s
        self.workers = [ImageWorker(limits, fitting, timeout_s) for _ in range(num_workers)]
        self._on_loss = on_loss
        self._free: asyncio.Queue[ImageWorker] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="image")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting, self._mean_s = 0, _FIRST_GUESS_S

    def begin(self) -> None:
        """Starts the workers, which takes seconds; call it on the loop that decodes."""
        for worker in self.workers:
            self._spawn(self._revive(worker))

    async def started(self) -> None:
        """Returns once a worker is there."""
        self._free.put_nowait(await self._free.get())

    async def decode(self, raws: Sequence[bytes], param: str = "image") -> list[Image.Image]:
        """Decodes all images of a request, in order, fitted where that is exact.

        Raises:
            BadRequestError: too many, or one is not admitted; names which.
            OverloadedError: no worker is free for too long (503).
        """
        names = image_names(raws, self.limits, param)
        jobs = [
            asyncio.ensure_future(self._one(raw, name))
            for raw, name in zip(raws, names, strict=True)
        ]
        try:
            return list(await asyncio.gather(*jobs))
        finally:
            for job in jobs:
                job.cancel()

    async def _one(self, raw: bytes, name: str) -> Image.Image:
        worker = await self._next_free()
        # A client that leaves does not take the worker along: its answer has to be read.
        return await asyncio.shield(self._spawn(self._decode(worker, raw, name)))

    async def _next_free(self) -> ImageWorker:
        expected_s = (self._waiting + 1) * self._mean_s / len(self.workers)
        if self._free.empty() and expected_s > self.timeout_s:
            raise self._overloaded(expected_s)
        self._waiting += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._free.get()
        except TimeoutError:
            raise self._overloaded(max(expected_s, self.timeout_s)) from None
        finally:
            self._waiting -= 1

    def _overloaded(self, expected_s: float) -> OverloadedError:
        error = OverloadedError(
            f"{self._waiting} images wait to be decoded by {len(self.workers)} workers, and one "
            f"waits no longer than {self.timeout_s:g} s; try again in the seconds that Retry-After "
            "says"
        )
        error.retry_after_s = max(1, math.ceil(expected_s))
        return error

    async def _decode(self, worker: ImageWorker, raw: bytes, name: str) -> Image.Image:
        started = time.monotonic()
        try:
            try:
                return await self._in_time(worker, raw, name)
            except WorkerLostError as lost:
                if not lost.is_outside:
                    raise self._blamed(name, time.monotonic() - started) from lost
            self._on_loss("outside")
            return await self._once_more(worker, raw, name)
        finally:
            self._mean_s += 0.1 * (time.monotonic() - started - self._mean_s)
            if worker.pid is not None:
                self._free.put_nowait(worker)
            else:
                self._spawn(self._revive(worker))

    async def _in_time(self, worker: ImageWorker, raw: bytes, name: str) -> Image.Image:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.timeout_s, worker.overdue)
        try:
            return await loop.run_in_executor(self._threads, worker.decode, raw, name)
        finally:
            timer.cancel()

    async def _once_more(self, worker: ImageWorker, raw: bytes, name: str) -> Image.Image:
        """After a worker that somebody else killed: no image is to blame for that."""
        loop, started = asyncio.get_running_loop(), time.monotonic()
        try:
            await loop.run_in_executor(self._threads, worker.start)
            return await self._in_time(worker, raw, name)
        except WorkerLostError as lost:
            if not lost.is_outside:
                raise self._blamed(name, time.monotonic() - started) from lost
            raise OverloadedError("image workers cannot be kept; try again shortly") from lost

    def _blamed(self, name: str, seconds: float) -> BadRequestError:
        is_late = seconds >= self.timeout_s
        self._on_loss("deadline" if is_late else "crash")
        why = f"was not decoded within {self.timeout_s:g} s" if is_late else "ended its decoder"
        logger.warning("an image %s; its worker is replaced", why)
        return BadRequestError(
            f"{name} {why}; scale it down, or save it anew as a plain JPEG or PNG",
            param=name,
            code="invalid_image",
        )

    async def _revive(self, worker: ImageWorker) -> None:
        """Starts a worker's process, again and again if need be, and takes it back."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._threads, worker.start)
            except WorkerLostError:
                logger.exception("an image worker did not start; it is tried again")
                await asyncio.sleep(_START_AGAIN_S)
            else:
                self._free.put_nowait(worker)
                return

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; a client that left does not

    def close(self) -> None:
        """Ends the workers; none is left when this returns."""
        for task in self._tasks:
            task.cancel()
        for worker in self.workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.end()


@asynccontextmanager
async def image_decoder(settings: Settings, metrics: Metrics) -> AsyncIterator[Decoder]:
    """What decodes the images of requests, as the settings say; it ends with the block.

    Workers start beside whatever comes next; `started` waits for the first.
    """
    limits = image_limits(settings)
    if settings.num_image_workers == 0:
        logger.warning("images are decoded inside the server; not for images of strangers")
        yield ImageDecoder(limits)
        return
    workers = ImageWorkers(
        limits,
        await asyncio.to_thread(Fitting.of, settings.model),
        num_workers=settings.num_image_workers,
        timeout_s=settings.image_timeout,
        on_loss=lambda reason: metrics.image_workers_lost.labels(reason).inc(),
    )
    workers.begin()
    try:
        yield workers
    finally:
        workers.close()
