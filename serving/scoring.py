"""From decoded ids and log-probabilities to labels and their probabilities.

A label's probability is the product of the renormalised probabilities of its canonical ids at each
step, given the labels already answered; per field they sum to 1. The greedy decode yields
them as it goes. Only where labels share a first id is a part of the trie off the greedy path, and
only that part is asked for again (`Unresolved`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.constraint import Constraint, Node


@dataclass(frozen=True, kw_only=True)
class Unresolved:
    """Labels of a field whose order of probability the greedy decode did not see.

    Attributes:
        field: index of the field.
        prefix: ids after the prompt, up to the node the labels share.
        node: their part of the trie.
        probability: of reaching that node, given the fields before.
    """

    field: int
    prefix: tuple[int, ...]
    node: Node
    probability: float


@dataclass
class Scores:
    """Labels of the greedy path, probabilities by field, and what is still open."""

    labels: dict[str, str] = field(default_factory=dict)
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    unresolved: list[Unresolved] = field(default_factory=list)


def score(
    constraint: Constraint, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, float]]
) -> Scores:
    """Walks the greedy decode through the structure's tries.

    Args:
        constraint: what the decode was constrained to.
        token_ids: decoded ids; may stop where the last label is already known.
        logprobs: per step, allowed id to log-probability, renormalised over the allowed.
    """
    scores = Scores()
    step = 0
    for index, tokens in enumerate(constraint.fields):
        found: dict[str, float] = dict.fromkeys(tokens.segments, 0.0)
        label, step = walk(
            tokens.root,
            token_ids,
            logprobs,
            step,
            start=Unresolved(
                field=index, prefix=tuple(token_ids[:step]), node=tokens.root, probability=1.0
            ),
            found=found,
            unresolved=scores.unresolved,
        )
        scores.labels[tokens.name] = label
        scores.probabilities[tokens.name] = found
    return scores


def walk(
    node: Node,
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, float]],
    step: int,
    *,
    start: Unresolved,
    found: dict[str, float],
    unresolved: list[Unresolved],
) -> tuple[str, int]:
    """Follows decoded ids below a node; fills `found`, and `unresolved` with what branched off.

    Returns:
        The label on the path, and the step after it.
    """
    probability, prefix = start.probability, list(start.prefix)
    while len(node.labels()) > 1:
        steps = {i: math.exp(value) for i, value in logprobs[step].items()}
        chosen = token_ids[step]
        ended = node.label is not None and chosen not in node.children
        for token_id, child in node.children.items():
            if token_id == chosen:
                continue
            share = probability * steps.get(token_id, 0.0)
            _settle(child, share, (*prefix, token_id), start.field, found, unresolved)
        if node.label is not None:
            others = sum(steps.get(token_id, 0.0) for token_id in node.children)
            found[node.label] = probability * max(0.0, 1.0 - others)
        if ended:
            assert node.label is not None
            return node.label, step
        probability *= steps[chosen]
        prefix.append(chosen)
        node, step = node.children[chosen], step + 1
    (label,) = node.labels()
    found[label] = probability
    return label, step + _depth(node)


def _settle(
    node: Node,
    probability: float,
    prefix: tuple[int, ...],
    index: int,
    found: dict[str, float],
    unresolved: list[Unresolved],
) -> None:
    """A branch off the path: one label has all of its probability, several are open."""
    labels = node.labels()
    if len(labels) == 1:
        found[labels[0]] = probability
    else:
        unresolved.append(
            Unresolved(field=index, prefix=prefix, node=node, probability=probability)
        )


def _depth(node: Node) -> int:
    """Steps left to the end of the only label below a node."""
    return 1 + _depth(next(iter(node.children.values()))) if node.children else 0
