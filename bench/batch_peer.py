"""`python -m serving batch` beside vLLM's own `run_batch`, whole processes in turn."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.contest import engine_arguments, equal_environment
from bench.outcome import BenchError, progress
from serving.posts import Post
from serving.server import load_tokenizer
from serving.settings import Settings
from serving.structures import STRUCTURES

OURS, THEIRS = "sieve", "vllm"
STRUCTURE = STRUCTURES["sentiment"]
_BAR = "Running batch:"
_LIMIT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Race:
    """One process that labelled all posts.

    Attributes:
        whole_s: from its start to its end.
        label_s: from the moment its engine was there and work began to the last answer.
        labels: by id.
        num_decoded: tokens of all answers; 0 where it does not tell.
    """

    whole_s: float
    label_s: float
    labels: Mapping[str, str]
    num_decoded: int = 0


def write_inputs(posts: Sequence[Post], folder: Path, settings: Settings, ask: str) -> None:
    """The same posts with images within them: rows for us, chat requests for vLLM."""
    adds_bos = chat_adds_bos(settings.model)
    with (folder / "ours.jsonl").open("w") as ours, (folder / "theirs.jsonl").open("w") as theirs:
        for post in posts:
            (image,) = [image_url(item) for item in post.images]
            ours.write(json.dumps({"id": post.id, "text": post.text, "image": image}) + "\n")
            body = chat(ask, post.text, image) | {"add_special_tokens": adds_bos}
            theirs.write(json.dumps(batch_row(post.id, body)) + "\n")


def batch_row(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batch format."""
    path = "/v1/chat/completions"
    return {"custom_id": name, "method": "POST", "url": path, "body": dict(body)}


def chat_adds_bos(model: str) -> bool:
    """Whether vLLM must be told to add a BOS that the chat template lacks, as ours does."""
    tokenizer = load_tokenizer(model)
    template, bos = tokenizer.chat_template or "", tokenizer.bos_token
    return bos is not None and "bos_token" not in template and bos not in template


def chat(model: str, text: str, image: str) -> dict[str, Any]:
    """The structure's prompt as a chat whose answer is one of its labels.

    The labels begin with a space, as LLaVA's answers do: without it the usual ids of a label are
    not allowed, vLLM spells it in more and odder ones, and often another label.
    """
    (labels,) = STRUCTURE.fields.values()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": STRUCTURE.prompt.replace("{text}", text)},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "temperature": 0.0,
        "structured_outputs": {"choice": [f" {label}" for label in labels]},
    }


def image_url(item: Any) -> str:
    """An image of a post as a data URL.

    Raises:
        BenchError: it is none.
    """
    raw = item if isinstance(item, bytes) else item.read_bytes()
    try:
        kind = Image.open(io.BytesIO(raw)).format or ""
    except OSError as error:
        raise BenchError(f"--data: image {getattr(item, 'name', '')!r}: {error}") from error
    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"


def race_ours(
    folder: Path, name: str, settings: Settings, ask: str, ratio: float, threads: int, args: Any
) -> Race:
    """`python -m serving batch`, with a server's defaults for what is not said."""
    out = folder / name
    arguments = ["-m", "serving", "batch", "--data", str(folder / "ours.jsonl"), "--out", str(out)]
    arguments += ["--checkpoint", settings.model, "--model", ask, "--retention", str(ratio)]
    arguments += ["--label-structure", STRUCTURE.name, "--dtype", settings.dtype]
    arguments += ["--max-num-seqs", str(settings.max_num_seqs)]
    arguments += ["--concurrency", str(args.concurrency), "--workers", str(args.workers)]
    arguments += ["--kv-cache-gib", str(settings.kv_cache_gib)]
    if settings.adapters_folder is not None:
        arguments += ["--adapters", str(settings.adapters_folder)]
    whole_s, _ = _timed(arguments, folder / f"{name}.log", equal_environment(settings, threads))
    now = json.loads((out / "summary.json").read_text())["this_run"]
    rows = [json.loads(x) for path in out.glob("labels-*.jsonl") for x in path.open()]
    labels = {row["id"]: next(iter(row["labels"].values())) for row in rows}
    return Race(whole_s=whole_s, label_s=now["wall_s"], labels=labels)


def race_theirs(folder: Path, name: str, settings: Settings, threads: int) -> Race:
    """VLLM's `run_batch`: stock architecture, no plugin, the engine arguments of ours."""
    out = folder / f"{name}.jsonl"
    arguments = ["-m", "vllm.entrypoints.openai.run_batch", "-o", str(out)]
    arguments += ["-i", str(folder / "theirs.jsonl"), *engine_arguments(settings)]
    environment = {**equal_environment(settings, threads), "VLLM_PLUGINS": ""}
    whole_s, label_s = _timed(arguments, folder / f"{name}.log", environment)
    answers = [json.loads(line) for line in out.open()]
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    try:
        labels = {i: body["choices"][0]["message"]["content"].strip() for i, body in bodies.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise BenchError(f"run_batch failed on a post: {str(answers[0])[:500]}") from error
    num_decoded = sum(body["usage"]["completion_tokens"] for body in bodies.values())
    return Race(whole_s=whole_s, label_s=label_s, labels=labels, num_decoded=num_decoded)


def _timed(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str]
) -> tuple[float, float]:
    """Seconds of a whole process, and of its progress bar from first sight to the full one.

    Raises:
        BenchError: it failed; names its log.
    """
    started = time.perf_counter()
    first = last = 0.0
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 65536):
                file.write(piece)
                if _BAR.encode() in piece:
                    last = time.perf_counter()
                    first = first or last
            status = process.wait(_LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    whole_s = time.perf_counter() - started
    if status:
        raise BenchError(f"status {status}: {' '.join(arguments[:4])}; see {log}")
    progress(f"{log.stem}: {whole_s:.1f} s in all")
    return whole_s, last - first
