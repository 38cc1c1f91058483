"""LLaVA's conversation JSON: a list of `{"id", "image", "conversations": [...]}`.

Published with https://github.com/haotian-liu/LLaVA (docs/Finetune_Custom_Data.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import ijson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import ConfigError
from serving.posts.places import Place
from serving.posts.post import Post
from serving.posts.reader import Found, Posts, Reading, RowError, told_id
from serving.structures import LabelStructure

_IMAGE = "<image>"


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    speaker: Literal["human", "gpt", "system"] = Field(alias="from")
    value: str


class Conversation(BaseModel):
    """An entry of the list; published files have further keys, such as `model`, without a use."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | int | None = None
    image: str | list[str] | None = None
    conversations: list[Turn]

    @property
    def images(self) -> list[str]:
        """Paths of the images."""
        return [self.image] if isinstance(self.image, str) else self.image or []

    def first(self, speaker: str) -> str | None:
        """What that speaker says first."""
        return next((turn.value for turn in self.conversations if turn.speaker == speaker), None)


class LlavaPosts(Posts):
    """A post a conversation: its first question is the text, its first answer the labels.

    The file is streamed, not loaded. Image paths are relative to it. An entry without id is
    called by its place in the list, from 1. A question that is the structure's own prompt counts
    as the text in it; an answer that the structure does not parse is the label `answer`.
    """

    description = "a .json file, LLaVA's list of objects with image and conversations"

    def __init__(self, source: Place, reading: Reading) -> None:
        super().__init__(source, reading)
        try:
            with source.open("rb") as file:
                start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        except OSError as error:
            raise ConfigError(f"{source.name} cannot be read: {error.strerror}") from error
        if not start.startswith(b"["):
            raise ConfigError(
                f"{source.name} starts with {start[:20].decode(errors='replace')!r}, expected a "
                "JSON list of objects with image and conversations; name a file with an object a "
                "line .jsonl",
                param="data",
            )

    @staticmethod
    def matches(source: Place) -> bool:
        """Whether the source has this layout."""
        return source.is_file() and source.suffix.lower() == ".json"

    def _found(self) -> Iterator[Found]:
        for number, entry in enumerate(self._listed(), start=1):
            where = f"entry {number}"
            try:
                yield where, self._post(number, _conversation(entry))
            except RowError as error:
                yield where, self._unreadable(where, error, told_id(entry))

    def _listed(self) -> Iterator[object]:
        number = 0
        with self.source.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            try:
                for number, entry in enumerate(ijson.items(file, "item", use_float=True), start=1):  # noqa: B007
                    yield entry
            except ijson.JSONError as error:
                reason = " ".join(str(error).split())
                raise self._fault(f"entry {number + 1}", f"is not JSON: {reason:.200}") from error

    def _post(self, number: int, conversation: Conversation) -> Post:
        question = conversation.first("human")
        if question is None:
            raise RowError("no turn is from 'human', so there is no text")
        images = conversation.images
        if question.count(_IMAGE) not in (0, len(images)):
            raise RowError(f"{question.count(_IMAGE)} times {_IMAGE} and {len(images)} images")
        structure = self.reading.structure
        text = re.sub(rf"(\s*{_IMAGE})+\s*", "\n", question).strip()
        return Post(
            id=str(number if conversation.id is None else conversation.id),
            text=_asked(structure, text),
            images=tuple(self._image(image) for image in images),
            labels=_labels(structure, conversation.first("gpt")),
        )


def _conversation(entry: object) -> Conversation:
    try:
        return Conversation.model_validate(entry)
    except ValidationError as error:
        raise RowError(_explain(error)) from error


def _asked(structure: LabelStructure | None, question: str) -> str:
    """The post's text in a question that is the structure's prompt, else the question."""
    if structure is None:
        return question
    before, _, after = structure.prompt.partition("{text}")
    if question.startswith(before) and question.endswith(after):
        return question[len(before) : len(question) - len(after)].strip()
    return question


def _labels(structure: LabelStructure | None, answer: str | None) -> dict[str, str]:
    if answer is None:
        return {}
    parsed = structure.parse(answer) if structure is not None else None
    return parsed or {"answer": answer.strip()}


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field or 'entry'}={first['input']!r:.80}: {first['msg']}"
