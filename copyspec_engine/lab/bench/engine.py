"""`copyspec bench engine`: recorded answers written by this engine and by transformers, on the same weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from copyspec_engine import ConfigError
from copyspec_engine.lab.bench.command import EngineOptions
from copyspec_engine.lab.bench.drafts import source_names
from copyspec_engine.lab.bench.engine_tables import limit_line, source_table, summary, together_table
from copyspec_engine.lab.measuring import Measured, machine, version, versions
from copyspec_engine.lab.recorded.generate import GENERATE_PEERS
from copyspec_engine.lab.recorded.records import ROOM, RecordMismatchError, Turn, Written, load_turns, renumbered
from copyspec_engine.lab.recorded.setup import (
    ALL_PEERS,
    BATCH_PEER,
    DRAFT_PEERS,
    Entry,
    RecordedDraft,
    Setup,
    SetupOptions,
    open_setup,
    take_turns,
)
from copyspec_engine.lab.recorded.shapes import SHAPES, shape_config
from copyspec_engine.lab.replay import end_token, load_tokenizer

__all__ = ["measure_engine"]


Figures = dict[str, list[dict[str, Any]]]


def measure_engine(options: EngineOptions, console: Console) -> Measured:
    """Writes every turn with every peer and prints the tables.

    Returns:
        Exit code 1, and no figures, if a peer wrote anything else than the record.

    Raises:
        CopySpecError: an option or a file cannot work.
    """
    names = _names(options)
    tokenizer = load_tokenizer(options.tokenizer)
    end = end_token(tokenizer)
    if end is None:
        raise ConfigError(f"Got --tokenizer {options.tokenizer} without <|im_end|>, which has to end every answer")
    conversations, new_ids = _conversations(options)
    end = new_ids.get(end, end)
    how = {key: getattr(options, key) for key in ("shape", "concurrency", "device", "dtype", "curve_s", "step_cost")}
    try:
        with open_setup(SetupOptions(**how, draft=_draft(options)), tokenizer, end, conversations, names) as setup:
            for name, reason in setup.left_out.items():
                console.print(f"Left out {name}: {escape(reason)}", soft_wrap=True)
            figures = _measure(setup, conversations, options.concurrency, console)
            facts = setup.facts
    except RecordMismatchError as error:
        console.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        return 1, {}
    figures["summary"] = summary(figures["results"])
    _print(figures, facts.limit, facts.curve, console)
    return 0, {
        **figures,
        **asdict(facts),
        "left_out": setup.left_out,
        "shape": options.shape,
        "draft_shape": options.draft_shape,
        "agreement": options.agreement if options.draft_shape else None,
        "draft_tokens": options.draft_tokens if options.draft_shape else None,
        "tokenizer": options.tokenizer,
        "renumbered_tokens": len(new_ids),
        "versions": {**versions(), "torch": torch.__version__, "transformers": version("transformers")},
        "machine": {**machine(facts.device), **_threads()},
    }


def _names(options: EngineOptions) -> list[str]:
    """The peers, each once."""
    if not options.peer:
        ours = ["ours", "ours-plain", *(DRAFT_PEERS if options.draft_shape else ())]
        return [*ours, BATCH_PEER] if options.concurrency > 1 else [*ours, *GENERATE_PEERS]
    names = list(dict.fromkeys(options.peer))
    unknown = next((name for name in names if name not in ALL_PEERS), None)
    if unknown is not None:
        raise ConfigError(f"Got --peer {unknown} but expected some of {', '.join(ALL_PEERS)}")
    if options.draft_shape is None and set(names) & set(DRAFT_PEERS):
        raise ConfigError(f"Got --peer {' '.join(names)} but some need a draft model: add --draft-shape NAME")
    if BATCH_PEER in names and options.concurrency == 1:
        raise ConfigError(f"Got --peer {BATCH_PEER} but one conversation at a time: add --concurrency 2 or more")
    return names


def _draft(options: EngineOptions) -> RecordedDraft | None:
    """The draft model that is asked for."""
    if options.draft_shape is None:
        return None
    if options.draft_shape not in SHAPES:
        raise ConfigError(f"Got --draft-shape {options.draft_shape} but expected one of {', '.join(SHAPES)}")
    if not 0 < options.agreement < 1:
        raise ConfigError(f"Got --agreement {options.agreement} but expected a number above 0 and below 1")
    own, other = (shape_config(shape, end_token=0).vocab_size for shape in (options.shape, options.draft_shape))
    if own != other:
        raise ConfigError(
            f"Got --draft-shape {options.draft_shape} with {other} tokens but --shape {options.shape} has {own}: take "
            "shapes of one family"
        )
    return RecordedDraft(options.draft_shape, options.agreement, options.draft_tokens, options.draft_step_cost)


def _conversations(options: EngineOptions) -> tuple[list[list[Turn]], dict[int, int]]:
    """What is to be written, and what the token ids that the shape lacks are now."""
    config = shape_config(options.shape, end_token=0)
    encoder, at_once = load_tokenizer(options.tokenizer), options.concurrency
    found: list[list[Turn]] = []
    for name, path in source_names(options.transcripts).items():
        loaded = load_turns(
            path,
            name,
            encoder,
            max_tokens=options.max_tokens,
            max_context=config.max_position_embeddings - ROOM,
            turns=options.turns,
            conversations=options.conversations or (at_once if at_once > 1 else None),
        )
        if len(loaded) < at_once:
            raise ConfigError(
                f"Got --concurrency {at_once} but {name} holds {len(loaded)} conversations that fit in --max-tokens "
                f"{options.max_tokens}"
            )
        found += loaded
    return renumbered(found, config.vocab_size)


def _measure(setup: Setup, conversations: Sequence[Sequence[Turn]], at_once: int, console: Console) -> Figures:
    """A row for each turn and peer; with concurrency also the totals of each peer, at once and one after another."""
    results: list[dict[str, Any]] = []
    totals: dict[tuple[str, str, int], list[float]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(setup.entries) * sum(map(len, conversations)))
        for begun, group in enumerate(_groups(conversations, at_once)):
            for entry, turns, written, seconds in take_turns(setup.entries, group, begun):
                progress.update(task, description=f"{turns[0].source} {entry.name}", advance=len(turns))
                results += [_row(entry, *pair) for pair in zip(turns, written, strict=True)]
                total = totals.setdefault((turns[0].source, entry.name, entry.concurrency), [0, 0.0])
                total[0] += sum(len(turn.answer_ids) for turn in turns)
                total[1] += seconds
    if at_once == 1:
        return {"results": results}
    return {"results": results, "concurrency": [_total(*key, *total) for key, total in totals.items()]}


def _groups(conversations: Iterable[Sequence[Turn]], size: int) -> Iterable[list[Sequence[Turn]]]:
    """`size` conversations of one source at a time."""
    group: list[Sequence[Turn]] = []
    for conversation in conversations:
        if group and (len(group) == size or group[0][0].source != conversation[0].source):
            yield group
            group = []
        group.append(conversation)
    yield group


def _row(entry: Entry, turn: Turn, written: Written) -> dict[str, Any]:
    tokens = len(written.token_ids)
    row = {
        "source": turn.source,
        "conversation": turn.conversation,
        "turn": turn.number,
        "peer": entry.name,
        "concurrency": entry.concurrency,
        "prompt_tokens": len(turn.prompt_ids),
        "cached_tokens": written.cached_tokens,
        "tokens": tokens,
        "forward_passes": written.passes,
        "seconds": round(written.seconds, 6),
        "ttft_s": round(written.ttft_s, 6),
        "tokens_per_s": round(tokens / written.seconds, 3),
        "tokens_per_forward": round(tokens / written.passes, 4),
    }
    return row if written.prefill_s is None else {**row, "prefill_s": round(written.prefill_s, 6)}


def _total(source: str, peer: str, concurrency: int, tokens: float, seconds: float) -> dict[str, Any]:
    figures = {"tokens": int(tokens), "seconds": round(seconds, 6), "tokens_per_s": round(tokens / seconds, 3)}
    return {"source": source, "peer": peer, "concurrency": concurrency, **figures}


def _print(figures: Figures, limit: dict[str, float], curve: Sequence[dict[str, float]], console: Console) -> None:
    for source in dict.fromkeys(row["source"] for row in figures["results"]):
        console.print(source_table(source, [row for row in figures["summary"] if row["source"] == source]))
    if "concurrency" in figures:
        console.print(together_table(figures["concurrency"]))
    console.print(limit_line(limit, curve), soft_wrap=True)


def _threads() -> dict[str, Any]:
    """What the speed of this process hangs on besides its hardware."""
    waiting = os.environ.get("OMP_WAIT_POLICY", "")
    return {"threads": torch.get_num_threads(), "omp_wait_policy": waiting}
