"""`python -m bench <command>`: one measurement, a Markdown table, and every sample as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import (
    batch,
    before,
    checks,
    cost,
    faults,
    fuzz,
    homes,
    outages,
    overload,
    peers,
    ramp,
    report,
    server,
    shape,
    soak,
    stages,
    sweep,
    tower,
    traffic,
    training,
)
from bench.environment import describe
from bench.outcome import BenchError

COMMANDS = {
    "tower": tower,
    "shape": shape,
    "server": server,
    "peers": peers,
    "training": training,
    "ramp": ramp,
    "ray": homes,
    "faults": faults,
    "batch": batch,
    "outages": outages,
    "fuzz": fuzz,
    "soak": soak,
    "overload": overload,
    "checks": checks,
    "load": traffic,
    "sweep": sweep,
    "report": report,
    "cost": cost,
    "stages": stages,
    "before": before,
}
_EPILOG = """\
Commands that compare variants do so in one run: they alternate within each round, in an order
drawn anew from --seed, every request has an image never seen before, warm-up is not counted, and
ratios are medians over rounds with a bootstrap 95 % interval. The table goes to stdout, progress
to stderr, and --json FILE stores environment, exact command, settings and every raw sample.
Leave the machine alone while a command runs.

examples:
  python -m bench tower                       the vision tower beside vLLM's own, scoring's share
  python -m bench shape clip-l                real shapes, random weights; by default 7B
  python -m bench server --json server.json   our HTTP server beside vLLM's
  python -m bench peers                       ours beside vLLM's server, run_batch and Hugging Face
  python -m bench training --rounds 5         our trainer beside a plain Hugging Face script
  python -m bench ramp --plot ramp.png        engines on Ray that follow a load
  python -m bench ray --parts home            the Ray home beside one process
  python -m bench faults --drills replica     what clients see when an engine is killed
  python -m bench outages                     what clients see when the engine dies or hangs
  python -m bench batch --data posts.jsonl    batches beside the engine's limit and vLLM's run_batch
  python -m bench fuzz --seconds 120          damaged images and bodies: answered or refused
  python -m bench soak --minutes 20           what grows, what fails while all goes on at once
  python -m bench overload                    who is answered at 1, 2 and 10 times capacity
  python -m bench checks                      what keys, limits and image workers cost
  python -m bench load http://127.0.0.1:8000  Locust load on a server that runs
  python -m bench sweep --out runs/sweep      ratios: speed, goodput, accuracy; a report
  python -m bench report --sweep FILE ...     a sweep, stages, shape and peers on one page
  python -m bench cost                        FLOP, bytes and the least time of a post
  python -m bench stages                      where a post's time goes, stage by stage, by ratio
  python -m bench before --checkout ../old    this checkout's server beside another checkout's
  python -m bench shape --help                what a command measures, and its options
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Paired, interleaved measurements of LLaVA Sieve.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        teaching = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=teaching.split("\n", 1)[0].rstrip("."),
            description=teaching,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--seed", type=int, default=0, help="of orders and images (default 0)")
        command.add_argument("--json", type=Path, help="write everything there, for machines")
        module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 when it measured, 1 when what it measured is a fault, 2 for an argument that cannot be
        used.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: its folder does not exist")
    environment = describe(argv)
    try:
        outcome = COMMANDS[options.command].run(options)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(outcome.markdown())
    if options.json is not None:
        stored = {"environment": environment, **outcome.as_json()}
        options.json.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
