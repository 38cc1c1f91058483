"""A label structure in token ids: what decoding may emit, and how many steps it takes.

Each field contributes one segment a label: the ids from the end of the field before it to the
label's end, the literal between them included (`, neutral` is two ids under Llama's tokenizer). A
segment belongs to one field alone, so a structure of many fields stays as small as the sum of its
labels. That this holds for the tokenizer at hand is checked at start, not assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from outlines.types import either
from outlines.types.dsl import Sequence as TermSequence
from outlines.types.dsl import String, Term, to_regex

from patches.canonical import spell
from serving.errors import ConfigError
from serving.structures import LabelStructure

Encoder = Callable[[str], list[int]]
"""From an answer's text to its canonical ids (those training used)."""


@dataclass(frozen=True)
class Node:
    """A step inside a field: which ids may follow, and which label ends here."""

    children: Mapping[int, Node]
    label: str | None

    def labels(self) -> list[str]:
        """Labels at or below this node."""
        own = [self.label] if self.label is not None else []
        return own + [name for child in self.children.values() for name in child.labels()]


@dataclass(frozen=True, kw_only=True)
class FieldTokens:
    """One field's labels as token ids.

    Attributes:
        name: the field.
        segments: label to its ids, the literal before it included.
    """

    name: str
    segments: Mapping[str, tuple[int, ...]]

    @cached_property
    def root(self) -> Node:
        """The segments as a trie."""
        return _trie([(ids, label) for label, ids in self.segments.items()])

    @property
    def term(self) -> Term:
        """The field as an Outlines type over spelled ids."""
        return _any_of(self.segments.values())


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A structure compiled for one tokenizer.

    Attributes:
        structure: what it was compiled from.
        fields: the fields in answer order.
        tail: ids of the literal after the last label, usually none.
    """

    structure: LabelStructure
    fields: tuple[FieldTokens, ...]
    tail: tuple[int, ...]

    @cached_property
    def pattern(self) -> str:
        """The regular expression for vLLM (see `patches.canonical`)."""
        terms = [field.term for field in self.fields]
        return to_regex(TermSequence([*terms, *([String(spell(self.tail))] if self.tail else [])]))

    def pattern_below(self, field: int, node: Node) -> str:
        """The pattern after a prefix that ended at `node` of a field: the rest of the answer."""
        rest = [other.term for other in self.fields[field + 1 :]]
        tail = [String(spell(self.tail))] if self.tail else []
        return to_regex(TermSequence([_any_of(_paths(node)), *rest, *tail]))

    @cached_property
    def num_steps(self) -> int:
        """Decoding steps after which every answer is known; the end token is not among them.

        Stopping at the last label's first unambiguous id saves the tail, the end token and the
        rest of that label; every saved step is a whole pass of the model.
        """
        before = sum(max(map(len, field.segments.values())) for field in self.fields[:-1])
        return before + decisive_depth(self.fields[-1].root)

    @cached_property
    def num_logprobs(self) -> int:
        """Most ids that may follow at any step.

        After a label that longer labels start with, these and the next field's may follow.
        """
        widths = [_max_width(field.root) for field in self.fields]
        return max(map(sum, itertools.pairwise([*widths, 1])))

    def answer_ids(self, labels: Mapping[str, str]) -> list[int]:
        """Canonical ids of one answer, without the end token."""
        ids = [i for field in self.fields for i in field.segments[labels[field.name]]]
        return [*ids, *self.tail]


def pattern_of(sequences: Iterable[Sequence[int]]) -> str:
    """A pattern that admits exactly these id sequences."""
    return to_regex(_any_of(sequences))


def _any_of(sequences: Iterable[Sequence[int]]) -> Term:
    """One of these sequences, longer ones first.

    Outlines' matching is leftmost-first: in `(bad|bad day)` the second is never reached.
    """
    spelled = [spell(ids) for ids in sorted(sequences, key=len, reverse=True)]
    return either(*spelled) if len(spelled) > 1 else String(spelled[0])


def compile_structure(structure: LabelStructure, encode_answer: Encoder) -> Constraint:
    """Finds the segments of a structure under a tokenizer and checks that they compose.

    Args:
        structure: what to compile.
        encode_answer: canonical ids of an answer's text under the checkpoint's prompt.

    Raises:
        ConfigError: labels do not end on token boundaries there.
    """
    first = {name: labels[0] for name, labels in structure.fields.items()}
    fields, start = [], 0
    names = list(structure.fields)
    for name, labels in structure.fields.items():
        segments = {
            label: _segment(structure, encode_answer, {**first, name: label}, name, start)
            for label in labels
        }
        if len(set(segments.values())) < len(segments):
            raise ConfigError(f"{structure.name}.{name}: two labels have the same tokens")
        fields.append(FieldTokens(name=name, segments=segments))
        start += len(segments[first[name]])
    tail = tuple(encode_answer(structure.render(first))[start:])
    constraint = Constraint(structure=structure, fields=tuple(fields), tail=tail)
    _check_neighbours(constraint, encode_answer, first, names)
    _check_ends(constraint)
    return constraint


def _segment(
    structure: LabelStructure, encode: Encoder, labels: Mapping[str, str], name: str, start: int
) -> tuple[int, ...]:
    """Ids of one field's label, from `start` to the label's end."""
    whole = encode(structure.render(labels))
    upto = encode(structure.render_until(labels, name))
    if whole[: len(upto)] != upto:
        raise ConfigError(
            f"{structure.name}.{name}={labels[name]!r} does not end on a token boundary in "
            f"{structure.render(labels)!r}; separate fields by punctuation and a space"
        )
    return tuple(upto[start:])


def _check_neighbours(
    constraint: Constraint, encode: Encoder, first: Mapping[str, str], names: list[str]
) -> None:
    """A label's ids must not depend on its neighbour's label."""
    structure = constraint.structure
    for left, right in itertools.pairwise(names):
        for one in structure.fields[left]:
            for other in structure.fields[right]:
                labels = {**first, left: one, right: other}
                if constraint.answer_ids(labels) != encode(structure.render(labels)):
                    raise ConfigError(
                        f"{structure.name}: the tokens of {right}={other!r} depend on "
                        f"{left}={one!r}; separate fields by punctuation and a space"
                    )


def _check_ends(constraint: Constraint) -> None:
    """After a label, the next field's first id must not also continue a longer label."""
    for field, following in itertools.pairwise(constraint.fields):
        for label, longer in _longer_labels(field.root):
            if longer & following.root.children.keys():
                raise ConfigError(
                    f"{constraint.structure.name}.{field.name}={label!r} cannot be told from a "
                    "longer label followed by the next field; separate fields by other punctuation"
                )


def _longer_labels(node: Node) -> Iterator[tuple[str, set[int]]]:
    """Labels that longer ones start with, and the ids these go on with."""
    if node.label is not None and node.children:
        yield node.label, set(node.children)
    for child in node.children.values():
        yield from _longer_labels(child)


def _trie(sequences: list[tuple[tuple[int, ...], str]]) -> Node:
    groups: dict[int, list[tuple[tuple[int, ...], str]]] = {}
    label = None
    for ids, name in sequences:
        if ids:
            groups.setdefault(ids[0], []).append((ids[1:], name))
        else:
            label = name
    return Node({first: _trie(rest) for first, rest in groups.items()}, label)


def decisive_depth(node: Node) -> int:
    """Steps from a node after which the label is known whatever was decoded."""
    if len(node.labels()) == 1:
        return 0
    ends_here = 1 if node.label is not None else 0  # one step tells the end from a longer label
    return max([ends_here, *(1 + decisive_depth(child) for child in node.children.values())])


def _paths(node: Node, prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Ids from a node to each label at or below it."""
    own = [prefix] if node.label is not None else []
    below = [
        path
        for token_id, child in node.children.items()
        for path in _paths(child, (*prefix, token_id))
    ]
    return own + below


def _max_width(node: Node) -> int:
    return max([len(node.children), *(_max_width(child) for child in node.children.values())])
