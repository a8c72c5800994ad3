"""What is shown of the drills of several replicas, `python -m scripts.scale_drill`: what held, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from copyspec_engine.lab.display.tables import Table, figure, percent, times
from copyspec_engine.lab.results.files import Result, Results, notes

__all__ = ["scale_drill_tables"]

Found = Mapping[str, Any]
"""What a drill has written of itself."""
_SPEED = "speed"
_TIMES = {
    "next_call_s": "next calls answered after",
    "replaced_after_s": "replaced after",
    "answers_again_after_s": "answers again after",
    "ended_after_s": "ended after",
}
_COUNTS = {
    "calls_meanwhile": "calls meanwhile",
    "listed": "conversations listed",
    "copied_from_memory": "characters copied from what calls did not show",
}
_WAYS = {"front": "behind a front", "direct": "Ray's proxies ask the replicas"}


def scale_drill_tables(results: Results) -> list[Table]:
    """What held, a row for each drill of each file; and what two replicas write beside one."""
    files = results["scale-drill"]
    drilled = [(file, name, found) for file in files for name, found in file.record["drills"].items()]
    held = [
        (f"{name}, one store for all" if file.record.get("shared_store") else name, *_row(found))
        for file, name, found in drilled
        if name != _SPEED
    ]
    speeds = [row for _, name, found in drilled if name == _SPEED for row in _speeds(found)]
    tables = []
    if held:
        tables.append(_table("Drills", ("drill", "held", "seen"), held, 3, _having(files, lambda name: name != _SPEED)))
    if speeds:
        headings = ("", "one replica, tokens per second", "two", "two by one")
        tables.append(
            _table("Two replicas, a processor each", headings, speeds, 1, _having(files, lambda name: name == _SPEED))
        )
    return tables


def _having(files: Sequence[Result], wanted: Callable[[str], bool]) -> list[Result]:
    return [file for file in files if any(map(wanted, file.record["drills"]))]


def _table(
    title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], num_labels: int, files: Sequence[Result]
) -> Table:
    return Table(title, headings, tuple(rows), num_labels, notes(files))


def _row(found: Found) -> tuple[str, str]:
    return "no" if found["broken"] else "yes", "; ".join(_seen(found))


def _seen(found: Found) -> Iterator[str]:
    """The figures that a drill may have written, in words."""
    if "sticky_hit_rate" in found:
        yield f"{found['calls']:,} calls, {percent(found['sticky_hit_rate'])} where the one before was"
    if "streams_lost" in found:
        yield f"{found['streams_lost']} streams lost, {found['streams_of_survivor']} of the survivor whole"
    for name, text in _TIMES.items():
        if name in found:
            yield f"{text} {_seconds(found[name])}"
    for change in found.get("kept", ()):
        yield f"{change['from']} to {change['to']}: {percent(change['kept'])} stay"
    for name, text in _COUNTS.items():
        if name in found:
            yield f"{found[name]:,} {text}"


def _seconds(found: Any) -> str:  # noqa: ANN401 - a number, or one or more of each round
    """The longest of all rounds."""
    if not isinstance(found, list):
        return f"{figure(found)} s"
    return f"{figure(max(each['longest'] if isinstance(each, Mapping) else each for each in found))} s at most"


def _speeds(found: Found) -> Iterator[tuple[str, ...]]:
    for way, told in found.items():
        one, two = (told[f"replicas_{number}"]["tokens_per_s"] for number in (1, 2))
        yield _WAYS[way], figure(one), figure(two), times(told["speedup"])
