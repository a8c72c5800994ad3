"""The picture at the front of the README: tokens per second by turn, ours beside what else decodes.

It shows what `copyspec demo --compare --json` has measured. Where there is no such file yet, it shows the turns of
`copyspec bench context`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copyspec_engine.lab.display.charts import Bars, Page, Plot
from copyspec_engine.lab.display.conditions import shortened
from copyspec_engine.lab.display.tables import Table, figure, times
from copyspec_engine.lab.results.context import NAMES
from copyspec_engine.lab.results.files import Result, Results, conditions, notes

__all__ = ["demo_tables", "front_plots"]

_PAGES: tuple[Page, ...] = ("light", "dark")
_OURS = "copyspec"
_WAYS = {_OURS: "", "plain decoding": "plain", "generate": "generate", "prompt lookup": "prompt_lookup"}
_SERVERS = {"llama.cpp": "llama_cpp", "llama.cpp, ngram": "llama_cpp_ngram"}
"""Ways of decoding, and what their figures of a turn begin with; llama.cpp counts the tokens of its own answer."""

Row = Mapping[str, Any]


def demo_tables(results: Results) -> list[Table]:
    """For each file of the demo tokens per second of every way, and ours over each, a row for each turn."""
    return [table for file in results["demo"] for table in _of_demo(file)]


def _of_demo(file: Result) -> list[Table]:
    ways = _ways_of(file)
    others = [way for way in ways if way != _OURS]
    turns = {f"{number}, {row['edit']}": [row] for number, row in enumerate(file.rows, 1)}
    speed_rows, ratio_rows = [], []
    for label, rows in {**turns, "all": list(file.rows)}.items():
        speeds = {way: _speed(rows, way) for way in ways}
        over = (times(speeds[_OURS] / speeds[way]) for way in others)
        same = f"{sum(row['identical'] for row in rows)}/{len(rows)}"
        speed_rows.append((label, f"**{figure(speeds[_OURS])}**", *(figure(speeds[way]) for way in others)))
        ratio_rows.append((label, *over, same))
    ratios = ("turn", *(f"over {way}" for way in others), "identical to plain decoding")
    return [
        Table("Tokens per second, the prompt's time included", ("turn", _OURS, *others), tuple(speed_rows)),
        Table(f"{_OURS} over each", ratios, tuple(ratio_rows), 1, notes([file])),
    ]


def front_plots(results: Results) -> list[Plot]:
    """One picture four times: for a light page and for a dark one, wide and for a telephone."""
    if results["demo"]:
        file = results["demo"][0]
        groups = tuple(f"turn {number}, {row['edit']}" for number, row in enumerate(file.rows, 1))
        series = {way: [round(_speed([row], way), 4) for row in file.rows] for way in _ways_of(file)}
    elif results["context"]:
        file = results["context"][0]
        lengths = {row["length"]: row["prompt_tokens"] for row in file.rows}
        groups = tuple(f"turn behind {tokens:,} tokens" for tokens in lengths.values())
        found = {(row["way"], row["length"]): row["tokens_per_s"] for row in file.rows}
        written = {way: name for way, name in NAMES.items() if all((way, length) in found for length in lengths)}
        series = {name: [found[way, length] for length in lengths] for way, name in written.items()}
    else:
        return []
    bars = tuple((name, tuple(values)) for name, values in series.items())
    chart = Bars("Speed, turn by turn: more is better", "tokens per second", groups, bars)
    caption = f"{conditions(file)}\n{shortened(file.facts['command'])}"
    return [
        Plot(f"front_{page}{'_narrow' * narrow}", (chart,), caption, page, narrow)
        for page in _PAGES
        for narrow in (False, True)
    ]


def _ways_of(file: Result) -> list[str]:
    """The ways that wrote every turn of a demo."""
    return [
        way
        for way, key in {**_WAYS, **_SERVERS}.items()
        if all(("seconds" if way == _OURS else f"{key}_seconds") in row for row in file.rows)
    ]


def _speed(rows: list[Row], way: str) -> float:
    """Tokens per second, the prompt's time included."""
    key = {**_WAYS, **_SERVERS}[way]
    tokens = sum(row[f"{key}_tokens" if way in _SERVERS else "tokens"] for row in rows)
    return float(tokens / sum(row["seconds" if way == _OURS else f"{key}_seconds"] for row in rows))
