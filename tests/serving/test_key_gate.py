"""Who gets in where: every route by every method, with every kind of key, however it is spelt."""

import random
import re
from urllib.parse import unquote

import pytest

from serving.keys import hash_of, new_key
from serving.page import page_paths
from tests.serving.key_home import (
    CHAT,
    LABEL,
    SECRETS,
    ask,
    bearer,
    check_refusal,
    client_of,
    listening,
    send_raw,
)

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


def test_every_route_is_listed_with_whom_it_is_for(make_guarded, keys_file):
    guarded = make_guarded(keys=keys_file, docs=True)
    there = {(method, route.path) for route in guarded.routes for method in route.methods}
    assert there == set(ROUTES)


@pytest.mark.parametrize("who", [None, "stranger", "user", "admin"])
@pytest.mark.parametrize("method", METHODS)
async def test_a_route_serves_those_it_is_for_by_any_method(make_guarded, keys_file, method, who):
    guarded = make_guarded(keys=keys_file, docs=True)
    headers = {"authorization": f"Bearer {new_key()}"} if who == "stranger" else bearer(who)
    async with client_of(guarded) as client:
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


async def test_metrics_and_docs_have_switches(make_guarded, keys_file):
    assert (
        await ask(make_guarded(keys=keys_file), "admin", "GET", "/openapi.json")
    ).status_code == 404
    assert (await ask(make_guarded(), None, "GET", "/openapi.json")).status_code == 404
    assert (await ask(make_guarded(docs=True), None, "GET", "/openapi.json")).status_code == 200
    opened = make_guarded(keys=keys_file, open_metrics=True)
    assert (await ask(opened, None, "GET", "/metrics")).status_code == 200


async def test_without_a_file_nobody_is_asked_for_a_key(make_guarded):
    opened = make_guarded()
    for path in ("/v1/models", "/metrics", "/readyz"):
        assert (await ask(opened, None, "GET", path)).status_code == 200
    assert (await ask(opened, "user", "POST", LABEL, json={"text": "x"})).status_code == 200


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
async def test_a_key_comes_as_one_bearer_token_or_not_at_all(guarded, header, value):
    secret = SECRETS["admin"]
    value = value.replace("KEY", secret).replace("HASH", hash_of(secret))
    answer = await ask(guarded, None, "GET", "/v1/models", headers={header: value})
    known = "invalid_api_key" if header == "authorization" else "missing_api_key"
    check_refusal(answer, 401, known)
    assert secret not in answer.text


async def test_two_keys_in_one_request_are_none(guarded):
    twice = [("authorization", f"Bearer {SECRETS['admin']}")] * 2
    check_refusal(
        await ask(guarded, None, "GET", "/v1/models", headers=twice), 401, "invalid_api_key"
    )
    answer = await ask(guarded, None, "GET", f"/v1/models?api_key={SECRETS['admin']}")
    check_refusal(answer, 401, "missing_api_key")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_schemes_case_does_not_matter(guarded, scheme):
    headers = {"authorization": f"{scheme} {SECRETS['user']}"}
    assert (await ask(guarded, None, "GET", "/v1/models", headers=headers)).status_code == 200


async def test_a_stranger_is_refused_before_a_byte_of_its_body_is_read(guarded):
    async def body():
        raise AssertionError("the body was read")
        yield b""

    for name, path, status in ((None, LABEL, 401), ("user", "/v1/adapters", 403)):
        answer = await ask(guarded, name, "POST", path, content=body())
        assert answer.status_code == status


# Spellings of a path, on a real connection


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
async def test_no_spelling_of_a_path_gets_by_without_a_key(guarded, slow_engine, path, method):
    num_served = num_other = 0
    async with listening(guarded) as port:
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
    assert slow_engine.requests == []


def meant(target):
    """The path of a target by RFC 9112: no host, query or fragment, escapes undone once."""
    path = re.sub(r"^http://[^/]*", "", target).partition("?")[0].partition("#")[0]
    return unquote(path, "latin-1")


@pytest.mark.parametrize("ending", ["%0a", "%0d", "%0a%0a", "%00", "%7f", "%c2%85", "%e2%80%a8"])
async def test_a_line_end_after_a_path_makes_it_another_one(make_guarded, keys_file, ending):
    """Patterns of the router that end in `$` would let `/metrics%0a` by the admin's check."""
    async with (
        listening(make_guarded(keys=keys_file)) as guarded,
        listening(make_guarded()) as opened,
    ):
        for path, method in [*GUARDED, ("/healthz", "GET"), ("/", "GET")]:
            assert (await send_raw(guarded, path + ending, method))[0] == 401, path
            for name in ("user", "admin"):
                status = (await send_raw(guarded, path + ending, method, name))[0]
                assert status in (403, 404), (path, name)
            assert (await send_raw(opened, path + ending, method))[0] == 404, path


@pytest.mark.parametrize("host", ["test", "a/?x=", "test/healthz?", "healthz", "", "a@b:99999"])
async def test_the_host_header_opens_nothing(guarded, host):
    async with listening(guarded) as port:
        for path, method in GUARDED:
            assert (await send_raw(port, path, method, host=host))[0] == 401, (path, host)
        assert (await send_raw(port, "/healthz", host=host))[0] == 200


async def test_only_listed_paths_exist_for_those_with_a_key(guarded):
    async with listening(guarded) as port:
        for target in ("/docs", "/redoc", "/openapi.json", "/v1", "/v1/", "/v1/completions",
                       "/page", "/page/", "/page/__init__.py", "/page/../__init__.py",
                       "/healthz/", "/v1/embeddings", "/health", "/ping", "/version"):  # fmt: skip
            assert (await send_raw(port, target))[0] == 401, target
            assert (await send_raw(port, target, name="admin"))[0] == 404, target


async def test_web_sockets_are_closed(guarded):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/healthz", "headers": []}
    await guarded(scope, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
