"""HTTP: typed bodies in, labels, chats and OpenAI-shaped errors out.

The app sees an `Engine` and a `Labeler`, never vLLM; the same app stands before an engine in
process and one behind a Ray Serve handle.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from patches.config import Retention
from serving.adapter_states import AdapterStatus
from serving.admission import Admission, BodyRoom
from serving.answers import choices_card, label_response, model_cards, status_card
from serving.audit import audited
from serving.bodies import StrictRoute
from serving.cascade import Cascade, Climbed, climb
from serving.catalogue import Choices
from serving.chat import build_call, plan_chat
from serving.draining import Drain, DrainGate
from serving.error_handlers import add_error_handlers
from serving.errors import BadRequestError
from serving.following import Bulletin
from serving.grammar_guard import GrammarGuard, GrammarLimits
from serving.image_hosts import read_rules
from serving.images import Decoder, ImageDecoder, ImageLimits
from serving.key_gate import OPEN_PATHS, KeyGate, PlainPaths, check_model, may_see, visible
from serving.keyring import Keyring
from serving.labeler import Labeler
from serving.metrics import Metrics
from serving.middleware import BodyLimit, RequestIds
from serving.page import add_page, page_paths
from serving.remote_images import RemoteImages
from serving.schema import (
    AdapterRequest,
    ChatRequest,
    LabelRequest,
    LabelResponse,
    check_chat,
)
from serving.settings import Settings
from serving.waiting import Deadline, Turnstile, stream_until, until_answered


class Adapters(Protocol):
    """Changes to the served adapters: `serving.registry`, direct or through a Ray handle."""

    async def add(
        self, name: str, version: str | None = None, *, pin: bool | None = None
    ) -> AdapterStatus:
        """Serves an adapter of the folder."""

    async def remove(self, name: str) -> AdapterStatus:
        """Stops serving one."""


Scrape = Callable[[], Awaitable[bytes]]
"""Renders all metrics there are."""


def build_app(
    labeler: Labeler,
    settings: Settings,
    metrics: Metrics,
    *,
    bulletin: Bulletin,
    adapters: Adapters,
    scrape: Scrape | None = None,
    is_behind_proxy: bool = False,
    remote: RemoteImages | None = None,
    drain: Drain | None = None,
    check_up: Callable[[], None] | None = None,
    decoder: Decoder | None = None,
) -> FastAPI:
    """The server's HTTP surface over a labeler and its engine.

    Args:
        labeler: answers requests.
        settings: of the server.
        metrics: of this HTTP side.
        bulletin: what is known of the adapters.
        adapters: changes them.
        scrape: renders all metrics; by default this side's.
        is_behind_proxy: whether Ray Serve's proxy gives answers their request id.
        remote: fetches images of URLs; by default from the hosts that the settings allow.
        drain: refuses new requests when the server ends.
        check_up: raises where it is known at once that no engine would answer.
        decoder: of images; by default threads of this process, for tests and trusted clients.
    """
    app = FastAPI(
        title="LLaVA Sieve",
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    limits = image_limits(settings)
    app.router.route_class = StrictRoute
    text_bytes = 4 * settings.max_text_chars
    app.add_middleware(
        BodyLimit,
        max_bytes=limits.max_images * (limits.max_bytes * 4 // 3 + 1024) + text_bytes + 65_536,
        timeout_s=settings.client_timeout_s,
    )
    turnstile = Turnstile(
        settings.max_pending,
        metrics.pending,
        at_once=settings.max_num_seqs,
        patience_s=settings.request_timeout_s / 2,
    )
    room = BodyRoom(settings.max_pending_bytes, metrics.pending_bytes)
    app.add_middleware(
        Admission, turnstile=turnstile, room=room, metrics=metrics, check_up=check_up
    )
    app.add_middleware(PlainPaths, metrics=metrics)
    _add_key_gate(app, settings, metrics)
    app.add_middleware(DrainGate, drain=drain or Drain(settings.drain_s))
    app.add_middleware(RequestIds, are_answered=is_behind_proxy)
    add_error_handlers(app, metrics)
    sources = Sources(
        remote=remote or remote_images(settings), decoder=decoder or ImageDecoder(limits)
    )
    _add_answers(app, labeler, settings, metrics, turnstile, sources)
    _add_adapters(app, bulletin, adapters, labeler.engine.info.num_patches)
    _add_health(app, labeler, metrics, scrape)
    add_page(app)
    return app


def _add_key_gate(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    if settings.keys is None:
        return
    open_paths = {*OPEN_PATHS, *page_paths(), *(["/metrics"] if settings.open_metrics else [])}
    keyring = Keyring(settings.keys)
    app.add_middleware(KeyGate, keyring=keyring, metrics=metrics, open_paths=open_paths)


def image_limits(settings: Settings) -> ImageLimits:
    """What is admitted, from the settings."""
    return ImageLimits(
        max_images=settings.max_images,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
    )


def remote_images(settings: Settings) -> RemoteImages:
    """What fetches images of URLs; nothing where the settings allow no host."""
    return RemoteImages(
        read_rules(settings.image_hosts),
        timeout_s=settings.image_fetch_timeout,
        max_bytes=settings.max_image_bytes,
        max_fetches=settings.image_fetches,
    )


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the images of requests come from and what decodes them."""

    remote: RemoteImages
    decoder: Decoder


def _add_answers(
    app: FastAPI,
    labeler: Labeler,
    settings: Settings,
    metrics: Metrics,
    turnstile: Turnstile,
    sources: Sources,
) -> None:
    limits, max_chars = image_limits(settings), settings.max_text_chars
    grammars = GrammarGuard(labeler.tokenizer, GrammarLimits(cpu_s=settings.grammar_cpu_s))
    info = labeler.engine.info

    def deadline_of(body: LabelRequest | ChatRequest) -> Deadline:
        return Deadline(
            min(body.timeout_s or settings.request_timeout_s, settings.request_timeout_s)
        )

    # Cheap checks first; no byte of an image is decoded before all that can be refused is.

    @app.post("/v1/label", response_model=LabelResponse, response_model_exclude_none=True)
    async def label(body: LabelRequest, request: Request) -> Any:
        """Labels one post with probabilities."""
        deadline = deadline_of(body)
        request_id = f"label-{uuid.uuid4().hex}"
        with turnstile.passage(deadline.remaining_s), metrics.latency.labels("label").time():
            check_model(labeler.catalogue, body.model, body.label_structure)
            _check_text(len(body.text), max_chars, "text")
            cascade = Cascade.asked(body.cascade, body.confidence, body.retention_ratio)
            choices = Choices(
                model=body.model,
                label_structure=body.label_structure,
                retention_ratio=body.retention_ratio,
                selector=body.selector,
            )
            labeler.catalogue.resolve(choices)

            async def work() -> tuple[Climbed, float]:
                started = time.perf_counter()
                raws = await sources.remote.read(body.images, limits, "image")
                images = await sources.decoder.decode(raws)
                image_ms = 1e3 * (time.perf_counter() - started)
                asked = (labeler, body.text, images, choices, cascade, request_id)
                return await climb(*asked, explain=body.explain), image_ms

            climbed, image_ms = await until_answered(request, deadline, work())
        answer = label_response(
            request_id, climbed.result, info.num_patches, image_ms, climbed.steps
        )
        metrics.labelled(answer)
        return answer

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat, with our fields for retention and label structure."""
        deadline = deadline_of(body)
        with turnstile.passage(deadline.remaining_s), metrics.latency.labels("chat").time():
            check_model(labeler.catalogue, body.model, body.label_structure)
            check_chat(body, info.vocab_size, info.max_model_len)
            _check_text(body.text_chars, max_chars, "messages")
            plan = plan_chat(body, labeler)

            async def work() -> dict[str, Any] | AsyncIterator[str]:
                raws = await sources.remote.read(body.image_urls(), limits, "messages")
                await grammars.check(body, plan.pattern)
                images = await sources.decoder.decode(raws, "messages")
                return await labeler.engine.chat(build_call(body, plan, images, labeler.tokenizer))

            answer = await until_answered(request, deadline, work())
        num_images = len(body.image_urls())
        retention = plan.settings.retention
        metrics.chatted(body.model, *_visual_tokens(retention, info.num_patches, num_images))
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return StreamingResponse(
            _within(turnstile, stream_until(deadline, answer)), media_type="text/event-stream"
        )


async def _within(turnstile: Turnstile, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream counts as pending until its last event."""
    with turnstile.stay():
        async for event in events:
            yield event


def _visual_tokens(retention: Retention, num_patches: int, num_images: int) -> tuple[int, int]:
    kept = retention.num_kept(num_patches) * num_images
    return kept, num_patches * num_images - kept


def _check_text(size: int, allowed: int, param: str) -> None:
    if size > allowed:
        raise BadRequestError(f"{param} has {size} characters, allowed are {allowed}", param=param)


def _add_adapters(app: FastAPI, bulletin: Bulletin, adapters: Adapters, num_patches: int) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model and its adapters, with what their manifests say and every state."""
        catalogue = visible(bulletin.catalogue)
        cards = model_cards(catalogue, bulletin.statuses)
        return {
            "object": "list",
            "data": [card for card in cards if may_see(card["id"])],
            "adapters": [status_card(one) for one in bulletin.statuses if may_see(one.name)],
            **choices_card(catalogue, num_patches),
        }

    @app.post("/v1/adapters")
    async def add(body: AdapterRequest) -> dict[str, Any]:
        """Serves an adapter that lies in the adapters folder, or another version of it."""
        asked = {"adapter": body.name[:80], "version": body.version}
        with audited("adapter_added", "adapter_refused", **asked):
            return status_card(await adapters.add(body.name, body.version, pin=body.pinned))

    @app.delete("/v1/adapters/{name}")
    async def remove(name: str) -> dict[str, Any]:
        """Stops serving an adapter; its files stay."""
        with audited("adapter_removed", "adapter_not_removed", adapter=name[:80]):
            return status_card(await adapters.remove(name))


def _add_health(app: FastAPI, labeler: Labeler, metrics: Metrics, scrape: Scrape | None) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether the engine answers; 503 where it does not."""
        await labeler.engine.check_health()
        return {"status": "ready"}

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        """Prometheus metrics of this server and of vLLM."""
        text = await scrape() if scrape else metrics.render()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
