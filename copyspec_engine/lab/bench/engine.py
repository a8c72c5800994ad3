"""`copyspec bench engine`: recorded answers written by this engine and by transformers, on the same weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from copyspec_engine import ConfigError
from copyspec_engine.cli.report import check_writable, write_record
from copyspec_engine.lab.bench.drafts import machine, source_names, version, versions
from copyspec_engine.lab.bench.engine_report import limit_line, source_table, summary, together_table
from copyspec_engine.lab.recorded.generate import GENERATE_PEERS
from copyspec_engine.lab.recorded.records import ROOM, ForcedMismatchError, Turn, Written, load_turns, renumbered
from copyspec_engine.lab.recorded.shapes import SHAPES, shape_config
from copyspec_engine.lab.recorded.stage import (
    ALL_PEERS,
    BATCH_PEER,
    DRAFT_PEERS,
    Entry,
    ForcedDraft,
    Stage,
    open_stage,
    take_turns,
)
from copyspec_engine.lab.replay import end_token, load_tokenizer

__all__ = ["EngineOptions", "run_engine"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The command's options, and what only tests set."""

    transcripts: tuple[Path, ...]
    shape: str = "bundled"
    tokenizer: str = "bundled"
    peers: str | None = None
    max_tokens: int = 1000
    turns: int | None = None
    conversations: int | None = None
    concurrency: int = 1
    device: str = "auto"
    dtype: str = "auto"
    draft_shape: str | None = None
    agreement: float = 0.7
    draft_tokens: int = 5
    curve_s: float = 10.0
    """Seconds that measuring passes may take."""
    step_cost: tuple[tuple[int, float], ...] | None = None
    """What drafting takes passes to cost; default: measured."""
    draft_step_cost: tuple[tuple[int, float], ...] | None = None
    """The same for passes of the draft model."""


Figures = dict[str, list[dict[str, Any]]]


def run_engine(options: EngineOptions, json_path: Path | None, command: str, console: Console) -> int:
    """Writes every turn with every peer, prints the tables and writes the file.

    Returns:
        The exit code: 1 if a peer wrote anything else than the record, else 0.

    Raises:
        CopySpecError: an option or a file cannot work.
    """
    if json_path:
        check_writable(json_path, "--json")
    names = _names(options)
    tokenizer = load_tokenizer(options.tokenizer)
    end = end_token(tokenizer)
    if end is None:
        raise ConfigError(f"Got --tokenizer {options.tokenizer} without <|im_end|>, which has to end every answer")
    conversations, new_ids = _conversations(options)
    end = new_ids.get(end, end)
    how = {key: getattr(options, key) for key in ("concurrency", "device", "dtype", "curve_s", "step_cost")}
    try:
        with open_stage(options.shape, tokenizer, end, conversations, names, draft=_draft(options), **how) as stage:
            for name, reason in stage.left_out.items():
                console.print(f"Left out {name}: {escape(reason)}", soft_wrap=True)
            figures = _measure(stage, conversations, options.concurrency, console)
            facts = stage.facts
    except ForcedMismatchError as error:
        console.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    figures["summary"] = summary(figures["results"])
    _print(figures, facts.limit, facts.curve, console)
    if json_path:
        record = {
            **figures,
            **asdict(facts),
            "left_out": stage.left_out,
            "shape": options.shape,
            "draft_shape": options.draft_shape,
            "agreement": options.agreement if options.draft_shape else None,
            "draft_tokens": options.draft_tokens if options.draft_shape else None,
            "tokenizer": options.tokenizer,
            "renumbered_tokens": len(new_ids),
            "command": command,
            "versions": {**versions(), "torch": torch.__version__, "transformers": version("transformers")},
            "machine": {**machine(facts.device), **_threads()},
        }
        write_record(json_path, record, console)
    return 0


def _names(options: EngineOptions) -> list[str]:
    """The peers, each once."""
    if options.peers is None:
        ours = ["ours", "ours-plain", *(DRAFT_PEERS if options.draft_shape else ())]
        return [*ours, BATCH_PEER] if options.concurrency > 1 else [*ours, *GENERATE_PEERS]
    names = list(dict.fromkeys(name.strip() for name in options.peers.split(",")))
    unknown = next((name for name in names if name not in ALL_PEERS), None)
    if unknown is not None:
        raise ConfigError(f"Got peer {unknown!r} but expected some of {', '.join(ALL_PEERS)}")
    if options.draft_shape is None and set(names) & set(DRAFT_PEERS):
        raise ConfigError(f"Got peers {', '.join(names)} but some need a draft model: add --draft-shape NAME")
    if BATCH_PEER in names and options.concurrency == 1:
        raise ConfigError(f"Got peer {BATCH_PEER} but one conversation at a time: add --concurrency 2 or more")
    return names


def _draft(options: EngineOptions) -> ForcedDraft | None:
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
    return ForcedDraft(options.draft_shape, options.agreement, options.draft_tokens, options.draft_step_cost)


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


def _measure(stage: Stage, conversations: Sequence[Sequence[Turn]], at_once: int, console: Console) -> Figures:
    """A row for each turn and peer; with concurrency also the totals of each peer, at once and one after another."""
    results: list[dict[str, Any]] = []
    totals: dict[tuple[str, str, int], list[float]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(stage.entries) * sum(map(len, conversations)))
        for begun, group in enumerate(_groups(conversations, at_once)):
            for entry, turns, written, seconds in take_turns(stage.entries, group, begun):
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
