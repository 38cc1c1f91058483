"""An engine without a model: random but fixed logits, decoded under the real Outlines pattern."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import outlines_core as oc

from patches.canonical import compile_index
from serving.errors import EngineDeadError
from serving.geometry import explained
from serving.protocol import EngineInfo, Explanation, Generated, Generation

EOS = 2


class FakeEngine:
    """Next-id logits are a hash of the ids before; everything around them is real."""

    def __init__(self, seed: int = 0, num_patches: int = 64) -> None:
        self.seed = seed
        self.requests: list[Generation] = []
        self.is_dead = False
        self.info = EngineInfo(
            model="base", num_patches=num_patches, max_model_len=2048, vocab_size=32064
        )

    def logit(self, prefix: Sequence[int], token_id: int) -> float:
        return random.Random(repr((self.seed, tuple(prefix), token_id))).gauss(0, 1.5)

    def distribution(self, prefix: Sequence[int], allowed: Sequence[int]) -> dict[int, float]:
        logits = {token_id: self.logit(prefix, token_id) for token_id in allowed}
        total = math.log(sum(map(math.exp, logits.values())))
        return {token_id: value - total for token_id, value in logits.items()}

    async def generate(self, request: Generation) -> Generated:
        if self.is_dead:
            raise EngineDeadError("the engine stopped; try again shortly")
        self.requests.append(request)
        guide = oc.Guide(compile_index(request.pattern, EOS))
        prefix, steps, decoded = list(request.prompt_ids), [], []
        for _ in range(request.max_tokens):
            step = self.distribution(prefix, guide.get_tokens())
            best = sorted(step, key=step.get, reverse=True)
            steps.append({i: step[i] for i in best[: request.num_logprobs]})
            decoded.append(best[0])
            if best[0] == EOS:
                break
            guide.advance(best[0])
            prefix.append(best[0])
        return Generated(
            token_ids=decoded,
            logprobs=steps,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=0,
            queue_ms=0.0,
            prefill_ms=0.0,
            decode_ms=0.0,
        )

    async def explain(self, request: Generation) -> list[Explanation]:
        """Scores fall from the first patch to the last; images are cropped."""
        total = self.info.num_patches
        scores = [1 / (1 + index) for index in range(total)]
        kept = list(range(request.retention.num_kept(total)))
        found = {"scores": scores, "cls_attention": scores, "kept": kept}
        side = math.isqrt(total) * 14
        cropping = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        shape = (len(request.images), 3, side, side)
        return explained([found] * len(request.images), request.images, cropping, 14, shape)

    async def chat(self, call):
        self.requests.append(call)
        return {"object": "chat.completion", "choices": [], "id": call.request_id}

    async def tower_images(self) -> int:
        return 0

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("the engine stopped; try again shortly")

    async def close(self) -> None:
        pass
