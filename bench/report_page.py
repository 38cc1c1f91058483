"""A report as one HTML page: style and pictures within it, no script, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.report_tables import Table

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1d1d1b; --muted: #6d6c66;
  --grid: #e6e5e0; --panel: #f4f3ef;
  --series-0: #2a78d6; --series-1: #d9622b; --series-2: #12946a; --series-3: #8a63d2;
  --series-4: #c08a00; --series-5: #c9407c; --series-6: #2e9bb5;
  --shade-0: #0d366b; --shade-1: #184f95; --shade-2: #2a78d6; --shade-3: #5598e7;
  --shade-4: #7fb2ee; --shade-5: #a5c9f3; }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --ink: #ecebe6; --muted: #a3a198;
  --grid: #34332f; --panel: #21211f;
  --series-0: #4b93ea; --series-1: #e4784a; --series-2: #2fae82; --series-3: #a586e0;
  --series-4: #d3a32c; --series-5: #dd6a9b; --series-6: #52b4cb;
  --shade-0: #cde2fb; --shade-1: #9ec5f4; --shade-2: #6da7ec; --shade-3: #3987e5;
  --shade-4: #3175c6; --shade-5: #2d62a6; } }
body { margin: 0 auto; max-width: 1240px; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.lead { color: var(--muted); margin: 0 0 1.5rem; }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0; }
.figures div { background: var(--panel); border-radius: 8px; padding: .75rem 1rem;
  flex: 1 1 160px; }
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.figures small { display: block; font-size: .8rem; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.wrap td, .wrap th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
ul { padding-left: 1.1rem; color: var(--muted); font-size: .85rem; }
pre { background: var(--panel); border-radius: 8px; padding: .75rem 1rem; overflow-x: auto; }
svg { width: 100%; max-width: 860px; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 1rem; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .tick { fill: var(--muted); } svg .title { fill: var(--muted); font-size: 13px; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--muted); }
svg .front { fill: none; stroke: var(--muted); stroke-dasharray: 4 4; }
svg .goal { stroke: var(--ink); stroke-dasharray: 2 4; }
svg .bar { stroke-width: 1.5; opacity: .55; } svg .mark { stroke-width: 2; }
svg .curve { fill: none; stroke-width: 2; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: of it.
        picture: SVG, may be empty.
        table: below it, if any.
        is_wide: whether the table's cells are texts that wrap.
    """

    title: str
    picture: str = ""
    table: Table | None = None
    is_wide: bool = False

    def html(self) -> str:
        """The section."""
        table = "" if self.table is None else _table(self.table, self.is_wide)
        return f"<section><h2>{escape(self.title)}</h2>{self.picture}{table}</section>"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number to see first.

    Attributes:
        name: what it is.
        value: of it.
        remark: in small print.
    """

    name: str
    value: str
    remark: str

    def html(self) -> str:
        """The figure."""
        name, value, remark = map(escape, (self.name, self.value, self.remark))
        return f"<div><dt>{name}</dt><dd>{value}<small>{remark}</small></dd></div>"


def page(
    title: str,
    lead: str,
    command: str,
    figures: Sequence[Figure],
    sections: Sequence[Section],
) -> str:
    """The whole page."""
    shown = "".join(figure.html() for figure in figures)
    body = "".join(section.html() for section in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p><dl class="figures">{shown}</dl>{body}'
        f"<section><h2>Command</h2><pre>{escape(command)}</pre></section>"
        "<footer>Written by <code>python -m bench</code>. Every request is in requests.csv beside "
        "this file, every number in report.json.</footer></body></html>\n"
    )


def _table(table: Table, is_wide: bool) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    kind = ' class="wrap"' if is_wide else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        f"</table></div>{f'<ul>{notes}</ul>' if notes else ''}"
    )
