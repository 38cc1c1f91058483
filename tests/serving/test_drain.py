"""The end of a server: what was accepted is answered, what comes is refused, and for how long."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from serving.cluster.exits import Exits
from serving.draining import Drain, DrainGate
from serving.server import QuietServer
from tests.running import free_port


def slow_app(drain, ended):
    """Routes that take as long as a test says, behind the gate."""
    app = FastAPI()
    app.add_middleware(DrainGate, drain=drain)
    app.state.may_end = asyncio.Event()

    @app.get("/healthz")
    @app.get("/readyz")
    async def fine():
        return "fine"

    @app.get("/slow")
    async def slow():
        try:
            await app.state.may_end.wait()
        finally:
            ended.append("slow")
        return "answered"

    @app.get("/stream")
    async def stream():
        async def events():
            yield "data: 1\n\n"
            await app.state.may_end.wait()
            yield "data: 2\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


class Scene:
    """A server that listens, its drain, and a client with one kept-alive connection a request."""

    def __init__(self, app, drain, server, task, client, ended):
        self.app, self.drain, self.server, self.task = app, drain, server, task
        self.client, self.ended = client, ended

    async def until_inside(self, number):
        async with asyncio.timeout(30):
            while self.drain.num_inside < number:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def served(limit_s):
    drain, ended = Drain(limit_s), []
    app = slow_app(drain, ended)
    port = free_port()
    server = QuietServer(uvicorn.Config(app, port=port, lifespan="off", log_level="error"), drain)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            yield Scene(app, drain, server, task, client, ended)
        finally:
            server.stop()
            server.stop()
            await task


async def test_accepted_requests_and_streams_are_answered_and_then_the_server_ends():
    async with served(60) as scene:
        asked = [asyncio.create_task(scene.client.get(path)) for path in ("/slow", "/stream")]
        await scene.until_inside(2)
        scene.server.stop()
        await asyncio.sleep(0.3)
        assert not scene.task.done()
        scene.app.state.may_end.set()
        slow, stream = await asyncio.gather(*asked)
        assert (slow.status_code, slow.json()) == (200, "answered")
        assert stream.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        await scene.task
        with pytest.raises(httpx.ConnectError):
            await scene.client.get("/healthz")


async def test_new_requests_are_refused_on_kept_alive_and_on_new_connections():
    async with served(60) as scene:
        assert (await scene.client.get("/readyz")).status_code == 200  # the connection stays open
        asked = asyncio.create_task(scene.client.get("/slow"))
        await scene.until_inside(1)
        scene.server.stop()
        await asyncio.sleep(0)
        for path in ("/slow", "/stream", "/readyz", "/v1/label", "/nothing"):
            answer = await scene.client.get(path)
            assert answer.status_code == 503, path
            assert answer.json()["error"]["code"] == "draining"
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["connection"] == "close"
        assert (await scene.client.get("/healthz")).status_code == 200
        scene.app.state.may_end.set()
        answer = await asked
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


async def test_what_is_not_answered_within_the_limit_is_told_so_and_its_work_ends():
    async with served(0.5) as scene:
        asked = [asyncio.create_task(scene.client.get(path)) for path in ("/slow", "/stream")]
        await scene.until_inside(2)
        scene.server.stop()
        slow, stream = await asyncio.gather(*asked)
        assert slow.status_code == 503
        assert slow.json()["error"]["code"] == "draining"
        assert scene.ended == ["slow"]
        first, error, done, _ = stream.text.split("\n\n")
        assert (first, done) == ("data: 1", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
        await scene.task


async def test_a_second_signal_ends_at_once():
    async with served(600) as scene:
        asked = asyncio.create_task(scene.client.get("/slow"))
        await scene.until_inside(1)
        scene.server.stop()
        await asyncio.sleep(0.2)
        assert not asked.done()
        scene.server.stop()
        assert (await asked).status_code == 503
        await scene.task


async def test_one_that_still_sends_its_body_hears_that_the_server_ends():
    async with served(60) as scene:
        asked = asyncio.create_task(scene.client.get("/slow"))
        await scene.until_inside(1)
        scene.server.stop()

        async def body():
            for _ in range(20):
                yield b"x" * 500_000
                await asyncio.sleep(0.01)

        answer = await scene.client.post("/v1/label", content=body())
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        scene.app.state.may_end.set()
        await asked


async def test_who_connects_just_as_an_idle_server_ends_is_told_so():
    async with served(60) as scene:
        scene.server.stop()
        await asyncio.sleep(0)
        assert (await scene.client.get("/readyz")).json()["error"]["code"] == "draining"


async def test_a_server_with_nobody_inside_ends_soon():
    async with served(600) as scene:
        await scene.client.get("/readyz")
        scene.server.stop()
        async with asyncio.timeout(30):
            await scene.task


async def test_a_client_that_left_is_not_waited_for():
    async with served(600) as scene:
        asked = asyncio.create_task(scene.client.get("/stream"))
        await scene.until_inside(1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        scene.server.stop()
        async with asyncio.timeout(30):
            await scene.task


async def test_on_ray_the_end_waits_for_every_http_side_and_tells_those_who_ask_at_once():
    exits = Exits()
    asking = [asyncio.create_task(exits.begun(name)) for name in ("one", "two")]
    await asyncio.sleep(0)
    ending = asyncio.create_task(exits.all_done(600))
    assert await asyncio.gather(*asking) == [True, True]
    exits.done("one")
    await asyncio.sleep(0.1)
    assert not ending.done()
    exits.done("two")
    assert await ending


async def test_on_ray_an_http_side_that_died_before_is_not_waited_for():
    exits = Exits()
    asking = [asyncio.create_task(exits.begun(name)) for name in ("lost", "living")]
    await asyncio.sleep(0)
    exits._asked["lost"] -= 600
    exits.done("living")
    assert await exits.all_done(600)
    await asyncio.gather(*asking)


async def test_on_ray_an_http_side_that_does_not_get_empty_in_time_is_told_of(monkeypatch):
    monkeypatch.setattr("serving.cluster.exits._LAST_WORDS_S", 0.0)
    exits = Exits()
    asking = asyncio.create_task(exits.begun("one"))
    await asyncio.sleep(0)
    assert not await exits.all_done(0.1)
    assert await asking
