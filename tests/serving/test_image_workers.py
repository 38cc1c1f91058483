"""Decoding processes: the pixels of the thread's way, and no image that costs more than its own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client import CollectorRegistry
from transformers import AutoImageProcessor

from serving.errors import BadRequestError, OverloadedError
from serving.fitting import Fitting
from serving.geometry import sent_size
from serving.image_workers import ImageWorkers, image_decoder
from serving.images import FORMATS, ImageDecoder, ImageLimits, decode_image
from serving.metrics import Metrics
from serving.settings import DEMO, Settings
from tests.pictures import encoded, noise
from tests.serving.hostile_fitting import CRASHER, GLUTTON, SLEEPER, SPINNER, HostileFitting

ROOT = Path(__file__).resolve().parents[2]
LIMITS = ImageLimits(max_images=4, max_bytes=200_000, max_pixels=1_000_000)
HOSTILE = HostileFitting(model=None)
GOOD = encoded(noise(5, (60, 40)))


class Running:
    """Workers of a test, and why some were lost."""

    def __init__(self, *, fitting=HOSTILE, num_workers=2, timeout_s=20.0):
        self.lost: list[str] = []
        self.pool = ImageWorkers(
            LIMITS,
            fitting,
            num_workers=num_workers,
            timeout_s=timeout_s,
            on_loss=self.lost.append,
        )

    async def __aenter__(self):
        self.pool.begin()
        await until(lambda: self.pool._free.qsize() == len(self.pool.workers))
        return self

    async def __aexit__(self, *_):
        self.pool.close()

    @property
    def pids(self):
        return [worker.pid for worker in self.pool.workers]


async def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def assert_good(running):
    (image,) = await running.pool.decode([GOOD])
    assert np.array_equal(image, decode_image(GOOD, LIMITS))


def pictures():
    """Every accepted format, and the kinds of pixels that take a way of their own."""
    yield from ((form, encoded(noise(3, (90, 50)), form)) for form in FORMATS)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
        yield mode, encoded(noise(4, (70, 90)).convert(mode), form)
    yield "16 bits", encoded(noise(4).convert("I").convert("I;16"))
    yield "one pixel", encoded(noise(4, (1, 1)))
    yield "wide", encoded(noise(4, (400, 3)))


async def test_workers_give_the_pixels_of_the_threads_way():
    raws = dict(pictures())
    thread = ImageDecoder(ImageLimits(max_images=99))
    async with Running(fitting=Fitting(model=None)) as running:
        for name, raw in raws.items():
            (theirs,) = await running.pool.decode([raw])
            (ours,) = await thread.decode([raw])
            assert theirs.mode == "RGB"
            assert np.array_equal(ours, theirs), name
            assert sent_size(theirs) == ours.size
    thread.close()


async def test_fitted_images_are_the_engines_pixels_and_know_their_sent_size():
    settings = Settings(image_workers=1)
    processor = AutoImageProcessor.from_pretrained(DEMO / "base")
    async with image_decoder(settings, Metrics(CollectorRegistry())) as decoder:
        await decoder.started()
        for name, raw in pictures():
            whole = decode_image(raw, LIMITS)
            (fitted,) = await decoder.decode([raw])
            pixels = [processor(one, return_tensors="np") for one in (whole, fitted)]
            np.testing.assert_array_equal(*(p["pixel_values"] for p in pixels), err_msg=name)
            assert fitted.size == pixels[0]["pixel_values"].shape[:1:-1]
            assert sent_size(fitted) == whole.size


async def test_images_keep_their_order_and_the_bad_one_is_named():
    async with Running() as running:
        raws = [encoded(noise(0, (20 + i, 9))) for i in range(4)]
        images = await running.pool.decode(raws)
        assert [image.size for image in images] == [(20 + i, 9) for i in range(4)]
        with pytest.raises(BadRequestError, match=r"photo\[2\]") as caught:
            await running.pool.decode([*raws[:2], b"no", raws[0]], "photo")
        assert (caught.value.param, caught.value.code) == ("photo[2]", "invalid_image")
        with pytest.raises(BadRequestError, match="5 images, allowed are 4"):
            await running.pool.decode([b""] * 5)
        assert not running.lost


@pytest.mark.parametrize(
    ("size", "timeout_s", "words", "reason"),
    [
        (SLEEPER, 1.0, "not decoded within 1 s", "deadline"),
        (SPINNER, 1.0, "not decoded within 1 s", "deadline"),
        (CRASHER, 20.0, "ended its decoder", "crash"),
        (GLUTTON, 20.0, "more memory than is allowed", None),
    ],
    ids=["sleeps", "holds the interpreter", "crashes", "eats memory"],
)
async def test_a_hostile_image_costs_its_own_request_only(size, timeout_s, words, reason):
    async with Running(timeout_s=timeout_s) as running:
        before = set(running.pids)
        bad = asyncio.create_task(running.pool.decode([encoded(noise(0, size))], "photo"))
        for _ in range(5):
            await assert_good(running)
        with pytest.raises(BadRequestError, match=words) as caught:
            await bad
        assert (caught.value.param, caught.value.code) == ("photo", "invalid_image")
        assert running.lost == ([reason] if reason else [])
        await until(lambda: running.pool._free.qsize() == 2)
        (*dead,) = before - set(running.pids)
        assert len(dead) == (1 if reason else 0)
        assert all(map(is_gone, dead))
        for _ in range(4):
            await assert_good(running)


async def test_a_stopped_worker_is_killed_at_its_deadline():
    async with Running(num_workers=1, timeout_s=1.0) as running:
        (pid,) = running.pids
        os.kill(pid, signal.SIGSTOP)
        raw = b"\0" * 190_000  # more than a pipe holds: sending it blocks as well
        with pytest.raises(BadRequestError, match="not decoded within 1 s"):
            await running.pool.decode([raw])
        assert is_gone(pid)
        await until(lambda: running.pool._free.qsize() == 1)
        await assert_good(running)


async def test_an_image_whose_worker_was_killed_from_outside_is_decoded_by_the_next():
    async with Running(num_workers=1) as running:
        (pid,) = running.pids
        os.kill(pid, signal.SIGSTOP)
        work = asyncio.create_task(assert_good(running))
        await until(lambda: running.pool.workers[0]._is_busy)
        os.kill(pid, signal.SIGKILL)
        await work
        assert running.lost == ["outside"]
        assert is_gone(pid)


async def test_images_that_would_wait_too_long_are_refused_with_the_time_to_come_again():
    async with Running(num_workers=1, timeout_s=2.0) as running:
        sleeper = asyncio.create_task(running.pool.decode([encoded(noise(0, SLEEPER))]))
        await until(lambda: running.pool.workers[0]._is_busy)
        running.pool._mean_s = 0.3  # as after some slow images
        waiting = [asyncio.create_task(running.pool.decode([GOOD])) for _ in range(60)]
        done = await asyncio.gather(*waiting, return_exceptions=True)
        refused = [error for error in done if isinstance(error, OverloadedError)]
        assert len(refused) >= 54  # at most the six that two seconds hold got in line
        assert all((error.status, error.code) == (503, "overloaded") for error in refused)
        assert all(error.retry_after_s >= 2 for error in refused)
        assert all(isinstance(error, OverloadedError | list) for error in done)
        with pytest.raises(BadRequestError):
            await sleeper
        await until(lambda: running.pool._free.qsize() == 1)
        await assert_good(running)


async def test_a_client_that_leaves_takes_no_worker_along():
    async with Running(num_workers=1) as running:
        for _ in range(5):
            leaving = asyncio.create_task(running.pool.decode([GOOD] * 4))
            await asyncio.sleep(0.002)
            leaving.cancel()
        await assert_good(running)
        await until(lambda: running.pool._free.qsize() == 1)
        assert not running.lost


async def test_no_worker_is_left_after_close():
    async with Running() as running:
        hanging = asyncio.create_task(running.pool.decode([encoded(noise(0, SLEEPER))]))
        await until(lambda: any(worker._is_busy for worker in running.pool.workers))
        pids = running.pids
        running.pool.close()
        assert all(map(is_gone, pids))
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)


def test_workers_end_with_a_server_that_is_killed():
    code = (
        "import asyncio\n"
        "from serving.image_workers import *\n"
        "from tests.serving.hostile_fitting import *\n"
        "async def main():\n"
        "    pool = ImageWorkers(ImageLimits(), HostileFitting(model=None), num_workers=2,\n"
        "                        timeout_s=60)\n"
        "    pool.begin()\n"
        "    while pool._free.qsize() < 2:\n"
        "        await asyncio.sleep(0.02)\n"
        "    print(*(worker.pid for worker in pool.workers), flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not all(map(is_gone, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
