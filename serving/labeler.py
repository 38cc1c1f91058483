"""The story of one labelled post: prompt, decode, score."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from patches.config import Retention
from serving.adapters import InstalledAdapter
from serving.constraint import Constraint, compile_structure, decisive_depth
from serving.errors import BadRequestError, ConfigError, UnknownModelError
from serving.manifest import Manifest
from serving.prompts import encode, encode_answer, render_chat, render_prompt
from serving.protocol import Engine, Generated, Generation
from serving.scoring import Scores, score, walk
from serving.structures import LabelStructure, find_structure


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a request chose; None where it left the choice to the adapter or the server."""

    model: str | None = None
    label_structure: str | None = None
    retention_ratio: float | None = None
    selector: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The settings of one request after precedence: request, then manifest, then server."""

    model: str
    adapter: str | None
    structure: str
    retention: Retention


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """A labelled post and what it cost."""

    settings: Resolved
    scores: Scores
    num_images: int
    generated: Generated
    num_passes: int
    total_ms: float


class Catalogue:
    """Models, adapters and label structures of a server, and the precedence among settings.

    Args:
        base: the base model's name.
        adapters: installed adapters by name.
        structures: label structures by name; adapters' own are added.
        structure: the server's default structure.
        retention: the server's default retention.

    Raises:
        ConfigError: a default or a manifest names a structure that does not exist, or two
            different structures have one name.
    """

    def __init__(
        self,
        *,
        base: str,
        adapters: Mapping[str, InstalledAdapter],
        structures: Mapping[str, LabelStructure],
        structure: str,
        retention: Retention,
    ) -> None:
        self.base, self.adapters = base, dict(adapters)
        self.structures = dict(structures)
        self.default_structure, self.default_retention = structure, retention
        if base in self.adapters:
            raise ConfigError(f"adapter {base!r} has the base model's name; rename its folder")
        for name, installed in self.adapters.items():
            self._check_manifest(name, installed.manifest)
        if structure not in self.structures:
            raise ConfigError(
                f"label_structure={structure!r} is unknown; allowed are {sorted(self.structures)}"
            )

    def _check_manifest(self, name: str, manifest: Manifest) -> None:
        own = manifest.label_structure
        if isinstance(own, LabelStructure):
            if self.structures.setdefault(own.name, own) != own:
                raise ConfigError(
                    f"adapter {name!r} defines label structure {own.name!r} differently; rename it"
                )
        elif own is not None and own not in self.structures:
            raise ConfigError(f"adapter {name!r} needs label structure {own!r}; see --structures")
        try:
            self._retention(Choices(), manifest)
        except BadRequestError as error:
            raise ConfigError(f"adapter {name!r}: {error.message}") from error

    def resolve(self, choices: Choices) -> Resolved:
        """Settings of a request.

        Raises:
            UnknownModelError: no such model.
            BadRequestError: no such structure or selector, or a ratio outside (0, 1].
        """
        model = choices.model if choices.model is not None else self.base
        adapter = self.adapters.get(model)
        if adapter is None and model != self.base:
            raise UnknownModelError(
                f"model={model[:80]!r} does not exist; served are "
                f"{[self.base, *sorted(self.adapters)]}",
                param="model",
            )
        manifest = adapter.manifest if adapter else Manifest()
        structure = find_structure(
            self.structures,
            choices.label_structure or manifest.structure_name or self.default_structure,
        )
        return Resolved(
            model=model,
            adapter=model if adapter else None,
            structure=structure.name,
            retention=self._retention(choices, manifest),
        )

    def _retention(self, choices: Choices, manifest: Manifest) -> Retention:
        ratios = (choices.retention_ratio, manifest.retention_ratio, self.default_retention.ratio)
        selectors = (choices.selector, manifest.selector, self.default_retention.selector)
        try:
            return Retention(
                ratio=next(ratio for ratio in ratios if ratio is not None),
                selector=next(selector for selector in selectors if selector is not None),
            )
        except ValueError as error:
            param = str(error).split("=", 1)[0]
            raise BadRequestError(str(error), param=param) from error


class Labeler:
    """Labels posts through an engine.

    Args:
        engine: where the model is.
        catalogue: what may be asked for.
        tokenizer: the checkpoint's Hugging Face tokenizer, with its chat template.
    """

    def __init__(self, engine: Engine, catalogue: Catalogue, tokenizer: Any) -> None:
        self.engine, self.catalogue, self.tokenizer = engine, catalogue, tokenizer
        self._end_of_prompt = render_chat(tokenizer, "", 0)
        self.constraints: dict[str, Constraint] = {
            name: compile_structure(structure, self.answer_ids)
            for name, structure in catalogue.structures.items()
        }

    def answer_ids(self, answer: str) -> list[int]:
        """Canonical ids of any answer under this checkpoint's prompt.

        Raises:
            ConfigError: the chat template does not keep prompt and answer apart.
        """
        try:
            return encode_answer(self.tokenizer, self._end_of_prompt, answer)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    async def label(
        self, text: str, images: list[Image.Image], choices: Choices, request_id: str = ""
    ) -> LabelResult:
        """Labels one post.

        Raises:
            SieveError: the request cannot be served.
        """
        started = time.perf_counter()
        settings = self.catalogue.resolve(choices)
        constraint = self.constraints[settings.structure]
        prompt = render_prompt(self.tokenizer, constraint.structure, text, len(images))
        request = Generation(
            request_id=request_id or uuid.uuid4().hex,
            prompt_ids=encode(self.tokenizer, prompt),
            images=images,
            adapter=settings.adapter,
            retention=settings.retention,
            pattern=constraint.pattern,
            max_tokens=max(1, constraint.num_steps),
            num_logprobs=constraint.num_logprobs,
        )
        generated = await self.engine.generate(request)
        scores = score(constraint, generated.token_ids, generated.logprobs)
        passes = 1 + await self._resolve_shared(request, constraint, scores)
        return LabelResult(
            settings=settings,
            scores=scores,
            num_images=len(images),
            generated=generated,
            num_passes=passes,
            total_ms=1e3 * (time.perf_counter() - started),
        )

    async def _resolve_shared(
        self, request: Generation, constraint: Constraint, scores: Scores
    ) -> int:
        """Extra passes for labels that share their first ids with each other off the path.

        They reuse the image (encoder cache) and most of the prompt (prefix cache).

        Returns:
            How many passes it took.
        """
        passes = 0
        while scores.unresolved:
            part = scores.unresolved.pop()
            passes += 1
            again = replace(
                request,
                request_id=f"{request.request_id}-{passes}",
                prompt_ids=[*request.prompt_ids, *part.prefix],
                pattern=constraint.pattern_below(part.field, part.node),
                max_tokens=decisive_depth(part.node),
            )
            generated = await self.engine.generate(again)
            walk(
                part,
                generated.token_ids,
                [{i: math.exp(v) for i, v in step.items()} for step in generated.logprobs],
                found=scores.probabilities[constraint.fields[part.field].name],
                unresolved=scores.unresolved,
            )
        return passes
