"""The process that tries grammars out: it may be killed at any time, and imports nothing of ours.

Run by `serving.grammar_guard` as a script; JSON lines in, JSON lines out. The first line has the
limits and the vocabulary. A compilation that needs more processor time or memory than allowed ends
this process: nothing else stops Outlines once it has begun.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

import outlines_core as oc
from outlines_core.json_schema import build_regex_from_schema

_NICE = 10  # requests that are answered come first


def main() -> None:
    """Answers a line a question until the other side closes."""
    setup = json.loads(sys.stdin.readline())
    vocabulary = _vocabulary(setup["eos"], setup["vocabulary"])
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + setup["memory"],) * 2)
    _say({"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        # Its default action ends the process; the timer counts processor time, ours alone.
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
        answer = _judge(question, setup, vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(answer)


def _judge(question: dict[str, Any], setup: dict[str, Any], words: oc.Vocabulary) -> dict[str, Any]:
    """Whether a schema, or a pattern over a vocabulary of its own, compiles; and how large."""
    started = time.process_time()
    try:
        pattern = question.get("pattern")
        if pattern is None:
            pattern = build_regex_from_schema(question["schema"])
        else:
            words = _vocabulary(setup["eos"], question["vocabulary"])
        if len(pattern) > setup["max_chars"]:
            return {"chars": len(pattern)}
        index = oc.Index(pattern, words)
    except MemoryError:
        raise
    except Exception as error:
        return {"error": str(error)[:200]}
    num_bytes = len(index.__reduce__()[1][0])
    return {"bytes": num_bytes, "cpu_s": round(time.process_time() - started, 3)}


def _vocabulary(eos: int, words: list[tuple[str, list[int]]]) -> oc.Vocabulary:
    """Words of bytes come as Latin-1 text, since JSON has no bytes."""
    return oc.Vocabulary(eos, {word.encode("latin-1"): ids for word, ids in words})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
