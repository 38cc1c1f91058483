"""Two ways to get a post labelled: a running server, or the engine in this process."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import httpx

from serving.answers import label_response
from serving.catalogue import Choices
from serving.client_key import bearer_headers
from serving.errors import BadRequestError, ConfigError, SieveError
from serving.images import ImageDecoder
from serving.labeler import Labeler
from serving.posts import Post
from serving.retries import Retries
from serving.schema import LabelResponse

Response = dict[str, Any]
"""The body of a `/v1/label` answer."""
Fields = Mapping[str, list[str]]
"""The fields of an answer, with their labels."""


class Sender(ABC):
    """Gets posts labelled."""

    @abstractmethod
    async def fields(self) -> Fields:
        """The fields of the answers to come.

        Raises:
            SieveError: there is no server, or it has no such model, structure or retention.
        """

    @abstractmethod
    async def __call__(self, post: Post) -> Response:
        """The body of the `/v1/label` answer.

        Raises:
            SieveError: the post cannot be labelled.
        """


class EngineSender(Sender):
    """Labels by an engine in this process, as its server would."""

    def __init__(
        self,
        labeler: Labeler,
        decoder: ImageDecoder,
        choices: Choices,
        *,
        max_text_chars: int,
        explain: bool = False,
    ) -> None:
        self._labeler, self._decoder, self._choices = labeler, decoder, choices
        self._max_text_chars, self._explain = max_text_chars, explain

    async def fields(self) -> Fields:
        """The fields of the structure that the choices lead to."""
        catalogue = self._labeler.catalogue
        structure = catalogue.resolve(self._choices).structure
        return {name: list(labels) for name, labels in structure.fields.items()}

    async def __call__(self, post: Post) -> Response:
        """The body that `POST /v1/label` would answer."""
        _check_size("text", len(post.text), "characters", self._max_text_chars)
        raws = await _image_bytes(post)
        for raw in raws:
            _check_size("image", len(raw), "bytes", self._decoder.limits.max_bytes)
        started = time.perf_counter()
        images = await self._decoder.decode(raws)
        image_ms = 1e3 * (time.perf_counter() - started)
        request_id = f"label-{uuid.uuid4().hex}"
        result = await self._labeler.label(
            post.text, images, self._choices, request_id, explain=self._explain
        )
        num_patches = self._labeler.engine.info.num_patches
        return label_response(request_id, result, num_patches, image_ms).model_dump(
            exclude_none=True
        )


def _check_size(param: str, size: int, unit: str, allowed: int) -> None:
    if size > allowed:
        raise BadRequestError(f"{param} has {size} {unit}, allowed are {allowed}", param=param)


async def _image_bytes(post: Post) -> list[bytes]:
    try:
        return await asyncio.to_thread(post.image_bytes)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        names = [item.name for item in post.images if not isinstance(item, bytes)]
        reason = getattr(error, "strerror", None) or "not a file name"
        raise BadRequestError(
            f"image {', '.join(names)!r} cannot be read: {reason}",
            param="image",
            code="image_unreadable",
        ) from error


class HttpSender(Sender):
    """Labels through a running server; overload and broken connections are tried again.

    Args:
        server: its URL; a trailing `/v1` is ignored.
        choices: what every request asks for.
        concurrency: most connections at once.
        retries: how often a post is tried.
        explain: whether answers say which patches were kept.
        transport: another way than the network (for tests).

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(
        self,
        server: str,
        choices: Choices,
        *,
        concurrency: int = 16,
        retries: Retries | None = None,
        explain: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.server = server.rstrip("/").removesuffix("/v1")
        self._choices: dict[str, Any] = {
            name: value for name, value in asdict(choices).items() if value is not None
        }
        if explain:
            self._choices["explain"] = True
        self._retries = retries or Retries()
        self._most_lost, self._num_lost = max(8, concurrency), 0
        self._client = httpx.AsyncClient(
            base_url=_url(self.server),
            headers=bearer_headers(),
            timeout=httpx.Timeout(300, connect=10, pool=None),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            transport=transport,
        )

    async def fields(self) -> Fields:
        """The fields of a first answer, to a short text, which also tells whether all is well."""
        try:
            response = await self._client.post("/v1/label", json=self._body("ready?", []))
        except httpx.TransportError as error:
            raise ConfigError(
                f"server={self.server!r} cannot be reached ({_name(error)}); is it running?",
                param="server",
                code="server_unreachable",
            ) from error
        is_busy = response.status_code in _BUSY
        answer = await self._ask("ready?") if is_busy else _read(response)
        return {name: list(labels) for name, labels in answer["probabilities"].items()}

    async def __call__(self, post: Post) -> Response:
        """The server's answer, after as many tries as it takes and is allowed."""
        raws = await _image_bytes(post)
        return await self._ask(post.text, raws)

    async def _ask(self, text: str, images: Iterable[bytes] = ()) -> Response:
        body = self._body(text, images)
        for tried in itertools.count(1):
            is_last = tried == self._retries.num_tries
            try:
                response = await self._client.post("/v1/label", json=body)
            except httpx.TransportError as error:
                if is_last:
                    raise self._lost(error) from error
                await asyncio.sleep(self._retries.wait_s(tried))
                continue
            self._num_lost = 0
            if response.status_code not in _BUSY or is_last:
                return _read(response)
            retry_after = response.headers.get("Retry-After")
            await asyncio.sleep(self._retries.wait_s(tried, retry_after))
        raise AssertionError("the last try returns or raises")

    def _body(self, text: str, images: Iterable[bytes]) -> dict[str, Any]:
        # The server goes by the bytes, whatever type the URL names.
        urls = [f"data:image/jpeg;base64,{base64.b64encode(raw).decode()}" for raw in images]
        return {"text": text, **({"image": urls} if urls else {}), **self._choices}

    def _lost(self, error: httpx.TransportError) -> SieveError:
        """The error of a post that could not be sent, or of the run after many in a row."""
        self._num_lost += 1
        message = f"no answer after {self._retries.num_tries} tries ({_name(error)})"
        if self._num_lost >= self._most_lost:
            return ConfigError(
                f"server={self.server!r} is lost: {message}, {self._num_lost} posts in a row",
                param="server",
                code="server_lost",
            )
        return SieveError(message, code="connection_failed")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


def _url(server: str) -> httpx.URL:
    try:
        url = httpx.URL(server)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(
            f"server={server!r} is not a URL; expected e.g. http://127.0.0.1:8000", param="server"
        )
    return url


_BUSY = (429, 503)


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__


def _read(response: httpx.Response) -> Response:
    """The answer's body.

    Raises:
        SieveError: it is an error, as the server said it, or no answer of `/v1/label`.
    """
    try:
        body = response.json()
        if response.is_success:
            LabelResponse.model_validate(body)
            return body
    except ValueError:  # not JSON, or not this body (pydantic's error is one)
        body = None
    raise _failure(response, body.get("error") if isinstance(body, dict) else None)


def _failure(response: httpx.Response, said: object) -> SieveError:
    if isinstance(said, dict) and "message" in said:
        error = SieveError(str(said["message"]), param=said.get("param"), code=said.get("code"))
        error.type = str(said.get("type"))
    else:
        error = SieveError(
            f"HTTP {response.status_code} is no answer of LLaVA Sieve: {response.text[:200]!r}",
            code="not_an_answer",
        )
    error.status = response.status_code
    return error
