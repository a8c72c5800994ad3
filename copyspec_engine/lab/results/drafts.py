"""What is shown of `copyspec bench drafts` and `copyspec bench propose`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copyspec_engine.lab.contestants import INGREDIENTS, OURS, PEERS
from copyspec_engine.lab.display.charts import Bars, Plot
from copyspec_engine.lab.display.conditions import shortened
from copyspec_engine.lab.display.tables import NONE, Table, figure, times
from copyspec_engine.lab.results.files import Result, Results, conditions, notes

__all__ = ["drafts_plots", "drafts_tables", "history_tables", "ingredients_tables", "propose_tables"]

SHOWN = {"copyspec": "copyspec (paper)", "prompt-lookup": "prompt lookup", "arctic-tuned": "Arctic, tuned"}
"""Peers in tables and plots; the files hold them all."""
NO_MEMORY = "adaptive-no-memory"
MAIN_CURVE = "gpu"


def _cells(result: Result | None, key: str) -> dict[tuple[str, str], float]:
    """A figure by source and drafter."""
    return {(row["source"], row["drafter"]): row[key] for row in result.rows} if result else {}


def _sources(result: Result) -> list[str]:
    return list(dict.fromkeys(row["source"] for row in result.rows))


def _ratios(result: Result | None, key: str) -> dict[str, float]:
    """Ours over the best peer by source."""
    return {line["source"]: line[key]["ratio"] for line in result.record["comparison"]} if result else {}


def _main(results: Results) -> list[Result]:
    return [result for result in results["drafts"] if result.record["cost_model"] == MAIN_CURVE]


def _beside(main: Result, others: Sequence[Result], **wanted: str) -> Result | None:
    """The file of the same tokens that was written with these options."""
    same = {"tokenizer": main.record["tokenizer"], "max_tokens": main.record["max_tokens"], **wanted}
    return next((other for other in others if same.items() <= other.record.items()), None)


def drafts_tables(results: Results) -> list[Table]:
    """Ours beside the peers; then over the best one, on two cost curves; then what memory is worth without history."""
    return [_drafts_table(main, results) for main in _main(results)]


def _drafts_table(main: Result, results: Results) -> Table:
    cpu = _beside(main, results["drafts"], cost_model="cpu")
    trimmed = _beside(main, results["history"], history="last-turn")
    tokens, memory = _cells(main, "tokens_per_forward"), _cells(trimmed, "tokens_per_forward")
    best, speed = _ratios(main, "tokens_per_forward"), _ratios(main, "modelled_speedup")
    cpu_speed = _ratios(cpu, "modelled_speedup")
    body = tuple(
        (
            source,
            *(figure(tokens.get((source, peer))) for peer in SHOWN),
            f"**{figure(tokens.get((source, OURS)))}**",
            *(times(ratio.get(source)) for ratio in (best, speed, cpu_speed)),
            *(figure(memory.get((source, drafter))) for drafter in (NO_MEMORY, OURS)),
        )
        for source in _sources(main)
    )
    over = ("over the best peer", "modelled speed, gpu curve", "cpu curve")
    headings = ("conversations", *SHOWN.values(), OURS, *over, "history trimmed, without memory", "with memory")
    files = [result for result in (main, cpu, trimmed) if result]
    return Table(f"Tokens per forward pass, {conditions(main)}", headings, body, 1, notes(files))


def drafts_plots(results: Results) -> list[Plot]:
    """Tokens per forward pass by source, a bar for each drafter."""
    return [
        Plot(
            main.name.removesuffix(".json"),
            (_drafts_chart(main),),
            f"Recorded conversations replayed: {conditions(main)}\n{shortened(main.facts['command'])}",
        )
        for main in _main(results)
    ]


def _drafts_chart(main: Result) -> Bars:
    tokens, found = _cells(main, "tokens_per_forward"), _sources(main)
    names = {OURS: OURS, **{peer: SHOWN.get(peer, peer) for peer in PEERS}}
    series = tuple(
        (name, tuple(tokens.get((source, drafter)) for source in found))
        for drafter, name in names.items()
        if any((source, drafter) in tokens for source in found)
    )
    return Bars("Tokens per forward pass", "tokens per forward pass", tuple(found), series, 1.0, log=True)


def history_tables(results: Results) -> list[Table]:
    """What memory is worth where prompts do not hold the whole history."""
    files = results["history"]
    if not files:
        return []
    cells = [_cells(result, "tokens_per_forward") for result in files]
    body = tuple(
        (
            source,
            *(figure(cell.get((source, drafter))) for cell in cells for drafter in (NO_MEMORY, OURS)),
        )
        for source in dict.fromkeys(source for result in files for source in _sources(result))
    )
    kinds = (result.record["history"] for result in files)
    headings = tuple(heading for kind in kinds for heading in (f"{kind}, without memory", "with memory"))
    return [
        Table(
            "Tokens per forward pass where the history is trimmed", ("conversations", *headings), body, 1, notes(files)
        )
    ]


def ingredients_tables(results: Results) -> list[Table]:
    """Tokens per forward and modelled speed, and their change without each ingredient."""
    return [_ingredients_table(result) for result in results["ingredients"]]


def _ingredients_table(result: Result) -> Table:
    figures = [_cells(result, key) for key in ("tokens_per_forward", "modelled_speedup")]
    off = [name for name in INGREDIENTS if any(row["drafter"] == name for row in result.rows)]
    body = tuple(
        (
            source,
            " / ".join(f"{cells[source, OURS]:.2f}" for cells in figures),
            *(_change(figures, source, name) for name in off),
        )
        for source in _sources(result)
    )
    title = f"Each ingredient off, {result.record['cost_model']} curve, {conditions(result)}"
    headings = ("conversations", OURS, *(name.removeprefix(f"{OURS}-").replace("-", " ") for name in off))
    return Table(title, headings, body, 1, notes([result]))


def _change(figures: Sequence[Mapping[tuple[str, str], float]], source: str, name: str) -> str:
    if (source, name) not in figures[0]:
        return NONE
    return " / ".join(f"{cells[source, name] / cells[source, OURS] - 1:+.1%}" for cells in figures)


def propose_tables(results: Results) -> list[Table]:
    """What drafting costs by the size of the memory."""
    return [_propose_table(result) for result in results["propose"]]


def _propose_table(result: Result) -> Table:
    body = tuple(_propose_cells(row) for row in result.rows)
    indexed = f"indexing {result.record['indexed_tokens']:,} tokens"
    headings = ("tokens of memory", "a proposal, median", "p99", indexed, "size")
    return Table(f"Time spent drafting, {conditions(result)}", headings, body, 1, notes([result]))


def _propose_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['memory_tokens']:,}",
        f"{row['propose_us_p50']:.0f} us",
        f"{row['propose_us_p99']:.0f} us",
        f"{row['index_ms']:.0f} ms",
        f"{row['bytes_per_token'] * row['memory_tokens'] / 1e6:,.0f} MB",
    )
