"""Keys: their file, who gets in where, how often, and that no log knows them."""

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
import uvicorn
import yaml
from prometheus_client import CollectorRegistry

from serving.app import build_app
from serving.audit import Refusals
from serving.cli import parse_command
from serving.client_key import bearer_headers
from serving.errors import ConfigError, KeyLimitError
from serving.following import Bulletin
from serving.keyring import Allowance, Keyring
from serving.keys import Key, add_key, describe_access, hash_of, new_key, read_keys
from serving.labeler import Labeler
from serving.logs import configure_logs
from serving.manifest import Manifest
from serving.metrics import Metrics
from serving.page import page_paths
from serving.registry import Registry
from serving.server import http_config
from serving.settings import Settings
from serving.structures import make_structure
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_labeler import catalogue

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


@pytest.fixture
def engine():
    return SlowEngine()


@pytest.fixture
def keys(tmp_path):
    return write(tmp_path / "keys.yaml", entries())


@pytest.fixture
def make_app(engine, published_tokenizer):
    def make(**settings):
        adapters = {
            "tuned": Manifest(label_structure="llavac"),
            "other": Manifest(label_structure=OWN),
        }
        labeler = Labeler(engine, catalogue(adapters), published_tokenizer)
        return build_app(
            labeler,
            Settings(**settings),
            Metrics(CollectorRegistry()),
            bulletin=Bulletin(labeler.catalogue),
            adapters=Registry(None, check=None),
        )

    return make


@pytest.fixture
def app(make_app, keys):
    return make_app(keys=keys)


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


# The file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no keys"),
        ("[]", "has no keys"),
        ("name: alice", "must be a list"),
        ("- [", "not YAML"),
        ("- alice", "entry 1"),
        ([{"name": "a"}], "entry 1, 'sha256'"),
        ([{"name": "a", "sha256": "0" * 63}], "64 hexadecimal digits"),
        ([{"name": "a", "sha256": "g" * 64}], "64 hexadecimal digits"),
        ([{"name": "a", "sha256": "0" * 64 + "\n"}], "64 hexadecimal digits"),
        ([{"name": "a b", "sha256": "0" * 64}], "a name is"),
        ([{"name": "a\n", "sha256": "0" * 64}], "a name is"),
        ([{"name": "a", "sha256": "0" * 64, "role": "x"}], "entry 1, 'role'"),
        ([{"name": "a", "sha256": "0" * 64, "admin": "yes"}], "entry 1, 'admin'"),
        ([{"name": "a", "sha256": "0" * 64, "adapters": []}], "entry 1, 'adapters'"),
        ([{"name": "a", "sha256": "0" * 64, "adapters": "x"}], "entry 1, 'adapters'"),
        ([{"name": "a", "sha256": "0" * 64, "max_concurrency": 0}], "entry 1, 'max_concurrency'"),
        ([{"name": "a", "sha256": "0" * 64, "per_minute": True}], "entry 1, 'per_minute'"),
        ([{"name": "a", "sha256": c * 64} for c in "01"], "name 'a' twice"),
        ([{"name": n, "sha256": c * 64} for n, c in ("aA", "ba")], "'a' and 'b' the same key"),
        ([{"name": f"n{i}", "sha256": f"{i:064x}"} for i in range(1001)], "up to 1000 keys"),
        ("x" * 1_000_001, "up to 1000000 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, content, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_keys(write(tmp_path / "keys.yaml", content))


@pytest.mark.parametrize(
    "content",
    [
        [{"name": "a", "key": "SECRET"}],
        [{"name": "a", "sha256": "SECRET"}],
        [{"name": "SECRET SECRET", "sha256": "0" * 64}],
        ["SECRET"],
        "SECRET",
        "- name: a\n  sha256: 'SECRET\n- [",
        "- name: a\n key: SECRET",
    ],
)
def test_a_key_that_stands_in_the_file_by_mistake_is_not_repeated(tmp_path, content):
    secret = new_key()
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    with pytest.raises(ConfigError) as failed:
        read_keys(write(tmp_path / "keys.yaml", text.replace("SECRET", secret)))
    assert secret[8:20] not in failed.value.message


def test_a_file_that_is_missing_or_anybodys_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "keys.yaml")
    with pytest.raises(ConfigError, match="not a file"):
        read_keys(tmp_path)
    path = write(tmp_path / "keys.yaml", entries())
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)


# The command


def run_key(*arguments):
    return asyncio.run(parse_command(["key", *arguments])())


def test_the_command_prints_a_key_once_and_keeps_its_hash(tmp_path, capsys):
    path = tmp_path / "keys.yaml"
    assert run_key("--name", "alice", "--adapters", "a,b", "--file", str(path)) == 0
    secret = capsys.readouterr().out.strip()
    assert re.fullmatch(r"sieve-[\w-]{43}", secret)
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(f"# ours\n{path.read_text()}".rstrip("\n"))
    run_key("--name", "ops", "--admin", "--max-concurrency", "3", "--per-minute", "9",
            "--file", str(path))  # fmt: skip
    assert path.read_text().startswith("# ours\n")
    alice, ops = read_keys(path)
    assert alice == Key(name="alice", sha256=hash_of(secret), adapters=["a", "b"])
    assert (ops.admin, ops.max_concurrency, ops.per_minute) == (True, 3, 9)
    assert {item.name for item in tmp_path.iterdir()} == {"keys.yaml"}


def test_without_a_file_the_entry_is_printed(tmp_path, capsys):
    run_key("--name", "alice")
    secret, rest = capsys.readouterr().out.split("\n", 1)
    (entry,) = read_keys(write(tmp_path / "keys.yaml", rest.split("\n", 1)[1]))
    assert entry == Key(name="alice", sha256=hash_of(secret))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a b"], "--name 'a b': a name is"),
        (["--name", "a", "--per-minute", "0"], "--per-minute 0: Input should be greater than 0"),
        (["--name", "a", "--adapters", "x,"], "--adapters"),
        (["--name", "a", "--file", "/no/such/folder/keys.yaml"], "cannot be written"),
    ],
)
def test_the_command_names_what_it_refuses(arguments, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_key(*arguments)


def test_the_command_leaves_a_file_as_it_is_where_it_cannot_add(tmp_path):
    path = write(tmp_path / "keys.yaml", entries())
    before = path.read_text()
    with pytest.raises(ConfigError, match="name 'user' twice"):
        run_key("--name", "user", "--file", str(path))
    assert path.read_text() == before
    path.write_text("- [")
    with pytest.raises(ConfigError, match="not YAML"):
        run_key("--name", "user", "--file", str(path))
    assert path.read_text() == "- ["


def test_keys_that_are_added_at_once_are_all_kept(tmp_path):
    path = tmp_path / "keys.yaml"

    def add(name):
        add_key(path, Key(name=name, sha256=hash_of(new_key())))

    threads = [threading.Thread(target=add, args=(f"n{i}",)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"n{i}" for i in range(24)}


# Who gets in where

OPEN, USER, ADMIN = "anybody", "any key", "an admin's key"
ROUTES = {
    **{(method, path): OPEN for path in page_paths() for method in ("GET", "HEAD")},
    ("GET", "/healthz"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("POST", LABEL): USER,
    ("POST", CHAT): USER,
    ("GET", "/v1/models"): USER,
    ("GET", "/openapi.json"): USER,
    ("HEAD", "/openapi.json"): USER,
    ("GET", "/metrics"): ADMIN,
    ("POST", "/v1/adapters"): ADMIN,
    ("DELETE", "/v1/adapters/{name}"): ADMIN,
}
"""Every route there is, and whom it is for. A new one must be decided upon here."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


def test_every_route_is_listed_with_whom_it_is_for(make_app, keys):
    app = make_app(keys=keys, docs=True)
    there = {(method, route.path) for route in app.routes for method in route.methods}
    assert there == set(ROUTES)


@pytest.mark.parametrize("who", [None, "stranger", "user", "admin"])
@pytest.mark.parametrize("method", METHODS)
async def test_a_route_serves_those_it_is_for_by_any_method(make_app, keys, method, who):
    app = make_app(keys=keys, docs=True)
    headers = {"authorization": f"Bearer {new_key()}"} if who == "stranger" else bearer(who)
    async with client_of(app) as client:
        for path in sorted({path for _, path in ROUTES}):
            answer = await client.request(
                method, path.replace("{name}", "tuned"), headers=headers, json={}
            )
            role = ROUTES.get((method, path))
            is_admins = ADMIN in (ROUTES.get((m, path)) for m in METHODS)
            is_open = path in ("/healthz", "/readyz", *page_paths()) and method in ("GET", "HEAD")
            if is_open:
                assert answer.status_code == (200 if role else 405), (method, path)
            elif who in (None, "stranger"):
                check_no_key(answer, method, who)
            elif who == "user" and is_admins:
                assert answer.status_code == 403, (method, path)
            else:
                assert answer.status_code not in (401, 403), (method, path, answer.text)
                assert (answer.status_code == 405) == (role is None), (method, path)


def check_no_key(answer, method, who):
    assert answer.status_code == 401, answer.url
    if method != "HEAD":
        check_refusal(answer, 401, "missing_api_key" if who is None else "invalid_api_key")


async def test_metrics_and_docs_have_switches(make_app, keys):
    assert (await ask(make_app(keys=keys), "admin", "GET", "/openapi.json")).status_code == 404
    assert (await ask(make_app(), None, "GET", "/openapi.json")).status_code == 404
    assert (await ask(make_app(docs=True), None, "GET", "/openapi.json")).status_code == 200
    opened = make_app(keys=keys, open_metrics=True)
    assert (await ask(opened, None, "GET", "/metrics")).status_code == 200


async def test_without_a_file_nobody_is_asked_for_a_key(make_app):
    app = make_app()
    for path in ("/v1/models", "/metrics", "/readyz"):
        assert (await ask(app, None, "GET", path)).status_code == 200
    assert (await ask(app, "user", "POST", LABEL, json={"text": "x"})).status_code == 200


SENT = [
    ("authorization", "Basic KEY"),
    ("authorization", "KEY"),
    ("authorization", "Bearer"),
    ("authorization", "Bearer "),
    ("authorization", "Bearer KEYx"),
    ("authorization", "Bearer xKEY"),
    ("authorization", "Bearer KEY KEY"),
    ("authorization", "Bearer KEY, Bearer KEY"),
    ("authorization", "Bearer HASH"),
    ("authorization", "Bearer " + "x" * 100_000),
    ("x-api-key", "KEY"),
    ("api-key", "KEY"),
    ("cookie", "authorization=Bearer KEY"),
    ("proxy-authorization", "Bearer KEY"),
]


@pytest.mark.parametrize(("header", "value"), SENT)
async def test_a_key_comes_as_one_bearer_token_or_not_at_all(app, header, value):
    secret = SECRETS["admin"]
    value = value.replace("KEY", secret).replace("HASH", hash_of(secret))
    answer = await ask(app, None, "GET", "/v1/models", headers={header: value})
    known = "invalid_api_key" if header == "authorization" else "missing_api_key"
    check_refusal(answer, 401, known)
    assert secret not in answer.text


async def test_two_keys_in_one_request_are_none(app):
    twice = [("authorization", f"Bearer {SECRETS['admin']}")] * 2
    check_refusal(await ask(app, None, "GET", "/v1/models", headers=twice), 401, "invalid_api_key")
    answer = await ask(app, None, "GET", f"/v1/models?api_key={SECRETS['admin']}")
    check_refusal(answer, 401, "missing_api_key")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_schemes_case_does_not_matter(app, scheme):
    headers = {"authorization": f"{scheme} {SECRETS['user']}"}
    assert (await ask(app, None, "GET", "/v1/models", headers=headers)).status_code == 200


async def test_a_stranger_is_refused_before_a_byte_of_its_body_is_read(app):
    async def body():
        raise AssertionError("the body was read")
        yield b""

    for name, path, status in ((None, LABEL, 401), ("user", "/v1/adapters", 403)):
        answer = await ask(app, name, "POST", path, content=body())
        assert answer.status_code == status


# Spellings of a path, on a real connection


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


def spellings(path, rng):
    """Targets that some server, proxy or framework takes for this path."""
    parts = path.strip("/").split("/")
    yield from (f"/{path}", f"//x{path}", path + "/", path + "//", path + "/.", path + "/x/..")
    yield from (f"/.{path}", f"/..{path}", f"/%2e{path}", f"/%2e%2e{path}", f"/page/..{path}")
    yield from (f"/page/%2e%2e{path}", f"/healthz/..{path}", f"/readyz;{path}", f"/{path}%2f")
    yield from (path.upper(), path.title(), path + ";x", path + "%00", path + "%20", path + "%0a")
    yield from (path.replace("/", "\\"), "/" + "%2f".join(parts), "/" + "//".join(parts))
    yield from (f"http://test{path}", f"http://healthz{path}", f"{path}?/healthz", f"{path}#/")
    yield from ("/".join(["", *(p[0] + f"%{ord(p[1]):02x}" + p[2:] for p in parts)]), f"*{path}")
    for _ in range(20):
        place = rng.randrange(1, len(path))
        odd = rng.choice(["/", "./", "../", "%2f", "%2e/", "\\", ";", "%", "%25", "%c0%af", "é"])
        yield path[:place] + odd + path[place:]


GUARDED = [(LABEL, "POST"), (CHAT, "POST"), ("/v1/models", "GET"), ("/metrics", "GET"),
           ("/v1/adapters", "POST"), ("/v1/adapters/tuned", "DELETE")]  # fmt: skip
ADMINS = ("/metrics", "/v1/adapters", "/v1/adapters/tuned")


@pytest.mark.parametrize(("path", "method"), GUARDED)
async def test_no_spelling_of_a_path_gets_by_without_a_key(app, engine, path, method):
    num_served = num_other = 0
    async with listening(app) as port:
        for target in spellings(path, random.Random(7)):
            status, head, _ = await send_raw(port, target, method)
            assert status in (400, 401), target
            assert b"location:" not in head
            status, head, _ = await send_raw(port, target, method, "user")
            assert b"location:" not in head  # no redirect to the right spelling
            is_http = b"x-request-id" in head  # else uvicorn refused it, and nobody saw it
            if is_http and meant(target) == path:
                num_served += 1
                assert status == (403 if path in ADMINS else 200 if method == "GET" else 400)
            elif is_http:
                num_other += 1
                assert status in (403, 404) if meant(target).startswith(ADMINS) else status == 404
    assert num_served >= 2
    assert num_other >= 30
    assert engine.requests == []


def meant(target):
    """The path of a target by RFC 9112: no host, query or fragment, escapes undone once."""
    path = re.sub(r"^http://[^/]*", "", target).partition("?")[0].partition("#")[0]
    return unquote(path, "latin-1")


@pytest.mark.parametrize("ending", ["%0a", "%0d", "%0a%0a", "%00", "%7f", "%c2%85", "%e2%80%a8"])
async def test_a_line_end_after_a_path_makes_it_another_one(make_app, keys, ending):
    """Patterns of the router that end in `$` would let `/metrics%0a` by the admin's check."""
    async with listening(make_app(keys=keys)) as guarded, listening(make_app()) as opened:
        for path, method in [*GUARDED, ("/healthz", "GET"), ("/", "GET")]:
            assert (await send_raw(guarded, path + ending, method))[0] == 401, path
            for name in ("user", "admin"):
                status = (await send_raw(guarded, path + ending, method, name))[0]
                assert status in (403, 404), (path, name)
            assert (await send_raw(opened, path + ending, method))[0] == 404, path


@pytest.mark.parametrize("host", ["test", "a/?x=", "test/healthz?", "healthz", "", "a@b:99999"])
async def test_the_host_header_opens_nothing(app, host):
    async with listening(app) as port:
        for path, method in GUARDED:
            assert (await send_raw(port, path, method, host=host))[0] == 401, (path, host)
        assert (await send_raw(port, "/healthz", host=host))[0] == 200


async def test_only_listed_paths_exist_for_those_with_a_key(app):
    async with listening(app) as port:
        for target in ("/docs", "/redoc", "/openapi.json", "/v1", "/v1/", "/v1/completions",
                       "/page", "/page/", "/page/__init__.py", "/page/../__init__.py",
                       "/healthz/", "/v1/embeddings", "/health", "/ping", "/version"):  # fmt: skip
            assert (await send_raw(port, target))[0] == 401, target
            assert (await send_raw(port, target, name="admin"))[0] == 404, target


async def test_web_sockets_are_closed(app):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/healthz", "headers": []}
    await app(scope, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


# Limits of a key


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_key_has_as_many_requests_at_once_as_it_may(app, engine):
    engine.may_go.clear()
    async with client_of(app, "single") as client:
        first = asyncio.create_task(client.post(LABEL, json={"text": "x"}))
        await until(lambda: engine.num_inside == 1)
        check_refusal(await client.post(LABEL, json={"text": "x"}), 429, "key_concurrency")
        check_refusal(await client.get("/v1/models"), 429, "key_concurrency")
        assert (await ask(app, "user", "GET", "/v1/models")).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        engine.may_go.set()
        assert (await first).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("does_leave", [False, True])
async def test_a_stream_holds_its_place_until_its_end(app, engine, does_leave):
    engine.may_go.clear()
    talk = json.dumps({**TALK, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(talk)}\r\n"
    head += f"Content-Type: application/json\r\nAuthorization: Bearer {SECRETS['single']}\r\n\r\n"

    async def listed():
        return (await ask(app, "single", "GET", "/v1/models")).status_code

    async with listening(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + talk)
        assert (await reader.readuntil(b"data: {}\n\n")).startswith(b"HTTP/1.1 200")
        assert await listed() == 429
        if does_leave:
            writer.transport.abort()
        else:
            engine.may_go.set()
            await reader.readuntil(b"[DONE]\n\n")
        async with asyncio.timeout(10):
            while await listed() == 429:
                await asyncio.sleep(0.01)
        writer.close()
    assert await listed() == 200


async def test_a_request_that_fails_gives_its_place_back(app, engine):
    for _ in range(5):
        answer = await ask(app, "single", "POST", LABEL, json={"text": 5})
        assert answer.status_code == 400
        answer = await ask(app, "single", "POST", LABEL, content=b"{")
        assert answer.status_code == 400
    engine.is_dead = True
    for _ in range(3):
        answer = await ask(app, "single", "POST", LABEL, json={"text": "x"})
        assert answer.json()["error"]["code"] == "engine_dead"


async def test_a_key_that_sends_too_often_is_told_when_to_come_again(app):
    for _ in range(2):
        assert (await ask(app, "rated", "GET", "/v1/models")).status_code == 200
    answer = await ask(app, "rated", "GET", "/v1/models")
    check_refusal(answer, 429, "key_rate")
    assert 25 <= int(answer.headers["retry-after"]) <= 30  # one every thirty seconds
    assert (await ask(app, "user", "GET", "/v1/models")).status_code == 200


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000])
def test_whoever_waits_as_told_gets_in_and_nobody_exceeds_the_rate(per_minute):
    key = Key(name="a", sha256="0" * 64, per_minute=per_minute)
    clock, rng = Clock(), random.Random(per_minute)
    allowance, passed, refused = Allowance(clock), [], 0

    def attempt():
        with allowance.passage(key):
            passed.append(clock.now)

    for _ in range(6 * per_minute + 20):
        try:
            attempt()
        except KeyLimitError as error:
            refused += 1
            clock.now += error.retry_after_s
            attempt()
        clock.now += rng.choice([0, 0, 0.2, 5]) / per_minute
    assert refused
    for start in passed:
        within = sum(start <= at < start + 60 for at in passed)
        assert within <= 2 * per_minute + 1  # a full bucket and what fills it meanwhile


def test_the_wait_for_a_place_follows_how_long_requests_take():
    key = Key(name="a", sha256="0" * 64, max_concurrency=2)
    clock = Clock()
    allowance = Allowance(clock)

    def told():
        with allowance.passage(key), allowance.passage(key):
            with pytest.raises(KeyLimitError) as refused, allowance.passage(key):
                pass
            return refused.value.retry_after_s

    assert told() == 1
    for _ in range(100):
        with allowance.passage(key):
            clock.now += 20
    assert told() == 10  # two places, twenty seconds each: one is free every ten


# Which models


async def test_a_key_asks_for_its_own_models_only(app, engine):
    for name, model, status in [
        ("narrow", "tuned", 200), ("narrow", "other", 403), ("narrow", "base", 403),
        ("narrow", None, 403), ("narrow", "nobody", 403), ("base", None, 200),
        ("base", "base", 200), ("base", "tuned", 403), ("user", "other", 200),
    ]:  # fmt: skip
        label = {"text": "x"} if model is None else {"text": "x", "model": model}
        answer = await ask(app, name, "POST", LABEL, json=label)
        assert answer.status_code == status, (name, model, answer.text)
        if model is not None:
            talk = await ask(app, name, "POST", CHAT, json={**TALK, "model": model})
            assert talk.status_code == status, (name, model, talk.text)
        if status == 403:
            check_refusal(answer, 403, "adapter_not_allowed")


async def test_a_key_hears_of_no_other_models(app):
    listed = (await ask(app, "narrow", "GET", "/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["tuned"]
    assert "own" not in listed["label_structures"]
    assert "own" in (await ask(app, "user", "GET", "/v1/models")).json()["label_structures"]
    bodies = [
        {"model": "missing"},  # allowed, but not served
        {"model": "other"},
        {"model": "tuned", "label_structure": "own"},
        {"model": "tuned", "label_structure": "nothing"},
    ]
    for body in bodies:
        answer = await ask(app, "narrow", "POST", LABEL, json={"text": "x", **body})
        assert 400 <= answer.status_code < 500
        message = answer.json()["error"]["message"].replace(f"model={body['model']!r}", "")
        assert "other" not in message
        assert "mood" not in answer.text
    answer = await ask(app, "narrow", "POST", LABEL, json={"text": "x", "model": "missing"})
    check_refusal(answer, 404, "model_not_found")


# Salt


async def test_every_key_has_a_prefix_cache_of_its_own(app, engine, make_app):
    async def salts(name, served=app):
        engine.requests.clear()
        assert (await ask(served, name, "POST", LABEL, json={"text": "x"})).status_code == 200
        assert (await ask(served, name, "POST", CHAT, json=TALK)).status_code == 200
        return {request.cache_salt for request in engine.requests}

    found = {name: await salts(name) for name in ("user", "admin", "base")}
    assert all(len(each) == 1 for each in found.values())
    assert len(set.union(*found.values())) == 3
    assert await salts("user") == found["user"]
    assert await salts(None, make_app()) == {None}
    hashes = "".join(hash_of(secret) for secret in SECRETS.values())
    for (salt,) in found.values():
        assert salt not in hashes
        assert re.fullmatch(r"[0-9a-f]{32}", salt)  # vLLM allows 128 characters, few others
    assert not any(salt in repr(engine.requests) for (salt,) in found.values())


# Changes of the file


def test_a_changed_file_is_seen_within_a_second_and_a_broken_one_changes_nothing(tmp_path, caplog):
    clock = Clock()
    path = write(tmp_path / "keys.yaml", entries())
    ring = Keyring(path, clock)
    user, late = SECRETS["user"].encode(), new_key()
    more = [*entries()[1:], {"name": "late", "sha256": hash_of(late)}]
    write(path, more)
    clock.now += 0.5
    assert ring.find(user)
    clock.now += 0.6
    assert ring.find(user) is None
    assert ring.find(late.encode()).name == "late"
    for broken in ("- [", [], [*more, *more]):
        write(path, broken)
        clock.now += 1.1
        assert ring.find(late.encode()).name == "late"
    path.unlink()
    clock.now += 1.1
    assert ring.find(late.encode()).name == "late"
    unusable = [r for r in caplog.records if "keys stay as they were" in r.getMessage()]
    assert len(unusable) == 4
    write(path, entries())
    clock.now += 1.1
    assert ring.find(user).name == "user"
    assert ring.find(late.encode()) is None


def test_a_changed_limit_holds_for_a_key_that_is_at_work(tmp_path):
    clock = Clock()
    path = write(tmp_path / "keys.yaml", entries())
    ring = Keyring(path, clock)

    def passage():
        key = ring.find(SECRETS["single"].encode())
        return ring.allowance(key).passage(key)

    with passage():
        with pytest.raises(KeyLimitError), passage():
            pass
        write(path, entries(single={"max_concurrency": 2}))
        clock.now += 1.1
        with passage(), pytest.raises(KeyLimitError), passage():
            pass


# Logs


@pytest.fixture
def logged():
    """Loggers as they were, after a test that configures them."""
    loggers = [logging.getLogger(name) for name in ("sieve", "sieve.audit")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    yield
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.mark.parametrize("level", ["debug", "error"])
async def test_audit_lines_name_the_key_and_no_log_holds_it(
    make_app, keys, capsys, logged, level, monkeypatch
):
    settings = Settings(log_level=level, log_format="json", port=0, keys=keys)
    configure_logs(settings)
    app = make_app(keys=keys, log_level=level)
    stranger = new_key()
    async with listening(app, settings) as port:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            for name in (*SECRETS, None):
                await client.post(LABEL, json={"text": "x"}, headers=bearer(name))
                await client.get(f"/v1/models?key={SECRETS['user']}", headers=bearer(name))
                await client.post("/v1/adapters", json={"name": "new"}, headers=bearer(name))
                await client.delete("/v1/adapters/gone", headers=bearer(name))
            wrong = {"authorization": f"Bearer {stranger}"}
            assert (await client.get("/v1/models", headers=wrong)).status_code == 401
    said = capsys.readouterr()
    text = said.out + said.err
    for secret in (stranger, *SECRETS.values()):
        assert secret not in text
        assert hash_of(secret) not in text
        assert secret.removeprefix("sieve-") not in text
    lines = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    audit = [line for line in lines if line["logger"] == "sieve.audit"]
    kinds = {line["what"]: line for line in audit}
    assert kinds["keys_read"]["names"] == list(SECRETS)
    refused = kinds["adapter_refused"]
    assert (refused["key"], refused["adapter"]) == ("admin", "new")
    assert refused.keys() >= {"time", "request_id", "reason"}
    assert kinds["adapter_not_removed"]["adapter"] == "gone"
    assert kinds["requests_refused"]["count"] == 1  # the others wait for the next line
    access = [line for line in lines if line["logger"] == "sieve.access"]
    assert bool(access) == (level == "debug")
    if access:
        assert {line.get("key") for line in access} == {*SECRETS, None}


async def test_changes_of_keys_are_audited_by_name(tmp_path, caplog):
    clock = Clock()
    path = write(tmp_path / "keys.yaml", entries())
    ring = Keyring(path, clock)
    fresh = {"name": "late", "sha256": hash_of(new_key())}
    write(path, [*entries(user={"admin": True})[:-1], fresh])
    clock.now += 1.1
    ring.find(b"x")
    lines = [r.fields for r in caplog.records if r.name == "sieve.audit"]
    assert lines[-1] == {
        "what": "keys_changed", "added": ["late"], "removed": ["base"], "changed": ["user"],
    }  # fmt: skip


def test_a_flood_of_refusals_is_a_line_in_ten_seconds(caplog):
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(1000):
        refusals.add("invalid_api_key", None)
        clock.now += 0.02
    refusals.add("key_rate", "alice")
    clock.now += 10
    refusals.tell()
    refusals.tell()
    counts = [r.fields for r in caplog.records if r.name == "sieve.audit"]
    assert len(counts) <= 4
    by_code = {code: sum(c["count"] for c in counts if c["code"] == code)
               for code in ("invalid_api_key", "key_rate")}  # fmt: skip
    assert by_code == {"invalid_api_key": 1000, "key_rate": 1}
    assert counts[-1]["key"] == "alice"


def test_a_server_that_others_reach_without_keys_says_so(tmp_path):
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert describe_access(None, host) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"):
        assert "WARNING" in describe_access(None, host)
    path = write(tmp_path / "keys.yaml", entries())
    assert describe_access(path, "0.0.0.0") == "keys: 6, of which 1 may change adapters"


# Our own clients


def test_our_clients_send_the_key_of_the_environment(monkeypatch):
    monkeypatch.delenv("SIEVE_API_KEY", raising=False)
    assert bearer_headers() == {}
    monkeypatch.setenv("SIEVE_API_KEY", " sieve-x\n")
    assert bearer_headers() == {"Authorization": "Bearer sieve-x"}
    for bad in ("a b", "ключ", "a\nb"):
        monkeypatch.setenv("SIEVE_API_KEY", bad)
        with pytest.raises(ConfigError, match="SIEVE_API_KEY") as failed:
            bearer_headers()
        assert bad not in failed.value.message


async def test_label_works_through_a_server_with_keys(app, tmp_path):
    posts = write(tmp_path / "posts.jsonl", '{"id": "1", "text": "x"}\n{"id": "2", "text": "y"}\n')
    async with listening(app) as port:
        command = [sys.executable, "-m", "serving", "label", "--data", str(posts),
                   "--server", f"http://127.0.0.1:{port}"]  # fmt: skip

        async def run(**extra):
            process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, env={**os.environ, **extra}, stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            _, errors = await process.communicate()
            return process.returncode, errors.decode()

        assert (await run(SIEVE_API_KEY=SECRETS["user"]))[0] == 0
        status, errors = await run(SIEVE_API_KEY="")
        assert status == 2
        assert "a key is needed" in errors
        status, errors = await run(SIEVE_API_KEY=SECRETS["narrow"])
        assert status == 2
        assert "is not allowed with key 'narrow'" in errors
