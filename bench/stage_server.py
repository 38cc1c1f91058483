"""Servers whose calls are noted, one and the same server without that, and requests to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench.checkpoints import write_shape
from bench.contest import make_text
from bench.fits import write_tokenizer
from bench.flops import SHAPES
from bench.outcome import BenchError
from bench.pictures import photo_url
from bench.process_tree import descendants, paused
from bench.processes import Server, free_port, running
from bench.stage_points import DUMMY_VARIABLE, FOLDER_VARIABLE, write_hook
from bench.stage_spans import Span, Timed, process_roles, read_spans
from serving.structures import STRUCTURES, LabelStructure

DEMO_MODEL, CLIP_L, LLAVA = "demo", "clip-l", "llava-1.5-7b"
MODELS = (DEMO_MODEL, CLIP_L, LLAVA)
TIMED, PLAIN = "timed", "plain"
ROOT = Path(__file__).resolve().parent.parent
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every request of a run asks for.

    Attributes:
        model: in the API; None asks the server's base.
        structure: of labels.
        size: of the pictures, which are JPEG photos.
        seed: of texts and pictures.
    """

    model: str | None
    structure: str
    size: tuple[int, int]
    seed: int

    def body(
        self, number: int, ratio: float, *, cascade: tuple[float, float] | None = None
    ) -> bytes:
        """A post that no cache has seen; a cascade goes up whatever the first answer."""
        body = {
            "text": make_text(self.seed, number),
            "image": photo_url(self.seed, number, self.size),
            "label_structure": self.structure,
            **({"cascade": cascade, "confidence": 1.0} if cascade else {"retention_ratio": ratio}),
        }
        return json.dumps(body | ({"model": self.model} if self.model else {})).encode()


class Client:
    """One connection to a server.

    Args:
        port: of the server on this machine.
    """

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def label(self, body: bytes) -> tuple[float, float, float, dict[str, Any]]:
        """When it was begun, sent and answered, on the machine's clock, and the answer.

        Raises:
            BenchError: it is not a 200; quotes it.
        """
        head = {"content-type": "application/json"}
        start = time.perf_counter()
        self._connection.request("POST", "/v1/label", body, head)
        sent = time.perf_counter()
        answer = self._connection.getresponse()
        raw = answer.read()
        end = time.perf_counter()
        if answer.status != 200:
            raise BenchError(f"/v1/label: {answer.status} {raw[:300].decode(errors='replace')}")
        return start, sent, end, json.loads(raw)

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def ask(client: Client, question: Question, *, number: int, ratio: float, turn: int) -> Timed:
    """One request; its body is made before the clock starts."""
    body = question.body(number, ratio)
    start, sent, end, answer = client.label(body)
    return Timed(
        round=turn,
        ratio=ratio,
        start=start,
        sent=sent,
        end=end,
        num_tokens=int(answer["usage"]["completion_tokens"]),
        num_prompt_tokens=int(answer["usage"]["prompt_tokens"]),
    )


@dataclass(frozen=True, kw_only=True)
class StageServers:
    """The servers of a run.

    Attributes:
        ports: by variant.
        pids: of their main processes, by variant.
        folder: where the timed one's processes note their calls.
    """

    ports: dict[str, int]
    pids: dict[str, int]
    folder: Path

    def only(self, variant: str) -> contextlib.AbstractContextManager[None]:
        """The others stand still: a server waits on a core for a second after its last answer."""
        return paused([pid for name, pid in self.pids.items() if name != variant])

    def spans(self) -> list[Span]:
        """What was noted so far."""
        return read_spans(self.folder)

    def processor_seconds(self) -> dict[str, float]:
        """Processor time so far of the timed server's processes, by role."""
        roles = process_roles(self.folder)
        root = self.pids[TIMED]
        seconds: dict[str, float] = {}
        for pid in (root, *descendants(root)):
            role = roles.get(pid, "others")
            seconds[role] = seconds.get(role, 0.0) + _processor_seconds(pid)
        return seconds


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


@contextlib.contextmanager
def stage_servers(
    folder: Path,
    model: str,
    variants: Sequence[str],
    arguments: Sequence[str],
    sides: Mapping[str, tuple[Path, Mapping[str, str]]] | None = None,
) -> Iterator[StageServers]:
    """Starts a server a variant; they end with the block.

    Args:
        folder: an empty one to work in.
        model: one of `MODELS`.
        variants: `TIMED`, and `PLAIN` where timers are to be compared with none.
        arguments: more of `python -m serving`.
        sides: the checkout whose code a variant runs and variables of its own; by default this one
            and none.
    """
    spans, hook = _made(folder / "spans"), _made(folder / "hook")
    path, needed = _checkpoint(folder, model)
    hooked = write_hook(hook, ROOT)
    if needed:
        needed |= hooked
    timing = {**hooked, FOLDER_VARIABLE: str(spans)}
    servers = []
    for variant in variants:
        environment = needed | (timing if variant == TIMED else {})
        if sides is not None:
            checkout, variables = sides[variant]
            environment |= {**_of_checkout(checkout, environment), **variables}
        servers.append(_server(variant, [*path, *arguments], environment))
    with running(servers, folder) as pids:
        yield StageServers(
            ports={server.name: server.port for server in servers},
            pids=dict(zip((server.name for server in servers), pids, strict=True)),
            folder=spans,
        )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _of_checkout(checkout: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which Python finds our packages there and not in the current folder."""
    paths = [str(checkout), environment.get("PYTHONPATH", "")]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _checkpoint(folder: Path, model: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and variables for a model: of a shape there is all but weights."""
    if model == DEMO_MODEL:
        return [], {}
    base, letters = _made(folder / "base"), _made(folder / "letters")
    words = [text for structure in STRUCTURES.values() for text in _words(structure)]
    write_tokenizer(letters, words)
    write_shape(base, SHAPES[model], letters)
    save_file({"none": np.zeros(1, np.float32)}, base / "model.safetensors")  # never read
    return ["--model", str(base), "--model-name", model], {DUMMY_VARIABLE: "1"}


def _words(structure: LabelStructure) -> list[str]:
    answers = [structure.render(labels) for labels in structure.answers()]
    return [structure.prompt, *answers, *(make_text(0, number) for number in range(8))]


def _server(name: str, arguments: Sequence[str], environment: dict[str, str]) -> Server:
    port = free_port()
    return Server(
        name=name,
        arguments=["-m", "serving", "--port", str(port), "--no-prefix-caching", *arguments],
        port=port,
        ready_path="/readyz",
        environment=environment,
    )
