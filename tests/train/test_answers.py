import torch

from train.answers import next_tokens, pad_left
from train.demo.examples import IGNORED, Example, collate

ANSWERS = {(5, 1, 6): {"a": "x"}, (5, 1, 7): {"a": "y"}, (8, 1, 6): {"a": "z"}}


def test_only_tokens_of_an_allowed_answer_may_follow():
    assert next_tokens(ANSWERS, ()) == [5, 8]
    assert next_tokens(ANSWERS, (5,)) == [1]
    assert next_tokens(ANSWERS, (5, 1)) == [6, 7]
    assert next_tokens(ANSWERS, (8, 1)) == [6]


def test_padding_stands_on_the_left_and_is_masked():
    embeds, mask = pad_left([torch.ones(2, 3), torch.ones(4, 3)])
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert embeds.sum(dim=-1).tolist() == [[0, 0, 3, 3], [3, 3, 3, 3]]


def test_targets_are_the_answer_and_its_end_and_nothing_else():
    short = Example(prompt_ids=[1, 4], answer_ids=[7, 2], picture=None)
    long = Example(prompt_ids=[1, 9, 4], answer_ids=[8, 2], picture=5)
    ids, targets, pictures = collate([short, long], image_token_id=9, pad_token_id=0)
    assert ids.shape == (2, 1 + 64 + 1 + 2)
    assert targets[0][targets[0] != IGNORED].tolist() == [7, 2]
    assert targets[0, 1:3].tolist() == [7, 2]
    assert targets[1, 65:67].tolist() == [8, 2]
    assert int((targets != IGNORED).sum()) == 4
    assert (ids[1] == 9).sum() == 64
    assert pictures.tolist() == [5]
