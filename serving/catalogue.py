"""What may be asked for by name, and which setting wins: request, then manifest, then server."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from patches.config import Retention
from serving.adapters import InstalledAdapter
from serving.errors import AdapterError, BadRequestError, ConfigError, UnknownModelError
from serving.manifest import Manifest
from serving.protocol import Adapter
from serving.structures import LabelStructure, find_structure


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a request chose; None where it left the choice to the adapter or the server."""

    model: str | None = None
    label_structure: str | None = None
    retention_ratio: float | None = None
    selector: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The settings of one request after precedence: request, then manifest, then server."""

    model: str
    adapter: Adapter | None
    structure: LabelStructure
    retention: Retention


class Catalogue:
    """Models, adapters and label structures of a server, and the precedence among settings.

    Args:
        base: the base model's name.
        structures: label structures by name; those of adapters come with the adapters.
        structure: the server's default structure.
        retention: the server's default retention.
        adapters: served adapters by name.

    Raises:
        ConfigError: a default names a structure that does not exist.
        AdapterError: an adapter does not go with the others, see `check`.
    """

    def __init__(
        self,
        *,
        base: str,
        structures: Mapping[str, LabelStructure],
        structure: str,
        retention: Retention,
        adapters: Mapping[str, InstalledAdapter] | None = None,
    ) -> None:
        self.base = base
        self._server_structures = dict(structures)
        self.default_structure, self.default_retention = structure, retention
        self.adapters: dict[str, InstalledAdapter] = {}
        for name, installed in (adapters or {}).items():
            self.check(name, installed.manifest, self.adapters)
            self.adapters[name] = installed
        self.update(self.adapters)
        if structure not in self.structures:
            raise ConfigError(
                f"label_structure={structure!r} is unknown; allowed are {sorted(self.structures)}"
            )

    def update(self, adapters: Mapping[str, InstalledAdapter]) -> None:
        """Serves these adapters from now on; requests that were resolved keep theirs."""
        self.adapters = dict(adapters)
        self.structures = self._structures_with(adapters)

    def only(self, models: Collection[str]) -> Catalogue:
        """The same with these adapters alone, and the structures that then remain."""
        view = copy.copy(self)
        view.update({name: item for name, item in self.adapters.items() if name in models})
        return view

    def _structures_with(
        self, adapters: Mapping[str, InstalledAdapter]
    ) -> dict[str, LabelStructure]:
        own = [installed.manifest.label_structure for installed in adapters.values()]
        return self._server_structures | {
            item.name: item for item in own if isinstance(item, LabelStructure)
        }

    def check(self, name: str, manifest: Manifest, others: Mapping[str, InstalledAdapter]) -> None:
        """Refuses an adapter that cannot be served beside the others.

        Raises:
            AdapterError: it has the base's name, needs an unknown structure, defines one
                differently from the server or another adapter, or names no retention there is.
        """
        if name == self.base:
            raise AdapterError(f"adapter {name!r} has the base model's name; rename its folder")
        own, structures = manifest.label_structure, self._structures_with(others)
        if isinstance(own, LabelStructure):
            if structures.get(own.name, own) != own:
                raise AdapterError(
                    f"adapter {name!r} defines label structure {own.name!r} differently; rename it"
                )
        elif own is not None and own not in structures:
            raise AdapterError(f"adapter {name!r} needs label structure {own!r}; see --structures")
        try:
            self._retention(Choices(), manifest)
        except BadRequestError as error:
            raise AdapterError(f"adapter {name!r}: {error.message}") from error

    def resolve(self, choices: Choices) -> Resolved:
        """Settings of a request.

        Raises:
            UnknownModelError: no such model.
            BadRequestError: no such structure or selector, or a ratio outside (0, 1].
        """
        model = choices.model if choices.model is not None else self.base
        installed = self.adapters.get(model)
        if installed is None and model != self.base:
            raise UnknownModelError(
                f"model={model[:80]!r} does not exist; served are {self._names()}", param="model"
            )
        manifest = installed.manifest if installed else Manifest()
        structure = find_structure(
            self.structures,
            manifest.structure_name or self.default_structure
            if choices.label_structure is None
            else choices.label_structure,
        )
        return Resolved(
            model=model,
            adapter=installed.adapter if installed else None,
            structure=structure,
            retention=self._retention(choices, manifest),
        )

    def _names(self, most: int = 20) -> str:
        names = [self.base, *sorted(self.adapters)]
        more = f" and {len(names) - most} more (GET /v1/models)" if len(names) > most else ""
        return f"{names[:most]}{more}"

    def _retention(self, choices: Choices, manifest: Manifest) -> Retention:
        ratios = (choices.retention_ratio, manifest.retention_ratio, self.default_retention.ratio)
        selectors = (choices.selector, manifest.selector, self.default_retention.selector)
        try:
            return Retention(
                ratio=next(ratio for ratio in ratios if ratio is not None),
                selector=next(selector for selector in selectors if selector is not None),
            )
        except ValueError as error:
            param = str(error).split("=", 1)[0]
            raise BadRequestError(str(error), param=param) from error
