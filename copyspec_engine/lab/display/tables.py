"""A table of figures, as Markdown and on a terminal.

Not covered: a page (evaluation/report/html.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table as Grid

__all__ = ["NONE", "Table", "figure", "limits", "markdown", "on_terminal", "percent", "times"]

NONE = "-"
"""What is shown where a figure does not exist."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; the first `num_labels` columns say what a row is about, the others hold its figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1
    note: str = ""
    """Where the figures come from; Markdown."""


def markdown(table: Table, level: int = 2) -> str:
    """The table under its title as a heading of this level; level 0 leaves the title out."""
    rules = ["---"] * table.num_labels + ["---:"] * (len(table.headings) - table.num_labels)
    lines = [table.headings, *table.rows]
    head, *body = ["| " + " | ".join(map(_cell, line)) + " |\n" for line in lines]
    title = f"{'#' * level} {table.title}\n\n" if level else ""
    note = f"\n{table.note}\n" if table.note else ""
    return f"{title}{head}|{'|'.join(rules)}|\n{''.join(body)}{note}"


def on_terminal(table: Table) -> Group:
    """The table under its title, its first labels grouped."""
    grid = Grid(box=box.SIMPLE, padding=0)
    words = any(len(cell) > 24 for row in table.rows for cell in row[table.num_labels :])
    for place, heading in enumerate(table.headings):
        label = place < table.num_labels
        grid.add_column(heading, justify="left" if label or words else "right", overflow="fold", no_wrap=label)
    group = table.num_labels - 1
    for place, row in enumerate(table.rows):
        following = table.rows[place + 1] if place + 1 < len(table.rows) else ()
        ends = bool(group) and row[:group] != following[:group]
        grid.add_row(*map(escape, row), end_section=ends)
    return Group(f"[italic]{escape(table.title)}[/]", grid)


def _cell(text: str) -> str:
    """A text as a cell holds it: in one line, its bars no borders."""
    return " ".join(text.replace("|", "\\|").splitlines())


def figure(value: float | None) -> str:
    """Three digits, or all of a whole number."""
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def limits(interval: Sequence[float] | None) -> str:
    """The limits of an interval, as they stand behind its figure; nothing where there is no interval."""
    return "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else f"{value:.1%}"


def times(value: float | None) -> str:
    """A ratio."""
    return NONE if value is None else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"
