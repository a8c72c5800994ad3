"""`copyspec bench drafts`: recorded conversations through every drafter, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from copyspec_engine import ConfigError
from copyspec_engine.lab.bench.command import DraftsOptions
from copyspec_engine.lab.bench.drafts_tables import comparison, comparison_table, ingredient_table, source_table
from copyspec_engine.lab.contestants import INGREDIENTS, OURS, PEERS, contestant, installed
from copyspec_engine.lab.measuring import Measured, machine, versions
from copyspec_engine.lab.replay import (
    Message,
    Tally,
    calls_of,
    end_token,
    load_conversations,
    load_cost_curve,
    load_tokenizer,
    replay,
)

__all__ = ["measure_drafts", "source_names", "sources"]


def measure_drafts(options: DraftsOptions, console: Console) -> Measured:
    """Replays and prints the tables.

    Raises:
        CopySpecError: an option or a file cannot work, or a drafter that was named is not installed.
    """
    cost = load_cost_curve(options.cost_model)
    names, left_out = _names(options)
    for name in names:  # whatever is wrong with one is said now, not after minutes
        contestant(name, cost)()
    loaded = sources(options.transcripts, options.tokenizer, options.max_tokens, console)
    for name in left_out:
        console.print(f'Left out {name}: arctic-inference is not installed. Run: pip install "copyspec\\[bench]"')
    results = _replay_all(loaded, names, options, console)
    for source in loaded:
        console.print(source_table(source, [row for row in results if row["source"] == source]))
    compared = comparison(results)
    if compared:
        console.print(comparison_table(compared, options.cost_model))
    if OURS in names and any(name in INGREDIENTS for name in names):
        for figure in ("tokens_per_forward", "modelled_speedup"):
            console.print(ingredient_table(results, figure))
    return 0, {
        "results": results,
        "comparison": compared,
        "cost_model": options.cost_model,
        "history": options.history,
        "max_tokens": options.max_tokens,
        "tokenizer": options.tokenizer,
        "versions": versions(),
        "machine": machine(),
    }


def _names(options: DraftsOptions) -> tuple[list[str], list[str]]:
    """The drafters to replay, each once, and those of the default ones that are not installed."""
    left_out: list[str] = []
    if options.drafters is not None:
        names = [name.strip() for name in options.drafters.split(",")]
    elif options.ingredients:
        names = [OURS]
    else:
        names = ["none", *PEERS, OURS]
        if options.history != "full":
            names.append("adaptive-no-memory")
        left_out = [name for name in names if not installed(name)]
        names = [name for name in names if installed(name)]
    if options.ingredients:
        names += [OURS, *INGREDIENTS]
    return list(dict.fromkeys(names)), left_out


def sources(
    paths: Sequence[Path], tokenizer: str, max_tokens: int, console: Console
) -> dict[str, list[tuple[Message, ...]]]:
    """The conversations of each file, by its name without endings, or by its path where two share a name.

    Raises:
        ConfigError: a file or the tokenizer cannot be read, or a file is given twice.
    """
    named, encoder = source_names(paths), load_tokenizer(tokenizer)
    with console.status("Reading the transcripts ..."):
        return {name: load_conversations(path, encoder, max_tokens) for name, path in named.items()}


def source_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their names without endings, or by their paths where two share a name.

    Raises:
        ConfigError: a file is given twice.
    """
    stems = [path.name.split(".")[0] for path in paths]
    names = [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Got transcript {name} twice but expected each file once")
    return dict(zip(names, paths, strict=True))


def _replay_all(
    loaded: Mapping[str, Sequence[tuple[Message, ...]]], names: Sequence[str], options: DraftsOptions, console: Console
) -> list[dict[str, Any]]:
    cost, end, results = load_cost_curve(options.cost_model), end_token(load_tokenizer(options.tokenizer)), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("conversations"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(names) * sum(map(len, loaded.values())))
        for source, conversations in loaded.items():
            for name in names:
                progress.update(task, description=f"{source} {name}")
                # What compiles or loads on the first call is no part of a measurement.
                replay(contestant(name, cost, end)(), islice(calls_of(conversations[0], options.history), 1), Tally())
                drafter, tally = contestant(name, cost, end), Tally()
                for conversation in conversations:
                    replay(drafter(), calls_of(conversation, options.history), tally)
                    progress.advance(task)
                results.append({"source": source, "drafter": name, **tally.figures(cost)})
    return results
