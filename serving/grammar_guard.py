"""A client's JSON schema or choices, tried out before the engine sees them.

A small schema can take Outlines minutes and gigabytes, and once it has begun nothing stops it: in
the engine it would take a core from everybody. So it is compiled once in a process of its own, with
a limit on processor time and memory that kills it. Only what compiled within the limits goes on.
The server's own structures never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patches.canonical import FIRST_CHARACTER
from serving.errors import BadRequestError, OverloadedError, SieveError
from serving.schema import ChatRequest

logger = logging.getLogger("sieve")

MAX_PATTERN_CHARS = 20_000
"""Of the regular expression that a schema becomes; vLLM reads it on the event loop as well."""
_WORKER = Path(__file__).with_name("grammar_worker.py")
_START_S = 60.0
_SPACE = "\u2581"  # how sentencepiece writes a leading space


class CompilerLostError(Exception):
    """The compiling process ended, or was ended, over one grammar.

    Attributes:
        limit: "time", "memory", or None where the machine was too busy to tell.
    """

    def __init__(self, limit: str | None) -> None:
        super().__init__(limit)
        self.limit = limit


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """What compiling one grammar may take.

    Attributes:
        cpu_s: seconds of processor time.
        index_bytes: size of what comes out, serialized; in memory it is about twice that.
        memory: bytes of working memory.
    """

    cpu_s: float = 2.0
    index_bytes: int = 32 * 2**20
    memory: int = 2**30


class GrammarGuard:
    """Verdicts on grammars; one compilation at a time, in a process that is started when needed.

    Args:
        tokenizer: the checkpoint's.
        limits: of one compilation.
        max_pending: different grammars under way or waiting; more get a 503.
        wait_s: longest wait for a verdict.
        num_verdicts: how many are remembered.
    """

    def __init__(
        self,
        tokenizer: Any,
        limits: GrammarLimits | None = None,
        *,
        max_pending: int = 8,
        wait_s: float = 10.0,
        num_verdicts: int = 1024,
    ) -> None:
        self.limits = limits or GrammarLimits()
        self._compiler = _Compiler(tokenizer, self.limits)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._max_pending, self._wait_s, self._num_verdicts = max_pending, wait_s, num_verdicts
        self._verdicts: OrderedDict[str, SieveError | None] = OrderedDict()
        self._pending: dict[str, asyncio.Task[SieveError | None]] = {}

    async def check(self, request: ChatRequest, pattern: str | None) -> None:
        """Lets a chat's own grammar pass, if it has one.

        Args:
            request: the chat.
            pattern: what its choices became.

        Raises:
            BadRequestError: it does not compile, or not within the limits.
            OverloadedError: too many other grammars wait.
        """
        form = request.response_format
        if form is not None and form.json_schema is not None:
            schema = json.dumps(form.json_schema.schema_)
            await self._check({"schema": schema}, "response_format")
        elif request.structured_outputs is not None and pattern is not None:
            letters = sorted({letter for letter in pattern if ord(letter) >= FIRST_CHARACTER})
            words = [
                (letter.encode().decode("latin-1"), [ord(letter) - FIRST_CHARACTER])
                for letter in letters
            ]
            question = {"pattern": pattern, "vocabulary": words}
            await self._check(question, "structured_outputs")

    async def _check(self, question: dict[str, Any], param: str) -> None:
        key = hashlib.sha256(json.dumps([param, question]).encode()).hexdigest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            error = self._verdicts[key]
        else:
            error = await self._asked(key, question, param)
        if error is not None:
            raise type(error)(error.message, param=error.param, code=error.code)

    async def _asked(self, key: str, question: dict[str, Any], param: str) -> SieveError | None:
        """A verdict that many may wait for; a client that leaves does not stop it."""
        task = self._pending.get(key)
        if task is None:
            if len(self._pending) >= self._max_pending:
                raise _busy(param)
            task = asyncio.create_task(self._judge(key, question, param))
            self._pending[key] = task
        try:
            return await asyncio.wait_for(asyncio.shield(task), self._wait_s)
        except TimeoutError as error:
            raise _busy(param) from error

    async def _judge(self, key: str, question: dict[str, Any], param: str) -> SieveError | None:
        try:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._thread, self._compiler.ask, question)
            verdict = self._read(answer, param)
        except CompilerLostError as lost:
            if lost.limit is None:
                return _busy(param)
            verdict = self._too_complex(lost.limit, param)
        finally:
            del self._pending[key]
        self._verdicts[key] = verdict
        if len(self._verdicts) > self._num_verdicts:
            self._verdicts.popitem(last=False)
        return verdict

    def _read(self, answer: dict[str, Any], param: str) -> SieveError | None:
        if "error" in answer:
            return BadRequestError(
                f"{param} cannot be compiled: {answer['error']}", param=param, code="invalid_schema"
            )
        if "chars" in answer:
            return self._too_complex("length", param)
        return (
            self._too_complex("size", param) if answer["bytes"] > self.limits.index_bytes else None
        )

    def _too_complex(self, limit: str, param: str) -> BadRequestError:
        limits = self.limits
        over = {
            "time": f"over {limits.cpu_s:g} s of processor time",
            "memory": f"over {limits.memory // 2**20} MiB of memory",
            "size": f"over {limits.index_bytes // 2**20} MiB once compiled",
            "length": f"over {MAX_PATTERN_CHARS} characters as a regular expression",
        }[limit]
        return BadRequestError(
            f"{param} is too complex: it takes {over}; use fewer or shorter values, smaller "
            "maxLength and maxItems, and list properties in 'required'",
            param=param,
            code="schema_too_complex",
        )

    def close(self) -> None:
        """Ends the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._compiler.kill()


def _busy(param: str) -> OverloadedError:
    return OverloadedError(
        f"{param}: too many new grammars are being compiled; try again shortly",
        param=param,
        code="grammars_busy",
    )


class _Compiler:
    """The process, from this side; one question at a time."""

    def __init__(self, tokenizer: Any, limits: GrammarLimits) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Blocks for an answer.

        Raises:
            CompilerLostError: the question ended the process.
        """
        if self._process is None:
            self._start()
        return self._exchange(question, 4 * self._limits.cpu_s + 5)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the server's to answer
        )
        # Ends it at the latest where Python exits.
        self._finally = weakref.finalize(self, _end, self._process)
        limits = self._limits
        setup = {
            "cpu_s": limits.cpu_s,
            "memory": limits.memory,
            "max_chars": MAX_PATTERN_CHARS,
            "eos": self._tokenizer.eos_token_id,
            "vocabulary": words_of(self._tokenizer),
        }
        try:
            self._exchange(setup, _START_S)
        except CompilerLostError as error:
            logger.error("the process that compiles grammars does not start")
            raise CompilerLostError(None) from error

    def _exchange(self, question: dict[str, Any], wait_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None, "it was started"
        assert process.stdin is not None, "it has pipes"
        assert process.stdout is not None, "it has pipes"
        line, ends = b"", time.monotonic() + wait_s
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], max(0.0, ends - time.monotonic()))[0]:
                line = process.stdout.readline()
        except BrokenPipeError:
            pass
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise CompilerLostError(self._bury())

    def _bury(self) -> str | None:
        """Ends what did not answer; says which limit it met."""
        process, self._process = self._process, None
        assert process is not None, "it was there to be asked"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        self._finally()
        # One that had to be ended now had not used up its time: the machine is too busy.
        if process.returncode in (-signal.SIGKILL, -signal.SIGTERM):
            return None
        return "time" if process.returncode == -signal.SIGPROF else "memory"

    def kill(self) -> None:
        """Ends the process; whoever waits for its answer hears of that."""
        if self._process is not None:
            self._process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Makes sure that it is gone, with its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a question was on its way
                pipe.close()


def words_of(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """What each token writes, as vLLM's Outlines backend sees it; bytes as Latin-1 text."""
    special = set(tokenizer.all_special_tokens)
    words: dict[bytes, list[int]] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if token not in special and (word := _word(tokenizer, token)):
            words.setdefault(word, []).append(token_id)
    return [(word.decode("latin-1"), ids) for word, ids in words.items()]


def _word(tokenizer: Any, token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    text: str = tokenizer.convert_tokens_to_string([token])
    return (f" {text}" if token.startswith(_SPACE) else text).encode()
