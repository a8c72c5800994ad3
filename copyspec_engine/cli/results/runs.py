"""What is shown of evaluation runs, whose `summary.json` is a result like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copyspec_engine.cli.results.files import Result, Results, conditions, notes
from copyspec_engine.evaluation.charts import Bars, Plot
from copyspec_engine.evaluation.conditions import model_name
from copyspec_engine.evaluation.report import FIGURES, figure_cells, metric_text
from copyspec_engine.evaluation.summary import ALL
from copyspec_engine.evaluation.tables import NONE, Table

__all__ = ["eval_plots", "eval_tables"]


def _rows(result: Result) -> list[Mapping[str, Any]]:
    """A row for each turn, over all categories; all turns together only where there are several."""
    categories = {row["category"] for row in result.rows}
    whole = [row for row in result.rows if row["category"] == ALL or len(categories) == 1]
    return whole if len(whole) > 2 else [row for row in whole if row["turn"] != ALL]


def eval_tables(results: Results) -> list[Table]:
    """Every run, a row for each turn."""
    files = results["eval"]
    if not files:
        return []
    body = tuple(_cells(result, row) for result in files for row in _rows(result))
    headings = ("benchmark", "model", "drafter", "turn", *FIGURES, "identical", "metrics")
    return [Table("Evaluation runs", headings, body, 4, notes(files))]


def _cells(result: Result, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a turn; what is said of the whole run stands in its last row."""
    record, last = result.record, row is _rows(result)[-1]
    same = record["identical"]
    identical = f"{same['same']}/{same['of']}" if last and same["of"] else ""
    metrics = ", ".join(f"{name} {metric_text(value)}" for name, value in record["metrics"].items()) if last else ""
    names = (record["benchmark"], model_name(record["model"]), record["drafter"], str(row["turn"]))
    return (*names, *figure_cells(row), identical or NONE, metrics or NONE)


def eval_plots(results: Results) -> list[Plot]:
    """Speed-up by benchmark and turn, a bar for each model and drafter."""
    value: dict[str, dict[str, float]] = {}
    for result in results["eval"]:
        name = ", ".join(part for part in (result.record["model"], result.record["drafter"]) if part)
        for row in _rows(result):
            speed = row["speedup"] if row["speedup"] is not None else row["modelled_speedup"]
            if row["turn"] != ALL and speed is not None:
                value.setdefault(name, {})[f"{result.record['benchmark']}, turn {row['turn']}"] = speed
    groups = tuple(dict.fromkeys(group for heights in value.values() for group in heights))
    series = tuple((name, tuple(map(heights.get, groups))) for name, heights in value.items())
    caption = "\n".join(f"{result.name}: {conditions(result)}" for result in results["eval"])
    title = "Speed over plain decoding of the same run"
    return [Plot("evaluation", (Bars(title, "times as fast", groups, series, 1.0),), caption)] if groups else []
