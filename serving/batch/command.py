"""Arguments of `python -m serving batch`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from serving.batch.options import DUPLICATES, BatchOptions
from serving.batch.tables import FORMATS
from serving.errors import ConfigError
from serving.settings import Settings

_EPILOG = """\
--data is JSONL ({"id", "image" or "images", "text"}, or OpenAI's batch lines), CSV, Parquet, a
folder of image/text pairs or MVSA's layout; a path, or a URL that fsspec reads.

--out is a folder: labels-00000.jsonl, ... in the order of the input; errors-00000.jsonl for posts
that failed (id, stage, code, reason, retryable); review-00000.jsonl for posts that abstain; and
summary.json. A run that was killed goes on when the same command is given again: every id gets
exactly one row.

Exit status: 0 every post has labels, 3 done with errors, 2 bad input or a run that cannot go on.

examples:
  python -m serving batch --data posts.jsonl --out labels --model sentiment
  python -m serving batch --data posts/ --out labels --model llavac --model sentiment --format csv
  python -m serving batch --data posts.jsonl --out labels --cascade 0.2,1.0 --confidence 0.9
  python -m serving batch --data posts.jsonl --out labels --model sentiment --retry-failed
"""

ENGINE_FIELDS = (
    "adapters",
    "structures",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_images",
    "max_image_bytes",
    "max_image_pixels",
    "max_text_chars",
    "kv_cache_gib",
    "gpu_memory",
    "tower_batch_size",
    "tower_cache_mib",
    "prefix_caching",
    "enforce_eager",
    "log_level",
)
"""Settings of the engine that a batch starts."""


def batch_command(argv: list[str]) -> Callable[[], Coroutine[None, None, int]]:
    """The command that the arguments ask for.

    Raises:
        ConfigError: an argument is not allowed.
    """
    from serving.cli import add_settings, read_settings

    parser = argparse.ArgumentParser(
        prog="python -m serving batch",
        description="Label very many posts, with an engine of its own; resumable.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    add_settings(parser, {name: Settings.model_fields[name] for name in ENGINE_FIELDS})
    given = vars(parser.parse_args(argv))
    engine = {name: given.pop(name) for name in ("config", *ENGINE_FIELDS)}
    settings = read_settings({**engine, "model": given.pop("checkpoint")})
    options = read_options(given)

    async def command() -> int:
        from serving.batch.job import run_batch

        return await stopped_by_sigterm(run_batch(options, settings))

    return command


_CALIBRATE_EPILOG = """\
The bar is set on half of the posts and measured on the other half: agreement with the highest
ratio, accuracy where the posts have labels, posts a second beside either ratio alone. Give what it
prints to 'batch', or to /v1/label as cascade and confidence.

example:
  python -m serving calibrate --data posts.jsonl --model sentiment --cascade 0.2,1.0 \\
      --agreement 0.98
"""


def calibrate_command(argv: list[str]) -> Callable[[], Coroutine[None, None, int]]:
    """The command that the arguments ask for.

    Raises:
        ConfigError: an argument is not allowed.
    """
    from serving.batch.calibrate import CalibrateOptions, run_calibrate
    from serving.cli import add_settings, read_settings

    parser = argparse.ArgumentParser(
        prog="python -m serving calibrate",
        description="Find how sure an answer at a low ratio must be to be kept.",
        epilog=_CALIBRATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="posts: a folder or a file")
    add("--cascade", required=True, help="the two ratios, e.g. 0.2,1.0")
    add("--agreement", type=float, required=True, help="wanted share of equal labels, e.g. 0.98")
    add("--model", help="adapter, or the base model")
    add("--label-structure", help="structure; by default the adapter's")
    add("--selector", help="which patches are kept")
    add("--split", help="only the ids of SPLIT_ids.txt, or of a file")
    add("--limit", type=int, default=600, help="posts to look at, at random (default 600)")
    add("--block", type=int, default=50, help="posts a timed block (default 50)")
    add("--concurrency", type=int, default=32, help="posts in the engine at once (default 32)")
    add("--seed", type=int, default=0, help="of the choice of posts and orders (default 0)")
    add("--json", action="store_true", dest="as_json", help="print for machines")
    add("--checkpoint", help="checkpoint to load (default the demo)")
    add_settings(parser, {name: Settings.model_fields[name] for name in ENGINE_FIELDS})
    given = vars(parser.parse_args(argv))
    engine = {name: given.pop(name) for name in ("config", *ENGINE_FIELDS)}
    settings = read_settings({**engine, "model": given.pop("checkpoint")})
    given["cascade"] = read_ratios(given["cascade"])
    options = CalibrateOptions(**given)
    return lambda: stopped_by_sigterm(run_calibrate(options, settings))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, help="posts: a folder, a file, or a URL")
    add("--out", type=Path, required=True, help="folder of the run; the same one goes on")
    add("--format", default="jsonl", help=f"rows as {', '.join(FORMATS)} (default jsonl)")
    add("--model", action="append", help="adapter or base model; may be given several times")
    add("--label-structure", help="structure; by default the adapter's")
    add("--retention", type=float, help="share of visual tokens kept")
    add("--selector", help="which patches are kept")
    add("--cascade", help="rising ratios, e.g. 0.2,1.0: the next only where an answer is not sure")
    add("--confidence", type=float, help="how sure is sure in a cascade; see 'calibrate'")
    add("--abstain", type=float, help="rows less sure than this abstain, into the review queue")
    add("--split", help="only the ids of SPLIT_ids.txt, or of a file")
    add("--fields", help="the data's own names, e.g. text=tweet,labels.sentiment=y")
    add(
        "--duplicates",
        default="error",
        help=f"an id that comes twice: {', '.join(DUPLICATES)} (default error, at the start)",
    )
    add("--shard-size", type=int, default=1000, help="posts a file (default 1000)")
    add("--concurrency", type=int, default=64, help="posts in the engine at once (default 64)")
    add("--workers", type=int, default=0, help="processes that read and decode (default: cores-1)")
    add("--retry-failed", action="store_true", help="label posts again that failed before")
    add("--ray", action="store_true", help="run on Ray Data, several engines, see --engines")
    add("--engines", type=int, help="with --ray: engines (default 2)")
    add("--ray-address", help="with --ray: cluster to join; by default Ray starts here")
    add("--checkpoint", help="checkpoint to load (default the demo)")


def read_options(given: dict[str, Any]) -> BatchOptions:
    """Options from parsed arguments.

    Raises:
        ConfigError: one is not allowed.
    """
    is_ray, engines = given.pop("ray"), given.pop("engines")
    if not is_ray and (engines is not None or given["ray_address"] is not None):
        raise ConfigError("--engines and --ray-address need --ray", param="engines")
    if engines is not None and engines < 1:
        raise ConfigError(f"engines={engines} must be 1 or more", param="engines")
    given["engines"] = (engines or 2) if is_ray else 0
    given["models"] = tuple(given.pop("model") or ())
    given["cascade"] = read_ratios(given["cascade"])
    given["fields"] = _read_fields(given["fields"])
    return BatchOptions(**given)


def read_ratios(text: str | None) -> tuple[float, ...] | None:
    """Ratios separated by commas.

    Raises:
        ConfigError: something among them is not a number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"cascade={text!r} is not a list of numbers such as 0.2,1.0", param="cascade"
        ) from error


def _read_fields(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    broken = [name for name, equals, theirs in pairs if not (name and equals and theirs)]
    if broken:
        raise ConfigError(
            f"fields={text!r} must be OURS=THEIRS,..., e.g. text=tweet,labels.sentiment=y",
            param="fields",
        )
    return {name: theirs for name, _, theirs in pairs}


async def stopped_by_sigterm(run: Coroutine[None, None, int]) -> int:
    """Runs it; SIGTERM ends it in order, with the status that shells expect."""
    task = asyncio.ensure_future(run)
    loop = asyncio.get_running_loop()
    is_stopped = False

    def stop() -> None:
        nonlocal is_stopped
        is_stopped = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if not is_stopped:
            raise
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 143
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
