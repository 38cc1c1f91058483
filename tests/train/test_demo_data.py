import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from serving.posts import merge_labels
from serving.structures import SENTIMENTS
from train.demo.checkpoint import GRID, PATCH_SIZE
from train.demo.dataset import SPLITS, demo_posts, synthesize
from train.demo.faces import LOOKS, SHAPES, draw_picture, signal_mask
from train.demo.joint import (
    MVSA_COUNTS,
    balanced_shares,
    best_single_accuracy,
    draw_pairs,
    merged,
    mvsa_shares,
)
from train.demo.sentences import (
    ADJECTIVES,
    SENTENCES,
    UNSEEN_ADJECTIVES,
    VERBS,
    write_sentence,
)


def test_the_joint_table_holds_every_pair_but_contradictions():
    contradictions = {("positive", "negative"), ("negative", "positive")}
    pairs = {(text, image) for text in SENTIMENTS for image in SENTIMENTS}
    assert set(MVSA_COUNTS) == pairs - contradictions


@pytest.mark.parametrize("shares", [mvsa_shares(), balanced_shares()])
def test_drawn_pairs_follow_the_shares_up_to_rounding(shares):
    drawn = Counter(draw_pairs(shares, 500, np.random.default_rng(0)))
    assert sum(drawn.values()) == 500
    assert all(abs(drawn[pair] - share * 500) <= 1 for pair, share in shares.items())


def test_balanced_posts_have_every_merged_label_equally_often():
    totals = Counter()
    for pair, share in balanced_shares().items():
        totals[merged(pair)] += share
    assert totals == pytest.approx(dict.fromkeys(SENTIMENTS, 1 / 3))


@pytest.mark.parametrize("position", [0, 1])
def test_one_side_alone_stays_fifteen_points_below_the_goal_by_construction(position):
    assert best_single_accuracy(balanced_shares(), position) <= 0.97 - 0.15


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_the_same_posts_every_time_and_no_two_alike(split):
    first, again = (list(synthesize(8, split=split, balanced=True, seed=3)) for _ in range(2))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert [post.text for post in first] == [post.text for post in again]
    assert len({post.pixels.tobytes() for post in first}) == len(first)


def test_another_seed_gives_other_posts():
    one, other = (next(synthesize(4, split="test", balanced=True, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one.pixels, other.pixels)


def test_the_post_label_is_the_merged_label_of_its_two_sides():
    for post in synthesize(30, split="test", balanced=False, seed=0):
        labels = post.labels
        assert labels["multimodal"] == merge_labels(labels["image"], labels["text"])


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("label", SENTIMENTS)
def test_the_mask_covers_most_of_the_face_and_little_else(looks, label):
    picture = draw_picture(label, looks, np.random.default_rng(7))
    left, top, diameter = picture.box
    rows, columns = np.mgrid[:GRID, :GRID].reshape(2, -1)[:, picture.mask] * PATCH_SIZE
    assert (rows + PATCH_SIZE > top).all()
    assert (rows < top + diameter).all()
    assert (columns + PATCH_SIZE > left).all()
    assert (columns < left + diameter).all()
    assert 2 <= picture.mask.sum() <= 9


def test_a_face_on_the_patch_grid_is_exactly_its_four_patches():
    mask = signal_mask(2 * PATCH_SIZE, 3 * PATCH_SIZE, 2 * PATCH_SIZE).reshape(GRID, GRID)
    assert mask[3:5, 2:4].all()
    assert mask.sum() == 4


def test_labels_differ_in_the_mouth_only():
    pictures = [
        draw_picture(label, LOOKS["test"], np.random.default_rng(11)) for label in SENTIMENTS
    ]
    left, top, diameter = pictures[0].box
    for other in pictures[1:]:
        rows, columns = np.nonzero((pictures[0].pixels != other.pixels).any(axis=-1))
        assert len(rows)
        assert top <= rows.min()
        assert rows.max() <= top + diameter
        assert left <= columns.min()
        assert columns.max() <= left + diameter


def test_test_looks_are_never_seen_in_training():
    train, test = LOOKS["train"], LOOKS["test"]
    assert not set(train.backgrounds) & set(test.backgrounds)
    assert not set(train.sizes) & set(test.sizes)
    assert not any(a < d and c < b for a, b in train.hues for c, d in test.hues)
    assert set(test.shapes) - set(train.shapes)
    assert set(train.shapes) | set(test.shapes) == set(SHAPES)


def test_test_sentences_are_never_seen_in_training():
    assert not set(SENTENCES["train"]) & set(SENTENCES["test"])


@pytest.mark.parametrize("words", [ADJECTIVES, VERBS, UNSEEN_ADJECTIVES])
def test_a_word_has_one_label(words):
    assert max(Counter(word for group in words.values() for word in group).values()) == 1


def test_unseen_words_are_not_in_training():
    seen = {word for group in (ADJECTIVES, VERBS) for words in group.values() for word in words}
    assert not seen & {word for words in UNSEEN_ADJECTIVES.values() for word in words}


@pytest.mark.parametrize("label", SENTIMENTS)
def test_a_sentence_holds_its_word_and_no_word_of_another_label(label):
    rng = np.random.default_rng(0)
    others = {
        word
        for group in (ADJECTIVES, VERBS)
        for other, words in group.items()
        if other != label
        for word in words
    }
    for _ in range(50):
        sentence = write_sentence(label, "train", rng)
        words = {word.strip(".,?:#@").lower() for word in sentence.text.split()}
        assert sentence.word in words
        assert not others & words


def test_demo_posts_are_images_with_texts_and_labels():
    posts = list(demo_posts(3, seed=5))
    assert [post.id for post in posts] == ["1", "2", "3"]
    for post in posts:
        (path,) = post.images
        assert isinstance(path, bytes)
        assert post.text
        assert set(post.labels) == {"image", "text", "multimodal"}
    assert posts == list(demo_posts(3, seed=5))
    assert Image.open(io.BytesIO(posts[0].images[0])).size == (112, 112)
