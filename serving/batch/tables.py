"""Published rows: JSON lines, CSV, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from serving.batch.outcomes import Answer, Outcome

Fields = Mapping[str, Sequence[str]]
"""A structure's fields with their labels."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """How a run's rows look.

    Attributes:
        fields: of every model that is asked, by its name; one model's columns have no prefix.
        versions: software and checkpoint, the same in every row.
        abstain: below this confidence a row says that it abstains; None where nobody asked.
    """

    fields: Mapping[str, Fields]
    versions: Mapping[str, str]
    abstain: float | None

    def abstains(self, answers: Sequence[Answer]) -> bool:
        """Whether some answer is below the bar."""
        return self.abstain is not None and any(a.confidence < self.abstain for a in answers)

    def write_jsonl(self, outcomes: Iterable[Outcome], path: Path) -> None:
        """An object a line: full answers."""
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for outcome in outcomes:
                file.write(json.dumps(self.as_object(outcome), ensure_ascii=False) + "\n")

    def as_object(self, outcome: Outcome) -> dict[str, Any]:
        """A labelled post; several models' answers stand in a list."""
        row: dict[str, Any] = {"id": outcome.id}
        answers = [self._answer(answer) for answer in outcome.answers]
        row |= answers[0] if len(self.fields) < 2 else {"answers": answers}
        if self.abstain is not None:
            row["abstained"] = self.abstains(outcome.answers)
        return row

    def _answer(self, answer: Answer) -> dict[str, Any]:
        values = dict(vars(answer))
        values["adapter"] = values.pop("model")
        values["versions"] = dict(self.versions) | (
            {"adapter": values.pop("version")} if answer.version else {}
        )
        values.pop("version", None)
        return values

    @cached_property
    def columns(self) -> dict[str, str]:
        """Names of the columns, and their kind: `text`, `number`, `count` or `flag`."""
        columns = {"id": "text"}
        for model, fields in self.fields.items():
            prefix = self._prefix(model)
            columns |= {f"{prefix}{field}": "text" for field in fields}
            columns |= {
                f"{prefix}{field}.{label}": "number"
                for field, labels in fields.items()
                for label in labels
            }
            columns |= {
                f"{prefix}confidence": "number",
                f"{prefix}adapter": "text",
                f"{prefix}adapter_version": "text",
                f"{prefix}ratio": "number",
                f"{prefix}kept": "count",
                f"{prefix}patches": "count",
            }
        if self.abstain is not None:
            columns["abstained"] = "flag"
        return {**columns, "versions": "text"}

    def _prefix(self, model: str) -> str:
        return "" if len(self.fields) < 2 else f"{model}."

    def as_cells(self, outcome: Outcome) -> list[Any]:
        """Values of `columns`."""
        values: dict[str, Any] = {"id": outcome.id, "versions": self._version_text}
        for model, answer in zip(self.fields, outcome.answers, strict=True):
            prefix = self._prefix(model)
            values |= {f"{prefix}{field}": label for field, label in answer.labels.items()}
            values |= {
                f"{prefix}{field}.{label}": share
                for field, shares in answer.probabilities.items()
                for label, share in shares.items()
            }
            values |= {
                f"{prefix}confidence": answer.confidence,
                f"{prefix}adapter": answer.model,
                f"{prefix}adapter_version": answer.version,
                f"{prefix}ratio": answer.ratio,
                f"{prefix}kept": answer.kept,
                f"{prefix}patches": answer.patches,
            }
        values["abstained"] = self.abstains(outcome.answers)
        return [values[name] for name in self.columns]

    @cached_property
    def _version_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.versions.items())

    def write_csv(self, outcomes: Iterable[Outcome], path: Path) -> None:
        """Commas, a header in every file."""
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(self.columns)
            rows.writerows(self.as_cells(outcome) for outcome in outcomes)

    def write_parquet(self, outcomes: Iterable[Outcome], path: Path) -> None:
        """One row group a file, zstd."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {
            "text": pa.string(),
            "number": pa.float32(),
            "count": pa.int32(),
            "flag": pa.bool_(),
        }
        schema = pa.schema([(name, kinds[kind]) for name, kind in self.columns.items()])
        rows = [self.as_cells(outcome) for outcome in outcomes]
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        arrays = [
            pa.array([_spelled(value) for value in column], field.type)
            for column, field in zip(columns, schema, strict=True)
        ]
        pq.write_table(pa.table(arrays, schema=schema), path, compression="zstd")


def _spelled(value: Any) -> Any:
    """Names of files need not be Unicode; what is not gets written as an escape."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


FORMATS: Mapping[str, Callable[[Table, Iterable[Outcome], Path], None]] = {
    "jsonl": Table.write_jsonl,
    "csv": Table.write_csv,
    "parquet": Table.write_parquet,
}


def write_errors(outcomes: Iterable[Outcome], path: Path) -> None:
    """Failed posts: id, stage, code, reason, retryable."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for outcome in outcomes:
            row = {"id": outcome.id, **(outcome.error or {})}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_review(outcomes: Iterable[Outcome], path: Path) -> None:
    """Posts that somebody should look at, the least sure first: text, images, answers."""
    queue = sorted(outcomes, key=lambda o: min(answer.confidence for answer in o.answers))
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for outcome in queue:
            answers = [
                {
                    "adapter": answer.model,
                    "confidence": answer.confidence,
                    "labels": answer.labels,
                    "probabilities": answer.probabilities,
                }
                for answer in outcome.answers
            ]
            row = {"id": outcome.id, **(outcome.review or {}), "answers": answers}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
