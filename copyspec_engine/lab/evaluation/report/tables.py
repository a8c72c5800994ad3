"""What is said of one run: its `summary.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from copyspec_engine.lab.display.conditions import hardware, model_name
from copyspec_engine.lab.display.tables import NONE, Table, figure, limits, markdown, percent, times
from copyspec_engine.lab.evaluation.loops import RULE
from copyspec_engine.lab.evaluation.records import RunFacts, TurnRecord
from copyspec_engine.lab.evaluation.summary import histogram, sources

__all__ = [
    "FIGURES",
    "accepted_table",
    "differences_table",
    "figure_cells",
    "figures_table",
    "loops_table",
    "metric_text",
    "peers_table",
    "summary_markdown",
]

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
    parts = [
        f"# {facts.benchmark}, drafter {facts.drafter}\n\n{_facts_list(facts, own)}",
        markdown(figures_table(summary)),
    ]
    same = summary["identical"]
    if same["of"]:
        parts.append(
            f"identical outputs: {same['same']}/{same['of']} (tasks, token for token, beside plain decoding)\n"
        )
    found = [
        _metrics_table(summary),
        differences_table([(facts.drafter, summary["differences"])]),
        loops_table([(facts.drafter, row) for row in summary["rows"]]),
        peers_table([(facts.drafter, row) for row in summary["rows"]]),
        accepted_table([("passes", own)]),
        _source_table(own),
    ]
    parts += [markdown(table) for table in found if table.rows]
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
    """The cells of a summary's row under `FIGURES`, intervals in brackets; a speed-up that was modelled says so."""
    over = times(row["speedup"]) + limits(row.get("speedup_interval"))
    if row["speedup"] is None and row["modelled_speedup"] is not None:
        over = f"{times(row['modelled_speedup'])} modelled"
    return (
        str(row["tokens"]),
        f"{row['tokens_per_forward']:.2f}{limits(row.get('tokens_per_forward_interval'))}",
        percent(row["copied_share"]),
        figure(row["tokens_per_s"]),
        over,
    )


def _figures_note(summary: Mapping[str, Any]) -> str:
    if any(row["tokens_per_s"] is not None for row in summary["rows"]):
        return (
            "tokens/s count from the call to the last token; over plain is the ratio to plain decoding of this run. In "
            "brackets 95 % intervals by the bootstrap over conversations."
        )
    return "Nothing was timed: over plain is modelled, from what the cost model says that passes cost."


def figures_table(summary: Mapping[str, Any]) -> Table:
    """A row for each turn and category of a run."""
    rows = tuple((str(row["turn"]), row["category"], *figure_cells(row)) for row in summary["rows"])
    return Table("Figures by turn and category", ("turn", "category", *FIGURES), rows, 2, _figures_note(summary))


def _metrics_table(summary: Mapping[str, Any]) -> Table:
    """What the drafter's answers are worth, and plain decoding's, which must be the same."""
    plain = summary["plain_metrics"]
    rows = tuple(
        (name, metric_text(value), *([metric_text(plain[name])] if plain else []))
        for name, value in summary["metrics"].items()
    )
    return Table("Metrics", ("metric", "value", *(["plain decoding"] if plain else [])), rows)


def differences_table(named: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Table:
    """Where each of the named runs first wrote another token than plain decoding, task by task."""
    rows = tuple(
        (name, each["task"], str(each["turn"]), str(each["position"]), _gap(each["gap"]))
        for name, found in named
        for each in found
    )
    headings = ("run", "task", "turn", "token of the answer", "gap of the logits")
    note = "The gap is that of the two tokens in plain decoding: what rounding may decide is far below 0.001."
    return Table("Answers that differ from plain decoding", headings, rows, 3, note)


def _gap(gap: float | None) -> str:
    return NONE if gap is None else f"{gap:.2g}"


def loops_table(named: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """How much of the answers goes round in circles, and the figures without it, of (run, row of a summary)."""
    rows = tuple(
        (
            str(row["turn"]),
            name,
            f"{row['looping_answers']} of {row['answers']}",
            percent(row["loop_share"]),
            figure(row["tokens_per_forward_before_loops"]),
            *(_without_loops(row["without_loops"]) if row["without_loops"] else (NONE, NONE, NONE)),
        )
        for name, row in named
        if "loop_share" in row
    )
    headings = ("turn", "run", "answers that loop", "tokens in loops", "tokens per forward before", "other answers")
    note = (
        f"{RULE} The last three columns leave out every answer with such a token, the one before them what follows it."
    )
    return Table("Loops", (*headings, "tokens per forward", "over plain"), rows, 2, note)


def _without_loops(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["tokens"]),
        f"{row['tokens_per_forward']:.2f}{limits(row['tokens_per_forward_interval'])}",
        times(row["speedup"]) + limits(row["speedup_interval"]),
    )


def peers_table(named: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """What transformers wrote in the same runs, and how much faster the drafter was, of (run, row of a summary)."""
    rows = tuple(
        (
            str(row["turn"]),
            name,
            peer,
            str(found["tokens"]),
            f"{found['tokens_per_forward']:.2f}",
            figure(found["tokens_per_s"]),
            f"{found['identical']['same']}/{found['identical']['of']}",
            times(found["speedup"]) + limits(found["speedup_interval"]),
        )
        for name, row in named
        for peer, found in row.get("peers", {}).items()
    )
    headings = ("turn", "run", "peer", "tokens", "tokens per forward", "tokens/s", "identical answers")
    return Table("Other writers of the same run", (*headings, "drafter over peer"), rows, 3)


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
