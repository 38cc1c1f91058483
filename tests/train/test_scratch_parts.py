import numpy as np
import pytest
import torch

from train.demo.checkpoint import Shape, save_preprocessor
from train.demo.dataset import demo_posts
from train.demo.tokenizer import learn_tokenizer
from train.scratch.chats import Examiner, Example, tokenizer_corpus
from train.scratch.corpus import label_fields, read_corpus
from train.scratch.descriptors import describe_images
from train.scratch.language import IGNORED, collate
from train.scratch.pieces import embed_pieces
from train.scratch.settings import LanguageRecipe, Size, TowerRecipe
from train.scratch.teacher import teach
from train.scratch.tower import augment


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    save_preprocessor(folder, 56, "crop")
    return read_corpus(list(demo_posts(90, balanced=True)), folder)


@pytest.fixture(scope="module")
def size():
    return Size(
        shape=Shape(),
        max_vocab_size=600,
        tower=TowerRecipe(num_steps=1, num_topics=4, num_descriptions=4),
        reading=LanguageRecipe(num_steps=1, learning_rate=1e-3),
        language=LanguageRecipe(num_steps=1, learning_rate=1e-3),
        num_folds=3,
    )


@pytest.fixture(scope="module")
def lessons(corpus, size):
    return teach(corpus, size, 0)


def test_of_fields_that_always_agree_only_the_first_is_learned():
    fields = label_fields(list(demo_posts(60, balanced=True)))
    assert set(fields) == {"image", "text", "multimodal"}
    assert all(len(labels) == 3 for labels in fields.values())


def test_a_posts_own_label_has_no_part_in_what_teachers_say_of_it(corpus, size, lessons):
    import dataclasses

    field = "text"
    flipped = corpus.labels[field].copy()
    flipped[7] = (flipped[7] + 1) % 3
    other = dataclasses.replace(corpus, labels={**corpus.labels, field: flipped})
    said = teach(other, size, 0).said[f"both/{field}"]
    np.testing.assert_array_equal(said[7], lessons.said[f"both/{field}"][7])
    assert (said != lessons.said[f"both/{field}"]).any()


def test_teachers_speak_in_probabilities(lessons):
    for said in lessons.said.values():
        np.testing.assert_allclose(said.sum(axis=1), 1, rtol=1e-5)
    assert lessons.figures["text/text"]["accuracy"] > 0.5


def test_descriptors_tell_colours_and_edges_apart():
    red = np.zeros((1, 3, 56, 56), np.uint8)
    red[:, 0] = 200
    blue = red[:, ::-1].copy()
    stripes = red.copy()
    stripes[:, :, ::4] = 0
    found = describe_images(np.concatenate([red, blue, stripes, red]))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[3])
    assert np.abs(found[0] - found[1]).max() > 0.5
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_augmented_pictures_stay_in_range_and_follow_the_generator():
    pixels = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    first, again, other = (
        augment(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == pixels.shape
    assert first.min() >= 0
    assert first.max() <= 255
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_are_learned_as_distributions_at_the_place_that_predicts_them():
    example = Example(ids=[1, 9, 5, 6, 7, 2], soft_at=4, soft={7: 0.75, 8: 0.25}, picture=0)
    longer = Example(ids=[1, 9, 5, 5, 5, 5, 2], soft_at=None, soft={}, picture=1)
    ids, targets, soft = collate([example, longer], 9, 3, 0)
    assert ids[0].tolist() == [1, 9, 9, 9, 5, 6, 7, 2, 0]
    assert (soft.rows, soft.places) == ([0], [5])
    assert ids[0, soft.places[0] + 1] == 7
    assert targets[0].tolist() == [IGNORED, IGNORED, IGNORED, 5, 6, IGNORED, 2, IGNORED, IGNORED]
    assert soft.dense(12)[0].nonzero().flatten().tolist() == [7, 8]


def test_every_post_is_asked_about_before_any_is_asked_about_again(corpus, lessons):
    tokenizer = learn_tokenizer(tokenizer_corpus(corpus), 600)
    recipe = LanguageRecipe(num_steps=1, learning_rate=1e-3, missing=0.0, writing=0.0)
    examiner = Examiner(corpus, lessons, tokenizer, recipe)
    batches = examiner.batches(9, np.random.default_rng(0))
    shown = [example.picture for _ in range(8) for example in next(batches)]
    assert len(set(shown)) == len(shown) == 72
    lengths = [len(example.ids) for example in next(batches)]
    assert max(lengths) - min(lengths) < 30


def test_hidden_pictures_and_texts_are_answered_by_teachers_that_do_not_see_them(corpus, lessons):
    tokenizer = learn_tokenizer(tokenizer_corpus(corpus), 600)
    recipe = LanguageRecipe(num_steps=1, learning_rate=1e-3, missing=0.5, writing=0.0)
    examiner = Examiner(corpus, lessons, tokenizer, recipe)
    image = tokenizer.convert_tokens_to_ids("<image>")
    rng = np.random.default_rng(0)
    for post in range(20):
        example = examiner.draw(post, rng)
        view = "image" if image in example.ids else "text"
        shares = sorted(example.soft.values())
        assert any(
            np.allclose(shares, sorted(lessons.said[f"{view}/{field}"][post].tolist()))
            for field in corpus.fields
        )


def test_pieces_start_alike_where_texts_with_them_feel_alike(corpus, lessons):
    tokenizer = learn_tokenizer(tokenizer_corpus(corpus), 900)
    rows = embed_pieces(corpus, lessons.said, tokenizer, 32, 0)
    again = embed_pieces(corpus, lessons.said, tokenizer, 32, 0)
    assert all(row.shape == (32,) and np.isfinite(row).all() for row in rows.values())
    assert all(np.array_equal(rows[id_], again[id_]) for id_ in rows)
    used = {id_ for text in corpus.texts for id_ in tokenizer.encode(f"Text: {text}")[1:]}
    assert used <= set(rows)
    vocabulary = tokenizer.get_vocab()
    pairs = [(piece, piece.lower()) for piece in vocabulary if piece != piece.lower()]
    both = [pair for pair in pairs if all(vocabulary.get(piece) in rows for piece in pair)]
    assert both
    for piece, lower in both:
        assert np.array_equal(rows[vocabulary[piece]], rows[vocabulary[lower]])
