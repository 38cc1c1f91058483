"""The command line: one flag a field of `Settings`, and the commands."""

from __future__ import annotations

import argparse
import importlib
import os
import typing
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from serving.errors import ConfigError
from serving.settings import ENV_PREFIX, Settings

Command = Callable[[], Coroutine[None, None, int]]
S = TypeVar("S", bound=Settings)

_SERVE_EPILOG = """\
Every flag is also an environment variable (SIEVE_MAX_NUM_SEQS=8) and a key of a YAML file
(--config server.yaml: 'max_num_seqs: 8'). Flags win over the environment, that over the file.

examples:
  python -m serving                                  serve the demo checkpoint and its adapters
  python -m serving --retention 0.4                  keep 40 % of the visual tokens by default
  python -m serving --model llava-hf/llava-1.5-7b-hf --adapters my_adapters
  python -m serving --ray --replicas 1-3             engines on Ray that follow the load
  python -m serving label --help                     label a folder of posts
  python -m serving batch --help                     label a million, resumable
  python -m serving calibrate --help                 find the bar of a cascade of ratios
  python -m serving explain --help                   show which patches of an image are kept
  python -m serving key --help                       make API keys
  python -m serving --keys keys.yaml                 serve whoever has one of them
  python -m serving verify --help                    check that an adapter is served as trained
"""
_LABEL_EPILOG = """\
--data is MVSA's layouts, Twitter-2015/2017, a folder of image/text pairs, JSONL, CSV or LLaVA
conversations. Flags of the engine (--dtype, --kv-cache-gib, ...) apply where it runs here, without
--server. A server with keys gets that of the environment variable SIEVE_API_KEY.

examples:
  python -m serving label --data posts/ --server http://127.0.0.1:8000 --model llavac
  python -m serving label --data posts.jsonl --model sentiment --out labels.jsonl
"""
_VERIFY_EPILOG = """\
Each adapter must load, answer otherwise than the base model, and give the log-probabilities that
Hugging Face gave when it was exported (its probes.json). One without probes.json is checked for the
first two, and the report says so. Exit status: 0 all good, 1 an adapter is not, 2 bad input.

examples:
  python -m serving verify my_adapters/mine --model checkpoints/base
  python -m serving verify my_adapters/* --model checkpoints/base --json
"""

COMMANDS = {
    "batch": "serving.batch.command:batch_command",
    "calibrate": "serving.batch.command:calibrate_command",
    "explain": "serving.explaining:explain_command",
    "key": "serving.key_command:key_command",
    "label": "serving.cli:label_command",
    "verify": "serving.cli:verify_command",
}
"""What may follow `python -m serving`, and what reads its arguments; else it is the server."""


def parse_command(argv: list[str]) -> Command:
    """The command that the arguments ask for.

    Raises:
        ConfigError: a setting is not allowed; says which, its value and what is.
    """
    if argv and argv[0] in COMMANDS:
        module, function = COMMANDS[argv[0]].split(":")
        command: Command = getattr(importlib.import_module(module), function)(argv[1:])
        return command
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description="Serve LLaVA-1.5 with kept patches, adapters and label structures.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if "--ray" in argv:
        return _ray_command(parser, argv)
    parser.add_argument("--ray", action="store_true", help="serve on Ray; see --ray --help")
    add_settings(parser, Settings.model_fields)
    given = vars(parser.parse_args(argv))
    given.pop("ray")
    settings = read_settings(given)

    async def run() -> int:
        from serving.server import serve

        await serve(settings)
        return 0

    return run


def _ray_command(parser: argparse.ArgumentParser, argv: list[str]) -> Command:
    from serving.cluster.settings import RayAppSettings

    parser.add_argument("--ray", action="store_true", help="serve on Ray")
    add_settings(parser, RayAppSettings.model_fields)
    given = vars(parser.parse_args(argv))
    given.pop("ray")
    settings = settings_of(RayAppSettings, given)

    async def command() -> int:
        from serving.cluster.home import serve_on_ray

        await serve_on_ray(settings)
        return 0

    return command


def label_command(argv: list[str]) -> Command:
    """`label` from its arguments."""
    from serving.labelling import LabelOptions, run_label

    parser = argparse.ArgumentParser(
        prog="python -m serving label",
        description="Label posts, through a running server or with an engine of its own.",
        epilog=_LABEL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="posts: a folder, a .jsonl or a .csv")
    add("--server", help="URL of a running server; without it the engine runs here")
    add("--model", help="adapter, or the base model; by default the server's base model")
    add("--retention", type=float, help="share of visual tokens kept")
    add("--selector", help="which patches are kept")
    add("--label-structure", help="structure; by default the adapter's")
    add("--out", type=Path, help="write a row a post: .jsonl or .csv")
    add("--summary-json", type=Path, help="write the summary for machines")
    add("--limit", type=int, help="label the first N posts only")
    add("--split", help="only the ids of SPLIT_ids.txt, or of a file")
    add("--concurrency", type=int, default=16, help="requests at once (default 16)")
    add("--checkpoint", help="without --server: checkpoint to load (default the demo)")
    engine_flags = ("config", *ENGINE_FIELDS)
    add_settings(parser, {name: Settings.model_fields[name] for name in ENGINE_FIELDS})
    given = vars(parser.parse_args(argv))
    engine = {name: given.pop(name) for name in engine_flags}
    checkpoint = given.pop("checkpoint")
    options = LabelOptions(**given)
    if options.server is not None:
        return lambda: run_label(options, None)
    settings = read_settings({**engine, "model": checkpoint})
    return lambda: run_label(options, settings)


ENGINE_FIELDS = (
    "adapters",
    "structures",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_images",
    "kv_cache_gib",
    "gpu_memory",
    "tower_batch_size",
    "tower_cache_mib",
    "enforce_eager",
    "log_level",
)
"""Settings that matter where `label` runs the engine itself."""


def verify_command(argv: list[str]) -> Command:
    """`verify` from its arguments."""
    from serving.verify import TOLERANCE, VerifyOptions, run_verify

    parser = argparse.ArgumentParser(
        prog="python -m serving verify",
        description="Check that adapters are served as they were trained.",
        epilog=_VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="an adapter's folder")
    add("--json", action="store_true", help="print the verdicts for machines")
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="most difference of log-probabilities; of probabilities, a tenth of it "
        f"(default {TOLERANCE})",
    )
    add_settings(parser, {name: Settings.model_fields[name] for name in VERIFY_FIELDS})
    given = vars(parser.parse_args(argv))
    options = VerifyOptions(
        adapters=given.pop("adapters"),
        as_json=given.pop("json"),
        tolerance=given.pop("tolerance"),
    )
    if not options.tolerance > 0:
        raise ConfigError(f"--tolerance {options.tolerance} must be above 0, e.g. {TOLERANCE}")
    exact = {"dtype": "float32", "max_num_seqs": 8, "max_images": 1, "retention": 1.0}
    settings = read_settings({**exact, **given})
    return lambda: run_verify(options, settings)


VERIFY_FIELDS = (
    "model",
    "structures",
    "max_model_len",
    "kv_cache_gib",
    "gpu_memory",
    "enforce_eager",
    "log_level",
)
"""Settings of the engine that `verify` starts; it computes in float32."""


def read_settings(given: dict[str, object]) -> Settings:
    """A server's settings, see `settings_of`."""
    return settings_of(Settings, given)


def settings_of(kind: type[S], given: dict[str, object]) -> S:
    """Settings from flags (None where not given), environment and YAML file.

    Raises:
        ConfigError: a value is not allowed or a key unknown.
    """
    config = given.pop("config", None)
    if config is not None:
        if not Path(str(config)).is_file():
            raise ConfigError(f"--config {config}: no such file")
        os.environ[f"{ENV_PREFIX}CONFIG"] = str(config)
    flags = {name: value for name, value in given.items() if value is not None}
    try:
        return kind(**flags)  # type: ignore[arg-type]
    except ValidationError as error:
        reasons = [
            f"{'.'.join(map(str, item['loc']))}={item.get('input')!r}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise ConfigError("settings: " + "; ".join(reasons)) from error


def add_settings(parser: argparse.ArgumentParser, fields: dict[str, FieldInfo]) -> None:
    """Adds a flag a field, and `--config`."""
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    for name, field in fields.items():
        _add_flag(parser, name, field)


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    flag = f"--{name.replace('_', '-')}"
    default = "" if field.default is None else f" (default {field.default})"
    text = f"{field.description}{default}".replace("%", "%%")
    kinds = {field.annotation, *typing.get_args(field.annotation)}
    if bool in kinds:
        parser.add_argument(
            flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
        )
    else:
        metavar = name.rsplit("_", 1)[-1].upper()
        parser.add_argument(flag, dest=name, metavar=metavar, help=text)
