"""VLLM's own `bench serve` as a load generator, in a process of its own.

Its module's `main` is called: the CPU package's command line fails for want of vLLM's metadata.
The parent asks a line at a time (see `bench.line_process`): the arguments of a run, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from bench.line_process import replies, reply

_KEPT = ("completed", "latencies", "queue_times", "start_times", "errors")


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """One run's latency, time in the client's queue, start and error, a value a request."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    found = serve.main(parser.parse_args(list(arguments)))
    return {name: found[name] for name in _KEPT}


def main() -> None:
    """Runs until stdin ends."""
    with replies() as stream:
        import vllm.benchmarks.serve  # noqa: F401  (seconds, not to be spent beside a server)

        reply(stream)
        for line in sys.stdin:
            reply(stream, json.dumps(run(json.loads(line))))


if __name__ == "__main__":
    main()
