"""`python -m train COMMAND`: each command is a module of `train.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys

from pydantic import ValidationError

from serving.errors import SieveError

COMMANDS = {
    "demo": "build the demo that ships with the server, from nothing",
    "posts": "write synthetic posts to try things on",
    "data": "look at a data set, split it, write its ID lists",
    "base": "train a small LLaVA from nothing on posts of your own",
    "fit": "train an adapter by a recipe",
    "evaluate": "say how well an adapter labels, beside baselines",
    "study": "run one of the papers' cross-checks",
    "export": "make a trained adapter ready to serve",
    "fold": "train the projector into a new base checkpoint",
}
_EPILOG = """\
examples:
  python -m train demo --out my_demo                 build the demo from nothing, in 10 minutes
  python -m train posts --out posts --count 200      write posts to label, with their labels
  python -m train COMMAND --help                     what a command does, and its flags
"""


def main(argv: list[str]) -> int:
    """Runs a command; the exit status."""
    name = argv[0] if argv else None
    flags = _parser(name).parse_args(argv)
    try:
        return int(flags.run(flags))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            where = ".".join(map(str, item["loc"])).replace("_", "-")
            print(f"--{where}: {item['msg']}, got {item['input']!r}", file=sys.stderr)
    except SieveError as error:
        print(error.message, file=sys.stderr)
    return 2


def _parser(name: str | None) -> argparse.ArgumentParser:
    """All commands by name; only the module of the one that is asked for is imported."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train LoRA adapters for LLaVA-1.5 that label posts, and say what they are "
        "worth.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, summary in COMMANDS.items():
        if command != name:
            commands.add_parser(command, help=summary)
            continue
        module = importlib.import_module(f"train.commands.{command}")
        sub = commands.add_parser(
            command, help=summary, description=module.DESCRIPTION, formatter_class=raw
        )
        module.add_flags(sub)
        sub.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
