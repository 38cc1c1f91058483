"""Answers under the label constraint: at each step only tokens of an allowed answer count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from serving.prompts import encode_answer, render_chat
from serving.structures import LabelStructure

Answers = dict[tuple[int, ...], dict[str, str]]


def allowed_answers(tokenizer: Any, structure: LabelStructure) -> Answers:
    """Canonical token ids of every allowed answer, to its labels."""
    prompt = render_chat(tokenizer, structure.prompt, 0)
    return {
        tuple(encode_answer(tokenizer, prompt, structure.render(labels))): labels
        for labels in structure.answers()
    }


@torch.inference_mode()
def decode(llava: Any, prompts: Sequence[Tensor], answers: Answers) -> list[dict[str, str]]:
    """The greedy answer to each prompt, in the order of the fields.

    Args:
        llava: a `LlavaForConditionalGeneration`.
        prompts: embedded prompts `(S_i, E)`; they may differ in length.
        answers: from `allowed_answers`.
    """
    embeds, mask = pad_left(prompts)
    cache = DynamicCache()
    prefixes: list[tuple[int, ...]] = [()] * len(prompts)
    while True:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        logits = llava(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        prefixes = [
            prefix if prefix in answers else (*prefix, _best(row, next_tokens(answers, prefix)))
            for prefix, row in zip(prefixes, logits, strict=True)
        ]
        if all(prefix in answers for prefix in prefixes):
            return [answers[prefix] for prefix in prefixes]
        embeds = llava.get_input_embeddings()(torch.tensor([p[-1] for p in prefixes]))[:, None]
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)


def next_tokens(answers: Answers, prefix: tuple[int, ...]) -> list[int]:
    """Tokens that some allowed answer has after `prefix`."""
    length = len(prefix)
    return sorted({ids[length] for ids in answers if ids[:length] == prefix and len(ids) > length})


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks prompts of different lengths, `(B, S, E)`, with the attention mask `(B, S)`."""
    length = max(len(prompt) for prompt in prompts)
    embeds = prompts[0].new_zeros(len(prompts), length, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        embeds[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return embeds, mask


def _best(logits: Tensor, allowed: list[int]) -> int:
    return allowed[int(logits[allowed].argmax())]
