"""Posts prepared in worker processes: the server's pixels, and no picture that costs the others."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor

from serving.batch.outcomes import Failure
from serving.batch.prepare import Preparer, prepare
from serving.fitting import Fitting
from serving.images import ImageLimits, decode_image
from serving.posts import Post
from tests.checkpoints import write_processor, write_tokenizer
from tests.pictures import encoded, noise
from tests.serving.deadly_picture import DeadlyPicture

ROOT = Path(__file__).resolve().parents[2]

SIZES = [(336, 336), (640, 480), (200, 1000), (50, 40), (1, 1), (3, 150), (337, 335), (2000, 1500)]


@pytest.fixture(scope="module", params=["crop", "pad"])
def checkpoint(request, tmp_path_factory):
    """As much of a checkpoint as processing images needs."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder)
    write_processor(folder, pad_to_square=request.param == "pad")
    return folder


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_fitted_image_has_the_pixels_that_the_server_makes_of_the_file(checkpoint):
    fitting = Fitting.of(str(checkpoint))
    assert fitting.model == str(checkpoint)
    theirs = AutoProcessor.from_pretrained(checkpoint).image_processor
    for seed, size in enumerate(SIZES):
        raw = encoded(noise(seed, size), "JPEG" if seed % 2 else "PNG")
        fitted = prepare(Post(id="a", images=(raw,)), ImageLimits(), fitting.load())
        assert fitted.images[0].shape == (336, 336, 3)
        whole = theirs(decode_image(raw, ImageLimits()), return_tensors="np")["pixel_values"]
        again = theirs(fitted.pictures()[0], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(again, whole, err_msg=str(size))


async def test_a_picture_that_ends_its_worker_costs_its_own_post_only(tmp_path):
    path = tmp_path / "good.png"
    path.write_bytes(encoded(noise()))
    posts = [Post(id=str(i), text="x", images=(path,)) for i in range(9)]
    posts[4] = Post(id="4", images=(DeadlyPicture(),))
    preparer = Preparer(ImageLimits(), Fitting(model=None), num_workers=2)
    try:
        chunks = [posts[:3], posts[3:6], posts[6:]]
        parts = await asyncio.gather(*map(preparer.prepare, chunks))
        done = [found for part in parts for found in part]
        whole = prepare(posts[0], ImageLimits())
        failure = done.pop(4)
        assert isinstance(failure, Failure)
        assert (failure.stage, failure.code) == ("decode", "worker_crashed")
        assert [found.key for found in done] == [whole.key] * 8
        assert all(np.array_equal(found.images[0], whole.images[0]) for found in done)
        again = await preparer.prepare(posts[:1])  # there are workers again
        assert again[0].key == whole.key
    finally:
        preparer.close()


def test_workers_end_with_a_parent_that_is_killed():
    code = (
        "import asyncio, time\n"
        "from serving.batch.prepare import *\n"
        "from tests.pictures import encoded, noise\n"
        "preparer = Preparer(ImageLimits(), Fitting(model=None), num_workers=2)\n"
        "posts = [[Post(id='a', images=(encoded(noise()),))] for _ in range(8)]\n"
        "async def work():\n"
        "    await asyncio.gather(*map(preparer.prepare, posts))\n"
        "asyncio.run(work())\n"
        "print(*preparer._pool._processes, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        assert all(map(is_running, pids))
        os.kill(parent.pid, signal.SIGKILL)  # a zombie from here: nobody reaps it yet
        deadline = time.monotonic() + 20
        while any(map(is_running, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("images", "stage", "code"),
    [
        ((b"",), "decode", "invalid_image"),
        ((encoded(noise())[:100],), "decode", "invalid_image"),
        ((encoded(noise(0, (300, 200))),), "decode", "image_too_large"),
        ((Path("/nowhere/at all.png"),), "read", "image_unreadable"),
        ((Path("a\0b.png"),), "read", "image_unreadable"),
        ((Path("/"),), "read", "image_unreadable"),
        ((b"",) * 5, "prompt", "too_many_images"),
    ],
)
def test_an_image_that_is_not_admitted_says_at_which_stage_and_why(images, stage, code):
    with pytest.raises(Failure) as caught:
        prepare(Post(id="a", images=images), ImageLimits(max_pixels=50_000))
    assert (caught.value.stage, caught.value.code) == (stage, code)
    assert len(caught.value.reason) > 10


def test_posts_without_images_need_no_worker():
    preparer = Preparer(ImageLimits(), Fitting(model=None), num_workers=2)
    done = asyncio.run(preparer.prepare([Post(id="a", text="x")] * 3))
    assert [found.images for found in done] == [()] * 3
    assert not preparer._pool._processes
    preparer.close()
