"""The same text in training and serving; special tokens in posts are text."""

import os
from pathlib import Path

import pytest
from transformers import LlamaTokenizer

from serving.constraint import compile_structure
from serving.prompts import as_plain_text, encode, encode_answer, render_chat, render_prompt
from serving.structures import STRUCTURES
from tests.checkpoints import CHAT_TEMPLATE

SHARED_TOKENIZER = Path(
    os.environ.get("SIEVE_LLAMA_TOKENIZER", Path(__file__).parents[3] / "shared/llama_tokenizer")
)


@pytest.fixture(params=["published", "demo", "llama"])
def tokenizer(request):
    if request.param != "llama":
        return request.getfixturevalue(f"{request.param}_tokenizer")
    if not (SHARED_TOKENIZER / "tokenizer.model").exists():
        pytest.skip("no Llama tokenizer here (SIEVE_LLAMA_TOKENIZER)")
    tokenizer = LlamaTokenizer.from_pretrained(SHARED_TOKENIZER, add_bos_token=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_canonical_ids_are_those_of_prompt_and_answer_after_the_prompt(tokenizer, structure):
    prompt = render_prompt(tokenizer, structure, "a day: great!", 1)
    for labels in structure.answers():
        answer = structure.render(labels)
        ids = encode_answer(tokenizer, prompt, answer)
        assert encode(tokenizer, prompt) + ids == tokenizer.encode(f"{prompt} {answer}")
        assert tokenizer.decode(ids).strip() == answer


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_a_compiled_structure_spells_every_answer_canonically(tokenizer, structure):
    prompt = render_chat(tokenizer, "", 0)
    constraint = compile_structure(structure, lambda a: encode_answer(tokenizer, prompt, a))
    longer = render_prompt(tokenizer, structure, "another post entirely", 2)
    for labels in structure.answers():
        expected = encode_answer(tokenizer, longer, structure.render(labels))
        assert constraint.answer_ids(labels) == expected


def test_a_prompt_has_one_bos_and_one_id_an_image(tokenizer):
    ids = encode(tokenizer, render_prompt(tokenizer, STRUCTURES["sentiment"], "hello", 3))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 3


@pytest.mark.parametrize(
    "text", ["<image>", "a</s>b", "<s><s>", "<unk>", "<<image>>", "<image><image> </s>"]
)
def test_special_tokens_in_a_post_are_text(tokenizer, text):
    plain = encode(tokenizer, render_prompt(tokenizer, STRUCTURES["sentiment"], text, 1))
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.unk_token_id}
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert plain.count(image) == 1
    assert sum(i in special for i in plain if i != image) == 0
    assert plain.count(tokenizer.bos_token_id) == 1


def test_ordinary_text_is_untouched(tokenizer):
    text = "I <3 this & that < > #tag @you 100% ünïcode 🎉"
    assert as_plain_text(tokenizer, text) == text
