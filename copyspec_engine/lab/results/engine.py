"""What is shown of `copyspec bench engine`: turns beside the peers, speed by context, conversations at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from copyspec_engine.lab.display.charts import Bars, Lines, Plot
from copyspec_engine.lab.display.conditions import hardware, shortened
from copyspec_engine.lab.display.tables import Table, figure, times
from copyspec_engine.lab.results.files import Result, Results, conditions, notes

__all__ = ["engine_plots", "engine_tables", "speed_tables"]

OURS, PLAIN, REFERENCE, TOGETHER = "ours", "ours-plain", "generate", "generate-batch"
NAMES = {
    OURS: "copyspec",
    PLAIN: "plain decoding",
    REFERENCE: "generate",
    "generate-kv": "generate, KV kept",
    "prompt-lookup": "prompt lookup",
    TOGETHER: "continuous batching",
}
"""Peers as tables and plots name them."""
PEERS = (PLAIN, REFERENCE, "generate-kv", "prompt-lookup")
"""What ours is compared to, one conversation at a time."""

Row = Mapping[str, Any]
Turn = tuple[str, str, int | str]
"""(file, source, turn or "all")."""


def _groups(results: Results) -> Iterator[list[Result]]:
    """Files of one shape on one machine that measured ours, without the runs of many conversations at once."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results["engine"]:
        facts = result.facts
        if "concurrency" not in facts and any(row["peer"] == OURS for row in result.rows):
            on = hardware(facts["machine"], facts["device"])
            groups.setdefault((facts["shape"], facts["device"], facts["dtype"], on), []).append(result)
    yield from groups.values()


def engine_tables(results: Results) -> list[Table]:
    """A table of turns for each shape and machine, and one of many conversations at once."""
    tables = [_turns_table(group) for group in _groups(results)]
    return [*tables, *(_together_table(result) for result in results["engine"] if "concurrency" in result.facts)]


def _turns(group: Sequence[Result]) -> dict[Turn, dict[str, Row]]:
    """The summary's rows by file, source and turn, then by peer; all turns together only where there are several."""
    turns: dict[Turn, dict[str, Row]] = {}
    for result in group:
        for row in result.record["summary"]:
            turns.setdefault((result.name, row["source"], row["turn"]), {})[row["peer"]] = row
    alone = {key[:2] for key in turns if sum(other[:2] == key[:2] for other in turns) == 2}
    return {key: peers for key, peers in turns.items() if OURS in peers and (key[2] != "all" or key[:2] not in alone)}


def _turns_table(group: Sequence[Result]) -> Table:
    turns = _turns(group)
    peers = [peer for peer in PEERS if any(peer in found for found in turns.values())]
    headings = ("conversations", "turn", "tokens", NAMES[OURS], *(NAMES[peer] for peer in peers))
    ratios = tuple(f"over {NAMES[peer]}" for peer in peers)
    body = []
    for (_, source, turn), found in turns.items():
        ours = found[OURS]
        speeds = [found[peer]["tokens_per_s"] if peer in found else None for peer in peers]
        over = [times(ours["tokens_per_s"] / speed if speed else None) for speed in speeds]
        cells = (str(ours["tokens"]), f"**{figure(ours['tokens_per_s'])}**", *map(figure, speeds), *over)
        body.append((source, str(turn), *cells, figure(ours["tokens_per_forward"])))
    return Table(
        f"Tokens per second, {conditions(group[0])}",
        (*headings, *ratios, "tokens per pass"),
        tuple(body),
        2,
        notes(group),
    )


def _together_table(result: Result) -> Table:
    """Total tokens a second of conversations that run at once."""
    totals = result.record["concurrency"]
    speed = {(row["source"], row["peer"], row["concurrency"] > 1): row["tokens_per_s"] for row in totals}
    body = []
    for row in (row for row in totals if row["concurrency"] > 1):
        source, peer = row["source"], row["peer"]
        others = (speed.get((source, peer, False)), speed.get((source, TOGETHER, True)))
        over = [times(row["tokens_per_s"] / other if other else None) for other in others]
        body.append((source, str(row["concurrency"]), NAMES[peer], figure(row["tokens_per_s"]), *over))
    headings = ("conversations", "at once", "", "tokens/s", "over one by one", f"over {NAMES[TOGETHER]}")
    return Table(f"Conversations at once, {conditions(result)}", headings, tuple(body), 3, notes([result]))


def speed_tables(results: Results) -> list[Table]:
    """All of it in short, one table for all shapes and machines: ours over each peer, first turns and later ones."""
    files = [result for group in _groups(results) for result in group]
    files += [result for result in results["engine"] if "concurrency" in result.facts]
    cells = [(result, *row) for result in files for row in _speed_rows(result)]
    peers = [peer for peer in (*PEERS, TOGETHER) if any(peer in speeds for *_, speeds, _ in cells)]
    several = len({conditions(result) for result in files}) > 1
    body = []
    for result, source, turns, speeds, per_pass in cells:
        over = (times(speeds[OURS] / speeds[peer] if peer in speeds else None) for peer in peers)
        where = (conditions(result),) if several else ()
        body.append((source, turns, *where, f"**{figure(speeds[OURS])}**", *over, figure(per_pass)))
    labels = ("conversations", "turns", *(("measured on",) if several else ()))
    headings = (*labels, "tokens/s", *(f"over {NAMES[peer]}" for peer in peers), "tokens per pass")
    return [Table("Speed", headings, tuple(body), len(labels), notes(files))] if files else []


def _speed_rows(result: Result) -> Iterator[tuple[str, str, dict[str, float], float]]:
    """(source, turns, tokens per second of each peer, tokens per pass of ours) of first and of later turns."""
    at_once = {
        (row["source"], row["peer"]): row for row in result.record.get("concurrency", ()) if row["concurrency"] > 1
    }
    own = [row for row in result.rows if (row["concurrency"] > 1) == bool(at_once)]
    for source in dict.fromkeys(row["source"] for row in own):
        last = max(row["turn"] for row in own if row["source"] == source)
        for first, most, name in ((1, 1, "1"), (2, last, "2" if last == 2 else f"2 to {last}")):
            rows = [row for row in own if row["source"] == source and first <= row["turn"] <= most]
            peers = dict.fromkeys(row["peer"] for row in rows)
            if OURS not in peers:
                continue
            speeds = {peer: _rate([row for row in rows if row["peer"] == peer], "seconds") for peer in peers}
            if at_once:  # seconds of turns that run side by side do not add up
                speeds = {peer: at_once[source, peer]["tokens_per_s"] for peer in peers}
                name = f"{name}, {at_once[source, OURS]['concurrency']} at once"
            yield source, name, speeds, _rate([row for row in rows if row["peer"] == OURS], "forward_passes")


def _rate(rows: Sequence[Row], key: str) -> float:
    return float(sum(row["tokens"] for row in rows) / sum(row[key] for row in rows))


def engine_plots(results: Results) -> list[Plot]:
    """For each shape and machine: speed by the length of the context, and speed-up by workload."""
    plots: list[Plot] = []
    for group in _groups(results):
        facts = group[0].facts
        name = f"{facts['shape']}_{facts['device'].partition(':')[0]}_{facts['dtype']}"
        number = sum(plot.name.startswith(f"context_{name}") for plot in plots)
        slug = f"{name}_{number + 1}" if number else name
        caption = "\n".join([conditions(group[0]), *(shortened(result.facts["command"]) for result in group)])
        plots += [
            Plot(f"context_{slug}", _context_charts(group), caption),
            Plot(f"workloads_{slug}", (_workloads(group),), caption),
        ]
    return plots


def _context_charts(group: Sequence[Result]) -> tuple[Lines, Lines]:
    """A point for each source and turn, a line for the turns of a source."""
    turns = {key: peers for key, peers in _turns(group).items() if key[2] != "all"}
    order = sorted({key[:2] for key in turns}, key=lambda own: min(_context(group, k) for k in turns if k[:2] == own))
    peers = [peer for peer in (OURS, *PEERS) if any(peer in found for found in turns.values())]
    speeds: dict[str, list[tuple[float, float] | None]] = {peer: [] for peer in peers}
    ratios: dict[str, list[tuple[float, float] | None]] = {peer: [] for peer in peers[1:]}
    notes_at = []
    for own in order:
        for key in (key for key in turns if key[:2] == own):
            at, found = _context(group, key), turns[key]
            for peer in found.keys() & speeds.keys():
                speeds[peer].append((at, found[peer]["tokens_per_s"]))
            for peer in found.keys() & ratios.keys():
                ratios[peer].append((at, round(found[OURS]["tokens_per_s"] / found[peer]["tokens_per_s"], 4)))
        for points in (*speeds.values(), *ratios.values()):
            points.append(None)
        last = [key for key in turns if key[:2] == own][-1]
        notes_at.append((_context(group, last), turns[last][OURS]["tokens_per_s"], own[1]))
    where = "tokens of context: prompt and half the answer"
    return (
        Lines(
            "Speed by length of context", where, "tokens per second", _named(speeds), None, True, True, tuple(notes_at)
        ),
        Lines("copyspec's speed over each peer", where, "times as fast", _named(ratios), 1.0, True, True),
    )


def _named(
    series: Mapping[str, Sequence[tuple[float, float] | None]],
) -> tuple[tuple[str, tuple[tuple[float, float] | None, ...]], ...]:
    return tuple((NAMES[peer], tuple(points)) for peer, points in series.items())


def _context(group: Sequence[Result], key: Turn) -> float:
    """Mean tokens in front of what is written, half of it counted, over the conversations of a turn."""
    rows = next(result.rows for result in group if result.name == key[0])
    lengths: list[float] = [
        row["prompt_tokens"] + row["tokens"] / 2
        for row in rows
        if (row["source"], row["turn"], row["peer"]) == (key[1], key[2], OURS)
    ]
    return round(sum(lengths) / len(lengths), 1)


def _workloads(group: Sequence[Result]) -> Bars:
    """Speed over `generate`, by source and turn."""
    turns = {key: found for key, found in _turns(group).items() if key[2] != "all" and REFERENCE in found}
    peers = [peer for peer in (OURS, *PEERS) if peer != REFERENCE and any(peer in found for found in turns.values())]
    series = tuple(
        (
            NAMES[peer],
            tuple(found[peer]["over_generate"] if peer in found else None for found in turns.values()),
        )
        for peer in peers
    )
    groups = tuple(f"{source}, turn {turn}" for _, source, turn in turns)
    return Bars("Speed over transformers' generate", "times as fast as generate", groups, series, 1.0)
