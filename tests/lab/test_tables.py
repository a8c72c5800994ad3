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
