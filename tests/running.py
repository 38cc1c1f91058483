"""The real server in this process: engine, app and uvicorn on an event loop of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serving.server import http_config, running_app
from serving.settings import Settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Client:
    """What tests ask of a server, wherever it runs."""

    url: str

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120)

    def label(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/label", body)
        assert response.status_code == 200, response.text
        return response.json()

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metric(self, name: str) -> float:
        """A metric, summed over its series."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        families = text_string_to_metric_families(text)
        return sum(s.value for family in families for s in family.samples if s.name == name)


class RunningServer(Client):
    """`python -m serving` without the process: same settings, engine, app and HTTP server."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(port=0, max_num_seqs=16, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stack = AsyncExitStack()

    def __enter__(self) -> RunningServer:
        self._thread.start()
        self.call(self._start())
        return self

    async def _start(self) -> None:
        # vLLM's own metrics are one set a process; tests/serving/test_command_line.py reads them.
        app, self.labeler = await self._stack.enter_async_context(
            running_app(self.settings, lambda line: None, CollectorRegistry())
        )
        self._server = uvicorn.Server(http_config(app, self.settings))
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _stop(self) -> None:
        self._server.should_exit = True
        await self._serving
        await self._stack.aclose()

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine on the server's loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=300)

    def tower_images(self) -> int:
        return self.call(self.labeler.engine.tower_images())
