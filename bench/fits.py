"""Trainings as child processes: what they train on, how they are started, what they report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoints import IMAGE_TOKEN_ID, write_shape
from bench.flops import Shape
from bench.outcome import BenchError
from serving.posts import read_posts
from serving.prompts import encode, render_prompt
from serving.structures import STRUCTURES

OURS, THEIRS = "sieve", "plain"
ROOT = Path(__file__).resolve().parent.parent
STRUCTURE = "llavac"
_POLL_S = 0.02

Recipe = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one training took.

    Attributes:
        whole: wall seconds of the process, imports and model loading included.
        loaded: seconds after the model was loaded: features, training, saving.
        loop: seconds of `Trainer.train` alone.
        cpu: processor seconds of the process, which a busy machine hardly stretches.
        peak: most resident memory of the process, in bytes.
        losses: by step; the mean since the entry before.
    """

    whole: float
    loaded: float
    loop: float
    cpu: float
    peak: int
    losses: Mapping[int, float]


def write_posts(folder: Path, count: int, seed: int, split: str = "train") -> Path:
    """Synthetic posts in MVSA's layout, by the trainer's own command."""
    arguments = ["-m", "train", "posts", "--out", str(folder), "--count", str(count)]
    arguments += ["--split", split, "--balanced", "--seed", str(seed)]
    run_python(arguments, folder.with_suffix(".log"), num_threads=1)
    return folder


def write_checkpoint(folder: Path, shape: Shape, posts: Path, seed: int) -> int:
    """A LLaVA-1.5 with random bfloat16 weights; returns the mean ids of a prompt's text."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration

    structure, texts = STRUCTURES[STRUCTURE], [post.text for post in read_posts(posts)]
    letters = folder / "letters"
    letters.mkdir(parents=True)
    answers = [structure.render(labels) for labels in structure.answers()]
    write_tokenizer(letters, [structure.prompt, *answers, *texts])
    write_shape(folder, shape, letters)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [len(encode(tokenizer, render_prompt(tokenizer, structure, t, 0))) for t in texts]
    return round(sum(ids) / len(ids))


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Llama's kind of BPE on these texts, with filler up to Llama's size.

    Prompts have as many ids as real ones that way; one id a byte would make them three times as
    long, and logits at all of them dearer than they are.
    """
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False, max_token_length=16
    )
    # A piece never spans two words, nor a word and its comma: labels end where pieces do.
    words = re.findall(r"\w+|[^\w\s]", " ".join(["USER: ASSISTANT:", *texts]))
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"▁filler{i}": i for i in range(len(vocabulary), IMAGE_TOKEN_ID)}
    state["added_tokens"] = state["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")


def fit(
    side: str, recipe: Recipe, *, base: Path, posts: Path, out: Path, seed: int, num_threads: int
) -> Fit:
    """Trains with one of the two; `out` is the run's folder and must be new.

    Raises:
        BenchError: it failed; quotes the end of its log.
    """
    recipe = {**recipe, "seed": seed}
    run = _fit_ours if side == OURS else _fit_theirs
    return run(recipe, base, posts, out, num_threads)


def _fit_ours(recipe: Recipe, base: Path, posts: Path, out: Path, num_threads: int) -> Fit:
    arguments = ["-m", "train", "fit", "llavac", "--base", str(base), "--data", str(posts)]
    arguments += ["--out", str(out), "--threads", str(num_threads)]
    arguments += ["--set", *(f"{name}={value}" for name, value in recipe.items())]
    process = run_python(arguments, out.with_suffix(".log"), num_threads)
    seconds = json.loads((out / "run.json").read_text(encoding="utf-8"))["seconds_by_stage"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (loop,) = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    return Fit(
        whole=process.seconds,
        loaded=sum(value for stage, value in seconds.items() if stage != "loading"),
        loop=loop,
        cpu=process.cpu,
        peak=process.peak,
        losses={entry["step"]: entry["loss"] for entry in log if "loss" in entry},
    )


def _fit_theirs(recipe: Recipe, base: Path, posts: Path, out: Path, num_threads: int) -> Fit:
    paths = {"base": str(base), "data": str(posts), "out": str(out)}
    settings = {**recipe, **paths, "structure": STRUCTURE, "threads": num_threads}
    file = out.with_suffix(".json")
    file.write_text(json.dumps(settings), encoding="utf-8")
    arguments = ["-m", "bench.plain_training", str(file)]
    process = run_python(arguments, out.with_suffix(".log"), num_threads)
    found = json.loads((out / "plain.json").read_text(encoding="utf-8"))
    return Fit(
        whole=process.seconds,
        loaded=found["seconds_by_stage"]["training"] + found["seconds_by_stage"]["saving"],
        loop=found["loop"],
        cpu=process.cpu,
        peak=process.peak,
        losses={int(step): loss for step, loss in found["losses"].items()},
    )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a process took: wall and processor seconds, and its peak of resident bytes."""

    seconds: float
    cpu: float
    peak: int


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that the training of the moment is stopped."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_python(arguments: Sequence[str], log: Path, num_threads: int) -> Ended:
    """Runs Python on so many threads.

    Raises:
        BenchError: it did not end with 0; quotes the end of its log.
    """
    threads = {f"{library}_NUM_THREADS": str(num_threads) for library in ("OMP", "MKL")}
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        peak = _watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BenchError(f"`{' '.join(arguments[:3])}` ended with {process.returncode}:\n{tail}")
    return Ended(
        seconds=time.perf_counter() - started,
        cpu=usage.ru_utime + usage.ru_stime,
        peak=peak,
    )


def _watch(pid: int) -> int:
    """Waits for a process's end; returns the peak of its resident bytes.

    `ru_maxrss` would not do: it starts at the peak of the process that started this one, which
    has had the model in its own memory.
    """
    peak = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(_POLL_S)
    return peak
