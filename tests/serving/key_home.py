"""An app that asks for keys, before a fake engine: what the tests of keys share."""

import asyncio
import contextlib
from pathlib import Path

import httpx
import uvicorn
import yaml

from serving.keys import hash_of, new_key
from serving.server import http_config
from serving.settings import Settings
from serving.structures import make_structure
from tests.serving.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {name: new_key() for name in ("user", "admin", "narrow", "single", "rated", "base")}
OWN = make_structure("own", {"fields": {"mood": ["up", "down"]}, "prompt": "{text}\nWhich mood?"})
LABEL, CHAT = "/v1/label", "/v1/chat/completions"
TALK = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}


def entries(**limits):
    """The file's list: one key each of `SECRETS`, with what is special about it."""
    special = {
        "admin": {"admin": True},
        "narrow": {"adapters": ["tuned", "missing"]},
        "base": {"adapters": ["base"]},
        "single": {"max_concurrency": 1},
        "rated": {"per_minute": 2},
        **limits,
    }
    return [
        {"name": name, "sha256": hash_of(secret), **special.get(name, {})}
        for name, secret in SECRETS.items()
    ]


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def bearer(name):
    return {"authorization": f"Bearer {SECRETS[name]}"} if name else {}


class SlowEngine(FakeEngine):
    """Answers labels, and streams a chat's second half, once it is told to."""

    def __init__(self):
        super().__init__()
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.num_inside = 0

    async def generate(self, request):
        with self._inside():
            await self.may_go.wait()
            return await super().generate(request)

    async def chat(self, call):
        if not call.body.get("stream"):
            return await super().chat(call)

        async def events():
            with self._inside():
                yield "data: {}\n\n"
                await self.may_go.wait()
                yield "data: [DONE]\n\n"

        return events()

    @contextlib.contextmanager
    def _inside(self):
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1


def client_of(app, name=None):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=bearer(name))


async def ask(app, name, method, path, **more):
    async with client_of(app, name) as client:
        return await client.request(method, path, **more)


def check_refusal(answer, status, code):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
    if status == 429:
        assert int(answer.headers["retry-after"]) >= 1


@contextlib.asynccontextmanager
async def listening(app, settings=None):
    """The app behind uvicorn, as the server in one process runs it; yields its port."""
    config = http_config(app, settings or Settings(port=0))
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await task


async def send_raw(port, target, method="GET", name=None, host="test", body=b""):
    """A request as its bytes: no client tidies the target up. Returns status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"Content-Length: {len(body)}"] if body else []
    lines += [f"Authorization: Bearer {SECRETS[name]}"] if name else []
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    answer = await reader.read()
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), rest


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now
