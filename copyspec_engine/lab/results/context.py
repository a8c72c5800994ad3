"""What is shown of `copyspec bench context`: the turns of conversations that grow, by the tokens before them."""

from __future__ import annotations

from pathlib import Path

from copyspec_engine.lab.display.charts import Lines, Plot
from copyspec_engine.lab.display.conditions import shortened
from copyspec_engine.lab.display.tables import NONE, Table, figure, percent, times
from copyspec_engine.lab.results.files import Result, Results, conditions, notes

__all__ = ["context_plots", "context_tables"]

OURS = "ours"
NAMES = {OURS: "copyspec", "plain": "plain decoding", "generate": "generate", "prompt-lookup": "prompt lookup"}
"""Ways of decoding as tables and plots name them."""


def context_tables(results: Results) -> list[Table]:
    """A row for each length of context: tokens per second of every way, and ours over it."""
    files = results["context"]
    others = [way for way in NAMES if way != OURS and any(row["way"] == way for file in files for row in file.rows)]
    body = []
    for file in files:
        for length in dict.fromkeys(row["length"] for row in file.rows):
            found = {row["way"]: row for row in file.rows if row["length"] == length}
            ours = found[OURS]
            speeds = [found[way]["tokens_per_s"] if way in found else None for way in others]
            over = [times(ours["tokens_per_s"] / speed) if speed else NONE for speed in speeds]
            passes = (figure(ours["tokens_per_forward"]), percent(ours["loop_share"]))
            cells = (f"**{figure(ours['tokens_per_s'])}**", *map(figure, speeds), *over, *passes)
            body.append((file.record["model"], f"{ours['prompt_tokens']:,}", str(ours["turns"]), *cells))
    names = [NAMES[way] for way in others]
    ratios = [f"over {name}" for name in names]
    headings = ("model", "tokens of context", "turns", f"{NAMES[OURS]}, tokens/s", *names, *ratios)
    title = "A conversation that grows"
    return [Table(title, (*headings, "tokens per pass", "in loops"), tuple(body), 2, notes(files))] if files else []


def context_plots(results: Results) -> list[Plot]:
    """For each file tokens per second and tokens per forward pass, a line for each way."""
    plots: list[Plot] = []
    for file in results["context"]:
        facts = file.facts
        name = f"growth_{Path(facts['model']).name}_{facts['device'].partition(':')[0]}_{facts['dtype']}"
        number = sum(plot.name.startswith(name) for plot in plots)
        caption = f"{conditions(file)}\n{shortened(facts['command'])}"
        charts = (
            _chart(file, "Speed as a conversation grows", "tokens per second", "tokens_per_s", log=True),
            _chart(file, "Tokens per forward pass", "tokens", "tokens_per_forward", log=False),
        )
        plots.append(Plot(f"{name}_{number + 1}" if number else name, charts, caption))
    return plots


def _chart(file: Result, title: str, unit: str, key: str, *, log: bool) -> Lines:
    ways = [way for way in NAMES if any(row["way"] == way for row in file.rows)]
    series = tuple(
        (NAMES[way], tuple((float(row["prompt_tokens"]), row[key]) for row in file.rows if row["way"] == way))
        for way in ways
    )
    return Lines(title, "tokens of context", unit, series, log_x=True, log_y=log)
