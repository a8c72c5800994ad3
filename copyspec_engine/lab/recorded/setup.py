"""One model, every peer on its weights, and the turns that they take."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.drafting.cost import Points
from copyspec_engine.engine.engine import Engine
from copyspec_engine.execution.loading import ReadModel, prepare
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.lab.recorded.curve import CONTEXTS, NODES, ROWS, measure_curve, measure_limit
from copyspec_engine.lab.recorded.generate import GENERATE_PEERS, GeneratePeer
from copyspec_engine.lab.recorded.ours import DRAFT_PEERS, OUR_PEERS, OurPeer
from copyspec_engine.lab.recorded.records import Turn, Written, check
from copyspec_engine.lab.recorded.runner import RecordedDraftRunner, RecordedRunner
from copyspec_engine.lab.recorded.shapes import random_model
from copyspec_engine.values.config import DraftModel, EngineConfig

__all__ = [
    "ALL_PEERS",
    "BATCH_PEER",
    "DRAFT_PEERS",
    "Entry",
    "Facts",
    "RecordedDraft",
    "Setup",
    "SetupOptions",
    "open_setup",
    "take_turns",
]

BATCH_PEER = "generate-batch"
ALL_PEERS = (*OUR_PEERS, *GENERATE_PEERS, BATCH_PEER)
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class RecordedDraft:
    """A draft model of a shape, which agrees with the record at a share of all places (see `RecordedDraftRunner`)."""

    shape: str
    agreement: float
    max_tokens: int = 5
    """See `DraftModel.max_tokens`."""
    step_cost: Points | None = None
    """See `DraftModel.step_cost`."""


class Peer(Protocol):
    """Writes turns; what it keeps of a conversation makes the next turn of it cheaper."""

    def write(self, turns: Sequence[Turn]) -> list[Written]: ...

    def forget(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A peer, and how many turns it takes at once."""

    name: str
    concurrency: int
    peer: Peer


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured of the model before anybody wrote, and what it is."""

    curve: list[dict[str, float]]
    limit: dict[str, float]
    step_cost: Points
    """What drafting goes by."""
    draft_step_cost: Points
    """The same of the draft model; empty without one."""
    device: str
    dtype: str
    num_parameters: int
    kv_cache_tokens: int


@dataclass(frozen=True, slots=True)
class Setup:
    """Everybody who writes."""

    entries: list[Entry]
    left_out: dict[str, str]
    """Why, by name."""
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupOptions:
    """The model and how it runs."""

    shape: str
    """One of `SHAPES`."""
    concurrency: int = 1
    """Turns at once, of the peers that can."""
    device: str = "auto"
    """See `random_model`."""
    dtype: str = "auto"
    """See `random_model`."""
    curve_s: float = 10.0
    """Seconds that measuring the curve may take."""
    step_cost: Points | None = None
    """What passes cost, for drafting; default: measured, as for any model."""
    draft: RecordedDraft | None = None
    """A draft model, for those peers that need one."""


@contextmanager
def open_setup(
    options: SetupOptions, tokenizer: Tokenizer, end: int, conversations: Sequence[Sequence[Turn]], names: Sequence[str]
) -> Iterator[Setup]:
    """A model of a shape with the peers `names`, warmed up on the beginning of the first turn.

    Args:
        options: what runs.
        tokenizer: turns tokens back to text for our engine.
        end: the token that ends an answer.
        conversations: what will be written; the KV pool is made to hold `concurrency` of them for each of our peers.
        names: of `ALL_PEERS`.

    Raises:
        CopySpecError: the model cannot be built.
        RecordMismatchError: a peer does not write the record.
    """
    config = _config(options, max(len(turn.prompt_ids) + turn.max_tokens for turns in conversations for turn in turns))
    fast: Any = PreTrainedTokenizerFast
    spoken, draft = HFTokenizer(fast(tokenizer_object=tokenizer)), options.draft
    model = random_model(options.shape, end, options.device, options.dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    theirs = _sharing_weights(model)
    small = None if draft is None else ReadModel(random_model(draft.shape, end, options.device, options.dtype), spoken)
    loaded = prepare(model, spoken, config, draft=small)
    facts = _measured(model, loaded, options.curve_s)
    loaded.runner = runner = RecordedRunner(loaded.runner)
    if draft is not None and loaded.draft is not None:
        loaded.draft.runner = RecordedDraftRunner(loaded.draft.runner, runner, draft.agreement)
    with Engine(config, model=loaded) as engine:
        entries = [entry for name in names for entry in _entries(name, options.concurrency, engine, runner, theirs)]
        entries, left_out = _warmed_up(entries, _beginning(conversations[0][0]))
        yield Setup(entries, left_out, facts)


def _config(options: SetupOptions, longest: int) -> EngineConfig:
    """The engine's, for conversations of so many tokens."""
    draft = options.draft
    return EngineConfig(
        model=options.shape,
        device=options.device,
        kv_cache_tokens=max(4 * options.concurrency * longest, max(ROWS) * (max(CONTEXTS) + max(NODES))),
        max_running=max(16, options.concurrency),
        max_sessions=max(256, 8 * options.concurrency),
        step_cost=options.step_cost or "measured",
        draft_model=draft and DraftModel(draft.shape, max_tokens=draft.max_tokens, step_cost=draft.step_cost),
    )


def _measured(model: PreTrainedModel, loaded: LoadedModel, curve_s: float) -> Facts:
    return Facts(
        curve=measure_curve(loaded, curve_s),
        limit=measure_limit(model, loaded.info.kv_bytes_per_token),
        step_cost=loaded.info.step_cost,
        draft_step_cost=() if loaded.draft is None else loaded.draft.info.step_cost,
        device=loaded.info.device,
        dtype=loaded.info.dtype,
        num_parameters=loaded.info.num_parameters,
        kv_cache_tokens=loaded.info.num_kv_slots,
    )


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the same tensors, whose attention can be chosen for itself."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _entries(
    name: str, concurrency: int, engine: Engine, runner: RecordedRunner, theirs: PreTrainedModel
) -> Iterator[Entry]:
    """A peer alone, and together where it can."""
    if name in OUR_PEERS:
        yield Entry(name, 1, OurPeer(engine, runner, name))
        if concurrency > 1:
            yield Entry(name, concurrency, OurPeer(engine, runner, name, together=True))
    elif name == BATCH_PEER:
        from copyspec_engine.lab.recorded.batch import BatchPeer  # what it plugs into is not in every release

        yield Entry(name, concurrency, BatchPeer(_sharing_weights(theirs)))
    else:
        yield Entry(name, 1, GeneratePeer(_sharing_weights(theirs), name))


def _beginning(turn: Turn) -> Turn:
    """A short turn that is thrown away."""
    *_, end = turn.answer_ids
    return Turn("warm-up", 0, 1, turn.prompt_ids[:64], (*turn.answer_ids[:-1][:_WARM_UP_TOKENS], end))


def _warmed_up(entries: Sequence[Entry], turn: Turn) -> tuple[list[Entry], dict[str, str]]:
    """The entries that can write at all; of the batch peer it is not known before."""
    ready, left_out = [], {}
    for entry in entries:
        try:
            _write(entry, [turn] * entry.concurrency)
        except Exception as error:
            if entry.name != BATCH_PEER:
                raise
            left_out[entry.name] = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            ready.append(entry)
        entry.peer.forget()
    return ready, left_out


def _write(entry: Entry, turns: Sequence[Turn]) -> tuple[list[Written], float]:
    """What an entry wrote, which is the record, and the seconds of all of it."""
    start = time.perf_counter()
    written = entry.peer.write(turns)
    seconds = time.perf_counter() - start
    for turn, result in zip(turns, written, strict=True):
        check(entry.name, turn, result)
    if entry.concurrency == 1:
        seconds = sum(result.seconds for result in written)
    elif entry.name == BATCH_PEER:
        seconds = max(result.seconds for result in written)
    return written, seconds


def take_turns(
    entries: Sequence[Entry], group: Sequence[Sequence[Turn]], begun: int = 0
) -> Iterator[tuple[Entry, list[Turn], list[Written], float]]:
    """The turns of a group of conversations, by every entry; the first turns, then the second ones, and so on.

    All entries write the same turns back to back, each time another one first, so that a machine that slows down slows
    all of them down alike.

    Args:
        entries: who writes.
        group: conversations that are under way at the same time.
        begun: turns taken before, so that the order goes on changing.

    Yields:
        The entry, the turns, what it wrote, and the seconds that all of them took.

    Raises:
        RecordMismatchError: what was written is not the record.
    """
    for place in range(max(map(len, group))):
        turns = [conversation[place] for conversation in group if place < len(conversation)]
        first = (begun + place) % len(entries)
        for entry in (*entries[first:], *entries[:first]):
            yield entry, turns, *_write(entry, turns)
    for entry in entries:
        entry.peer.forget()
