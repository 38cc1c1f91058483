"""The manifest beside an adapter: what it was trained for and how well it does.

`train` writes it, `serving` reads it. An adapter without one is legal and gets the server's
defaults.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import AdapterError
from serving.structures import LabelStructure

MANIFEST_NAME = "sieve.json"
_SAMPLE_BYTES = 1 << 20


class Manifest(BaseModel):
    """What an adapter is for.

    Attributes:
        label_structure: a structure's name, or a whole structure of the adapter's own.
        base_model: name of the checkpoint it was trained on, for people.
        base_fingerprint: `fingerprint` of that checkpoint; a server with another base refuses
            the adapter.
        retention_ratio: the ratio requests get unless they ask for one, in (0, 1].
        selector: the selector requests get unless they ask for one.
        quality: measured figures by test set, e.g. `{"balanced test, r=0.4": {"accuracy": 0.99}}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label_structure: str | LabelStructure | None = None
    base_model: str | None = None
    base_fingerprint: str | None = None
    retention_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    selector: str | None = None
    quality: dict[str, dict[str, float]] = Field(default_factory=dict)

    @property
    def structure_name(self) -> str | None:
        """The structure's name, wherever it is defined."""
        if isinstance(self.label_structure, LabelStructure):
            return self.label_structure.name
        return self.label_structure

    def save(self, folder: Path) -> None:
        """Writes the manifest into an adapter's folder."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of an adapter's folder, or None where there is none.

    Raises:
        AdapterError: there is one, and it is not valid.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"adapter {folder.name!r}: {MANIFEST_NAME} is not valid: {error}"
        ) from error


def fingerprint(checkpoint: Path) -> str:
    """A hash that tells two checkpoints apart without reading all of their weights.

    Covers, of every safetensors file, its header (names, shapes, dtypes, offsets), its size and
    the first and last MiB of its tensor data.

    Raises:
        FileNotFoundError: the folder has no safetensors file.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {checkpoint}")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} ".encode() + file.read(header_size))
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
