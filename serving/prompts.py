"""Texts that the model reads, the same in training and in serving.

A prompt is the checkpoint's chat template around one user turn. An answer is what follows the
prompt after one space, and its token ids are those that training used: the ids of
`prompt + " " + answer` after the ids of `prompt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from serving.structures import LabelStructure

IMAGE_TOKEN = "<image>"
_BREAK = "\u200b"  # zero-width space


def render_prompt(tokenizer: Any, structure: LabelStructure, text: str, num_images: int) -> str:
    """The prompt of one post, ending where the answer starts (`... ASSISTANT:`)."""
    turn = structure.prompt.replace("{text}", as_plain_text(tokenizer, text))
    return render_chat(tokenizer, turn, num_images)


def render_chat(tokenizer: Any, turn: str, num_images: int) -> str:
    """The checkpoint's chat template around one user turn with its images."""
    content: list[dict[str, str]] = [{"type": "image"}] * num_images
    content.append({"type": "text", "text": turn})
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return str(rendered)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a rendered prompt, with the BOS the tokenizer adds; one id an image."""
    if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        return list(tokenizer.encode(prompt, add_special_tokens=False))
    return list(tokenizer.encode(prompt))


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Canonical token ids of an answer: those after the prompt's, without the end token.

    Raises:
        ValueError: the answer's first characters change the prompt's own ids, so training on
            that template would not see the prompt that serving sends.
    """
    before, whole = encode(tokenizer, prompt), encode(tokenizer, f"{prompt} {answer}")
    if whole[: len(before)] != before:
        raise ValueError(
            f"the answer {answer!r} merges with the end of the prompt {prompt[-20:]!r}; "
            "end the chat template's generation prompt with punctuation such as 'ASSISTANT:'"
        )
    return whole[len(before) :]


def as_plain_text(tokenizer: Any, text: str) -> str:
    """User text in which no special token of the tokenizer is spelled.

    A post that says `<image>` or `</s>` means these characters. A zero-width space after their
    first character makes the tokenizer read them as text.
    """
    return _special_pattern(tokenizer).sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    cached = getattr(tokenizer, "_sieve_special_pattern", None)
    if cached is None:
        cached = _any_of({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), IMAGE_TOKEN})
        tokenizer._sieve_special_pattern = cached
    return cached


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(re.escape(string) for string in longest_first))
