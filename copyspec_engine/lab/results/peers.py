"""What is shown of `copyspec bench peers`: tokens per second by kind and turn, of every peer, and ours over each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from copyspec_engine.lab.display.charts import Bars, Plot
from copyspec_engine.lab.display.conditions import shortened
from copyspec_engine.lab.display.tables import NONE, Table, figure, times
from copyspec_engine.lab.results.files import Results, conditions, tables_of_each

__all__ = ["OURS", "PLAIN", "peers_plots", "peers_tables", "peers_tables_of"]

Row = Mapping[str, Any]
Column = tuple[str, int | None]
"""(kind, turn); ("all", None) is all together."""

OURS, PLAIN = "ours", "ours-plain"
NAMES = {
    OURS: "copyspec",
    PLAIN: "plain decoding",
    "generate": "generate",
    "prompt-lookup": "prompt lookup",
    "llama": "llama.cpp",
    "llama-ngram-mod": "llama.cpp, ngram-mod",
    "llama-ngram-simple": "llama.cpp, ngram-simple",
    "ours-langchain": "copyspec in LangChain",
    "llama-langchain": "llama.cpp in LangChain",
}
"""Peers as tables and plots name them."""
BESIDE = {"llama-langchain": "ours-langchain"}
"""Which of ours a peer is compared with, if not `OURS`."""
ALL: Column = ("all", None)


def peers_tables(results: Results) -> list[Table]:
    """The tables of each file: speed, ours over each peer, and what else was counted."""
    return tables_of_each(results["peers"], peers_tables_of)


def peers_tables_of(record: Mapping[str, Any]) -> list[Table]:
    """The tables of one file of figures; that of ours over each is there if ours wrote."""
    rows: Sequence[Row] = record["results"]
    names, columns = _names(rows), [*_columns(rows), ALL]
    labels = [" ".join(str(part) for part in column if part is not None) for column in columns]
    speeds = [
        (label, *(figure(_rate(_of(rows, name, column))) for name in names))
        for label, column in zip(labels, columns, strict=True)
    ]
    pairs = [
        (ours, name)
        for name in names
        if (ours := BESIDE.get(name, OURS)) in names and name not in (ours, *BESIDE.values())
    ]
    ratios = [
        (label, *(times(_ratio(rows, ours, name, column)) for ours, name in pairs))
        for label, column in zip(labels, columns, strict=True)
    ]
    headings = ("", *(NAMES[name] for name in names))
    tables = [Table("Tokens per second, the prompt's time included", headings, tuple(speeds))]
    if pairs:
        over = ("", *(f"over {NAMES[name]}" for _, name in pairs))
        tables.append(Table(f"{NAMES[OURS]} over each, or through LangChain over LangChain", over, tuple(ratios)))
    return [*tables, _counts(record, names)]


def _counts(record: Mapping[str, Any], names: Sequence[str]) -> Table:
    """First tokens, equal answers and memory, a row for each peer."""
    rows: Sequence[Row] = record["results"]
    peaks = {peer: process["peak_bytes"] for process in record["memory"] for peer in process["peers"]}
    body = []
    for name in names:
        own = _of(rows, name, ALL)
        first = [row["ttft_s"] for row in own if row["ttft_s"] is not None]
        same, peak = sum(row["same_as_plain"] for row in own), peaks.get(name)
        cells = (f"{1000 * statistics.median(first):.0f} ms" if first else NONE, f"{same}/{len(own)}")
        body.append((NAMES[name], str(len(own)), *cells, NONE if peak is None else f"{peak / 1e6:,.0f} MB"))
    headings = ("", "turns", "first token, median", "same answer as plain decoding", "peak memory of its process")
    return Table("First tokens, equal answers, memory", headings, tuple(body))


def peers_plots(results: Results) -> list[Plot]:
    """For each file tokens per second by kind and turn, a bar for each peer that is asked without a framework."""
    plots: list[Plot] = []
    for file in results["peers"]:
        columns = [*_columns(file.rows), ALL]
        names = [name for name in _names(file.rows) if not name.endswith("langchain")]
        series = tuple(
            (NAMES[name], tuple(_rounded(_rate(_of(file.rows, name, column))) for column in columns)) for name in names
        )
        groups = tuple(kind if turn is None else f"{kind}, turn {turn}" for kind, turn in columns)
        chart = Bars("Speed beside what else runs it on a CPU", "tokens per second", groups, series, log=True)
        name = f"peers_{Path(file.facts['model']).name}_{file.facts['device'].partition(':')[0]}"
        number = sum(plot.name.startswith(name) for plot in plots)
        caption = f"{conditions(file)}\n{shortened(file.facts['command'])}"
        plots.append(Plot(f"{name}_{number + 1}" if number else name, (chart,), caption))
    return plots


def _names(rows: Sequence[Row]) -> list[str]:
    written = {row["peer"] for row in rows}
    return [name for name in NAMES if name in written]


def _columns(rows: Sequence[Row]) -> list[Column]:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    return sorted({(row["kind"], row["turn"]) for row in rows}, key=lambda column: (kinds.index(column[0]), column[1]))


def _of(rows: Sequence[Row], peer: str, column: Column) -> list[Row]:
    return [row for row in rows if row["peer"] == peer and column in (ALL, (row["kind"], row["turn"]))]


def _rate(rows: Sequence[Row]) -> float | None:
    return sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows) if rows else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _ratio(rows: Sequence[Row], ours: str, peer: str, column: Column) -> float | None:
    """Of rates, over the turns that both wrote: a peer may have ended before the others."""

    def by_turn(name: str) -> dict[tuple[Any, ...], Row]:
        return {(row["kind"], row["conversation"], row["turn"]): row for row in _of(rows, name, column)}

    own, other = by_turn(ours), by_turn(peer)
    both = own.keys() & other.keys()
    fast, slow = _rate([own[turn] for turn in both]), _rate([other[turn] for turn in both])
    return fast / slow if fast and slow else None
