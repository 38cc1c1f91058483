"""One server of either home that bad requests are sent to: with keys, short patience, warm."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file, save_file

from bench.bad_requests import BAD, UNUSUAL
from bench.process_tree import usage
from serving.settings import DEMO
from tests.pictures import data_url, noise
from tests.process_running import ProcessServer
from tests.serving.hostile_clients import Reply, engine_cores, send

KEYS = {"user": "sieve-test-user-0123456789abcdef", "admin": "sieve-test-admin-0123456789abcde"}
HASHES = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
MODEL = "llavac"
CLIENT_TIMEOUT_S = 6
JSON = {"content-type": "application/json"}
LARGEST = (BAD["body-70-mb"], BAD["label-big-image"], UNUSUAL["label-picture-4000x4000"])
"""Sent before memory is noted: allocators keep what the largest body took, in every process."""
_NUMBERS = itertools.count()


def bearer(name: str = "user") -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@contextlib.contextmanager
def hostile_server(home: str, folder: Path) -> Iterator[Any]:
    """A server in a process of its own, or on Ray; `pid`, `log()` and what it had when warm."""
    entries = [{"name": n, "sha256": each, "admin": n == "admin"} for n, each in HASHES.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
    (folder / "keys.yaml").chmod(0o600)
    settings = {
        "adapters": str(shutil.copytree(DEMO / "adapters", folder / "adapters")),
        "keys": str(folder / "keys.yaml"),
        "client_timeout_s": CLIENT_TIMEOUT_S,
        "log_format": "json",
        "log_level": "info",
    }
    with _started(home, folder / "log", settings) as server:
        server.adapters_folder = folder / "adapters"
        for _ in range(20):
            assert good(server).status == 200
        for request in (*LARGEST, *LARGEST):
            headers = {**request.headers, **bearer()}
            send(server.url, request.method, request.path, request.body(), headers)
        server.cores, server.before = engine_cores(server.pid), usage(server.pid)
        assert server.cores
        yield server


@contextlib.contextmanager
def _started(home: str, log: Path, settings: dict[str, Any]) -> Iterator[Any]:
    if home == "process":
        with ProcessServer(log, **settings) as server:
            yield server
        return
    from tests.ray_running import RayServer

    with RayServer(log, **settings) as server:
        server.pid, server.log = server._process.pid, log.read_text
        yield server


def good(server: Any) -> Reply:
    """A label that no cache has seen."""
    number = next(_NUMBERS)
    body = {"image": data_url(noise(number)), "text": f"good {number}", "model": MODEL}
    return post(server, "/v1/label", body)


def post(server: Any, path: str, body: Any, key: str = "user") -> Reply:
    return send(server.url, "POST", path, json.dumps(body).encode(), {**JSON, **bearer(key)})


def metrics(server: Any) -> str:
    answer = send(server.url, "GET", "/metrics", b"", bearer("admin"))
    assert answer.status == 200
    return answer.body.decode()


def metric(server: Any, name: str) -> float:
    """Summed over its series."""
    lines = metrics(server).splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith((f"{name}{{", f"{name} ")))


def broken_adapters(folder: Path) -> list[str]:
    """Writes adapters that must not be served; returns their names."""
    names = []

    def copy(name: str) -> Path:
        names.append(name)
        return Path(shutil.copytree(DEMO / "adapters" / "sentiment", folder / name))

    def configured(name: str, **changes: Any) -> None:
        file = copy(name) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    cut = copy("cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    other = copy("other-base") / "sieve.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "base_fingerprint": "0" * 64}))
    text_only = copy("text-only") / "adapter_model.safetensors"
    weights = load_file(text_only)
    save_file({k.replace("language_model.", ""): v for k, v in weights.items()}, text_only)
    configured("rank", r=1024)
    configured("saves", modules_to_save=["multi_modal_projector"])
    configured("dora", use_dora=True)
    (copy("no-weights") / "adapter_model.safetensors").unlink()
    (copy("not-json") / "adapter_config.json").write_text("{")
    pickled = copy("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    return names
