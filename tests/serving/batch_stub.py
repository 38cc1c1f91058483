"""Batches on an engine without a model, in processes that may be killed at any moment.

`python -m tests.serving.batch_stub` reads jobs from its standard input, a JSON object a line, and
runs each in a fork of itself, so that a hundred kills do not cost a hundred imports.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from serving import fitting
from serving.__main__ import main
from serving.batch import job, prepare
from serving.batch.job import Plan
from serving.batch.outcomes import Answer
from serving.batch.tables import Table
from serving.labeler import Labeler
from serving.server import load_tokenizer
from serving.settings import DEMO
from tests.pictures import data_url, encoded, noise
from tests.serving.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
TABLE = Table(
    fields={"stub": {"mood": ["good", "bad"]}}, versions={"base": "b", "x": "1"}, abstain=None
)
GOOD, BAD = {"mood": {"good": 0.75, "bad": 0.25}}, {"mood": {"good": 0.25, "bad": 0.75}}


def constant_answer(good: bool = True, **values: Any) -> Answer:
    """An answer under `TABLE`."""
    label = "good" if good else "bad"
    defaults = {
        "model": "stub",
        "version": "v1",
        "labels": {"mood": label},
        "probabilities": GOOD if good else BAD,
        "confidence": 0.75,
        "ratio": 0.4,
        "selector": "cls",
        "kept": 0,
        "visual_tokens": 0,
        "patches": 0,
    }
    return Answer(**{**defaults, **values})


class PreparerHere:
    """Reads and decodes in a thread of this process; the real one's signature and functions."""

    def __init__(self, *_: Any, num_workers: int) -> None:
        self.num_workers = num_workers

    def start(self) -> None:
        pass

    async def prepare(self, posts):
        return await asyncio.to_thread(prepare._work, posts)

    def close(self) -> None:
        pass


class Unfitted(fitting.Fitting):
    """Images stay as they are: an engine without a model looks at none."""

    @classmethod
    def of(cls, model: str) -> fitting.Fitting:
        return fitting.Fitting(model=None)


class CountedEngine(FakeEngine):
    """Notes each call in a file, which a kill does not take back."""

    def __init__(self, calls: Path, delay_s: float) -> None:
        super().__init__()
        self.file, self.delay_s = calls.open("ab", buffering=0), delay_s

    async def generate(self, request):
        await asyncio.sleep(self.delay_s)
        self.file.write(b".")
        return await super().generate(request)


@cache
def tokenizer() -> Any:
    return load_tokenizer(str(DEMO / "base"))


@contextmanager
def stubbed(calls: Path, delay_s: float = 0.0) -> Iterator[None]:
    """`run_batch` with an engine that has no model; all else is the real one."""

    @asynccontextmanager
    async def labeling(plan: Plan):
        engine = CountedEngine(calls, delay_s)
        with engine.file:
            yield Labeler(engine, plan.catalogue, tokenizer())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "labeling", labeling)
        patch.setattr(job, "Preparer", PreparerHere)
        patch.setattr(job, "Fitting", Unfitted)
        yield


def run_here(
    data: Path,
    out: Path,
    calls: Path,
    flags: Sequence[str] = (),
    said: list[str] | None = None,
    **how: float,
) -> int:
    """`python -m serving batch` in this process; its exit status, and in `said` what it printed."""
    argv = ["batch", "--data", str(data), "--out", str(out), "--model", "sentiment", *flags]
    log = io.StringIO()
    with stubbed(calls, **how), redirect_stdout(log), redirect_stderr(log):
        status = main(argv)
    if said is not None:
        said.append(log.getvalue())
    return status


def kill_at_change(folder: Path, number: int) -> None:
    """Ends this process just before its n-th change of files in a folder: as kill -9 would."""
    left = number

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal left
        if event in CHANGES and str(values[0]).startswith(str(folder)):
            if event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR):
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Zygote:
    """Runs batches in processes of their own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Zygote]:
        one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # it forks
        with subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env=os.environ | one_thread,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            yield cls(process)
            process.stdin.close()

    def run(self, data: Path, out: Path, calls: Path, **how: Any) -> int:
        """The exit status; -9 where it was killed, `at_change` or `after_s`."""
        paths = {"data": str(data), "out": str(out), "calls": str(calls)}
        print(json.dumps({**paths, **how}), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def _serve_jobs() -> None:
    with tempfile.TemporaryDirectory() as name:  # what is imported and loaded once is there already
        folder = Path(name)
        write_posts(folder, 20)
        run_here(folder / "posts.jsonl", folder / "out", folder / "calls")
    for line in sys.stdin:
        asked = json.loads(line)
        after_s, at_change = asked.pop("after_s", None), asked.pop("at_change", None)
        pid = os.fork()
        if not pid:
            signal.alarm(60)
            os._exit(_work_off(asked, at_change))
        if after_s is not None:
            threading.Event().wait(after_s)
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _work_off(asked: dict[str, Any], at_change: int | None) -> int:
    data, out, calls = (Path(asked.pop(name)) for name in ("data", "out", "calls"))
    if at_change is not None:
        kill_at_change(out, at_change)
    return run_here(data, out, calls, **asked)


def write_posts(folder: Path, number: int, seed: int = 0) -> dict[str, str | None]:
    """`posts.jsonl` with broken rows and images among it: id to the stage that fails, in order."""
    rng, lines, expected = random.Random(seed), [], {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.png").write_bytes(encoded(noise(seed, (40, 30))))
    (folder / "torn.png").write_bytes(encoded(noise(seed))[:200])
    kinds = {
        "text": None,
        "equal": None,
        "image": None,
        "inline": None,
        "row": "read",
        "absent": "read",
        "torn": "decode",
        "base64": "read",
        "empty": "prompt",
    }
    for index in range(number):
        kind = rng.choices(list(kinds), weights=[20, 2, 3, 3, 1, 1, 1, 1, 1])[0]
        post: dict[str, Any] = {"id": f"post {index}", "text": f"a day in the park {index}"}
        post |= {
            "equal": {"text": "the same"},
            "image": {"image": "good.png"},
            "inline": {"image": data_url(noise(index, (20, 20)))},
            "row": {"text": ["no text"]},
            "absent": {"image": "nowhere.png"},
            "torn": {"image": "torn.png"},
            "base64": {"image": "data:image/png;base64,!" + base64.b64encode(b"no").decode()},
            "empty": {"text": ""},
        }.get(kind, {})
        lines.append(json.dumps(post))
        expected[post["id"]] = kinds[kind]
    (folder / "posts.jsonl").write_text("\n".join(lines) + "\n")
    return expected


if __name__ == "__main__":
    _serve_jobs()
