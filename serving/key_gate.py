"""Who may do what: pure ASGI before everything else, and what of the models a key may see.

The gate reads the ASGI scope's path, as the router does: a URL put together from the `Host` header
may say something else. Paths are compared letter by letter and only a short list is open, so that
another spelling of a path is a path that needs a key.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.audit import Refusals
from serving.catalogue import Catalogue, Choices
from serving.error_handlers import respond
from serving.errors import BadRequestError, ForbiddenError, SieveError, UnauthorizedError
from serving.keyring import Keyring
from serving.keys import Key, caller
from serving.metrics import Metrics

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Need no key, beside the page's own files; probes of a load balancer have none."""

_ADMIN_PATHS = ("/v1/adapters", "/metrics")
_BEARER = re.compile(rb"bearer +([\x21-\x7e]{1,512}) *", re.IGNORECASE)


class KeyGate:
    """Lets a request in by its key, as often and as many at once as that may.

    A request that is refused is answered before its body is read.

    Args:
        app: what is served.
        keyring: the keys.
        metrics: counts refusals.
        open_paths: may be read without a key.
    """

    def __init__(
        self, app: ASGIApp, *, keyring: Keyring, metrics: Metrics, open_paths: Iterable[str]
    ) -> None:
        self._app, self._keyring, self._metrics = app, keyring, metrics
        self._open_paths = frozenset(open_paths)
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1008})

    def _is_open(self, scope: Scope) -> bool:
        is_reading = scope.get("method") in ("GET", "HEAD")
        return is_reading and _path(scope) in self._open_paths

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts as one of the key's requests until the answer's last byte, or its client left."""
        with contextlib.ExitStack() as held:
            self._refusals.tell()
            try:
                key = self._known(scope)
                caller.set(key)
                held.enter_context(self._keyring.allowance(key).passage(key))
                _check_role(key, _path(scope))
            except SieveError as error:
                key_now = caller.get()
                self._refusals.add(error.code, key_now.name if key_now else None)
                await respond(error, scope, self._metrics)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> Key:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        if not found:
            raise UnauthorizedError(
                "a key is needed: send it as 'Authorization: Bearer KEY'", code="missing_api_key"
            )
        sent = _BEARER.fullmatch(found[0]) if len(found) == 1 else None
        if sent is None:
            raise UnauthorizedError(
                "the Authorization header is not one 'Bearer KEY' with a key of this server"
            )
        key = self._keyring.find(sent[1])
        if key is None:
            raise UnauthorizedError(
                "this server does not know the key; ask its operator for one, and send it as "
                "'Authorization: Bearer KEY'"
            )
        return key


class PlainPaths:
    """Knows no path with a line end or another control character in it: not found.

    The router's patterns end in `$`, which also matches before a last line end, so that
    `/metrics%0A` would be `/metrics` to it and to nobody else.

    Args:
        app: what is served.
        metrics: counts refusals.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http" or scope["path"].isprintable():
            await self._app(scope, receive, send)
            return
        error = BadRequestError("the path has a control character in it; there is no such path")
        error.status = 404
        await respond(error, scope, self._metrics)(scope, receive, send)


def _path(scope: Scope) -> str:
    """What the router matches: the path below where the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _check_role(key: Key, path: str) -> None:
    """Everything at or below an administrator's path, whether there is such a route or not."""
    is_admins = any(path == one or path.startswith(f"{one}/") for one in _ADMIN_PATHS)
    if is_admins and not key.admin:
        raise ForbiddenError(
            f"key {key.name!r} is not an admin key; adapters are changed and metrics read with one"
        )


def visible(catalogue: Catalogue) -> Catalogue:
    """What of a catalogue the caller may see."""
    key = caller.get()
    if key is None or key.adapters is None:
        return catalogue
    return catalogue.only(key.adapters)


def may_see(model: str) -> bool:
    """Whether the caller may know of a model."""
    key = caller.get()
    return key is None or key.may_use(model)


def check_model(catalogue: Catalogue, model: str | None, structure: str | None) -> None:
    """Refuses a model, or the structure of one, that the caller's key is not for.

    Raises:
        ForbiddenError: the model is not of the key's.
        SieveError: it is, but there is no such model or structure; names none of the others.
    """
    key = caller.get()
    if key is None or key.adapters is None:
        return
    name = catalogue.base if model is None else model
    if not key.may_use(name):
        raise ForbiddenError(
            f"model={name[:80]!r} is not allowed with key {key.name!r}; allowed are "
            f"{sorted(key.adapters)[:20]}",
            param="model",
            code="adapter_not_allowed",
        )
    visible(catalogue).resolve(Choices(model=model, label_structure=structure))
