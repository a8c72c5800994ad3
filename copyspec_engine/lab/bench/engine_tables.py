"""The tables of `copyspec bench engine`: a row for each turn and peer, and its ratio to `generate`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from copyspec_engine.lab.recorded.setup import ALL_PEERS

__all__ = ["limit_line", "source_table", "summary", "together_table"]

Row = Mapping[str, Any]

_REFERENCE = "generate"
ALL_TURNS = "all"


def summary(results: Sequence[Row]) -> list[dict[str, Any]]:
    """For each source, turn and peer, and for all turns together: rates of sums, and the median time to first token."""
    rows = []
    for source in dict.fromkeys(row["source"] for row in results):
        own = [row for row in results if row["source"] == source]
        turns = sorted({row["turn"] for row in own})
        for turn in (*turns, ALL_TURNS):
            of_turn = [row for row in own if turn in (row["turn"], ALL_TURNS)]
            keys = sorted({(row["peer"], row["concurrency"]) for row in of_turn}, key=_order)
            cells = [_cell([row for row in of_turn if (row["peer"], row["concurrency"]) == key]) for key in keys]
            reference = next((cell["tokens_per_s"] for cell in cells if cell["peer"] == _REFERENCE), None)
            for cell in cells:
                ratio = None if reference is None else round(cell["tokens_per_s"] / reference, 4)
                rows.append({"source": source, "turn": turn, **cell, "over_generate": ratio})
    return rows


def _order(key: tuple[str, int]) -> tuple[int, int]:
    return key[1], ALL_PEERS.index(key[0])


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    return {
        "peer": rows[0]["peer"],
        "concurrency": rows[0]["concurrency"],
        "conversations": len({row["conversation"] for row in rows}),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 3),
        "tokens_per_s_median": round(statistics.median(row["tokens_per_s"] for row in rows), 3),
        "tokens_per_forward": round(tokens / sum(row["forward_passes"] for row in rows), 4),
        "ttft_s_median": round(statistics.median(row["ttft_s"] for row in rows), 6),
    }


def source_table(source: str, rows: Sequence[Row]) -> Group:
    """One source: its turns, a line for each peer."""
    grid = Table(box=box.SIMPLE, padding=0)
    grid.add_column("\nturn", justify="right")
    grid.add_column("\npeer", no_wrap=True)
    for heading in ("\ntokens", "tokens/\nsecond", "over\ngenerate", "tokens/\nforward", "first\ntoken"):
        grid.add_column(heading, justify="right")
    for place, row in enumerate(rows):
        shown = "" if place and rows[place - 1]["turn"] == row["turn"] else str(row["turn"])
        last = place + 1 == len(rows) or rows[place + 1]["turn"] != row["turn"]
        name = row["peer"] if row["concurrency"] == 1 else f"{row['peer']} x{row['concurrency']}"
        ratio = "" if row["over_generate"] is None else f"{row['over_generate']:.2f}x"
        figures = (f"{row['tokens_per_s']:.1f}", ratio, f"{row['tokens_per_forward']:.2f}", _time(row["ttft_s_median"]))
        style = "bold" if row["peer"] == "ours" else None
        grid.add_row(shown, name, str(row["tokens"]), *figures, style=style, end_section=last)
    return Group(f"[italic]{escape(source)}[/]", grid)


def together_table(rows: Sequence[Row]) -> Group:
    """Total tokens a second of each peer, and how much more that is than its own, one conversation after another."""
    grid = Table(box=box.SIMPLE, padding=0)
    for heading in ("source", "peer"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("at once", "tokens/second", "over one by one"):
        grid.add_column(heading, justify="right")
    alone = {(row["source"], row["peer"]): row["tokens_per_s"] for row in rows if row["concurrency"] == 1}
    for row in rows:
        single = alone.get((row["source"], row["peer"]))
        ratio = "" if single is None else f"{row['tokens_per_s'] / single:.2f}x"
        grid.add_row(row["source"], row["peer"], str(row["concurrency"]), f"{row['tokens_per_s']:.1f}", ratio)
    return Group("[italic]all conversations together[/]", grid)


def limit_line(limit: Mapping[str, float], curve: Sequence[Row]) -> str:
    """What reading the weights and the KV allows, beside the pass of one token that was measured."""
    least = limit["bytes_per_step"] / limit["bandwidth_bytes_per_s"]
    line = (
        f"A step reads {limit['bytes_per_step'] / 1e9:.2f} GB, at {limit['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s of "
        f"a big copy {_time(least)}"
    )
    key = {"rows": 1, "nodes": 1, "context": limit["context"]}
    step = next((point["seconds"] for point in curve if key.items() <= dict(point).items()), None)
    return line + ("." if step is None else f"; measured: {_time(step)}, {step / least:.2f}x.")


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
