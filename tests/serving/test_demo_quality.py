"""The shipped demo's accuracy, measured through the server on posts it has never seen.

The goals are 0.97 at ratio 1.0 and 0.95 at 0.4; what ships is just short of them, see the README.
"""

import asyncio

import pytest

from serving.catalogue import Choices
from serving.images import ImageLimits, decode_image
from train.demo.dataset import demo_posts

NUM_POSTS = 400


@pytest.fixture(scope="module")
def posts():
    found = list(demo_posts(NUM_POSTS, split="test", balanced=True, seed=0))
    assert len(found) == NUM_POSTS
    return found


def accuracy(server, posts, field, **choices):
    async def all_labels():
        gate = asyncio.Semaphore(16)

        async def one(post):
            images = [decode_image(raw, ImageLimits()) for raw in post.image_bytes()]
            async with gate:
                result = await server.labeler.label(post.text, images, Choices(**choices))
            return result.scores.labels[field] == post.labels["multimodal"]

        return await asyncio.gather(*map(one, posts))

    right = server.call(all_labels())
    return sum(right) / len(right)


@pytest.mark.parametrize(
    ("adapter", "field"), [("llavac", "multimodal"), ("sentiment", "sentiment")]
)
@pytest.mark.parametrize(("ratio", "least"), [(1.0, 0.95), (0.4, 0.92)])
def test_merged_labels_are_right_at_full_and_low_retention(
    demo_server, posts, adapter, field, ratio, least
):
    assert accuracy(demo_server, posts, field, model=adapter, retention_ratio=ratio) >= least


def test_the_default_precision_is_as_good(bfloat16_server, posts):
    found = accuracy(bfloat16_server, posts, "multimodal", model="llavac", retention_ratio=0.4)
    assert found >= 0.92


def test_the_base_model_does_not_know_the_task(demo_server, posts):
    assert accuracy(demo_server, posts[:100], "sentiment", model="demo") < 0.9
