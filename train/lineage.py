"""Where an adapter comes from: what it is asked, and which base it belongs to.

The manifest in its folder says so, or, where it was not exported yet, `run.json` of the run folder
around it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import AdapterError, ConfigError
from serving.manifest import MANIFEST_NAME, fingerprint, load_manifest
from serving.structures import LabelStructure, find_structure, make_structure

RUN_NAME = "run.json"


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What is known about an adapter.

    Attributes:
        structure: what it was trained to be asked; None where nobody says.
        base_fingerprint: of the checkpoint it was trained on; None where nobody says.
    """

    structure: LabelStructure | None = None
    base_fingerprint: str | None = None


def read_lineage(adapter: Path, structures: Mapping[str, LabelStructure]) -> Lineage:
    """What manifest or run folder say about an adapter.

    Args:
        adapter: its folder.
        structures: those that may be called by name.

    Raises:
        ConfigError: there is no such folder, or what it says cannot be read or used.
    """
    if not adapter.is_dir():
        raise ConfigError(f"--adapter {adapter} is no folder", param="adapter")
    manifest = load_manifest(adapter)
    if manifest is not None and manifest.label_structure is not None:
        return Lineage(
            structure=_structure(manifest.label_structure, structures),
            base_fingerprint=manifest.base_fingerprint,
        )
    run = _read_run(adapter.resolve().parent / RUN_NAME)
    own = manifest.base_fingerprint if manifest is not None else None
    said = run.get("label_structure")
    return Lineage(
        structure=None if said is None else _structure(said, structures),
        base_fingerprint=own or run.get("base_fingerprint"),
    )


def find_adapter_structure(
    lineage: Lineage, name: str | None, structures: Mapping[str, LabelStructure]
) -> LabelStructure:
    """The structure to ask for: the one that is named, else the adapter's own.

    Raises:
        ConfigError: neither is there.
    """
    if name is not None:
        return find_structure(structures, name)
    if lineage.structure is None:
        raise ConfigError(
            f"neither {MANIFEST_NAME} in the adapter's folder nor {RUN_NAME} beside it says which "
            f"label structure it is for; give --structure, one of {sorted(structures)}",
            param="structure",
        )
    return lineage.structure


def check_base(adapter: Path, lineage: Lineage, base: Path) -> None:
    """Whether the adapter was trained on this base, as far as both can be told.

    Raises:
        AdapterError: it was trained on another one.
    """
    if lineage.base_fingerprint is None or not base.is_dir():
        return
    try:
        found = fingerprint(base)
    except FileNotFoundError as error:
        raise ConfigError(f"--base {base} has no *.safetensors", param="base") from error
    if found != lineage.base_fingerprint:
        raise AdapterError(
            f"--adapter {adapter} was trained on another base: fingerprint "
            f"{lineage.base_fingerprint}, --base {base} has {found}; name the base it was trained "
            "on",
            param="adapter",
        )


def _structure(said: object, structures: Mapping[str, LabelStructure]) -> LabelStructure:
    if isinstance(said, LabelStructure):
        return said
    if isinstance(said, dict):
        entry = {key: value for key, value in said.items() if key != "name"}
        return make_structure(str(said.get("name")), entry)
    return find_structure(structures, str(said))


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="adapter") from error
    return run if isinstance(run, dict) else {}
