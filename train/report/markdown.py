"""An evaluation's figures as Markdown: the content of `evaluation.md`, and what the terminal gets.

Every function takes the JSON of `train.report.figures.summarize`, so that an old evaluation can be
rendered again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.report.tables import as_difference, markdown_table, with_interval

Figures = Mapping[str, Any]


def render_markdown(report: Figures, plots: Sequence[str] = ()) -> str:
    """The whole report.

    Args:
        report: content of `evaluation.json`.
        plots: file names of images beside it.
    """
    last = report["field"]
    sections = [
        f"# Evaluation of {_title(report)}",
        _posts(report),
        "## Conclusions\n\n" + _list([*report["conclusions"], _well_formed(report)]),
        f"## {last} by selector and retention ratio\n\n{retention_table(report)}\n\n{_LEGEND}",
        f"## Beside the model\n\n{baseline_table(report)}",
        "## Fields and classes, all visual tokens\n\n" + class_table(report),
        "## Confusion, all visual tokens\n\n" + confusion_tables(report),
    ]
    if report["notes"]:
        sections.append("## Notes\n\n" + _list(report["notes"]))
    sections += [f"![{name.rsplit('.', 1)[0]}]({name})" for name in plots]
    if report.get("configuration"):
        rows = [[name, _brief(value)] for name, value in report["configuration"].items()]
        sections.append("## Configuration\n\n" + markdown_table(["setting", "value"], rows))
    return "\n\n".join(sections) + "\n"


def render_terminal(report: Figures) -> str:
    """What a person reads when the run has ended."""
    parts = [
        _posts(report),
        retention_table(report),
        baseline_table(report),
        "\n".join([*report["conclusions"], _well_formed(report), *report["notes"]]),
    ]
    return "\n\n".join(parts)


_LEGEND = (
    "Brackets are 95 % bootstrap intervals. Differences are of macro-F1, paired by post: to ratio "
    "1.0, where all selectors keep every token, and to `random` at the same ratio. ECE is the "
    "expected calibration error over 15 bins."
)


def retention_table(report: Figures) -> str:
    """The last field at each selector and ratio."""
    headers = ["selector", "ratio", "kept tokens", "accuracy", "macro-F1", "weighted F1"]
    headers += ["to ratio 1.0", "to random", "ECE"]
    rows = []
    for cell in report["cells"]:
        figures = cell["fields"][report["field"]]
        kept = None if cell["kept_tokens"] is None else f"{cell['kept_tokens']:.1f}"
        rows.append(
            [
                cell["selector"],
                f"{cell['ratio']:g}",
                kept,
                figures["accuracy"],
                with_interval(figures["macro_f1"], figures["macro_f1_interval"]),
                figures["weighted_f1"],
                None if cell["ratio"] == 1.0 else _macro(cell["difference_to_whole"]),
                _macro(cell["difference_to_random"]),
                figures["ece"],
            ]
        )
    return markdown_table(headers, rows)


def baseline_table(report: Figures) -> str:
    """The last field by model and baselines, with the model's lead on the same posts."""
    last = report["field"]
    headers = ["answers of", "posts", "accuracy", "macro-F1", "weighted F1"]
    headers += ["model minus this, macro-F1", "McNemar p"]

    def row(name: str, fields: Figures, against: Figures | None) -> list[object]:
        figures = fields[last]
        p_value = against["mcnemar"]["p_value"] if against else None
        return [
            name,
            figures["posts"],
            figures["accuracy"],
            with_interval(figures["macro_f1"], figures["macro_f1_interval"]),
            figures["weighted_f1"],
            _macro(against["difference"]) if against else None,
            None if p_value is None else f"{p_value:.2g}",
        ]

    rows = [row("the model, ratio 1.0", _whole(report)["fields"], None)]
    for name, fields in report["baselines"].items():
        if last in fields:
            rows.append(row(name, fields, report["comparisons"].get(name)))
    if shuffled := report["shuffled_images"]:
        against = {"difference": shuffled["drop"], "mcnemar": shuffled["mcnemar"]}
        rows.append(row("shuffled images", shuffled["fields"], against))
    return markdown_table(headers, rows)


def class_table(report: Figures) -> str:
    """Every field's classes at ratio 1.0."""
    rows: list[list[object]] = []
    for field, figures in _whole(report)["fields"].items():
        for label, one in figures["per_class"].items():
            columns = [one[name] for name in ("precision", "recall", "f1")]
            rows.append([f"{field}: {label}", *columns, one["support"]])
        whole = [figures["accuracy"], figures["macro_f1"], figures["weighted_f1"]]
        said = "accuracy {:.3f}, macro-F1 {:.3f}, weighted F1 {:.3f}".format(*whole)
        unlabelled = figures["unlabelled"]
        said += f", {unlabelled} posts without a label" if unlabelled else ""
        rows.append([f"**{field}**: {said}", None, None, None, figures["posts"]])
    return markdown_table(["field: label", "precision", "recall", "F1", "posts"], rows)


def confusion_tables(report: Figures) -> str:
    """Every field at ratio 1.0, a row a true label; the last field first."""
    tables = []
    for field, figures in reversed(_whole(report)["fields"].items()):
        counted = zip(figures["labels"], figures["confusion"], strict=True)
        headers = [f"{field}: true \\ answered", *figures["labels"]]
        tables.append(markdown_table(headers, [[label, *counts] for label, counts in counted]))
    return "\n\n".join(tables)


def _whole(report: Figures) -> Figures:
    """The first cell that keeps everything."""
    return next(cell for cell in report["cells"] if cell["ratio"] == 1.0)


def _posts(report: Figures) -> str:
    counts = ", ".join(f"{name} {n}" for name, n in report["labels"][report["field"]].items())
    skipped = "".join(f"; {n} left out: {why}" for why, n in report["skipped"].items())
    return f"{report['num_posts']} posts; {report['field']}: {counts}{skipped}."


def _title(report: Figures) -> str:
    configuration = report.get("configuration") or {}
    return configuration.get("adapter") or configuration.get("model") or report["structure"]


def _well_formed(report: Figures) -> str:
    share = report["well_formed"]
    if share is None:
        return "The share of well-formed answers without the constraint was not measured"
    return f"Without the label constraint {share:.1%} of the answers are well formed"


def _macro(difference: Figures | None) -> str | None:
    return as_difference(difference["macro_f1"]) if difference else None


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _brief(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
