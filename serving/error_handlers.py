"""Whatever goes wrong, as OpenAI's error body."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.errors import BadRequestError, SieveError
from serving.metrics import Metrics

logger = logging.getLogger("sieve")
_ENDPOINTS = {"/v1/label": "label", "/v1/chat/completions": "chat"}
_REASONS = {400: "bad_request", 404: "not_found", 500: "internal"}


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Every error leaves as OpenAI's error body; those worth another try with `Retry-After`."""

    def respond(error: SieveError, request: Request) -> JSONResponse:
        endpoint = _ENDPOINTS.get(request.scope["path"], "other")
        metrics.requests.labels(endpoint, "", str(error.status)).inc()
        if endpoint != "other":
            metrics.reject(error.code or _REASONS.get(error.status, "bad_request"))
        is_passing = error.status in (429, 503)
        headers = {"Retry-After": str(error.retry_after_s)} if is_passing else None
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
