"""Predictions through a running server, over its public HTTP interface.

Posts go with their own image bytes; what comes back fills the same `Prediction`s as
`train.predict`, so nothing downstream knows where an answer came from.
"""

from __future__ import annotations

import base64
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError
from tqdm import tqdm

from serving.client_key import bearer_headers
from serving.errors import BadRequestError, ConfigError
from serving.posts import Post
from serving.retries import Retries
from serving.schema import LabelResponse
from serving.structures import STRUCTURES, LabelStructure, make_structure
from train.predict import Prediction

CONCURRENCY = 16
MAX_WRITTEN_TOKENS = 64
_BUSY = (429, 503)
T = TypeVar("T")


class ServedModel:
    """A model of a running server.

    Args:
        server: its URL; a trailing `/v1` is ignored.
        name: the base model's or an adapter's; None is the base model.
        structure: what is asked; None is what the server says the model is for.
        concurrency: most requests at once.
        patience: with a server that is busy.
        transport: another way than the network (for tests).

    Raises:
        ConfigError: there is no server, or it has no such model.
    """

    def __init__(
        self,
        server: str,
        name: str | None = None,
        structure: LabelStructure | None = None,
        *,
        concurrency: int = CONCURRENCY,
        patience: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.server = server.rstrip("/").removesuffix("/v1")
        self._concurrency, self._patience = concurrency, patience or Retries()
        self._client = httpx.Client(
            base_url=_url(self.server),
            headers=bearer_headers(),
            timeout=httpx.Timeout(300, connect=10, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
            transport=transport,
        )
        self._card = _find_card(self._models(), name)
        self._structure = structure or _structure_of(self._card)

    @property
    def name(self) -> str:
        """The model's name on the server."""
        return str(self._card["id"])

    @property
    def structure(self) -> LabelStructure:
        """What it is asked."""
        return self._structure

    def label(
        self, posts: Sequence[Post], *, ratio: float, selector: str, title: str
    ) -> list[Prediction]:
        """Labels of posts, in their order.

        Raises:
            ConfigError: the server refuses a post (named), or is lost.
        """

        def one(post: Post) -> Prediction:
            body: dict[str, Any] = {
                "text": post.text,
                "model": self.name,
                "label_structure": self._structure.name,
                "retention_ratio": ratio,
                "selector": selector,
            }
            if post.images:
                body["image"] = _data_urls(post)
            return _read_prediction(post, self._structure, self._post("/v1/label", body, post))

        return self._each(posts, one, title)

    def write(self, posts: Sequence[Post]) -> list[str]:
        """What the model writes to the structure's prompt as a free chat."""

        def one(post: Post) -> str:
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": url}} for url in _data_urls(post)
            ]
            turn = self._structure.prompt.replace("{text}", post.text)
            body = {
                "model": self.name,
                "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": turn}]}],
                "retention_ratio": 1.0,
                "max_tokens": MAX_WRITTEN_TOKENS,
                "temperature": 0.0,
            }
            answer = self._post("/v1/chat/completions", body, post)
            return str(answer["choices"][0]["message"]["content"] or "").strip()

        return self._each(posts, one, "without the constraint")

    def without_adapter(self) -> ServedModel | None:
        """The server's base model under the same structure."""
        base = self._card.get("parent")
        if base is None:
            return None
        other = copy.copy(self)  # shares the connections
        other._card = {"id": base, "parent": None}
        return other

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _each(self, posts: Sequence[Post], one: Callable[[Post], T], title: str) -> list[T]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            answers = pool.map(one, posts)
            try:
                bar = tqdm(answers, total=len(posts), desc=title, disable=None, unit="post")
                return list(bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _models(self) -> list[dict[str, Any]]:
        try:
            response = self._client.get("/v1/models")
        except httpx.TransportError as error:
            raise ConfigError(
                f"--server {self.server!r} cannot be reached ({_reason(error)}); is it running?",
                param="server",
            ) from error
        try:
            cards = response.raise_for_status().json()["data"]
            return [card for card in cards if card["id"]]
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--server {self.server!r} does not answer /v1/models as LLaVA Sieve does "
                f"(HTTP {response.status_code})",
                param="server",
            ) from error

    def _post(self, path: str, body: dict[str, Any], post: Post) -> dict[str, Any]:
        for tried in itertools.count(1):
            is_last = tried == self._patience.num_tries
            retry_after = None
            try:
                response = self._client.post(path, json=body)
            except httpx.TransportError as error:
                if is_last:
                    raise ConfigError(
                        f"--server {self.server!r} is lost: no answer to post {post.id!r} after "
                        f"{tried} tries ({_reason(error)})",
                        param="server",
                    ) from error
            else:
                if response.status_code not in _BUSY or is_last:
                    return self._read(response, post)
                retry_after = response.headers.get("Retry-After")
            time.sleep(self._patience.wait_s(tried, retry_after))
        raise AssertionError("the last try returns or raises")

    def _read(self, response: httpx.Response, post: Post) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        said = body.get("error") if isinstance(body, dict) else None
        message = said.get("message") if isinstance(said, dict) else response.text[:200]
        raise ConfigError(
            f"post {post.id!r}: the server answered HTTP {response.status_code}: {message}",
            param="server",
        )


def _read_prediction(post: Post, structure: LabelStructure, body: dict[str, Any]) -> Prediction:
    try:
        answer = LabelResponse.model_validate(body)
    except ValidationError as error:
        raise ConfigError(
            f"post {post.id!r}: the server's answer is none of LLaVA Sieve's /v1/label: "
            f"{error.errors(include_url=False)[0]['msg']}",
            param="server",
        ) from error
    there = {name: set(shares) for name, shares in answer.probabilities.items()}
    if there != {name: set(labels) for name, labels in structure.fields.items()}:
        raise ConfigError(
            f"the server's label structure {structure.name!r} has other fields or labels than the "
            f"one here: {there} there, {dict(structure.fields)} here; rename one of them",
            param="structure",
        )
    return Prediction(
        id=post.id,
        labels=answer.labels,
        probabilities=answer.probabilities,
        kept=answer.retention.kept,
        patches=answer.retention.patches,
    )


def _data_urls(post: Post) -> list[str]:
    try:
        raws = post.image_bytes()
    except (BadRequestError, OSError) as error:
        reason = error.message if isinstance(error, BadRequestError) else error.strerror
        raise ConfigError(
            f"post {post.id!r}: its image cannot be read: {reason}; mend it or leave the "
            "post out (--skip-broken)",
            param="data",
        ) from error
    # The server goes by the bytes, whatever type the URL names.
    return [f"data:image/jpeg;base64,{base64.b64encode(raw).decode()}" for raw in raws]


def _find_card(cards: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """The model's card; the first without a parent is the base model."""
    for card in cards:
        if card["id"] == name or (name is None and card.get("parent") is None):
            return card
    raise ConfigError(
        f"--model {name!r} is not served; allowed are {[card['id'] for card in cards]}",
        param="model",
    )


def _structure_of(card: dict[str, Any]) -> LabelStructure:
    """The structure that a card describes; its answer's form is the default one where unknown."""
    own = make_structure(
        str(card.get("label_structure")),
        {name: card.get(name) for name in ("fields", "prompt", "answer")},
    )
    known = STRUCTURES.get(own.name)
    is_known = known is not None and known.fields == own.fields and known.prompt == own.prompt
    return known if known is not None and is_known else own


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _url(server: str) -> httpx.URL:
    try:
        url = httpx.URL(server)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(
            f"--server {server!r} is not a URL; expected e.g. http://127.0.0.1:8000",
            param="server",
        )
    return url
