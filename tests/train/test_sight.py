"""What the tower saw is the reference's, is seen once, and survives a kill."""

import io

import pytest
import torch
from PIL import Image

import train.sight as sight_module
from serving.errors import ConfigError
from serving.posts import Post
from tests.pictures import noise
from train.demo.build import SHIPPED
from train.model import load_llava
from train.predict import with_other_images
from train.reference import Reference
from train.sight import Sight

BASE = SHIPPED / "base"


@pytest.fixture(scope="module")
def model():
    return load_llava(BASE)


def png(seed):
    buffer = io.BytesIO()
    noise(seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def posts_of(*seeds):
    return [Post(id=str(i), images=(png(seed),)) for i, seed in enumerate(seeds)]


@pytest.fixture
def calls(monkeypatch):
    """How many images each pass of the tower had."""
    sizes = []
    see = sight_module.see_pixels

    def counted(model, pixels):
        sizes.append(len(pixels))
        return see(model, pixels)

    monkeypatch.setattr(sight_module, "see_pixels", counted)
    return sizes


def test_features_and_attention_are_the_references(model, tmp_path):
    posts = posts_of(1, 2)
    sight = Sight(model, tmp_path)
    sight.see(posts)
    reference = Reference(BASE)
    for post in posts:
        image = Image.open(io.BytesIO(post.images[0])).convert("RGB")
        expected, (found,) = reference.see(reference.process([image])), sight.of(post)
        torch.testing.assert_close(found.features, expected.features[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.cls_attention, expected.cls_attention[0])
        for selector in ("cls", "cls-last", "stride", "random"):
            kept = reference.keep(expected, 0, ratio=0.4, selector=selector, seed=found.seed)
            torch.testing.assert_close(found.keep(0.4, selector), found.features[kept])


def test_an_image_is_seen_once_whoever_posts_it_and_in_later_runs(model, tmp_path, calls):
    Sight(model, tmp_path).see(posts_of(1, 2, 1))
    assert sum(calls) == 2
    Sight(model, tmp_path).see(posts_of(2, 3))
    assert sum(calls) == 3


def test_what_a_killed_run_left_half_written_is_written_again(model, tmp_path, calls):
    first = Sight(model, tmp_path)
    first.see(posts_of(1, 2))
    (index,) = tmp_path.glob("*/index.jsonl")
    lines = index.read_text().splitlines()
    index.write_text(lines[0] + "\n" + lines[1][:20])
    again = Sight(model, tmp_path)
    again.see(posts_of(1, 2))
    assert sum(calls) == 3
    for post in posts_of(1, 2):
        torch.testing.assert_close(again.of(post)[0].features, first.of(post)[0].features)
    Sight(model, tmp_path).see(posts_of(1, 2))
    assert sum(calls) == 3


def test_precisions_never_share_features(tmp_path, calls):
    for dtype in (torch.float32, torch.bfloat16):
        Sight(load_llava(BASE, dtype=dtype), tmp_path).see(posts_of(1))
    assert sum(calls) == 2


def test_an_image_that_does_not_open_names_its_post(model, tmp_path):
    with pytest.raises(ConfigError, match="post 'x'"):
        Sight(model, tmp_path).see([Post(id="x", images=(b"not an image",))])
    with pytest.raises(ConfigError, match=r"post 'y'.*gone\.png"):
        Sight(model, tmp_path).see([Post(id="y", images=(tmp_path / "gone.png",))])


def test_shuffling_gives_nobody_his_own_images_and_keeps_their_number():
    posts = [Post(id=str(i), images=(b"%d" % i,) * (1 + i % 2)) for i in range(20)]
    shuffled = with_other_images(posts, "shuffled", seed=3)
    for own, other in zip(posts, shuffled, strict=True):
        assert own.images != other.images
        assert len(own.images) == len(other.images)
    assert sorted(p.images for p in posts) == sorted(p.images for p in shuffled)
