"""What is shown of `copyspec bench engine --draft-shape`: copies and a draft model, apart and together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copyspec_engine.lab.display.tables import Table, figure, times
from copyspec_engine.lab.results.files import Result, Results, notes

__all__ = ["draft_model_tables"]

_PLAIN, _DRAFT = "ours-plain", "ours-draft"
_WAYS = {"ours": "copy only", _DRAFT: "draft only", "ours-copy-first": "copy-first", "ours-tree": "tree"}
"""Peers that draft, as the table names them."""


def draft_model_tables(results: Results) -> list[Table]:
    """A row for each source, turn and agreement: every way over plain decoding, and the last two over draft only."""
    files = results["draft-models"]
    body = tuple(cells for result in files for cells in _cells(result))
    over_draft = tuple(f"{_WAYS[way]} over draft only" for way in ("ours-copy-first", "ours-tree"))
    headings = ("conversations", "turn", "agreement", "plain, tokens/s", *_WAYS.values(), *over_draft)
    return [Table("Draft models", headings, body, 3, notes(files))] if files else []


def _cells(result: Result) -> list[tuple[str, ...]]:
    turns: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in result.record["summary"]:
        if row["turn"] != "all" and row["concurrency"] == 1:
            turns.setdefault((row["source"], row["turn"]), {})[row["peer"]] = row
    return [
        (source, str(turn), f"{result.facts['agreement']:g}", *_speeds(found))
        for (source, turn), found in turns.items()
    ]


def _speeds(found: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    speeds = {peer: row["tokens_per_s"] for peer, row in found.items()}

    def over(peer: str, other: str) -> str:
        return times(speeds[peer] / speeds[other] if peer in speeds and other in speeds else None)

    together = (over(way, _DRAFT) for way in ("ours-copy-first", "ours-tree"))
    return (figure(speeds.get(_PLAIN)), *(over(way, _PLAIN) for way in _WAYS), *together)
