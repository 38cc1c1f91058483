"""Mistakes of users, as types: each says the value, what is allowed and how to fix it."""

from __future__ import annotations


class SieveError(Exception):
    """A request or setting that cannot be served; becomes an OpenAI-shaped error body.

    Args:
        message: what is wrong, what is allowed, how to fix it. Shown to the client as it is, so
            it never holds a path, a key or a traceback.
        param: the field at fault, as the client spells it.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    retry_after_s = 1

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body that OpenAI clients understand."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to try again, or how to say who one is."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_after_s)} if self.status in (429, 503) else {}


class BadRequestError(SieveError):
    """A value that is not allowed (400)."""


class UnknownModelError(SieveError):
    """No base model or adapter of that name (404)."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"


class UnauthorizedError(SieveError):
    """No key, or none that the server knows (401)."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(SieveError):
    """The key is known, but not for this (403)."""

    status = 403
    type = "permission_error"
    code = "admin_key_needed"


class KeyLimitError(SieveError):
    """The key has used up what it may (429 with Retry-After)."""

    status = 429
    type = "rate_limit_error"
    code = "key_rate"


class TooLargeError(SieveError):
    """More bytes than the server reads (413)."""

    status = 413
    code = "request_too_large"


class SlowRequestError(SieveError):
    """A body that does not come in the time it has (408)."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class UnfetchableImageError(SieveError):
    """An image behind an allowed URL that its host does not give (422)."""

    status = 422
    code = "image_unfetchable"


class ClientLeftError(SieveError):
    """Its client left (499, in logs and metrics; nobody reads it)."""

    status = 499
    code = "client_left"


class OverloadedError(SieveError):
    """Too much queued; may be tried again (503 with Retry-After)."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"


class FailedOnceError(SieveError):
    """The engine could not do one request and goes on; it may be tried again (503)."""

    status = 503
    type = "server_error"
    code = "engine_failed_once"


class DeadlineError(SieveError):
    """Not answered in the time that the client or the server gives it (503); it was cancelled."""

    status = 503
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineDeadError(SieveError):
    """The engine is gone (503).

    Attributes:
        is_crash: the engine failed by itself, so a request it worked on may be the cause and must
            not be sent to another one; otherwise it may.
        num_together: requests that were in the engine with this one, itself included.
        engine: which engine it was, so that one failure is told from the next.
    """

    is_crash = False
    num_together = 0
    engine = ""

    status = 503
    type = "server_error"
    code = "engine_dead"


class EngineRestartingError(EngineDeadError):
    """The engine was lost and is started again (503); `Retry-After` says when it should be up."""

    code = "engine_restarting"


class EngineLostError(SieveError):
    """The engine does not stay up however often it is started: the server ends."""

    status = 503
    type = "server_error"
    code = "engine_lost"


class DrainingError(SieveError):
    """The server is stopping (503): it answers what it accepted and accepts nothing new."""

    status = 503
    type = "server_error"
    code = "draining"


class ConfigError(SieveError):
    """A setting, structure or manifest of the operator that cannot be used."""


class AdapterError(ConfigError):
    """An adapter that cannot be served, or that would do nothing."""
