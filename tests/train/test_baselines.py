import itertools
import os
from pathlib import Path

import pytest

from serving.posts import Post, read_posts
from serving.structures import STRUCTURES
from tests.train.evaluated import labeled_posts
from train.baselines import majority, perfect_label, tfidf
from train.metrics import mark, measure

STRUCTURE = STRUCTURES["llavac"]
ROOT = Path(__file__).resolve().parents[2]
MVSA = Path(os.environ.get("SIEVE_MVSA", ROOT / "../shared/mvsa/MVSA_Single"))


def last(predictions):
    return [one.labels.get("multimodal") for one in predictions]


def test_the_majority_is_that_of_the_training_posts():
    train = [Post(id=str(i), labels={"multimodal": "negative"}) for i in range(3)]
    train.append(Post(id="4", labels={"multimodal": "positive"}))
    posts = [Post(id=f"p{i}", labels={"multimodal": "positive"}) for i in range(2)]
    found = majority(STRUCTURE, train, posts)
    assert last(found) == ["negative", "negative"]
    assert found[0].probabilities["multimodal"] == {
        "positive": 0.25,
        "neutral": 0.0,
        "negative": 0.75,
    }
    assert "image" not in found[0].labels


def test_a_perfect_label_is_mapped_as_training_posts_are():
    pairs = [("positive", "negative")] * 3 + [("positive", "positive"), ("negative", "neutral")]
    train = [
        Post(id=str(i), labels={"text": text, "multimodal": merged})
        for i, (text, merged) in enumerate(pairs)
    ]
    posts = [Post(id=label, labels={"text": label}) for label in ("positive", "negative")]
    assert last(perfect_label(STRUCTURE, train, posts, known="text")) == ["negative", "neutral"]


def test_a_known_label_that_training_never_had_gets_the_majority():
    train = [Post(id="1", labels={"text": "positive", "multimodal": "negative"})]
    posts = [Post(id="2", labels={"text": "neutral"}), Post(id="3", labels={})]
    assert last(perfect_label(STRUCTURE, train, posts, known="text")) == ["negative", None]


@pytest.mark.parametrize("known", ["image", "multimodal"])
def test_there_is_no_perfect_label_where_nobody_knows_it(known):
    train = [Post(id="1", labels={"text": "positive", "multimodal": "negative"})]
    assert perfect_label(STRUCTURE, train, train, known=known) is None


def test_tf_idf_learns_words_and_gives_probabilities():
    train, posts = labeled_posts(150), labeled_posts(60, seed=9, start=1000)
    found, said = tfidf(STRUCTURE, train, posts)
    right = [
        one.labels["text"] == post.labels["text"] for one, post in zip(found, posts, strict=True)
    ]
    assert sum(right) / len(right) > 0.95
    assert "5-fold cross-validation on 150 training posts" in said
    for one, name in itertools.product(found[:3], STRUCTURE.fields):
        assert sum(one.probabilities[name].values()) == pytest.approx(1)


def test_tf_idf_sees_no_label_of_the_posts_it_answers():
    train, posts = labeled_posts(60), labeled_posts(20, seed=9, start=1000)
    bare = [Post(id=post.id, text=post.text) for post in posts]
    assert tfidf(STRUCTURE, train, posts) == tfidf(STRUCTURE, train, bare)


def test_too_few_posts_to_cross_validate_are_said():
    train = [
        Post(id="0", text="one of its kind", labels={"multimodal": "positive"}),
        *(Post(id=i, text="bad day", labels={"multimodal": "negative"}) for i in "123"),
    ]
    found, said = tfidf(STRUCTURE, train, [Post(id="x", text="one of its kind")])
    assert "too few training posts" in said
    assert last(found) == ["positive"]


@pytest.mark.parametrize("text", ["", "a b !"])
def test_texts_without_words_leave_tf_idf_out(text):
    train = [Post(id=str(i), text=text, labels={"multimodal": "positive"}) for i in range(4)]
    assert tfidf(STRUCTURE, train, train) is None


@pytest.mark.long
@pytest.mark.mvsa
def test_on_real_posts_the_baselines_are_as_strong_as_they_can_be():
    if not (MVSA / "labelResultAll.txt").is_file():
        pytest.skip("no MVSA-Single here; SIEVE_MVSA names its folder")
    train, dev = (list(read_posts(MVSA, split=split)) for split in ("train", "dev"))
    answers = {
        "majority": majority(STRUCTURE, train, dev),
        "text": perfect_label(STRUCTURE, train, dev, known="text"),
        "image": perfect_label(STRUCTURE, train, dev, known="image"),
        "tf-idf": tfidf(STRUCTURE, train, dev)[0],
    }
    figures = {
        name: measure(mark(STRUCTURE, dev, found)["multimodal"]) for name, found in answers.items()
    }
    assert figures["majority"]["accuracy"] == pytest.approx(0.596, abs=0.001)
    assert figures["text"]["accuracy"] == pytest.approx(0.807, abs=0.001)
    assert figures["image"]["accuracy"] == pytest.approx(0.891, abs=0.001)
    assert figures["tf-idf"]["accuracy"] >= 0.70
    assert figures["tf-idf"]["weighted_f1"] >= 0.68
