"""Label structures: which fields an answer has, which labels each allows, and how it is spelled.

A structure is a value. Training renders its answers from it, the server constrains decoding to
it, evaluation parses with it; nobody else knows how an answer looks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from string import Formatter

import yaml
from outlines.types import either
from outlines.types.dsl import Sequence, String, Term, to_regex
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serving.errors import BadRequestError, ConfigError

SENTIMENTS = ("positive", "neutral", "negative")
MAX_LABELS = 128


class LabelStructure(BaseModel):
    """Named fields with allowed labels, the prompt that asks for them and the answer's form.

    Attributes:
        name: how requests and manifests call it.
        fields: field name to allowed labels, in answer order.
        prompt: the user's turn; `{text}` is the post's text.
        answer: the answer's form, e.g. `{image}, {text}, {multimodal}`; by default the fields in
            order, joined by a comma and a space.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fields: Mapping[str, tuple[str, ...]]
    prompt: str
    answer: str = ""

    @model_validator(mode="before")
    @classmethod
    def _default_answer(cls, values: object) -> object:
        if isinstance(values, dict) and not values.get("answer"):
            names = values.get("fields")
            if isinstance(names, Mapping):
                form = ", ".join(f"{{{field}}}" for field in names)
                return {**values, "answer": form}
        return values

    @model_validator(mode="after")
    def _check(self) -> LabelStructure:
        if not self.fields:
            raise ValueError("a label structure needs at least one field")
        for field, labels in self.fields.items():
            _check_field(field, labels)
        named = [name for _, name, _, _ in Formatter().parse(self.answer) if name is not None]
        if named != list(self.fields):
            raise ValueError(
                f"answer {self.answer!r} must name the fields {list(self.fields)} once each, "
                "in their order"
            )
        if any(not between for between in self._literals[1:-1]):
            raise ValueError(f"answer {self.answer!r} needs something between two fields")
        if "{text}" not in self.prompt:
            raise ValueError("the prompt must hold {text}, where the post's text goes")
        return self

    @cached_property
    def _literals(self) -> tuple[str, ...]:
        """Fixed text before the first field, between fields, and after the last one."""
        parts = list(Formatter().parse(self.answer))
        literals = [literal for literal, name, _, _ in parts if name is not None]
        trailing = "" if parts[-1][1] is not None else parts[-1][0]
        return (*literals, trailing)

    @cached_property
    def output_type(self) -> Term:
        """The structure as an Outlines type over characters."""
        terms: list[Term] = []
        for literal, labels in zip(self._literals, self.fields.values(), strict=False):
            terms += [String(literal)] if literal else []
            terms.append(either(*labels) if len(labels) > 1 else String(labels[0]))
        terms += [String(self._literals[-1])] if self._literals[-1] else []
        return Sequence(terms)

    @property
    def num_answers(self) -> int:
        """How many answers the structure allows."""
        return math.prod(len(labels) for labels in self.fields.values())

    def answers(self) -> Iterator[dict[str, str]]:
        """Every allowed answer, as field to label."""
        for labels in itertools.product(*self.fields.values()):
            yield dict(zip(self.fields, labels, strict=True))

    def render(self, labels: Mapping[str, str]) -> str:
        """The answer's text for one label a field.

        Raises:
            ConfigError: a field is missing, or a label is not allowed.
        """
        for field, allowed in self.fields.items():
            if labels.get(field) not in allowed:
                raise ConfigError(
                    f"{self.name}.{field}={labels.get(field)!r} is not one of {list(allowed)}"
                )
        return self.answer.format(**labels)

    def render_until(self, labels: Mapping[str, str], last: str) -> str:
        """The answer's text up to and including the label of field `last`."""
        text = ""
        for literal, field in zip(self._literals, self.fields, strict=False):
            text += literal + labels[field]
            if field == last:
                return text
        raise AssertionError(f"{last!r} is not a field of {self.name!r}")

    def parse(self, answer: str) -> dict[str, str] | None:
        """Labels of an answer's text, or None where it is not an allowed answer."""
        pattern = re.escape(self._literals[0])
        for (field, labels), literal in zip(self.fields.items(), self._literals[1:], strict=True):
            choices = "|".join(re.escape(label) for label in labels)
            pattern += f"(?P<{field}>{choices}){re.escape(literal)}"
        match = re.fullmatch(pattern, answer.strip())
        return match.groupdict() if match else None

    @cached_property
    def regex(self) -> str:
        """The regular expression of `output_type`, for clients that want to check answers."""
        return to_regex(self.output_type)


def _check_field(field: str, labels: tuple[str, ...]) -> None:
    if not field.isidentifier():
        raise ValueError(f"field name {field!r} must be letters, digits and underscores")
    if not labels or len(labels) > MAX_LABELS:
        raise ValueError(f"field {field!r} has {len(labels)} labels, allowed are 1 to {MAX_LABELS}")
    if len(set(labels)) != len(labels):
        raise ValueError(f"field {field!r} names a label twice: {list(labels)}")
    for label in labels:
        if not label or label != label.strip():
            raise ValueError(f"label {label!r} of {field!r} is empty or has space around it")


STRUCTURES: dict[str, LabelStructure] = {
    # One label for the whole post.
    "sentiment": LabelStructure(
        name="sentiment",
        fields={"sentiment": SENTIMENTS},
        prompt="Text: {text}\nIs the sentiment of this post positive, neutral or negative?",
    ),
    # One label towards an aspect, which the text names in its last line: `Aspect: ...`.
    "aspect": LabelStructure(
        name="aspect",
        fields={"sentiment": SENTIMENTS},
        prompt=(
            "Text: {text}\nIs the sentiment of this post towards the aspect positive, neutral or "
            "negative?"
        ),
    ),
    # LLaVAC: image, text and post in one answer.
    "llavac": LabelStructure(
        name="llavac",
        fields={"image": SENTIMENTS, "text": SENTIMENTS, "multimodal": SENTIMENTS},
        prompt=(
            "Text: {text}\nWhat is the sentiment of the image, of the text, and of both "
            "together: positive, neutral or negative?"
        ),
    ),
    # LLaVAC's control: the post's label alone, under the name that `llavac` has for it.
    "multimodal": LabelStructure(
        name="multimodal",
        fields={"multimodal": SENTIMENTS},
        prompt=(
            "Text: {text}\nIs the sentiment of image and text together positive, neutral or "
            "negative?"
        ),
    ),
}


def load_structures(path: Path) -> dict[str, LabelStructure]:
    """Structures of a YAML file: a mapping of name to fields, prompt and answer form.

    Raises:
        ConfigError: the file is not such a mapping; says what is wrong and where.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"label structures {path}: {error}", param="structures") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"label structures {path}: expected a mapping of name to structure")
    return {str(name): make_structure(str(name), entry) for name, entry in entries.items()}


def make_structure(name: str, entry: object) -> LabelStructure:
    """A structure from parsed YAML or JSON.

    Raises:
        ConfigError: it does not describe a structure.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"label structure {name!r}: expected fields and a prompt, got {entry!r}")
    try:
        return LabelStructure.model_validate({**entry, "name": name})
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}".lstrip(": ")
            for item in error.errors(include_url=False)
        )
        raise ConfigError(f"label structure {name!r}: {reasons}", param="structures") from error


def find_structure(structures: Mapping[str, LabelStructure], name: str) -> LabelStructure:
    """The structure of that name.

    Raises:
        BadRequestError: there is none; names those there are.
    """
    if name not in structures:
        raise BadRequestError(
            f"label_structure={name[:80]!r} is unknown; allowed are {sorted(structures)}",
            param="label_structure",
        )
    return structures[name]
