"""Whatever goes wrong, as OpenAI's error body."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from serving.errors import BadRequestError, SieveError
from serving.metrics import Metrics

logger = logging.getLogger("sieve")
_ENDPOINTS = {"/v1/label": "label", "/v1/chat/completions": "chat"}
_SHORT = reprlib.Repr()
"""Looks at the first few items of a value only: a body may be one list of fifty megabytes."""
_REASONS = {400: "bad_request", 404: "not_found", 500: "internal"}


def respond(error: SieveError, scope: Scope, metrics: Metrics) -> JSONResponse:
    """The answer to a request that failed, counted."""
    endpoint = _ENDPOINTS.get(scope["path"], "other")
    metrics.requests.labels(endpoint, "", str(error.status)).inc()
    if endpoint != "other":
        metrics.reject(error.code or _REASONS.get(error.status, "bad_request"))
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Every error leaves as OpenAI's error body; those worth another try with `Retry-After`."""

    @app.exception_handler(SieveError)
    async def ours(request: Request, error: SieveError) -> JSONResponse:
        return respond(error, request.scope, metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_explain(error), request.scope, metrics)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        wrapped = BadRequestError(
            f"{request.scope['method']} {request.scope['path'][:80]}: {error.detail}"
        )
        wrapped.status = error.status_code
        return respond(wrapped, request.scope, metrics)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("unexpected error", exc_info=error)
        wrapped = SieveError("internal error; it was logged")
        wrapped.status, wrapped.type = 500, "server_error"
        return respond(wrapped, request.scope, metrics)


def _explain(error: RequestValidationError) -> BadRequestError:
    """The first complaint of pydantic as a message with value and field."""
    first = error.errors()[0]
    field = _field(first["loc"])
    if first["type"] == "extra_forbidden":
        return BadRequestError(f"unknown field {field!r}; remove it", param=field)
    if first["type"] == "missing":
        what = repr(field) if field else "the body"
        return BadRequestError(f"{what} is missing", param=field or None)
    value = _SHORT.repr(first.get("input"))[:80]
    return BadRequestError(f"{field or 'body'}={value}: {first['msg']}", param=field or None)


def _field(place: Sequence[int | str]) -> str:
    """A field as its client spells it, without pydantic's names for the kinds of a union."""
    steps = [str(step)[:80] for step in place[1:]]  # the first is always "body"
    kinds = ("str", "list[", "constrained-")
    return ".".join([*steps[:1], *(s for s in steps[1:] if not s.startswith(kinds))])[:120]
