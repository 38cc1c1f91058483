"""What the operator chose by HTTP, kept beside the adapters: a restart finds it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from serving.adapter_files import AdapterFolder
from serving.errors import AdapterError

logger = logging.getLogger(__name__)

STATE_FILE = "registry.json"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for one name.

    Attributes:
        version: the one that serves; None for the newest.
        is_pinned: never evicted from engines.
        is_removed: not served though it lies there.
    """

    version: str | None = None
    is_pinned: bool = False
    is_removed: bool = False


def read_choices(folder: AdapterFolder) -> dict[str, Choice]:
    """Choices by name.

    Raises:
        AdapterError: the file is not what this wrote.
    """
    try:
        stored = json.loads(folder.read_text(STATE_FILE) or "{}")
        return {name: Choice(**choice) for name, choice in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{STATE_FILE} of the adapters folder cannot be read ({type(error).__name__}); "
            "repair or delete it: it keeps which versions were chosen, pinned or removed",
            param="adapters",
        ) from error


def keep_choice(folder: AdapterFolder, name: str, choice: Choice) -> None:
    """Writes one choice; where the folder cannot be written the log says what that means."""
    try:
        choices = {**read_choices(folder), name: choice}
        text = json.dumps({n: vars(c) for n, c in sorted(choices.items())}, indent=2)
        folder.write_text(STATE_FILE, text + "\n")
    except (OSError, AdapterError) as error:
        logger.warning("the choice for %r is lost at a restart: %s", name, error)
