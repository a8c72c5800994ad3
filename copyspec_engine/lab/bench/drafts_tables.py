"""The tables of `copyspec bench`: a drafter a row, and ours beside the best peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from copyspec_engine.lab.contestants import INGREDIENTS, OURS, PEERS

__all__ = ["comparison", "comparison_table", "ingredient_table", "source_table"]

Row = Mapping[str, Any]

_FIGURES = ("tokens_per_forward", "modelled_speedup")
"""What drafters are compared by: more is better."""
_TITLES = {"tokens_per_forward": "tokens per forward", "modelled_speedup": "modelled speed"}


def source_table(source: str, rows: Sequence[Row]) -> Group:
    """One source: a row per drafter, the best peer of each compared figure marked with a star."""
    grid = Table(box=box.SIMPLE, padding=0)
    grid.add_column("\ndrafter", no_wrap=True)
    counts = ("tokens/\nforward", "modelled\nspeed", "draft\nnodes", "\naccepted")
    for heading in (*counts, "propose\np50 us", "\np99 us", "observe\np50 us", "index\nms/100k"):
        grid.add_column(heading, justify="right")
    best = {figure: _best_peer(rows, figure) for figure in _FIGURES}
    for row in rows:
        compared = [f"{row[figure]:.3f}{'*' if row is best[figure] else ' '}" for figure in _FIGURES]
        shares = (f"{row['draft_nodes']:.2f}", f"{row['accepted_share']:.1%}")
        times = [f"{row[key]:.1f}" for key in ("propose_us_p50", "propose_us_p99", "observe_us_p50", "index_ms")]
        name = row["drafter"].removeprefix(f"{OURS}-")
        grid.add_row(name, *compared, *shares, *times, style="bold" if name == OURS else None)
    return Group(f"[italic]{escape(source)}, {rows[0]['tokens']} tokens[/]", grid)


def _best_peer(rows: Sequence[Row], figure: str) -> Row | None:
    peers = [row for row in rows if row["drafter"] in PEERS]
    return max(peers, key=lambda row: float(row[figure]), default=None)


def comparison(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours beside the best peer of each compared figure, a row a source; empty if ours or every peer is missing."""
    compared = []
    for source in dict.fromkeys(row["source"] for row in results):
        rows = [row for row in results if row["source"] == source]
        ours = next((row for row in rows if row["drafter"] == OURS), None)
        line: dict[str, Any] = {"source": source}
        for figure in _FIGURES:
            best = _best_peer(rows, figure)
            if ours is None or best is None:
                return []
            line[figure] = {
                "ours": ours[figure],
                "best_peer": best["drafter"],
                "peer": best[figure],
                "ratio": round(ours[figure] / best[figure], 4),
            }
        compared.append(line)
    return compared


def comparison_table(compared: Sequence[Row], cost_model: str) -> Group:
    """Every source: ours, the best peer's figure (its name is in the JSON and in the source's table), the ratio."""
    title = f"{OURS} over the best peer, cost model {escape(cost_model)}"
    grid = Table(box=box.SIMPLE, padding=0)
    grid.add_column("\nsource", overflow="fold")
    for heading in ("tokens/\nforward", "modelled\nspeed"):
        grid.add_column(heading, justify="right")
        grid.add_column("\nbest peer", justify="right")
        grid.add_column("\nratio", justify="right", style="bold")
    for line in compared:
        cells: list[str] = []
        for pair in (line[figure] for figure in _FIGURES):
            cells += [f"{pair['ours']:.3f}", f"{pair['peer']:.3f}", f"{pair['ratio']:.3f}x"]
        grid.add_row(escape(line["source"]), *cells)
    return Group(f"[italic]{title}[/]", grid)


def ingredient_table(results: Sequence[Row], figure: str) -> Group:
    """Ours, and by how much the figure changes without each ingredient that was switched off."""
    off = [name for name in INGREDIENTS if any(row["drafter"] == name for row in results)]
    title = f"{_TITLES[figure]} of {OURS}, and the change without each ingredient"
    grid = Table(box=box.SIMPLE, padding=0)
    grid.add_column("\nsource", overflow="fold")
    for heading in ("\nall", *(name.removeprefix(f"{OURS}-").replace("-", "\n") for name in off)):
        grid.add_column(heading, justify="right")
    for source in dict.fromkeys(row["source"] for row in results):
        value = {row["drafter"]: row[figure] for row in results if row["source"] == source}
        changes = [f"{value[name] / value[OURS] - 1:+.1%}" for name in off]
        grid.add_row(escape(source), f"{value[OURS]:.3f}", *changes)
    return Group(f"[italic]{title}[/]", grid)
