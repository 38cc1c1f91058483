"""The requests of a fault drill: labels of adapters and of the base model, streamed chats."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import httpx

from bench.answers import CONNECTION, FAILED, Answer, outcome_of, outcome_of_stream
from bench.arrivals import Arrival, OpenLoop, arrivals
from bench.contest import make_text
from bench.drills import ADAPTER, NUM_PROBES, SIZE, probe_body
from bench.pictures import picture_url

MIXTURE = {ADAPTER: 0.35, "sentiment": 0.25, "base": 0.2, "stream": 0.2}
TIMEOUT_S = 150.0
"""Above the server's own deadline: a client that gives up first would hide it."""
_NUM_PICTURES = 64
_STREAM_TOKENS = 24


class Load:
    """Constant open-loop load on one URL, and what came of each request.

    Args:
        client: of the application.
        base: the base model's name.
        rate: requests a second.
        seed: of times, kinds and posts.
        most_in_flight: see `OpenLoop`.
        mixture: of kinds, by their weights.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        base: str,
        rate: float,
        seed: int,
        most_in_flight: int,
        mixture: Mapping[str, float] = MIXTURE,
    ) -> None:
        self._client, self._base, self._seed = client, base, seed
        self._pictures = [picture_url(seed, index, SIZE) for index in range(_NUM_PICTURES)]
        self.loop = OpenLoop(arrivals(rate, mixture, seed), self._send, most_in_flight)
        self.answers: list[Answer] = []
        self.probes: list[tuple[int, dict[str, Any]]] = []

    def volley(self, size: int) -> None:
        """Sends so many labels at once, beside the schedule: every engine has work to lose."""
        for index in range(size):
            arrival = Arrival(number=100_000 + index, at_s=self.loop.now_s, kind="volley")
            self.loop.send_now(arrival)

    async def _send(self, arrival: Arrival) -> None:
        try:
            send = self._stream if arrival.kind == "stream" else self._label
            outcome, detail = await send(arrival)
        except httpx.TimeoutException as error:
            outcome, detail = FAILED, type(error).__name__
        except httpx.TransportError as error:
            outcome, detail = CONNECTION, repr(error)
        answer = Answer(
            kind=arrival.kind,
            at_s=arrival.at_s,
            seconds=time.monotonic() - self.loop.started - arrival.at_s,
            outcome=outcome,
            detail=detail,
        )
        self.answers.append(answer)

    async def _label(self, arrival: Arrival) -> tuple[str, str]:
        is_probe = arrival.kind == ADAPTER
        number = arrival.number % NUM_PROBES
        body = probe_body(number) if is_probe else self._post(arrival)
        response = await self._client.post("/v1/label", json=body)
        answer = _json(response)
        outcome, detail = outcome_of(response.status_code, response.headers, answer)
        if is_probe and response.status_code == 200:
            self.probes.append((number, answer["probabilities"]))
        return outcome, detail

    async def _stream(self, arrival: Arrival) -> tuple[str, str]:
        post = self._post(arrival)
        content = [
            {"type": "text", "text": post["text"]},
            {"type": "image_url", "image_url": {"url": post["image"]}},
        ]
        body = {
            "model": self._base,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": _STREAM_TOKENS,
            "temperature": 0,
            "stream": True,
        }
        lines: list[str] = []
        call = self._client.stream("POST", "/v1/chat/completions", json=body)
        async with call as response:
            if response.status_code != 200:
                await response.aread()
                return outcome_of(response.status_code, response.headers, _json(response))
            try:
                async for line in response.aiter_lines():
                    lines.append(line)
            except httpx.TransportError as error:
                lines.append(f"broken by {error!r}")
        return outcome_of_stream(lines)

    def _post(self, arrival: Arrival) -> dict[str, Any]:
        return {
            "model": self._base if arrival.kind in ("base", "stream", "volley") else arrival.kind,
            "text": make_text(self._seed, arrival.number),
            "image": self._pictures[arrival.number % _NUM_PICTURES],
        }


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except json.JSONDecodeError:
        return {"error": {"message": response.text[:120]}}
