"""Tables on a narrow terminal: no word of them is broken, and nothing is left out."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from copyspec_engine.lab.display.tables import Table, on_terminal

HEADINGS = ("model", "tokens of context", "turns", *(f"figure number {number}" for number in range(12)))


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("long", ["10,312.45", "what was typed at the time, in many words"])
def test_every_word_stands_whole(width: int, long: str) -> None:
    rows = tuple(
        (model, "12,096", "2", long, *(f"{place},123.45" for place in range(11))) for model in ("a/b-135M", "c")
    )
    out = StringIO()
    Console(file=out, width=width).print(on_terminal(Table("Speed", HEADINGS, rows, 2)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = out.getvalue().split()
    for text in (*HEADINGS, *(cell for row in rows for cell in row)):
        assert set(text.split()) <= set(shown), text
    parts = sum("c" in line.split() for line in lines)
    assert parts == 1 if width == 200 else parts > 1, "each part names its rows"


@pytest.mark.parametrize(
    ("rows", "gaps"),
    [
        ([("1", "maths", "a", "2"), ("1", "code", "a", "3"), ("2", "maths", "a", "4")], 1),
        ([("1", "maths", "a", "2"), ("1", "maths", "b", "3"), ("1", "code", "a", "4")], 1),
        ([("1", "maths", "a", "2"), ("2", "maths", "a", "3"), ("3", "maths", "a", "4")], 0),
    ],
    ids=["by turn", "by turn and category", "no groups"],
)
def test_rows_are_grouped_where_some_belong_together(rows: list[tuple[str, ...]], gaps: int) -> None:
    out = StringIO()
    Console(file=out, width=80).print(on_terminal(Table("Speed", ("turn", "category", "run", "x"), tuple(rows), 3)))
    body = [line.split() for line in out.getvalue().splitlines()[4:]]
    first, last = (next(n for n in order if body[n]) for order in (range(len(body)), range(len(body) - 1, -1, -1)))
    assert sum(not words for words in body[first:last]) == gaps
