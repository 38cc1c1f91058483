"""Answers under the label constraint, with the server's definition of their probabilities.

Letters: B prompts, S prompt length, E language model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from serving.constraint import Constraint, Node
from serving.scoring import Scores, Unresolved, score, walk
from train.model import Llava


@dataclass(frozen=True)
class Place:
    """Where in a structure a decode stands: below `node` of a field."""

    field: int
    node: Node


@torch.inference_mode()
def decode(model: Llava, prompts: Sequence[Tensor], constraint: Constraint) -> list[Scores]:
    """The greedy answer to each embedded prompt `(S_i, E)`, and each label's probability."""
    start = Place(0, constraint.fields[0].root)
    found = []
    for ids, logprobs in _decode_from(model, prompts, [start] * len(prompts), constraint):
        found.append(score(constraint, ids, logprobs))
    _settle(model, prompts, found, constraint)
    return found


def _settle(
    model: Llava, prompts: Sequence[Tensor], found: Sequence[Scores], constraint: Constraint
) -> None:
    """Further passes for labels that share their first ids off the greedy path."""
    while open_rows := [(row, s.unresolved.pop()) for row, s in enumerate(found) if s.unresolved]:
        longer = [_append(model, prompts[row], part.prefix) for row, part in open_rows]
        places = [Place(part.field, part.node) for _, part in open_rows]
        decoded = _decode_from(model, longer, places, constraint)
        for (row, part), (ids, logprobs) in zip(open_rows, decoded, strict=True):
            _walk(found[row], part, ids, logprobs, constraint)


def _walk(
    scores: Scores,
    part: Unresolved,
    ids: list[int],
    logprobs: list[dict[int, float]],
    constraint: Constraint,
) -> None:
    steps = [{i: math.exp(value) for i, value in step.items()} for step in logprobs]
    name = constraint.fields[part.field].name
    walk(part, ids, steps, found=scores.probabilities[name], unresolved=scores.unresolved)


def _append(model: Llava, prompt: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.cat([prompt, model.embed_ids(torch.tensor(ids, device=prompt.device))])


Decoded = tuple[list[int], list[dict[int, float]]]


def _decode_from(
    model: Llava, prompts: Sequence[Tensor], places: list[Place], constraint: Constraint
) -> list[Decoded]:
    """Greedy ids and renormalised log-probabilities from a place in the structure to its end."""
    at: list[Place | None] = list(places)
    eos = int(model.tokenizer.eos_token_id)
    embeds, mask = pad_left(prompts)
    cache = DynamicCache()
    decoded: list[Decoded] = [([], []) for _ in prompts]
    while any(place is not None for place in at):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        logits = model.llava(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        last = []
        for row, place in enumerate(at):
            if place is None:
                last.append(eos)
                continue
            allowed = allowed_ids(constraint, place, eos)
            logprobs = logits[row, allowed].float().log_softmax(dim=-1).tolist()
            chosen = allowed[max(range(len(allowed)), key=logprobs.__getitem__)]
            decoded[row][0].append(chosen)
            decoded[row][1].append(dict(zip(allowed, logprobs, strict=True)))
            at[row] = _next(constraint, place, chosen)
            last.append(chosen)
        embeds = model.embed_ids(torch.tensor(last, device=embeds.device))[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return decoded


def allowed_ids(constraint: Constraint, place: Place, eos: int) -> list[int]:
    """Ids that may follow: longer labels, and where a label ends here, what comes after it."""
    allowed = list(place.node.children)
    if place.node.label is not None:
        if place.field + 1 < len(constraint.fields):
            allowed += constraint.fields[place.field + 1].root.children
        else:
            allowed.append(constraint.tail[0] if constraint.tail else eos)
    return sorted(allowed)


def _next(constraint: Constraint, place: Place, chosen: int) -> Place | None:
    """The place after an id; None where nothing is open any more."""
    if chosen in place.node.children:
        place = Place(place.field, place.node.children[chosen])
    elif place.field + 1 < len(constraint.fields):
        root = constraint.fields[place.field + 1].root
        place = Place(place.field + 1, root.children[chosen])
    else:
        return None
    is_last = place.field + 1 == len(constraint.fields)
    return None if is_last and len(place.node.labels()) == 1 else place


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks prompts of different lengths, `(B, S, E)`, with the attention mask `(B, S)`."""
    length = max(len(prompt) for prompt in prompts)
    embeds = prompts[0].new_zeros(len(prompts), length, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), length, dtype=torch.long, device=embeds.device)
    for row, prompt in enumerate(prompts):
        embeds[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return embeds, mask
