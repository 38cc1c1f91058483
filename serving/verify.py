"""Whether vLLM serves an adapter as it was trained: the probes asked again, and compared.

Three things must hold: the adapter loads, its answers differ from the base model's, and both give
the log-probabilities that Hugging Face gave (`probes.json`). An adapter without probes is checked
for the first two, and the report says so.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serving.adapters import InstalledAdapter, check_adapter, read_base
from serving.catalogue import Choices
from serving.errors import ConfigError
from serving.labeler import Labeler
from serving.probes import Logprobs, Probe, Probes, load_probes, questions
from serving.settings import Settings

TOLERANCE = 1e-3
"""Most difference of log-probabilities in float32; of probabilities, a tenth of it."""

_LEAST = 1e-300  # log-probability of -690: probabilities that underflowed


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What `python -m serving verify` was asked for.

    Attributes:
        adapters: folders.
        tolerance: most difference of log-probabilities.
        as_json: for machines.
    """

    adapters: Sequence[Path]
    tolerance: float = TOLERANCE
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A probability that is not what it should be; None where there is none at all."""

    probe: str
    model: str
    field: str
    label: str
    expected: float | None
    found: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found out about one adapter.

    Attributes:
        name: the adapter.
        num_probes: questions asked.
        has_answers: whether they came with the trained model's answers.
        largest_error: most difference from those, in log-probability; None without them.
        change: most difference between adapter and base, in log-probability.
        tolerance: most that `largest_error` may be, least that `change` must be more than.
        differences: what is not as it should be.
    """

    name: str
    num_probes: int
    has_answers: bool
    largest_error: float | None
    change: float
    tolerance: float
    differences: list[Difference] = field(default_factory=list)

    @property
    def acts(self) -> bool:
        """Whether the adapter changes any answer."""
        return self.change > self.tolerance

    @property
    def is_good(self) -> bool:
        """Whether it may be served."""
        return self.acts and not self.differences

    def lines(self) -> Iterator[str]:
        """For people."""
        state = "ok" if self.is_good else "FAILED"
        yield f"{self.name}: {state}"
        yield (
            f"  differs from the base by up to {self.change:.3g} in log-probability"
            if self.acts
            else f"  answers as the base model does (within {self.tolerance:g}): it does nothing"
        )
        if self.largest_error is None:
            yield "  no probes.json: not compared with the trained model, only loaded and asked"
        else:
            yield (
                f"  differs from the trained model by up to {self.largest_error:.3g}, allowed "
                f"{self.tolerance:g} ({self.num_probes} probes)"
            )
        if self.differences:
            yield from _table(self.differences)


def _table(differences: Sequence[Difference], most: int = 20) -> Iterator[str]:
    rows = [("probe", "model", "field", "label", "expected", "found")]
    for item in differences[:most]:
        numbers = (item.expected, item.found)
        shown = ["none" if number is None else f"{number:.6g}" for number in numbers]
        rows.append((item.probe, item.model, item.field, item.label, shown[0], shown[1]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
    if len(differences) > most:
        yield f"  and {len(differences) - most} more"


async def run_verify(options: VerifyOptions, settings: Settings) -> int:
    """Loads base and adapters in vLLM, asks and compares.

    Returns:
        0 where every adapter may be served, else 1.

    Raises:
        ConfigError: an adapter or setting that cannot even be tried.
    """
    from serving.server import catalogue_of, check_model, running_labeler

    check_model(settings.model)
    installed = _install(options.adapters, settings)
    asked = {name: load_probes(Path(item.adapter.path)) for name, item in installed.items()}
    catalogue = catalogue_of(settings, installed)
    for name, probes in asked.items():
        if probes is not None and probes.structure not in catalogue.structures:
            raise ConfigError(
                f"adapter {name!r}: its probes ask for label structure {probes.structure!r}, which "
                "neither its manifest nor --structures has"
            )

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    async with running_labeler(settings, report, catalogue) as labeler:
        verdicts = [
            await verify(labeler, name, probes, tolerance=options.tolerance)
            for name, probes in asked.items()
        ]
    if options.as_json:
        print(json.dumps([_as_dict(verdict) for verdict in verdicts], indent=2))
    else:
        print("\n".join(line for verdict in verdicts for line in verdict.lines()))
    return 0 if all(verdict.is_good for verdict in verdicts) else 1


def _install(folders: Sequence[Path], settings: Settings) -> dict[str, InstalledAdapter]:
    base = read_base(settings.model)
    installed: dict[str, InstalledAdapter] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"adapter {folder} is no folder; name the exported adapter's")
        item = check_adapter(folder.resolve(), base)
        if item.adapter.name in installed:
            raise ConfigError(
                f"two adapters are called {item.adapter.name!r}; verify them one after the other"
            )
        installed[item.adapter.name] = item
    return installed


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    return {"is_good": verdict.is_good, **asdict(verdict)}


async def verify(
    labeler: Labeler, name: str, probes: Probes | None, *, tolerance: float = TOLERANCE
) -> Verdict:
    """Asks an adapter's probes of it and of the base model, all in one go, and compares.

    Args:
        labeler: on an engine that computes in float32.
        name: the adapter.
        probes: its own, or None for questions without known answers.
        tolerance: see `TOLERANCE`.
    """
    catalogue = labeler.catalogue
    structure = catalogue.resolve(Choices(model=name)).structure.name
    probes = probes or Probes(structure=structure, probes=tuple(questions(3)))
    models = (catalogue.base, name)
    answers = await asyncio.gather(
        *(ask(labeler, model, probes, probe) for probe in probes.probes for model in models)
    )
    change, errors = 0.0, [0.0]
    differences: list[Difference] = []
    for index, probe in enumerate(probes.probes):
        pair = answers[2 * index : 2 * index + 2]
        change = max(change, _largest(*pair))
        if probe.answers is None:
            continue
        expected = (probe.answers.base, probe.answers.adapter)
        for model, wanted, found in zip(models, expected, pair, strict=True):
            errors.append(_largest(wanted, found))
            differences += _compare(probe, model, wanted, found, tolerance)
    has_answers = probes.are_answered
    return Verdict(
        name=name,
        num_probes=len(probes.probes),
        has_answers=has_answers,
        largest_error=max(errors) if has_answers else None,
        change=change,
        tolerance=tolerance,
        differences=differences,
    )


async def ask(labeler: Labeler, model: str, probes: Probes, probe: Probe) -> Logprobs:
    """A model's log-probabilities of all labels, along the answer it gives."""
    choices = Choices(
        model=model,
        label_structure=probes.structure,
        retention_ratio=probe.ratio,
        selector=probes.selector,
    )
    images = [] if probe.picture is None else [probe.picture.paint()]
    result = await labeler.label(probe.text, images, choices)
    return {
        name: {label: math.log(max(value, _LEAST)) for label, value in labels.items()}
        for name, labels in result.scores.probabilities.items()
    }


Pair = tuple[str, str, float | None, float | None]


def _pairs(one: Logprobs, other: Logprobs) -> Iterator[Pair]:
    """Field, label and both log-probabilities of whatever either has."""
    for name in {**one, **other}:
        left, right = one.get(name, {}), other.get(name, {})
        for label in {**left, **right}:
            yield name, label, left.get(label), right.get(label)


def _largest(one: Logprobs, other: Logprobs) -> float:
    """Most difference between two, of the labels that both have."""
    both = [
        abs(left - right)
        for _, _, left, right in _pairs(one, other)
        if left is not None and right is not None
    ]
    return max(both, default=0.0)


def _compare(
    probe: Probe, model: str, wanted: Logprobs, found: Logprobs, tolerance: float
) -> Iterator[Difference]:
    for name, label, left, right in _pairs(wanted, found):
        if left is not None and right is not None:
            in_log = abs(left - right) <= tolerance
            if in_log and abs(math.exp(left) - math.exp(right)) <= tolerance / 10:
                continue
        yield Difference(
            probe=probe.title,
            model=model,
            field=name,
            label=label,
            expected=None if left is None else math.exp(left),
            found=None if right is None else math.exp(right),
        )
