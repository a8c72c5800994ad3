"""What is shown of evaluation runs, whose `summary.json` is a result like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copyspec_engine.lab.display.charts import Bars, Plot
from copyspec_engine.lab.display.conditions import model_name
from copyspec_engine.lab.display.tables import NONE, Table, figure, limits, percent, times
from copyspec_engine.lab.evaluation.report.tables import FIGURES, figure_cells, metric_text
from copyspec_engine.lab.evaluation.summary import ALL
from copyspec_engine.lab.results.files import Result, Results, conditions, notes

__all__ = ["eval_plots", "eval_tables", "free_eval_tables", "reproduction_categories", "reproduction_tables"]

_PAPER, _OURS = "copyspec", "adaptive"
_Key = tuple[str, str, str]
"""Benchmark, turn and category."""


def _rows(result: Result) -> list[Mapping[str, Any]]:
    """A row for each turn, over all categories; all turns together only where there are several."""
    categories = {row["category"] for row in result.rows}
    whole = [row for row in result.rows if row["category"] == ALL or len(categories) == 1]
    return whole if len(whole) > 2 else [row for row in whole if row["turn"] != ALL]


def reproduction_tables(results: Results) -> list[Table]:
    """The paper's algorithm and ours on recorded answers, a row for each benchmark and turn."""
    return _reproduction(results["eval"], _rows_of_turns, ("benchmark", "turn"))


def reproduction_categories(results: Results) -> list[Table]:
    """The same by category too."""
    return _reproduction(results["eval"], _rows_of_categories, ("benchmark", "turn", "category"))


def _reproduction(
    files: Sequence[Result], rows_of: Callable[[Result], Sequence[Mapping[str, Any]]], labels: tuple[str, ...]
) -> list[Table]:
    recorded = [file for file in files if file.facts["recorded"] and file.record["drafter"] in (_PAPER, _OURS)]
    found: dict[_Key, dict[tuple[str, str], float]] = {}
    for file in recorded:
        is_timed = bool(file.record["model"])
        name = "speedup" if is_timed else "tokens_per_forward"
        for row in rows_of(file):
            key = (file.record["benchmark"], str(row["turn"]), str(row["category"]))
            found.setdefault(key, {})[file.record["drafter"], name] = row[name]
    headings = (*labels, "paper", "ours", "paper, over plain decoding", "ours, over plain decoding")
    rows_shown = tuple(_reproduced(key, labels, values) for key, values in found.items())
    return [Table("Recorded answers", headings, rows_shown, len(labels), notes(recorded))] if found else []


def _rows_of_turns(result: Result) -> list[Mapping[str, Any]]:
    """A row for each turn, and for all of them; the only category counts as all of them."""
    several = any(row["category"] == ALL for row in result.rows)
    return [{**row, "category": ALL} for row in result.rows if row["category"] == ALL or not several]


def _rows_of_categories(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result.rows if row["turn"] != ALL]


def _reproduced(key: _Key, labels: Sequence[str], values: Mapping[tuple[str, str], float]) -> tuple[str, ...]:
    passes = (figure(values.get((drafter, "tokens_per_forward"))) for drafter in (_PAPER, _OURS))
    speeds = (times(values.get((drafter, "speedup"))) for drafter in (_PAPER, _OURS))
    return (*key[: len(labels)], *passes, *speeds)


def eval_tables(results: Results) -> list[Table]:
    """Every run, a row for each turn: a table for each model, machine and day, without figures that none of it has."""
    files: dict[str, list[Result]] = {}
    for file in results["eval"]:
        model = "" if file.record["model"] else f"{model_name('')}, "
        files.setdefault(f"{model}{conditions(file)}", []).append(file)
    return [_measured_together(title, found) for title, found in files.items()]


def _measured_together(title: str, files: Sequence[Result]) -> Table:
    headings = ("benchmark", "drafter", "turn", *FIGURES, "identical", "metrics")
    rows = [_cells(result, row) for result in files for row in _rows(result)]
    shown = [place for place in range(len(headings)) if any(row[place] != NONE for row in rows)]
    body = tuple(tuple(row[place] for place in shown) for row in rows)
    return Table(title, tuple(headings[place] for place in shown), body, 3, notes(files))


def _cells(result: Result, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a turn; what is said of the whole run stands in its last row."""
    record, last = result.record, row is _rows(result)[-1]
    same = record["identical"]
    identical = f"{same['same']}/{same['of']}" if last and same["of"] else ""
    metrics = ", ".join(f"{name} {metric_text(value)}" for name, value in record["metrics"].items()) if last else ""
    names = (record["benchmark"], record["drafter"], str(row["turn"]))
    return (*names, *figure_cells(row), identical or NONE, metrics or NONE)


def free_eval_tables(results: Results) -> list[Table]:
    """Runs of a model that wrote as it likes: the paper's drafts and ours over plain, ours over transformers."""
    free = [
        file for file in results["eval"] if not file.facts["recorded"] and file.record["drafter"] in (_PAPER, _OURS)
    ]
    return [table for table in (*_over_plain(free), _over_peers(free)) if table.rows]


def _over_plain(files: Sequence[Result]) -> list[Table]:
    found: dict[tuple[str, str], dict[str, tuple[Result, Mapping[str, Any]]]] = {}
    for file in files:
        for row in _rows(file):
            if "loop_share" in row and row["speedup"] is not None:
                found.setdefault((file.record["benchmark"], str(row["turn"])), {})[file.record["drafter"]] = (file, row)
    shown = {key: drafters for key, drafters in found.items() if _OURS in drafters}
    used = {file.name: file for drafters in shown.values() for file, _ in drafters.values()}
    over = ("benchmark", "turn", "conversations", "paper", "ours", "paper, over plain", "ours, over plain", "identical")
    loops = ("benchmark", "turn", "tokens in loops", "ours before loops", "answers without loops", "ours in them")
    return [
        Table("Over plain decoding", over, tuple(_free_cells(*found) for found in shown.items()), 3),
        Table(
            "The same without loops",
            (*loops, "over plain"),
            tuple(_loop_cells(*found) for found in shown.items()),
            2,
            notes(list(used.values())),
        ),
    ]


def _over_peers(files: Sequence[Result]) -> Table:
    with_peers = [file for file in files if any(row.get("peers") for row in file.rows)]
    body = tuple(
        (file.record["benchmark"], str(row["turn"]), str(file.record["num_tasks"]), name, *_peer_cells(row, peer))
        for file in with_peers
        for row in _rows(file)
        for name, peer in row.get("peers", {}).items()
    )
    headings = (
        "benchmark",
        "turn",
        "conversations",
        "peer",
        "its tokens/s",
        "ours",
        "ours over it",
        "identical answers",
    )
    return Table("Over transformers", headings, body, 4, notes(with_peers))


def _free_cells(key: tuple[str, str], drafters: Mapping[str, tuple[Result, Mapping[str, Any]]]) -> tuple[str, ...]:
    file, ours = drafters[_OURS]
    paper = drafters[_PAPER][1] if _PAPER in drafters else None
    same = file.record["identical"]
    passes, speeds = [], []
    for row in (paper, ours):
        passes.append(NONE if row is None else figure(row["tokens_per_forward"]))
        speeds.append(NONE if row is None else times(row["speedup"]) + limits(row["speedup_interval"]))
    return (*key, str(file.record["num_tasks"]), *passes, *speeds, f"{same['same']}/{same['of']}")


def _loop_cells(key: tuple[str, str], drafters: Mapping[str, tuple[Result, Mapping[str, Any]]]) -> tuple[str, ...]:
    ours = drafters[_OURS][1]
    without, left = ours["without_loops"], ours["answers"] - ours["looping_answers"]
    others = (figure(without["tokens_per_forward"]), times(without["speedup"])) if without else (NONE, NONE)
    before = figure(ours["tokens_per_forward_before_loops"])
    return (*key, percent(ours["loop_share"]), before, f"{left} of {ours['answers']}", *others)


def _peer_cells(row: Mapping[str, Any], peer: Mapping[str, Any]) -> tuple[str, ...]:
    same = peer["identical"]
    over = times(peer["speedup"]) + limits(peer["speedup_interval"])
    return figure(peer["tokens_per_s"]), figure(row["tokens_per_s"]), over, f"{same['same']}/{same['of']}"


def eval_plots(results: Results) -> list[Plot]:
    """Speed-up by benchmark and turn, a bar for each model and drafter; "modelled" where no model ran."""
    value: dict[str, dict[str, float]] = {}
    for result in results["eval"]:
        name = f"{result.record['model'] or 'modelled'}, {result.record['drafter']}"
        for row in _rows(result):
            speed = row["speedup"] if row["speedup"] is not None else row["modelled_speedup"]
            if row["turn"] != ALL and speed is not None:
                value.setdefault(name, {})[f"{result.record['benchmark']}, turn {row['turn']}"] = speed
    groups = tuple(dict.fromkeys(group for heights in value.values() for group in heights))
    series = tuple((name, tuple(map(heights.get, groups))) for name, heights in value.items())
    caption = "\n".join(dict.fromkeys(map(conditions, results["eval"])))
    title = "Speed over plain decoding of the same run"
    return [Plot("evaluation", (Bars(title, "times as fast", groups, series, 1.0),), caption)] if groups else []
