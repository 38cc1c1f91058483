"""Bad requests and bad clients, to the real server: refused in OpenAI's shape, hurting nobody else.

One server with keys a home, asked by all tests. The requests are in `bench.bad_requests`.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.bad_requests import BAD, UNUSUAL
from bench.process_tree import usage
from tests.pictures import data_url, noise
from tests.serving.hostile_clients import LEAKS, Raw, engine_cores, head, send
from tests.serving.hostile_server import (
    CLIENT_TIMEOUT_S,
    HASHES,
    KEYS,
    bearer,
    broken_adapters,
    good,
    hostile_server,
    metric,
    metrics,
    post,
)

ON_RAY = pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.long])


@pytest.fixture(scope="module", params=["process", ON_RAY])
def server(request, tmp_path_factory):
    with hostile_server(request.param, tmp_path_factory.mktemp("bad")) as started:
        started.home = request.param
        yield started


@pytest.fixture
def own_server(server):
    """The server whose connections are ours; those of Ray's proxy have no such limits."""
    if server.home == "ray":
        pytest.skip("connections are those of Ray Serve's proxy")
    return server


def beside_a_good_one(server, ask):
    """What comes of a request; a good one that is sent at the same moment is answered."""
    with ThreadPoolExecutor(2) as pool:
        fine = pool.submit(good, server)
        found = ask()
        assert fine.result().status == 200
    assert engine_cores(server.pid) == server.cores
    return found


def asked(server, request, key="user"):
    body, headers = request.body(), {**request.headers, **bearer(key)}
    return beside_a_good_one(
        server, lambda: send(server.url, request.method, request.path, body, headers)
    )


def check_error(answer, param="", word=""):
    error = answer.error
    assert error is not None, answer.body[:300]
    assert error.keys() == {"message", "type", "param", "code"}
    assert param in (error["param"] or ""), error
    assert word in error["message"], error
    assert 0 < len(error["message"]) < 700
    assert not LEAKS.search(answer.body.decode()), error


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_alone(server, name):
    request = BAD[name]
    answer = asked(server, request, "admin" if "/v1/adapters" in request.path else "user")
    assert answer.status in request.statuses, answer.body[:300]
    if request.method != "HEAD":
        check_error(answer, request.param, request.word)


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_request_is_answered_or_clearly_refused(server, name):
    request = UNUSUAL[name]
    answer = asked(server, request)
    assert answer.status in request.statuses, answer.body[:300]
    if answer.status != 200:
        check_error(answer)
        return
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in answer.body
        return
    for field in json.loads(answer.body).get("probabilities", {}).values():
        assert sum(field.values()) == pytest.approx(1, abs=1e-3)


PRIVATE = [
    ("GET", "/v1/models"), ("POST", "/v1/label"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/sentiment"), ("GET", "/metrics"),
    ("GET", "//v1/models"), ("GET", "/v1/./models"), ("GET", "/v1/%2e%2e/v1/models"),
    ("GET", "/healthz/../v1/models"), ("GET", "/%761/models"), ("GET", "/v1/models/"),
    ("GET", "/V1/MODELS"), ("GET", "/v1/models?x=/healthz"), ("GET", "/v1/models%2f"),
    ("GET", "/page/../v1/models"), ("GET", "/nope"), ("OPTIONS", "/v1/label"),
    ("GET", "http://other/v1/models"), ("GET", "/openapi.json"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PRIVATE)
def test_nothing_is_served_without_a_known_key(server, method, path):
    for host in ("x", "a/?x=", "a/healthz?", "127.0.0.1#"):
        for key in (None, "Bearer nobody", "Basic dTpw", "Bearer ", "bearer", KEYS["user"]):
            headers = {"Host": host, **({"Authorization": key} if key else {})}
            answer = send(server.url, method, path, b"", headers)
            assert answer.status in (400, 401), (host, key, answer.status, answer.body[:200])
            if answer.status == 401:
                check_error(answer)
                assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_users_key_changes_no_adapter(server):
    assert post(server, "/v1/adapters", {"name": "sentiment"}).status == 403
    answer = send(server.url, "DELETE", "/v1/adapters/sentiment", b"", bearer())
    assert answer.status == 403
    check_error(answer)


def test_thousands_of_unknown_names_leave_no_trace(server):
    post(server, "/v1/label", {"model": "unknown-0", "text": "x"})
    series, memory = len(metrics(server).splitlines()), usage(server.pid).rss

    def ask(number):
        return post(server, "/v1/label", {"model": f"unknown-{number}", "text": "x"}).status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(2000))) == {404}
    text = metrics(server)
    assert "unknown-" not in text
    assert len(text.splitlines()) <= series + 10
    assert usage(server.pid).rss - memory < 60 << 20


def test_broken_adapters_are_refused_fifty_times_while_good_ones_serve(server):
    names = broken_adapters(server.adapters_folder)
    for number in range(50):
        body = {"name": names[number % len(names)]}
        answer = beside_a_good_one(server, lambda b=body: post(server, "/v1/adapters", b, "admin"))
        assert answer.status == 400, (body, answer.body)
        check_error(answer, word=body["name"])


def test_two_images_of_the_same_bytes_get_their_own_answers(server):
    wide, tall = noise(5, (100, 30)), noise(5, (30, 100))
    tall.frombytes(wide.tobytes())
    answers = [
        json.loads(post(server, "/v1/label", {"image": data_url(image), "text": "same"}).body)
        for image in (wide, tall, wide)
    ]
    first, other, again = (answer["probabilities"]["sentiment"] for answer in answers)
    assert first == pytest.approx(again, abs=0.02)
    assert first != pytest.approx(other, abs=1e-6)


LABEL_HEAD = ("POST", "/v1/label", "content-type: application/json")


def user_head(*more):
    return head(*LABEL_HEAD, f"Authorization: {bearer()['Authorization']}", *more)


@pytest.mark.parametrize("garbage", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
    b"GET /healthz\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"NONSENSE /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n",
    b"POST /v1/label HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/label HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST /v1/label HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    b"POST /v1/label HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /v1/label HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
])  # fmt: skip
def test_what_is_no_http_is_closed_with_a_400(own_server, garbage):
    def ask():
        with Raw(own_server.url) as client:
            client.send(garbage)
            return client.rest()

    answer = beside_a_good_one(own_server, ask)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer[:200]
    assert set(json.loads(answer.rsplit(b"\r\n\r\n", 1)[1])) == {"error"}


def test_endless_headers_are_cut(own_server):
    with Raw(own_server.url) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        while sent < 50 << 20 and client.send(b"X-A: " + b"a" * 8000 + b"\r\n"):
            sent += 8007
        assert sent < 5 << 20
        assert client.rest().startswith(b"HTTP/1.1 431") or sent > 0
    assert good(own_server).status == 200


@pytest.mark.parametrize(
    "start", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"]
)
def test_a_slow_head_loses_its_connection(own_server, start):
    with Raw(own_server.url) as client:
        client.send(start)
        assert client.rest() == b""  # closed within the 60 s that the socket waits


def test_a_slow_body_is_a_408(server):
    def ask():
        with Raw(server.url) as client:
            client.send(user_head("Content-Length: 1000") + b"{")
            ends = time.monotonic() + 5 * CLIENT_TIMEOUT_S
            while time.monotonic() < ends and client.send(b" "):
                time.sleep(0.5)
                client._socket.setblocking(False)
                try:
                    found = client.some()
                except BlockingIOError:
                    continue
                finally:
                    client._socket.settimeout(60)
                return found
        return b"never closed"

    assert beside_a_good_one(server, ask).startswith(b"HTTP/1.1 408")


def test_a_chunked_body_without_an_end_is_refused(server):
    with Raw(server.url) as client:
        client.send(user_head("Transfer-Encoding: chunked") + b"5\r\n     \r\n")
        assert client.rest().startswith(b"HTTP/1.1 408")
    with Raw(server.url) as client:
        client.send(user_head("Transfer-Encoding: chunked"))
        chunk, sent = b"100000\r\n" + b" " * (1 << 20) + b"\r\n", 0
        while sent < 400 and client.send(chunk):
            sent += 1
        assert sent < 400
    assert good(server).status == 200


def test_two_requests_on_one_connection_are_answered_in_order(server):
    body = b'{"text": "x"}'
    first = user_head(f"Content-Length: {len(body)}", "X-Request-Id: first") + body
    second = user_head("Content-Length: 2", "X-Request-Id: second", "Connection: close") + b"[]"
    with Raw(server.url) as client:
        client.send(first + second)
        answers = client.rest().decode()
    assert re.findall(r"HTTP/1.1 (\d+)", answers) == ["200", "400"]
    assert answers.index("first") < answers.index("second")


def test_an_idle_connection_outlives_what_clients_keep(own_server):
    """Five seconds in httpx, so in OpenAI's client: who closes first breaks a request."""
    for _ in range(5):  # a machine that holds this process up past the server's limit says nothing
        with Raw(own_server.url) as client:
            assert healthy(client)
            began = time.monotonic()
            time.sleep(5.1)
            if time.monotonic() - began < CLIENT_TIMEOUT_S - 0.5:
                assert healthy(client)
                return
    raise AssertionError("this machine is too slow to tell")


def healthy(client):
    client.send(head("GET", "/healthz"))
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        answer += (more := client.some())
        assert more, answer
    return answer.startswith(b"HTTP/1.1 200")


def is_idle(server):
    running = metric(server, "vllm:num_requests_running")
    return running == 0 and metric(server, "sieve_pending_requests") == 0


def wait_idle(server, seconds=20):
    ends = time.monotonic() + seconds
    while not is_idle(server):
        assert time.monotonic() < ends
        time.sleep(0.2)


def long_chat(**more):
    messages = [{"role": "user", "content": "a long story"}]
    return {"model": "demo", "messages": messages, "n": 8, "temperature": 1.5, **more}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("reads", [0, 1], ids=["before-a-byte", "after-a-byte"])
def test_no_token_is_made_for_a_client_that_left(server, is_stream, reads):
    """Where nothing is streamed, there is no byte to leave after: then it leaves a moment later."""
    wait_idle(server)
    body = json.dumps(long_chat(stream=is_stream, logit_bias={"2": -100})).encode()
    request = head("POST", "/v1/chat/completions", "content-type: application/json",
                   f"Authorization: {bearer()['Authorization']}",
                   f"Content-Length: {len(body)}") + body  # fmt: skip
    with Raw(server.url) as client:
        client.send(request)
        if reads and is_stream:
            assert client.some(1)
        else:
            time.sleep(0.3 if reads else 0)
    time.sleep(4 if server.home == "ray" else 2)  # engines on Ray push their metrics each second
    tokens = metric(server, "vllm:generation_tokens_total")
    time.sleep(2.5)
    assert metric(server, "vllm:generation_tokens_total") == tokens
    assert is_idle(server)


def test_a_client_that_stops_reading_is_closed(own_server):
    wait_idle(own_server)
    tokens = metric(own_server, "vllm:generation_tokens_total")
    descriptors = usage(own_server.pid).descriptors
    body = long_chat(stream=True, logprobs=True, top_logprobs=20, logit_bias={"2": -100})
    raw = json.dumps(body).encode()
    request = head("POST", "/v1/chat/completions", "content-type: application/json",
                   f"Authorization: {bearer()['Authorization']}",
                   f"Content-Length: {len(raw)}") + raw  # fmt: skip
    clients = [Raw(own_server.url, receive_buffer=2048) for _ in range(3)]
    try:
        for client in clients:
            client.send(request)
        time.sleep(1)
        wait_idle(own_server, 60 + 3 * CLIENT_TIMEOUT_S)
        assert good(own_server).status == 200
        time.sleep(2 * CLIENT_TIMEOUT_S)
        assert usage(own_server.pid).descriptors <= descriptors + 2
    finally:
        for client in clients:
            client.__exit__()
    made = metric(own_server, "vllm:generation_tokens_total") - tokens
    assert made < 3 * 8 * 2048 + 100


def test_after_all_that_the_engine_is_the_same_and_memory_is_back(server):
    """Runs last but one: the tests before it sent thousands of requests."""
    assert good(server).status == 200
    assert engine_cores(server.pid) == server.cores
    after = usage(server.pid)
    allowed = 50 << 20  # a process: allocators keep what a large request took in each of them
    assert after.rss - server.before.rss < allowed * after.processes, (server.before, after)
    assert after.descriptors - server.before.descriptors < 40, (server.before, after)
    assert after.threads - server.before.threads < 20, (server.before, after)


def test_logs_hold_no_key_and_no_post(server):
    text = server.log()
    assert "request_id" in text
    assert not [secret for secret in (*KEYS.values(), *HASHES.values()) if secret in text]
    assert "good 1" not in text
    assert "a long story" not in text
