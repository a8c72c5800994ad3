"""Runs beside one another as one page: nothing but this file, light or dark as the reader's system, wide or narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from copyspec_engine.lab.display.charts import Chart
from copyspec_engine.lab.display.plots import element
from copyspec_engine.lab.display.tables import Table
from copyspec_engine.values.html import look

__all__ = ["page"]

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: var(--space); max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/var(--leading) var(--font); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .6rem; }
section { margin: 0 0 2.2rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: var(--small); }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; font-weight: normal; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr.same { border-bottom-color: transparent; }
.figures td, .figures thead th.figure { text-align: right; }
.figures td { white-space: nowrap; }
.figures thead th { vertical-align: bottom; }
.words td { min-width: 11rem; max-width: 26rem; overflow-wrap: anywhere; }
@media (max-width: 30rem) { table { font-size: .75rem; } th, td { padding-right: .45rem; } }
p { margin: .5rem 0; color: var(--soft); font-size: var(--small); }
.charts { display: grid; gap: 1.6rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; max-width: 34rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink) !important; }
"""


def page(title: str, tables: Sequence[Table], charts: Sequence[Chart]) -> str:
    """The page; the first table stands above the charts, the others below them.

    Raises:
        CopySpecError: matplotlib, which draws the charts, is not installed.
    """
    figures = "".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{element(chart, f'chart-{number}')}</figure>\n"
        for number, chart in enumerate(charts, 1)
    )
    pictures = f'<section aria-label="Charts" class="charts">\n{figures}</section>\n' if charts else ""
    first, *others = [_section(table, f"table-{number}") for number, table in enumerate(tables, 1)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{look()}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{first}{pictures}{''.join(others)}</main>\n</body>\n</html>\n"
    )


def _section(table: Table, identifier: str) -> str:
    """A table under its heading; it scrolls by itself where the page is narrower."""
    kind = "words" if any(len(cell) > 24 for row in table.rows for cell in row[table.num_labels :]) else "figures"
    head = "".join(
        f'<th scope="col"{_right(place >= table.num_labels)}>{escape(text)}</th>'
        for place, text in enumerate(table.headings)
    )
    body = "".join(_row(table, place) for place in range(len(table.rows)))
    note = f"<p>{escape(table.note)}</p>\n" if table.note else ""
    return (
        f'<section>\n<h2 id="{identifier}">{escape(table.title)}</h2>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{identifier}">\n<table class="{kind}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n{note}</section>\n"
    )


def _right(figure: bool) -> str:
    return ' class="figure"' if figure else ""


def _row(table: Table, place: int) -> str:
    """Rows that differ in the last of several labels alone are set as one group."""
    row, group = table.rows[place], table.num_labels - 1
    following = table.rows[place + 1] if place + 1 < len(table.rows) else ()
    same = ' class="same"' if group and following and following[:group] == row[:group] else ""
    cells = "".join(
        f'<th scope="row">{escape(cell)}</th>' if column < table.num_labels else f"<td>{escape(cell)}</td>"
        for column, cell in enumerate(row)
    )
    return f"<tr{same}>{cells}</tr>\n"
