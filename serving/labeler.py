"""The story of one labelled post: prompt, decode, score."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from serving.catalogue import Catalogue, Choices, Resolved
from serving.constraint import Constraint, compile_structure, decisive_depth
from serving.errors import ConfigError
from serving.keys import salt_of_caller
from serving.prompts import encode, encode_answer, render_chat, render_prompt
from serving.protocol import Engine, Explanation, Generated, Generation
from serving.scoring import Scores, score, walk
from serving.structures import LabelStructure


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """A labelled post and what it cost; `explanations` only where they were asked for."""

    settings: Resolved
    scores: Scores
    num_images: int
    generated: Generated
    num_passes: int
    total_ms: float
    explanations: list[Explanation] | None = None
    explain_ms: float = 0.0


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
        self.constraints: dict[str, Constraint] = {}
        for structure in catalogue.structures.values():
            self.constraint_of(structure)

    def constraint_of(self, structure: LabelStructure) -> Constraint:
        """A structure's constraint; compiled once, in milliseconds."""
        known = self.constraints.get(structure.name)
        if known is None or known.structure != structure:
            known = compile_structure(structure, self.answer_ids)
            self.constraints[structure.name] = known
        return known

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
        self,
        text: str,
        images: list[Image.Image],
        choices: Choices,
        request_id: str = "",
        *,
        explain: bool = False,
        is_further: bool = False,
    ) -> LabelResult:
        """Labels one post.

        Args:
            text: of the post.
            images: of the post.
            choices: what is asked for.
            request_id: unique; by default a random one.
            explain: whether to say as well which patches were kept.
            is_further: whether its client was let in with an earlier pass.

        Raises:
            SieveError: the request cannot be served.
        """
        started = time.perf_counter()
        settings = self.catalogue.resolve(choices)
        constraint = self.constraint_of(settings.structure)
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
            is_further=is_further,
            cache_salt=salt_of_caller(),
        )
        generated = await self.engine.generate(request)
        scores = score(constraint, generated.token_ids, generated.logprobs)
        passes = 1 + await self._resolve_shared(request, constraint, scores)
        explanations, explain_ms = None, 0.0
        if explain:
            asked = time.perf_counter()
            explanations = await self.engine.explain(request) if images else []
            explain_ms = 1e3 * (time.perf_counter() - asked)
        return LabelResult(
            settings=settings,
            scores=scores,
            num_images=len(images),
            generated=generated,
            num_passes=passes,
            total_ms=1e3 * (time.perf_counter() - started),
            explanations=explanations,
            explain_ms=explain_ms,
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
                is_further=True,
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
