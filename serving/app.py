"""HTTP: typed bodies in, labels, chats and OpenAI-shaped errors out.

The app sees an `Engine` and a `Labeler`, never vLLM; the same app stands before an engine in
process and one behind a Ray Serve handle.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.chat import build_call
from serving.errors import BadRequestError, SieveError, TooLargeError
from serving.images import ImageDecoder, ImageLimits
from serving.labeler import Choices, Labeler, LabelResult
from serving.metrics import Metrics
from serving.schema import (
    ChatRequest,
    LabelRequest,
    LabelResponse,
    Retained,
    Usage,
    check_chat,
    read_images,
)

logger = logging.getLogger("sieve")
_ENDPOINTS = {"/v1/label": "label", "/v1/chat/completions": "chat"}
T = TypeVar("T")


def build_app(
    labeler: Labeler, *, limits: ImageLimits, max_text_chars: int, metrics: Metrics
) -> FastAPI:
    """The server's HTTP surface over a labeler and its engine."""
    app = FastAPI(title="LLaVA Sieve", docs_url=None, redoc_url=None)
    decoder = ImageDecoder(limits)
    engine = labeler.engine
    max_body = limits.max_images * (limits.max_bytes * 4 // 3 + 1024) + 4 * max_text_chars + 65_536
    app.add_middleware(BodyLimit, max_bytes=max_body)
    _add_error_handlers(app, metrics)

    @app.post("/v1/label", response_model=LabelResponse)
    async def label(body: LabelRequest, request: Request) -> Any:
        """Labels one post with probabilities."""
        with metrics.latency.labels("label").time():
            _check_text(len(body.text), max_text_chars, "text")
            started = time.perf_counter()
            images = await decoder.decode(read_images(body.images, limits, "image"))
            image_ms = 1e3 * (time.perf_counter() - started)
            choices = Choices(
                model=body.model,
                label_structure=body.label_structure,
                retention_ratio=body.retention_ratio,
                selector=body.selector,
            )
            request_id = f"label-{uuid.uuid4().hex}"
            result = await until_disconnect(
                request, labeler.label(body.text, images, choices, request_id)
            )
        answer = label_response(request_id, result, engine.info.num_patches, image_ms)
        _count(metrics, answer)
        return answer

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat, with our fields for retention and label structure."""
        with metrics.latency.labels("chat").time():
            check_chat(body, engine.info.vocab_size, engine.info.max_model_len)
            _check_text(body.text_chars, max_text_chars, "messages")
            raws = read_images(body.image_urls(), limits, "messages")
            images = await decoder.decode(raws, "messages")
            call = build_call(body, images, labeler)
            answer = await until_disconnect(request, engine.chat(call))
        kept = call.retention.num_kept(engine.info.num_patches) * len(images)
        metrics.kept_tokens.inc(kept)
        metrics.saved_tokens.inc(engine.info.num_patches * len(images) - kept)
        metrics.requests.labels("chat", body.model, "200").inc()
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return StreamingResponse(answer, media_type="text/event-stream")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model and its adapters, with what their manifests say."""
        return {"object": "list", "data": model_cards(labeler)}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether the engine answers; 503 where it does not."""
        await engine.check_health()
        return {"status": "ready"}

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        """Prometheus metrics of this server and of vLLM."""
        metrics.tower_images.set(await engine.tower_images())
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4")

    return app


def _check_text(size: int, allowed: int, param: str) -> None:
    if size > allowed:
        raise BadRequestError(f"{param} has {size} characters, allowed are {allowed}", param=param)


def label_response(
    request_id: str, result: LabelResult, num_patches: int, image_ms: float
) -> LabelResponse:
    """The answer's body."""
    settings, generated = result.settings, result.generated
    num_tokens = len(generated.token_ids)
    timing = {
        "image": image_ms,
        "queue": generated.queue_ms,
        "prefill": generated.prefill_ms,
        "decode": generated.decode_ms,
        "total": image_ms + result.total_ms,
    }
    return LabelResponse(
        id=request_id,
        model=settings.model,
        label_structure=settings.structure,
        labels=result.scores.labels,
        probabilities=result.scores.probabilities,
        retention=Retained(
            ratio=settings.retention.ratio,
            selector=settings.retention.selector,
            kept=settings.retention.num_kept(num_patches) * result.num_images,
            patches=num_patches * result.num_images,
        ),
        usage=Usage(
            prompt_tokens=generated.num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=generated.num_prompt_tokens + num_tokens,
            prompt_tokens_details={"cached_tokens": generated.num_cached_tokens},
        ),
        timing_ms={name: round(value, 3) for name, value in timing.items()},
    )


def _count(metrics: Metrics, answer: LabelResponse) -> None:
    metrics.requests.labels("label", answer.model, "200").inc()
    metrics.kept_tokens.inc(answer.retention.kept)
    metrics.saved_tokens.inc(answer.retention.patches - answer.retention.kept)
    for field, label in answer.labels.items():
        metrics.labels.labels(answer.model, answer.label_structure, field, label).inc()


def model_cards(labeler: Labeler) -> list[dict[str, Any]]:
    """OpenAI's model objects, with structures and quality; no paths."""
    catalogue = labeler.catalogue
    cards = []
    for name in [catalogue.base, *sorted(catalogue.adapters)]:
        settings = catalogue.resolve(Choices(model=name))
        installed = catalogue.adapters.get(name)
        structure = catalogue.structures[settings.structure]
        cards.append(
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "llava-sieve",
                "parent": catalogue.base if installed else None,
                "label_structure": structure.name,
                "fields": {field: list(labels) for field, labels in structure.fields.items()},
                "prompt": structure.prompt,
                "answer": structure.answer,
                "retention_ratio": settings.retention.ratio,
                "selector": settings.retention.selector,
                "quality": installed.manifest.quality if installed else {},
                **(installed.manifest.provenance() if installed else {}),
            }
        )
    return cards


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Awaits work, or cancels it as soon as the client leaves.

    Raises:
        asyncio.CancelledError: the client left; nobody waits for an answer.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise asyncio.CancelledError("client disconnected")
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def respond(error: SieveError, request: Request) -> JSONResponse:
        endpoint = _ENDPOINTS.get(request.scope["path"], "other")
        metrics.requests.labels(endpoint, "", str(error.status)).inc()
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(SieveError)
    async def ours(request: Request, error: SieveError) -> JSONResponse:
        return respond(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_explain(error), request)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        wrapped = BadRequestError(
            f"{request.scope['method']} {request.scope['path'][:80]}: {error.detail}"
        )
        wrapped.status = error.status_code
        return respond(wrapped, request)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("unexpected error", exc_info=error)
        wrapped = SieveError("internal error; it was logged")
        wrapped.status, wrapped.type = 500, "server_error"
        return respond(wrapped, request)


def _explain(error: RequestValidationError) -> BadRequestError:
    """The first complaint of pydantic as a message with value and field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")[:120]
    if first["type"] == "extra_forbidden":
        return BadRequestError(f"unknown field {field!r}; remove it", param=field)
    if first["type"] == "missing":
        return BadRequestError(f"field {field!r} is missing", param=field)
    value = repr(first.get("input"))[:80]
    return BadRequestError(f"{field or 'body'}={value}: {first['msg']}", param=field or None)


class BodyLimit:
    """Refuses bodies over a limit, by header at once, by count while they come in.

    Pure ASGI: Starlette's `BaseHTTPMiddleware` would hide the client's disconnect.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with a counted body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = TooLargeError(
            f"the body is larger than {self._max_bytes} bytes; send fewer or smaller images"
        )
        refusal = JSONResponse(error.body(), status_code=error.status)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await refusal(scope, receive, send)
            return
        received, is_refused = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise error
            return message

        async def refusing(message: Message) -> None:
            """FastAPI calls a failed body a 400 of its own; the client gets ours instead."""
            nonlocal is_refused
            if received <= self._max_bytes:
                await send(message)
            elif not is_refused:
                is_refused = True
                await refusal(scope, receive, send)

        await self._app(scope, counted, refusing)
