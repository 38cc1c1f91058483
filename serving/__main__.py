"""`python -m serving`: the server, `label`, which labels posts, and `verify`."""

from __future__ import annotations

import sys

import uvloop

from serving.cli import parse_command
from serving.errors import EngineLostError, SieveError


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 when all went well, 1 for an adapter that is not served as trained, 2 for a setting that
        cannot be used, 3 where some posts failed, 4 for an engine that does not stay up.
    """
    try:
        command = parse_command(sys.argv[1:] if argv is None else argv)
        return uvloop.run(command())
    except EngineLostError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 4
    except SieveError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
