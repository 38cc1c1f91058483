"""An evaluation's folder: written aside and put in place by renames, or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.errors import ConfigError
from train.evaluation import Evaluation
from train.report.markdown import render_markdown
from train.report.plots import write_plots

REPORT_NAME = "evaluation.json"
MARKDOWN_NAME = "evaluation.md"
PREDICTIONS_NAME = "predictions.jsonl"


def check_out(out: Path, configuration: Mapping[str, Any]) -> None:
    """Whether `out` may be written: it is new, empty, or holds this very evaluation.

    Raises:
        ConfigError: it holds something else (names what differs), or cannot be written.
    """
    _check_writable(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    report = out / REPORT_NAME
    if not report.is_file():
        raise ConfigError(
            f"--out {out} is there and is no evaluation; name another folder", param="out"
        )
    try:
        old = json.loads(report.read_text(encoding="utf-8")).get("configuration") or {}
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"--out {out} has an {REPORT_NAME} that cannot be read ({error}); name another folder",
            param="out",
        ) from error
    new = json.loads(json.dumps(configuration))
    differing = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ConfigError(
            f"--out {out} holds an evaluation with another configuration "
            f"({'; '.join(differing)}); name another folder",
            param="out",
        )


def _check_writable(out: Path) -> None:
    """Better now than after hours of evaluation."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written: {error.strerror}", param="out"
        ) from error


def write_evaluation(out: Path, evaluation: Evaluation, report: Mapping[str, Any]) -> None:
    """Writes report, predictions and plots.

    Args:
        out: its folder; an evaluation that is there is replaced when the new one is whole.
        evaluation: whose predictions are written, a line a post and cell.
        report: content of `evaluation.json`, the configuration included.

    Raises:
        ConfigError: the folder cannot be written; what was there is left as it was.
    """
    with _put_in_place(out) as folder:
        _write_json(folder / REPORT_NAME, report)
        with (folder / PREDICTIONS_NAME).open("w", encoding="utf-8") as file:
            for row in prediction_rows(evaluation):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        plots = write_plots(report, folder)
        (folder / MARKDOWN_NAME).write_text(render_markdown(report, plots), encoding="utf-8")


def prediction_rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """A row a post and cell: id, selector, ratio, labels, probabilities, truth, kept tokens."""
    fields = evaluation.structure.fields
    for cell in evaluation.cells:
        for post, found in zip(evaluation.posts, cell.predictions, strict=True):
            yield {
                "id": post.id,
                "selector": cell.selector,
                "ratio": cell.ratio,
                "labels": dict(found.labels),
                "probabilities": {
                    field: {label: round(p, 6) for label, p in shares.items()}
                    for field, shares in found.probabilities.items()
                },
                "truth": {name: post.labels.get(name) for name in fields},
                "kept": found.kept,
                "patches": found.patches,
            }


@contextmanager
def _put_in_place(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place in the end, or disappears on an error."""
    new, old = (out.parent / f".{out.name}.{state}" for state in ("new", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not out.exists():  # killed between the two renames below
            old.rename(out)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written: {error.strerror}", param="out"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_json(path: Path, report: Mapping[str, Any]) -> None:
    text = json.dumps(_rounded(report), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Six decimals are more than any of these figures is worth; p-values may need them all."""
    if isinstance(value, float):
        return round(value, 6) if abs(value) >= 1e-4 else float(f"{value:.3g}")
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
