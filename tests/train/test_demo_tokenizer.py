import pytest

from serving.prompts import encode, encode_answer, render_prompt
from serving.structures import SENTIMENTS, STRUCTURES
from train.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(0)


@pytest.mark.parametrize(
    "text",
    ["a happy day", "Zürich \U0001f600 @x", "a  b\n\tc", "日本語", "{curly} <b> 100% €5", "\u200b"],
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_same_seed_gives_the_same_pieces(tokenizer):
    assert train_tokenizer(0).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_labels_are_single_pieces_after_the_prompt(tokenizer, structure):
    prompt = render_prompt(tokenizer, structure, "a happy day", 1)
    for label in SENTIMENTS:
        answer = structure.render(dict.fromkeys(structure.fields, label))
        pieces = tokenizer.convert_ids_to_tokens(encode_answer(tokenizer, prompt, answer))
        assert pieces == [f"▁{label}"] + [",", f"▁{label}"] * (len(structure.fields) - 1)


def test_a_prompt_is_llavas_and_starts_with_bos(tokenizer):
    prompt = render_prompt(tokenizer, STRUCTURES["sentiment"], "hello", 1)
    assert prompt.startswith("USER: <image>\nText: hello\n")
    assert prompt.endswith(" ASSISTANT:")
    ids = encode(tokenizer, prompt)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
