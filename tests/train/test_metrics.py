import numpy as np
import pytest
from sklearn.metrics import f1_score

from serving.posts import Post
from serving.structures import STRUCTURES
from tests.train.evaluated import marked
from train.metrics import count_labels, mark, measure
from train.predict import Prediction


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guesses", [(0, 1, 2), (0, 1), (2,)])
def test_f1_is_scikit_learns_also_where_labels_are_never_answered(seed, guesses):
    rng = np.random.default_rng(seed)
    true, guessed = rng.choice(3, 50), rng.choice(guesses, 50)
    figures = measure(marked(true, guessed))
    for name in ("macro", "weighted"):
        expected = f1_score(true, guessed, average=name, zero_division=0)
        assert figures[f"{name}_f1"] == pytest.approx(expected)


def test_a_label_that_nobody_knows_or_answers_does_not_lower_macro_f1():
    figures = measure(marked([0, 1, 0, 1], [0, 1, 0, 1]))
    assert figures["macro_f1"] == 1.0
    assert figures["per_class"]["negative"]["support"] == 0


def test_confusion_has_a_row_a_true_label():
    figures = measure(marked([0, 0, 1, 2], [0, 1, 1, 0]))
    assert figures["confusion"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert figures["labels"] == ["positive", "neutral", "negative"]
    assert figures["accuracy"] == 0.5


def test_posts_without_a_label_of_a_field_are_counted_and_do_not_count():
    structure = STRUCTURES["llavac"]
    posts = [
        Post(id="1", text="a", labels={"image": "positive", "multimodal": "positive"}),
        Post(id="2", text="b", labels={"image": "negative", "text": "positive"}),
    ]
    found = mark(structure, posts, [answer(post.id) for post in posts])
    assert found["multimodal"].ids == ("1",)
    assert found["multimodal"].num_unlabelled == 1
    assert measure(found["multimodal"])["unlabelled"] == 1
    assert found["image"].ids == ("1", "2")
    assert measure(found["image"])["accuracy"] == 0.5
    assert count_labels(structure, posts)["image"] == {"positive": 1, "neutral": 0, "negative": 1}


def test_answers_of_other_posts_are_never_measured():
    post = Post(id="1", text="a", labels={"multimodal": "positive"})
    with pytest.raises(AssertionError, match="other posts"):
        mark(STRUCTURES["llavac"], [post], [answer("2")])


def test_a_part_of_the_posts_keeps_their_answers_together():
    part = marked([0, 1, 2], [0, 0, 2]).of({"0", "2"})
    assert part.ids == ("0", "2")
    assert part.true.tolist() == part.guessed.tolist() == [0, 2]


def answer(id_: str) -> Prediction:
    fields = ("image", "text", "multimodal")
    return Prediction(
        id=id_,
        labels=dict.fromkeys(fields, "positive"),
        probabilities={
            name: {"positive": 0.5, "neutral": 0.25, "negative": 0.25} for name in fields
        },
        kept=1,
        patches=1,
    )
