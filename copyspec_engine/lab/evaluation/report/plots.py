"""The plots of one run: speed-up and tokens per forward by category and turn, and lengths accepted in a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from copyspec_engine.lab.display.charts import Bars, Plot
from copyspec_engine.lab.display.conditions import day, hardware, model_name
from copyspec_engine.lab.display.plots import check_installed, save
from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.summary import ALL, histogram

__all__ = ["run_plots", "turn_name", "write_plots"]

_NO_MODEL = "speed-up over plain decoding, modelled"


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
    caption = f"{facts.benchmark}, {facts.drafter}: {_conditions(facts)}\n{facts.command}"
    return [
        Plot(name, (chart,), caption)
        for name, chart in charts.items()
        if any(value is not None for _, values in chart.series for value in values)
        and not (name == "speedup" and facts.drafter == PLAIN)
    ]


def _conditions(facts: RunFacts) -> str:
    """Model, hardware and day of a run, in one line."""
    on = hardware(facts.machine, facts.device)
    parts = [model_name(facts.model), facts.dtype, on if facts.machine else facts.device, day(facts.date)]
    return ", ".join(part for part in parts if part)


def _by_category(rows: Sequence[Mapping[str, Any]], key: str, label: str, reference: float) -> Bars:
    """A group of bars for each category, a bar for each turn."""
    categories = tuple(dict.fromkeys(row["category"] for row in rows))
    value = {(row["turn"], row["category"]): row[key] for row in rows}
    turns = [turn for turn in dict.fromkeys(row["turn"] for row in rows) if turn != ALL] or [ALL]
    series = tuple((turn_name(turn), tuple(value.get((turn, category)) for category in categories)) for turn in turns)
    return Bars(f"{label[0].upper()}{label[1:]}", label, categories, series, reference)


def write_plots(
    folder: RunFolder, facts: RunFacts, records: Sequence[TurnRecord], summary: Mapping[str, Any], under: str = "plots"
) -> list[Path]:
    """Draw the plots of a run into a folder of it, each as SVG and as PNG.

    Args:
        folder: of the run.
        facts: of the run.
        records: of complete tasks.
        summary: the content of `summary.json`.
        under: name of the folder in that of the run.

    Raises:
        CopySpecError: matplotlib is not installed.
        ConfigError: the files cannot be written.
    """
    check_installed()
    plots = run_plots(facts, records, summary)
    return [save(plot, folder.path / under / f"{plot.name}.{ending}") for plot in plots for ending in ("svg", "png")]
