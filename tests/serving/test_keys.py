"""Keys: their file, the command that makes them, changes while a server runs, our own clients."""

import asyncio
import os
import re
import stat
import subprocess
import sys
import threading

import pytest
import yaml

from serving.cli import parse_command
from serving.client_key import bearer_headers
from serving.errors import ConfigError, KeyLimitError
from serving.keyring import Keyring
from serving.keys import Key, add_key, hash_of, new_key, read_keys
from tests.serving.key_home import ROOT, SECRETS, Clock, entries, listening, write

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


async def test_label_works_through_a_server_with_keys(guarded, tmp_path):
    posts = write(tmp_path / "posts.jsonl", '{"id": "1", "text": "x"}\n{"id": "2", "text": "y"}\n')
    async with listening(guarded) as port:
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
