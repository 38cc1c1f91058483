"""A study's folder for people and machines: `study.md`, `study.json`, pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from train.files import write_json, write_text
from train.report.tables import markdown_table
from train.studies.catalog import STUDIES
from train.studies.cells import KINDS, Result
from train.studies.findings import Findings, Plot, Table
from train.studies.setup import IMAGE_MODES, Setup

_SIZE = (6.4, 4.2)  # inches
_STYLES = ("--", ":", "-.", (0, (1, 4)))


def write_report(
    setup: Setup,
    configuration: Mapping[str, Any],
    findings: Findings,
    results: Mapping[str, Result],
) -> dict[str, Any]:
    """Writes the report, each file at once; the content of `study.json`."""
    content = {
        "study": setup.study,
        "question": findings.question,
        "num_posts": {"train": len(setup.material.train), "dev": len(setup.material.dev)},
        "seeds": list(setup.seeds),
        "conclusions": list(findings.conclusions),
        "limits": [*_limits(setup, findings), *findings.limits],
        "figures": findings.figures,
        "seconds": {
            kind: round(sum(one["seconds"] for one in results.values() if one["kind"] == kind), 1)
            for kind in KINDS
        },
        "num_cells": len(results),
        "configuration": dict(configuration),
    }
    for plot in findings.plots:
        write_text(setup.out / f"{plot.name}.svg", draw(plot))
    write_text(setup.out / "study.md", render(content, findings))
    write_json(setup.out / "study.json", content)
    return content


def render(content: Mapping[str, Any], findings: Findings) -> str:
    """The report in Markdown."""
    entry = STUDIES[content["study"]]
    sections = [
        f"# Study: {content['study']}",
        f"{entry.summary[0].upper()}{entry.summary[1:]} Why: {entry.why}.",
        "## What was run\n\n" + _what_was_run(content),
        "## What follows\n\n" + _bullets(content["conclusions"]),
        "## What does not follow\n\n" + _bullets(content["limits"]),
        *(_section(table) for table in findings.tables),
        *(f"![{plot.name}]({plot.name}.svg)" for plot in findings.plots),
    ]
    return "\n\n".join(sections) + "\n"


def draw(plot: Plot) -> str:
    """A picture as SVG; the same figures give the same text. No display is needed."""
    with matplotlib.rc_context({"svg.hashsalt": "sieve", "font.size": 9}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for name, points in plot.lines.items():
            xs, means, stds = zip(*points, strict=True)
            style = "o" if isinstance(xs[0], str) else "o-"
            bars = [std or 0.0 for std in stds]
            axes.errorbar(xs, means, yerr=bars, fmt=style, capsize=3, label=name)
        for (name, level), line in zip(plot.levels.items(), _STYLES, strict=False):
            axes.axhline(level, color="gray", linewidth=1, linestyle=line, label=name)
        if plot.is_log:
            ticks = sorted({point[0] for points in plot.lines.values() for point in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if any(isinstance(point[0], str) for points in plot.lines.values() for point in points):
            axes.margins(x=0.15)
            if max(len(str(point[0])) for points in plot.lines.values() for point in points) > 3:
                axes.tick_params(axis="x", rotation=20)
        axes.set(xlabel=plot.across, ylabel=plot.up)
        axes.legend(fontsize=7)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _what_was_run(content: Mapping[str, Any]) -> str:
    settings = content["configuration"]
    data, recipe, posts = settings["data"], settings["recipe"], content["num_posts"]
    structure = settings["label_structure"]
    field = list(structure["fields"])[-1]
    labels = ", ".join(f"{n} {label}" for label, n in data["dev"]["labels"][field].items())
    left_out = data["left_out"] and f", left out: {data['left_out']}"
    splits = data["splits"]
    lines = [
        content["question"],
        f"Posts: {data['source']}, {posts['train']} to train on (split {splits['train']}), "
        f"{posts['dev']} to answer (split {splits['dev']}; {field}: {labels}){left_out or ''}.",
        f"Seeds: {', '.join(map(str, content['seeds']))}, of LoRA's weights, the order of the "
        "posts and dropout.",
        f"Base: {settings['base']} (fingerprint {settings['base_fingerprint']}), images are "
        f"{IMAGE_MODES[settings['image_mode']]}.",
        f"Recipe: {recipe['name']}, structure {structure['name']}, rank {recipe['rank']}, alpha "
        f"{recipe['alpha']}, {recipe['targets']} weights, learning rate "
        f"{recipe['learning_rate']:g}, {recipe['num_epochs']:g} epoch(s), batches of "
        f"{recipe['batch_size']}, {recipe['keep']} weights kept; all settings are in study.json.",
        f"Cells: {content['num_cells']}, {content['seconds']['training']:.0f} s of training, "
        f"{content['seconds']['evaluation']:.0f} s of evaluation, "
        f"{content['seconds']['baseline']:.0f} s of baselines.",
    ]
    return _bullets(lines)


def _limits(setup: Setup, findings: Findings) -> list[str]:
    """What holds for every study."""
    num_posts = findings.num_posts or len(setup.material.dev)
    said = [
        f"These are {num_posts} posts of one data set, answered by adapters of one recipe. The "
        "figure after ± is the standard deviation over seeds; an interval in brackets "
        "is a 95 % bootstrap over posts of the mean over seeds. Neither says anything about other "
        "data, bases or recipes.",
        "A verdict (better, worse) is about macro-F1, fixed beforehand: the interval leaves zero "
        "out and every seed has the same sign. No reliable difference is not equality.",
        "McNemar's exact test is about accuracy, so the two may disagree. It takes each post once, "
        "with the label that most seeds answered (of labels as frequent, the first seed's); adding "
        "seeds up would count every post several times. Results by seed are in study.json.",
    ]
    if len(setup.seeds) < 3:
        said.append(
            f"Number of seeds: {len(setup.seeds)}. Below 3 their deviation is worth little; where "
            "there is none, luck with the seed is not told from a difference."
        )
    if findings.num_comparisons > 1:
        said.append(
            f"{findings.num_comparisons} comparisons were made and no interval or p is widened "
            f"for that; hold p against {0.05 / findings.num_comparisons:.2g} to be strict."
        )
    if setup.recipe.keep == "best":
        said.append(
            "The weights that were kept are the best on these very posts, so all trained models "
            "look somewhat better than they are."
        )
    return said


def _section(table: Table) -> str:
    legend = f"\n\n{table.legend}" if table.legend else ""
    return f"## {table.title}\n\n{markdown_table(table.headers, table.rows)}{legend}"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
