"""What logs say of keys: names, changes and counts, never a key or its hash."""

import json
import logging

import httpx
import pytest

from serving.audit import Refusals
from serving.keyring import Keyring
from serving.keys import describe_access, hash_of, new_key
from serving.logs import configure_logs
from serving.settings import Settings
from tests.serving.key_home import LABEL, SECRETS, Clock, bearer, entries, listening, write


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
    make_guarded, keys_file, capsys, logged, level, monkeypatch
):
    settings = Settings(log_level=level, log_format="json", port=0, keys=keys_file)
    configure_logs(settings)
    guarded = make_guarded(keys=keys_file, log_level=level)
    stranger = new_key()
    async with listening(guarded, settings) as port:
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
