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


def confidence_of(probabilities: Mapping[str, Mapping[str, float]]) -> float:
    """How sure an answer is: the smallest of its fields' winning probabilities."""
    return min(max(shares.values()) for shares in probabilities.values())


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
    step, also_allowed = 0, frozenset[int]()
    for index, tokens in enumerate(constraint.fields):
        start = Unresolved(
            field=index, prefix=tuple(token_ids[:step]), node=tokens.root, probability=1.0
        )
        path = _renormalised(logprobs, step, also_allowed)
        found: dict[str, float] = dict.fromkeys(tokens.segments, 0.0)
        end = walk(start, token_ids[step:], path, found=found, unresolved=scores.unresolved)
        scores.labels[tokens.name] = end.label
        scores.probabilities[tokens.name] = found
        step, also_allowed = step + end.num_steps, end.also_allowed
    return scores


def _renormalised(
    logprobs: Sequence[Mapping[int, float]], step: int, also_allowed: frozenset[int]
) -> list[dict[int, float]]:
    """Steps from one on, as probabilities.

    Where the field before ended on a label that longer labels start with, its longer labels were
    still allowed at this field's first step; given that it ended, they are not.
    """
    steps = [{i: math.exp(value) for i, value in entry.items()} for entry in logprobs[step:]]
    if steps and also_allowed:
        rest = {i: value for i, value in steps[0].items() if i not in also_allowed}
        total = sum(rest.values())
        steps[0] = {i: value / total for i, value in rest.items()}
    return steps


@dataclass(frozen=True)
class PathEnd:
    """Where a walk ended.

    Attributes:
        label: the label on the path.
        num_steps: ids from the start to the label's end.
        also_allowed: ids of longer labels that were allowed at the step after it.
    """

    label: str
    num_steps: int
    also_allowed: frozenset[int]


def walk(
    start: Unresolved,
    token_ids: Sequence[int],
    steps: Sequence[Mapping[int, float]],
    *,
    found: dict[str, float],
    unresolved: list[Unresolved],
) -> PathEnd:
    """Follows decoded ids below a node; fills `found`, and `unresolved` with what branched off.

    Args:
        start: the node, the ids before it, and the probability of reaching it.
        token_ids: ids decoded from there on.
        steps: per id, allowed id to probability.
        found: label to probability, filled in.
        unresolved: parts of the trie whose labels the path did not tell apart, added to.
    """
    node, probability, prefix = start.node, start.probability, list(start.prefix)
    depth = 0
    while len(node.labels()) > 1:
        step, chosen = steps[depth], token_ids[depth]
        for token_id, child in node.children.items():
            if token_id != chosen:
                share = probability * step.get(token_id, 0.0)
                _settle(child, share, (*prefix, token_id), start.field, found, unresolved)
        if node.label is not None:
            longer = sum(step.get(token_id, 0.0) for token_id in node.children)
            found[node.label] = probability * max(0.0, 1.0 - longer)
        if chosen not in node.children:
            assert node.label is not None
            return PathEnd(node.label, depth, frozenset(node.children))
        probability *= step[chosen]
        prefix.append(chosen)
        node, depth = node.children[chosen], depth + 1
    (label,) = node.labels()
    found[label] = probability
    return PathEnd(label, depth + _depth(node), frozenset())


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
