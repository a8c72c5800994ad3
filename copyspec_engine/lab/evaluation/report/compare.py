"""Runs beside one another: their tables, their charts, and whether they wrote the same.

A run goes by a letter, in the order given. Of a run that is not finished, the complete tasks count.

Not covered: showing it (write.py, html.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from copyspec_engine import ConfigError
from copyspec_engine.lab.display.charts import Bars, Chart, Lines
from copyspec_engine.lab.display.conditions import hardware, model_name
from copyspec_engine.lab.display.tables import NONE, Table, times
from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.report.plots import turn_name
from copyspec_engine.lab.evaluation.report.tables import (
    FIGURES,
    accepted_table,
    differences_table,
    figure_cells,
    loops_table,
    metric_text,
    peers_table,
)
from copyspec_engine.lab.evaluation.summary import ALL, complete_tasks, histogram, identical, rows

__all__ = ["ComparedRun", "charts", "load_runs", "tables"]


@dataclass(frozen=True)
class ComparedRun:
    """One drafter's run: what was run, the records of its complete tasks, and its summary where it is finished."""

    letter: str
    path: Path
    facts: RunFacts
    records: tuple[TurnRecord, ...]
    summary: dict[str, Any]
    """What it said of itself when it ended: its metrics and where answers differ."""

    @property
    def own(self) -> list[TurnRecord]:
        """What the drafter that was measured wrote."""
        return [record for record in self.records if record.writer == self.facts.drafter]

    @property
    def num_tasks(self) -> int:
        return len({record.task for record in self.own})

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return rows(self.facts, self.records)

    @property
    def relative_cost(self) -> dict[int, float]:
        """T(k): cost of a verify pass by its tokens, the one with the fewest being 1."""
        points = sorted(self.facts.step_cost)
        return {tokens: cost / points[0][1] for tokens, cost in points}


def load_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """The runs in these folders; one with several drafters counts as a run of each.

    Raises:
        ConfigError: a folder is given twice, holds no run, or a broken one.
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"Got run {path} twice but expected each folder once")
    found = [(path, drafter) for path in paths for drafter in RunFolder(path).facts().drafters]
    return [_load(_letter(number), path, drafter) for number, (path, drafter) in enumerate(found)]


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"R{number + 1}"


def _load(letter: str, path: Path, drafter: str) -> ComparedRun:
    folder = RunFolder(path)
    run = folder.facts()
    records = tuple(complete_tasks(run, folder.turns()))
    return ComparedRun(letter, path, run.of(drafter), records, _summary(path / run.file("summary.json", drafter)))


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"metrics": {}, "plain_metrics": {}, "differences": []}
    try:
        found = json.loads(path.read_bytes())
        return {name: found[name] for name in ("metrics", "plain_metrics", "differences")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Got {path}, which is no summary of a run: {error!r}. Run `copyspec eval` again") from None


def tables(runs: Sequence[ComparedRun]) -> list[Table]:
    """Every table that has a row."""
    benchmarks = dict.fromkeys(run.facts.benchmark for run in runs)
    found = [
        _facts_table(runs),
        *(_figures_table(name, [run for run in runs if run.facts.benchmark == name]) for name in benchmarks),
        _agreement_table(runs),
        _metrics_table(runs),
        differences_table([(run.letter, run.summary["differences"]) for run in runs]),
        *(
            replace(table([(run.letter, row) for run, row in _turns(runs, name)]), title=f"{name}: {title}")
            for name in benchmarks
            for title, table in (("loops", loops_table), ("other writers of the same run", peers_table))
        ),
        accepted_table([(run.letter, run.own) for run in runs]),
        _cost_table(runs),
    ]
    return [table for table in found if table.rows]


def _turns(runs: Sequence[ComparedRun], benchmark: str) -> list[tuple[ComparedRun, Mapping[str, Any]]]:
    """The rows of a benchmark's runs, those of one turn under one another."""
    found = [(run, row) for run in runs if run.facts.benchmark == benchmark for row in run.rows]
    return sorted(found, key=lambda each: (each[1]["turn"] == ALL, str(each[1]["turn"])))


def _facts_table(runs: Sequence[ComparedRun]) -> Table:
    """A column for each run; what none of them has is left out."""
    columns = [_facts_column(run) for run in runs]
    body = tuple((name, *(column[name] or NONE for column in columns)) for name in columns[0])
    shown = tuple(row for row in body if set(row[1:]) != {NONE})
    return Table("Runs", ("run", *(run.letter for run in runs)), shown)


def _facts_column(run: ComparedRun) -> dict[str, str]:
    facts, same = run.facts, identical(run.facts, run.records)
    left = facts.num_tasks - run.num_tasks
    return {
        "folder": str(run.path),
        "benchmark": facts.benchmark,
        "drafter": facts.drafter,
        "options": ", ".join(f"{name}={value}" for name, value in facts.drafter_options.items()),
        "model": model_name(facts.model) + (", recorded answers" if facts.recorded and facts.model else ""),
        "device": ", ".join(part for part in (facts.device, facts.dtype) if part),
        "hardware": hardware(facts.machine, facts.device) if facts.machine else "",
        "tasks": str(run.num_tasks) if left <= 0 else f"{run.num_tasks} of {facts.num_tasks}, unfinished",
        "identical to plain": f"{same['same']}/{same['of']}" if same["of"] else "",
        "most tokens": str(facts.max_new_tokens),
        "date": facts.date,
        "command": facts.command,
    }


def _figures_table(benchmark: str, runs: Sequence[ComparedRun]) -> Table:
    """The runs of each turn and category under one another."""
    found = {(row["turn"], row["category"], run.letter): row for run in runs for row in run.rows}
    body = tuple(
        (str(turn), category, run.letter, *figure_cells(found[turn, category, run.letter]))
        for turn, category in _groups(runs)
        for run in runs
        if (turn, category, run.letter) in found
    )
    note = "Over plain is the ratio to plain decoding of the same turns in the same run."
    if len({frozenset(record.task for record in run.own) for run in runs}) > 1:
        note += " These runs do not hold the same tasks."
    return Table(f"{benchmark} by turn and category", ("turn", "category", "run", *FIGURES), body, 3, note)


def _groups(runs: Sequence[ComparedRun]) -> list[tuple[int | str, str]]:
    """(turn, category) of any of the runs, all of something behind the single ones."""
    keys = dict.fromkeys((row["turn"], row["category"]) for run in runs for row in run.rows)
    categories = list(dict.fromkeys(category for _, category in keys))

    def order(key: tuple[int | str, str]) -> tuple[bool, int, bool, int]:
        turn, category = key
        return turn == ALL, 0 if turn == ALL else int(turn), category == ALL, categories.index(category)

    return sorted(keys, key=order)


def _agreement_table(runs: Sequence[ComparedRun]) -> Table:
    body = tuple(row for first, second in combinations(runs, 2) for row in _agreements(first, second))
    return Table("Identical outputs between runs", ("runs", "answers of", "identical", "first difference"), body, 2)


def _agreements(first: ComparedRun, second: ComparedRun) -> Iterator[tuple[str, ...]]:
    """Tasks that two runs of a benchmark wrote token for token the same, of those that both hold."""
    runs = f"{first.letter} and {second.letter}"
    if first.facts.benchmark != second.facts.benchmark:
        return
    if first.facts.model != second.facts.model:
        yield runs, "any", NONE, "not compared: not the same model"
        return
    pairs = [(first.facts.drafter, second.facts.drafter), (PLAIN, PLAIN)]
    for writers in dict.fromkeys(pairs):
        one, other = (_written(run, writer) for run, writer in zip((first, second), writers, strict=True))
        tasks = [task for task in one if task in other]
        if not tasks:
            continue
        different = [task for task in tasks if one[task] != other[task]]
        where = f"task {different[0]}, {_first_turn(one[different[0]], other[different[0]])}" if different else ""
        names = writers[0] if len(set(writers)) == 1 else " and ".join(writers)
        yield runs, names, f"{len(tasks) - len(different)}/{len(tasks)}", where


Answers = dict[int, tuple[int, ...]]
"""Token ids by turn."""


def _written(run: ComparedRun, writer: str) -> dict[str, Answers]:
    answers: dict[str, Answers] = {}
    for record in run.records:
        if record.writer == writer:
            answers.setdefault(record.task, {})[record.turn] = record.token_ids
    return answers


def _first_turn(one: Answers, other: Answers) -> str:
    return turn_name(min(turn for turn in one.keys() | other.keys() if one.get(turn) != other.get(turn)))


def _metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of the drafter's answers, and of plain decoding's."""
    plain = {f"{name}, plain decoding": value for name, value in summary["plain_metrics"].items()}
    return {**summary["metrics"], **plain}


def _metrics_table(runs: Sequence[ComparedRun]) -> Table:
    columns = [_metrics(run.summary) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    body = tuple(
        (name, *(metric_text(column[name]) if name in column else NONE for column in columns)) for name in names
    )
    return Table("Metrics", ("metric", *(run.letter for run in runs)), body)


def _cost_table(runs: Sequence[ComparedRun]) -> Table:
    costs = [run.relative_cost for run in runs]
    counts = sorted({tokens for cost in costs for tokens in cost})
    body = tuple((str(tokens), *(times(cost.get(tokens)) for cost in costs)) for tokens in counts)
    title = "T(k): cost of a verify pass of k tokens, in passes of one"
    return Table(title, ("k", *(run.letter for run in runs)), body)


def charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    """What the tables say, to look at; a chart without a figure is left out."""
    found: list[Chart] = []
    for name in dict.fromkeys(run.facts.benchmark for run in runs):
        found += _benchmark_charts(name, [run for run in runs if run.facts.benchmark == name])
    shares = {run.letter: histogram(run.own) for run in runs}
    if lengths := max(map(tuple, shares.values()), key=len):
        series = tuple((letter, tuple(map(share.get, lengths))) for letter, share in shares.items())
        found.append(Bars("Draft tokens accepted in a pass", "share of passes", lengths, series, shares=True))
    costs = tuple((run.letter, tuple(run.relative_cost.items())) for run in runs if len(run.facts.step_cost) > 1)
    if costs:
        found.append(Lines("T(k): cost of a verify pass", "tokens k", "passes of one token", costs, log_x=True))
    return found


def _benchmark_charts(benchmark: str, runs: Sequence[ComparedRun]) -> Iterator[Bars]:
    """Speed-up and tokens per forward of each turn by category, or where there is but one category by turn."""
    groups = _groups(runs)
    categories = len({category for _, category in groups}) > 1
    turns = [turn for turn in dict.fromkeys(turn for turn, _ in groups) if turn != ALL]
    parts = [[key for key in groups if key[0] == turn] for turn in turns] if categories else [groups]
    for part in parts:
        names = tuple(category if categories else turn_name(turn) for turn, category in part)
        where = f"{benchmark}, {turn_name(part[0][0])}" if categories else benchmark
        for label, unit, key in _compared(runs):
            values = [{(row["turn"], row["category"]): row[key] for row in run.rows} for run in runs]
            series = tuple(
                (run.letter, tuple(value.get(key) for key in part)) for run, value in zip(runs, values, strict=True)
            )
            if any(height is not None for _, heights in series for height in heights):
                yield Bars(f"{label}: {where}", unit, names, series, 1.0)


def _compared(runs: Sequence[ComparedRun]) -> tuple[tuple[str, str, str], ...]:
    """(title, unit, key of a summary's row); speed is modelled where none of the runs was timed."""
    timed = any(row["speedup"] is not None for run in runs for row in run.rows)
    speed = ("Speed over plain decoding", "times", "speedup")
    if not timed:
        speed = ("Modelled speed over plain decoding", "times", "modelled_speedup")
    return speed, ("Tokens per forward pass", "tokens", "tokens_per_forward")
