"""A table of figures, as Markdown and on a terminal.

Not covered: a page (evaluation/report/html.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
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


def on_terminal(table: Table) -> RenderableType:
    """The table under its title, its first labels grouped; figures that find no room beside the others stand below."""
    return _OnTerminal(table)


@dataclass(frozen=True, slots=True)
class _OnTerminal:
    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield f"[italic]{escape(self.table.title)}[/]"
        for columns in self._parts(options.max_width):
            yield self._grid(columns, options.max_width)

    def _parts(self, room: int) -> list[list[int]]:
        """The columns in parts of which each fits, labels first, without a word that is broken."""
        labels = list(range(self.table.num_labels))
        taken = sum(self._least(place) + 1 for place in labels) + 1
        parts, width = [labels.copy()], taken
        for place in range(self.table.num_labels, len(self.table.headings)):
            if width + self._least(place) + 1 > room and len(parts[-1]) > len(labels):
                parts.append(labels.copy())
                width = taken
            parts[-1].append(place)
            width += self._least(place) + 1
        return parts

    def _least(self, place: int) -> int:
        """Cells that a column needs so that no word of it is broken; labels and figures are one word each."""
        whole = place < self.table.num_labels or not self._says_words
        cells = [row[place] for row in self.table.rows]
        words = [*self.table.headings[place].split(), *(cells if whole else " ".join(cells).split())]
        return max(map(cell_len, words), default=0)

    @property
    def _says_words(self) -> bool:
        return any(len(cell) > 24 for row in self.table.rows for cell in row[self.table.num_labels :])

    def _grid(self, columns: Sequence[int], room: int) -> Grid:
        grid, table = Grid(box=box.SIMPLE, padding=0), self.table
        spare = room - 1 - sum(self._least(place) + 1 for place in columns)
        for place in columns:
            label = place < table.num_labels
            justify: Literal["left", "right"] = "left" if label or self._says_words else "right"
            least = self._least(place)
            most = max(map(cell_len, [table.headings[place], *(row[place] for row in table.rows)]))
            more = max(min(spare, most - least), 0)
            spare -= more
            grid.add_column(table.headings[place], justify=justify, overflow="fold", width=least + more)
        group = self._num_grouping
        for number, row in enumerate(table.rows):
            following = table.rows[number + 1] if number + 1 < len(table.rows) else ()
            ends = bool(group) and row[:group] != following[:group]
            grid.add_row(*(escape(row[place]) for place in columns), end_section=ends)
        return grid

    @property
    def _num_grouping(self) -> int:
        """The labels that rows in a group share: as many as some rows do, so that not each row is a group."""
        pairs = list(pairwise(self.table.rows))
        shared = (n for n in range(self.table.num_labels - 1, 0, -1) if any(a[:n] == b[:n] for a, b in pairs))
        return next(shared, 0)


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
