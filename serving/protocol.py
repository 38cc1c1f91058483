"""What crosses between the HTTP side and the engine, wherever the engine lives.

Plain values only: the same objects go to an engine in this process and, pickled, to a Ray replica.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from patches.config import Retention


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts of the loaded checkpoint that the HTTP side needs.

    Attributes:
        model: the base model's name in the API.
        num_patches: P, visual tokens of an image at ratio 1.0.
        max_model_len: tokens of prompt and answer together.
        vocab_size: token ids are below it.
    """

    model: str
    num_patches: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One version of a LoRA adapter, as requests carry it and engines load it.

    A request keeps the version it met on arrival, so none is answered by two.

    Attributes:
        name: its name in the API.
        path: its folder, or a URL that fsspec reads.
        rank: LoRA rank.
        has_projector: whether it has weights for the projector, which vLLM applies only where the
            engine was started for them.
        version: what its folder's name says after `@`.
        digest: of its files; empty where nobody asked.
    """

    name: str
    path: str = field(repr=False)
    rank: int
    has_projector: bool = False
    version: str = ""
    digest: str = ""

    @property
    def key(self) -> str:
        """Its name inside engines: other contents have another one.

        VLLM keys its prefix cache by an adapter's name and path, its encoder cache by name alone.
        """
        return f"{self.name}@{self.digest[:12]}" if self.digest else self.name


@dataclass(frozen=True, kw_only=True)
class LoraRoom:
    """What an engine has room for; fixed when it starts.

    Attributes:
        max_rank: largest LoRA rank.
        max_loras: distinct adapters in one batch.
        max_cpu_loras: adapters in memory; vLLM evicts the one not used for longest.
        has_projector: whether projector weights are applied.
    """

    max_rank: int
    max_loras: int
    max_cpu_loras: int
    has_projector: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One constrained, greedy decode.

    Attributes:
        request_id: unique; shows in logs.
        prompt_ids: one id an image, not yet expanded.
        images: decoded, RGB.
        adapter: the adapter, or None for the base model.
        retention: ratio and selector.
        pattern: what may be decoded (see `serving.constraint`).
        max_tokens: decoding steps.
        num_logprobs: alternatives wanted at each step.
        is_further: another pass of a request that was let in: it waits for room in the engine's
            queue where a new one is refused.
        cache_salt: requests share the prefix cache with those of the same salt only.
    """

    request_id: str
    prompt_ids: list[int]
    images: list[Image.Image]
    adapter: Adapter | None
    retention: Retention
    pattern: str
    max_tokens: int
    num_logprobs: int
    is_further: bool = False
    cache_salt: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What came out.

    Attributes:
        token_ids: the decoded ids.
        logprobs: per step, id to log-probability over the ids the pattern allowed there.
        num_prompt_tokens: after expansion, so with kept visual tokens.
        num_cached_tokens: of those, found in the prefix cache.
        queue_ms: from arrival in the engine to its first scheduling.
        prefill_ms: from then to the first token.
        decode_ms: from then to the last token.
    """

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which patches of one image a request kept, and why.

    Attributes:
        grid: rows and columns of patches; they are counted row by row.
        box: left, top, right and bottom of that grid in pixels of the image as it was given. Inside
            it where the checkpoint crops, partly outside where it pads.
        scores: one number a patch; the selector kept the highest.
        cls_attention: a patch's mean [CLS] attention, whatever the selector.
        kept: indices of the kept patches, ascending.
    """

    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    scores: list[float]
    cls_attention: list[float]
    kept: list[int]


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """One OpenAI chat request, admitted and resolved.

    Attributes:
        request_id: unique; shows in logs.
        body: fields of OpenAI's API that vLLM understands, images decoded.
        retention: ratio and selector.
        adapter: the adapter, or None for the base model; `body["model"]` is the client's word.
        pattern: constraint of a label structure or of choices, or None.
        num_images: images in `body`.
        cache_salt: requests share the prefix cache with those of the same salt only.
    """

    request_id: str
    body: Mapping[str, Any]
    retention: Retention
    adapter: Adapter | None = None
    pattern: str | None = None
    num_images: int = 0
    cache_salt: str | None = field(default=None, repr=False)


class Engine(Protocol):
    """Holds the model. In process (`serving.engine`) or behind a Ray Serve handle."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the checkpoint."""

    async def generate(self, request: Generation) -> Generated:
        """Decodes one answer; cancelling the call stops the engine's work for it."""

    async def explain(self, request: Generation) -> list[Explanation]:
        """Which patches `generate` keeps of the request's images, in order.

        One more pass of the tower. It neither reads nor fills a cache.
        """

    async def chat(self, call: ChatCall) -> dict[str, Any] | AsyncIterator[str]:
        """Answers a chat: a completion, or server-sent events where the body asks to stream."""

    async def tower_images(self) -> int:
        """Images that went through the vision tower so far."""

    async def check_health(self) -> None:
        """Returns if the engine can answer.

        Raises:
            EngineDeadError: it cannot.
        """

    async def close(self) -> None:
        """Stops the engine and its processes."""
