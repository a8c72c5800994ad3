"""Figures of one run beyond its summary: complete tasks, accepted lengths, sources, and what its plots show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS
from copyspec_engine.lab.evaluation.charts import Bars, Plot
from copyspec_engine.lab.evaluation.conditions import run_conditions
from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, TurnRecord
from copyspec_engine.lab.evaluation.summary import ALL

__all__ = ["LENGTHS", "complete_tasks", "histogram", "run_plots", "sources", "turn_name"]

LENGTHS = {"0": 0, "1": 1, "2": 2, "3-4": 4, "5-8": 8, "9-16": 16, "17-32": 32, "33-64": 64, "65+": 10**9}
"""Accepted tokens of a pass as a histogram counts them: (name, the most that it counts)."""
_NO_MODEL = "speed-up over plain decoding, modelled"


def complete_tasks(facts: RunFacts, records: Sequence[TurnRecord]) -> list[TurnRecord]:
    """The records of tasks of which every writer has written every turn of the benchmark."""
    of_task: dict[str, set[tuple[int, str]]] = {}
    for record in records:
        of_task.setdefault(record.task, set()).add((record.turn, record.writer))
    benchmark = BENCHMARKS.get(facts.benchmark)
    num_turns = benchmark.num_turns if benchmark else max((record.turn for record in records), default=0)
    whole = {(turn, writer) for turn in range(1, num_turns + 1) for writer in facts.writers}
    return [record for record in records if of_task[record.task] == whole]


def histogram(records: Iterable[TurnRecord]) -> dict[str, float]:
    """Shares of the passes by accepted draft tokens, as far up as there are any of `LENGTHS`."""
    counts = Counter(
        next(name for name, most in LENGTHS.items() if length <= most)
        for record in records
        for length in record.accepted_lengths
    )
    names = list(LENGTHS)
    longest = max(map(names.index, counts), default=-1)
    return {name: counts[name] / counts.total() for name in names[: longest + 1]}


def sources(records: Iterable[TurnRecord]) -> dict[str, int]:
    """Accepted tokens by where they were copied from, most first."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.accepted_by_source)
    return dict(counts.most_common())


def turn_name(turn: int | str) -> str:
    """A turn as a legend names it."""
    return "all turns" if turn == ALL else f"turn {turn}"


def run_plots(facts: RunFacts, records: Sequence[TurnRecord], summary: Mapping[str, Any]) -> list[Plot]:
    """The plots of one run; one that has nothing to show is left out."""
    rows = summary["rows"]
    timed = any(row["speedup"] is not None for row in rows)
    speed = ("speedup", "speed-up over plain decoding") if timed else ("modelled_speedup", _NO_MODEL)
    own = [record for record in records if record.writer == facts.drafter]
    shares = histogram(own)
    charts = {
        "speedup": _by_category(rows, *speed, reference=1.0),
        "tokens_per_forward": _by_category(rows, "tokens_per_forward", "tokens per forward pass", reference=1.0),
        "accepted_lengths": Bars(
            "Draft tokens accepted in a pass",
            "share of passes",
            tuple(shares),
            ((facts.drafter, tuple(shares.values())),),
            shares=True,
        ),
    }
    caption = f"{facts.benchmark}, {facts.drafter}: {run_conditions(facts)}\n{facts.command}"
    return [
        Plot(name, (chart,), caption)
        for name, chart in charts.items()
        if any(value is not None for _, values in chart.series for value in values)
        and not (name == "speedup" and facts.drafter == PLAIN)
    ]


def _by_category(rows: Sequence[Mapping[str, Any]], key: str, label: str, reference: float) -> Bars:
    """A group of bars for each category, a bar for each turn."""
    categories = tuple(dict.fromkeys(row["category"] for row in rows))
    value = {(row["turn"], row["category"]): row[key] for row in rows}
    turns = [turn for turn in dict.fromkeys(row["turn"] for row in rows) if turn != ALL] or [ALL]
    series = tuple((turn_name(turn), tuple(value.get((turn, category)) for category in categories)) for turn in turns)
    return Bars(f"{label[0].upper()}{label[1:]}", label, categories, series, reference)
