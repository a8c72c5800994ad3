"""What is said of one run: its `summary.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from copyspec_engine.evaluation.conditions import hardware, model_name
from copyspec_engine.evaluation.figures import histogram, sources
from copyspec_engine.evaluation.records import RunFacts, TurnRecord
from copyspec_engine.evaluation.tables import Table, figure, markdown, percent, times

__all__ = ["FIGURES", "accepted_table", "figure_cells", "metric_text", "summary_markdown"]

FIGURES = ("tokens", "tokens per forward", "copied", "tokens/s", "over plain")
"""Headings of the cells that `figure_cells` gives."""


def summary_markdown(facts: RunFacts, records: Sequence[TurnRecord], summary: Mapping[str, Any]) -> str:
    """The content of `summary.md`.

    Args:
        facts: of the run.
        records: of complete tasks.
        summary: the content of `summary.json`.
    """
    own = [record for record in records if record.writer == facts.drafter]
    rows = tuple((str(row["turn"]), row["category"], *figure_cells(row)) for row in summary["rows"])
    parts = [
        f"# {facts.benchmark}, drafter {facts.drafter}\n\n{_facts_list(facts, own)}",
        markdown(
            Table("Figures by turn and category", ("turn", "category", *FIGURES), rows, 2, _figures_note(summary))
        ),
    ]
    same = summary["identical"]
    if same["of"]:
        parts.append(
            f"identical outputs: {same['same']}/{same['of']} (tasks, token for token, beside plain decoding)\n"
        )
    if summary["metrics"]:
        metrics = tuple((name, metric_text(value)) for name, value in summary["metrics"].items())
        parts.append(markdown(Table("Metrics", ("metric", "value"), metrics)))
    parts += [markdown(table) for table in (accepted_table([("passes", own)]), _source_table(own)) if table.rows]
    return "\n".join(parts)


def _facts_list(facts: RunFacts, own: Sequence[TurnRecord]) -> str:
    device = ", ".join(part for part in (facts.device, facts.dtype) if part)
    machine = hardware(facts.machine, facts.device) if facts.machine else ""
    num_tasks = len({record.task for record in own})
    lines = {
        "model": model_name(facts.model) + (", writing recorded answers" if facts.recorded and facts.model else ""),
        "device": f"{device} on {machine}" if device and machine else device or machine,
        "data": facts.data,
        "tasks": str(num_tasks) if num_tasks == facts.num_tasks else f"{num_tasks} of {facts.num_tasks} so far",
        "drafter options": ", ".join(f"{name}={value}" for name, value in facts.drafter_options.items()),
        "date": facts.date,
        "command": f"`{facts.command}`",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    return "".join(f"- {name}: {value}\n" for name, value in lines.items() if value)


def figure_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a summary's row under `FIGURES`; a speed-up that was modelled says so."""
    over = times(row["speedup"])
    if row["speedup"] is None and row["modelled_speedup"] is not None:
        over = f"{times(row['modelled_speedup'])} modelled"
    return (
        str(row["tokens"]),
        f"{row['tokens_per_forward']:.2f}",
        percent(row["copied_share"]),
        figure(row["tokens_per_s"]),
        over,
    )


def _figures_note(summary: Mapping[str, Any]) -> str:
    if any(row["tokens_per_s"] is not None for row in summary["rows"]):
        return "tokens/s count from the call to the last token; over plain is the ratio to plain decoding of this run."
    return "Nothing was timed: over plain is what the cost model gives."


def metric_text(value: object) -> str:
    """A metric's value; one that is no single number as JSON."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False).strip('"')


def accepted_table(named: Sequence[tuple[str, Sequence[TurnRecord]]]) -> Table:
    """Shares of the passes by accepted draft tokens, a column for each of the named lists of records."""
    shares = [(name, histogram(records)) for name, records in named]
    lengths = max((tuple(share) for _, share in shares), key=len)
    rows = tuple(
        (length, *(percent(share.get(length, 0.0) if share else None) for _, share in shares)) for length in lengths
    )
    return Table("Draft tokens accepted in a pass", ("accepted tokens", *(name for name, _ in shares)), rows)


def _source_table(records: Sequence[TurnRecord]) -> Table:
    counted = sources(records)
    total = sum(counted.values())
    rows = tuple((source, str(count), percent(count / total)) for source, count in counted.items() if count)
    return Table("Accepted tokens by source", ("source", "tokens", "share"), rows)
