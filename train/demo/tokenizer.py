"""A small tokenizer of Llama's kind: BPE over `▁` pieces with byte fallback, so any text fits."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from serving.prompts import IMAGE_TOKEN
from serving.structures import SENTIMENTS, STRUCTURES
from train.demo import chats, sentences

SPECIALS = ("<unk>", "<s>", "</s>")
PAD_TOKEN = "<pad>"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MAX_VOCAB_SIZE = 1280
MAX_LENGTH = 2048
NUM_SENTENCES = 6000

# The chat template of the published llava-1.5 checkpoints: `USER: <image>\n{text} ASSISTANT:`.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_tokenizer(seed: int) -> LlamaTokenizer:
    """A tokenizer for the demo's texts, prompts and answers."""
    return learn_tokenizer(_corpus(seed), MAX_VOCAB_SIZE)


def learn_tokenizer(corpus: Iterable[str], max_vocab_size: int) -> LlamaTokenizer:
    """A tokenizer for the given texts.

    Merges are learned within words, so that ` positive` after `ASSISTANT:` stays one piece
    whatever stands before it, as it does in Llama's.
    """
    learned = Tokenizer(models.BPE(unk_token=SPECIALS[0], byte_fallback=True, fuse_unk=True))
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="removed"),  # stays a byte, as in Llama's
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Split("▁", behavior="merged_with_next"),
            # `Punctuation` would also cut at the special mark of a space.
            pre_tokenizers.Split(Regex(f"[{re.escape(string.punctuation)}]"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size - 2,
        special_tokens=[*SPECIALS, *BYTES],
        initial_alphabet=[*sorted(set(string.printable) - set(string.whitespace)), "▁"],
        show_progress=False,
        min_frequency=2,
    )
    learned.train_from_iterator(corpus, trainer)
    return _as_llama(json.loads(learned.to_str())["model"])


def save_tokenizer(tokenizer: LlamaTokenizer, folder: Path) -> None:
    """Writes the tokenizer and its chat template where every loader looks for them."""
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _as_llama(model: dict) -> LlamaTokenizer:
    vocab = dict(model["vocab"])
    for token in (IMAGE_TOKEN, PAD_TOKEN):
        vocab[token] = len(vocab)
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in model["merges"]],
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=MAX_LENGTH,
        padding_side="left",
        add_bos_token=True,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus(seed: int) -> Iterator[str]:
    """Prompts, answers and texts, in about the amounts in which the model will read them."""
    rng = np.random.default_rng(seed)
    for index in range(NUM_SENTENCES):
        label = SENTIMENTS[index % len(SENTIMENTS)]
        sentence = sentences.write_sentence(label, "train", rng)
        turn = chats.draw_turn(label, sentence, rng)
        yield f"USER: {turn.question} ASSISTANT: {turn.answer}"
    for structure in STRUCTURES.values():
        for labels in structure.answers():
            yield f"USER: {structure.prompt} ASSISTANT: {structure.render(labels)}"
    for captions in chats.CAPTIONS.values():
        yield from captions
