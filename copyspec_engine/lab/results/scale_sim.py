"""What is shown of `copyspec bench scale-sim`: what calls find, who moves, and how even the load is, by policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copyspec_engine.lab.display.charts import Bars, Plot
from copyspec_engine.lab.display.conditions import shortened
from copyspec_engine.lab.display.tables import NONE, Table, times
from copyspec_engine.lab.results.files import Result, Results, conditions, tables_of_each

__all__ = ["scale_sim_plots", "scale_sim_tables", "scale_sim_tables_of"]

_FOUND = {"kv": "KV", "file": "texts in the slot's file", "store": "texts in a shared store"}


def scale_sim_tables(results: Results) -> list[Table]:
    """The tables of each file."""
    return tables_of_each(results["scale-sim"], scale_sim_tables_of)


def scale_sim_tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Of one file of figures: with a steady number of replicas, and when it changes."""
    rows: Sequence[Mapping[str, Any]] = record["results"]
    about = f"{record['replicas']:,} replicas, {record['lost']:.1%} of them lost an hour"
    about += f", {record['conversations']:,} conversations, calls of each an hour: {record['calls']:g}"
    steady = tuple(
        (
            row["policy"],
            *(_share(row["steady"][name]) for name in _FOUND),
            _share(row["steady"]["second"]),
            times(row["busiest"]),
            times(row["busiest_at_once"]),
            f"{row['wait_s']:.1f} s",
            f"{row['longest_wait_s']:.1f} s",
        )
        for row in rows
    )
    scaling = tuple(
        (
            row["policy"],
            *(_share(row["moved"][name]) for name in ("out", "in")),
            *(_share(row["scaling"][name]) for name in _FOUND),
        )
        for row in rows
    )
    more = round(record["grow"] * record["replicas"])
    found = [f"find {name}" for name in _FOUND.values()]
    load = ("busiest by mean, all calls", "busiest by mean, at a moment", "wait for a turn", "at the busiest")
    return [
        Table(
            f"A steady number: {about}",
            ("routing", *found, "not to their slot", *load),
            steady,
        ),
        Table(
            f"{more:,} more, and {more:,} fewer again",
            ("routing", "moved as replicas come", "as they go", *found),
            scaling,
        ),
    ]


def scale_sim_plots(results: Results) -> list[Plot]:
    """For each file what calls find, and how even the load is."""
    return [_plot(file, number) for number, file in enumerate(results["scale-sim"], 1)]


def _plot(file: Result, number: int) -> Plot:
    rows = file.rows
    groups = tuple(row["policy"] for row in rows)
    lost = tuple((f"no {name}", tuple(_missed(row["steady"][key]) for row in rows)) for key, name in _FOUND.items())
    load = (("all calls", tuple(round(row["busiest"], 4) for row in rows)),)
    charts = (
        Bars("What calls do not find: less is better", "percent of calls", groups, lost, log=True),
        Bars("The busiest replica: less is better", "calls, by the mean", groups, load, reference=1.0),
    )
    name = "scale_sim" if number == 1 else f"scale_sim_{number}"
    return Plot(name, charts, f"{conditions(file)}\n{shortened(file.facts['command'])}")


def _missed(share: float | None) -> float | None:
    """The other share, in percent; none of nothing, which has no place on a logarithmic scale."""
    return None if share is None or share == 1 else round(100 * (1 - share), 6)


def _share(value: float | None) -> str:
    """A share, with as many digits as tell it from all."""
    if value is None:
        return NONE
    return f"{value:.1%}" if value < 0.99 or value == 1 else f"{value:.3%}"
