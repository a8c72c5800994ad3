"""Who runs next, and what becomes of a step's tokens.

Requests are admitted in the order in which they came, as soon as all the KV slots they may ever need are free: a
running request never has to be thrown out. Every running request takes part in every step, with a piece of its prompt
or with its last token and a draft.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from copyspec_engine.drafter import DraftTree
from copyspec_engine.kv_pool import KVPool
from copyspec_engine.memory import SessionMemory, common_prefix_length
from copyspec_engine.outputs import FinishReason, GenerationOutput, Segment, StreamChunk
from copyspec_engine.sequence import Sequence
from copyspec_engine.sessions import SessionStore
from copyspec_engine.verify import Verdict

__all__ = ["ScheduledBatch", "ScheduledRow", "Scheduler"]


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """A sequence's part in one step: its next `num_tokens` pending tokens."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    """The row's last pending token is among them, so a token is sampled and a draft may follow."""


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The rows of one step, of any lengths."""

    rows: tuple[ScheduledRow, ...]


class Scheduler:
    """Queue, running requests and the KV slots of both.

    Args:
        pool: the KV slots.
        sessions: what is remembered between calls.
        max_running: requests admitted at once.
        max_prefill_tokens: prompt tokens of one row in one step.
        release: told of each request that has been running and is over.
        reuses_kv: sessions keep the KV of their last call.
    """

    def __init__(
        self,
        pool: KVPool,
        sessions: SessionStore,
        max_running: int,
        max_prefill_tokens: int,
        release: Callable[[Sequence], None],
        reuses_kv: bool = True,
    ) -> None:
        self._release, self._reuses_kv = release, reuses_kv
        self._pool, self._sessions = pool, sessions
        self._max_running, self._max_prefill_tokens = max_running, max_prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Admitted, and not over yet."""

    def __bool__(self) -> bool:
        """Whether there is work."""
        return bool(self._waiting or self.running)

    def holds(self, sequence: Sequence) -> bool:
        """Whether a request is running or waiting."""
        return sequence in self.running or sequence in self._waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def admit(self) -> None:
        """Take in waiting requests, as many as fit."""
        while self._waiting and len(self.running) < self._max_running and self._admit(self._waiting[0]):
            self.running.append(self._waiting.popleft())

    def schedule(self) -> ScheduledBatch:
        """Give every running request its part of the next step."""
        rows = []
        for sequence in self.running:
            count = min(sequence.num_pending, self._max_prefill_tokens)
            rows.append(ScheduledRow(sequence, count, samples=count == sequence.num_pending))
        return ScheduledBatch(tuple(rows))

    def _admit(self, sequence: Sequence) -> bool:
        """Bind a request to its session's memory and reserve its KV slots; False if it has to wait for slots."""
        session_id, pool = sequence.request.session_id, sequence.request.memory_pool
        # The last prompt token is always computed: its logits choose the first token of the answer.
        prefix = common_prefix_length(sequence.token_ids[:-1], self._sessions.cached_tokens(session_id))
        need = sequence.max_total_tokens - prefix
        if self._pool.num_free + self._sessions.num_cached_slots - prefix < need:
            return False
        session = self._sessions.open(session_id)
        shared, rest = session.take_slots(prefix)
        self._pool.release(rest)
        while self._pool.num_free < need:
            self._sessions.evict_slots()
        new = self._pool.allocate(need, after=int(shared[-1]) if prefix else None)
        sequence.session = session
        self._use(sequence, session.memory if pool is None else self._sessions.open_pool(pool, session_id))
        sequence.slots = np.concatenate((shared, new))
        sequence.num_computed = sequence.num_cached_tokens = prefix
        sequence.started_s = time.perf_counter()
        return True

    def _use(self, sequence: Sequence, memory: SessionMemory) -> None:
        memory.begin_call()
        sequence.memory = memory

    def commit(self, row: ScheduledRow, draft: DraftTree, verdict: Verdict | None) -> StreamChunk | None:
        """Take over a row's results; one that only read prompt tokens has no verdict and nothing to tell."""
        sequence = row.sequence
        sequence.num_computed += row.num_tokens
        if verdict is None:
            sequence.num_prefill_passes += 1
            return None
        return self._append(sequence, draft, verdict)

    def _append(self, sequence: Sequence, draft: DraftTree, verdict: Verdict) -> StreamChunk:
        """Add sampled tokens until one of them ends the answer; what lies behind it is dropped, as if never drafted."""
        now = time.perf_counter()
        sequence.first_token_s = sequence.first_token_s or now
        sequence.last_token_s = now
        segments: list[Segment] = []
        taken = 0
        for token in verdict.tokens:
            sequence.token_ids.append(token)
            segments += sequence.text.push(token, copied=taken < len(verdict.accepted))
            taken += 1
            sequence.finish_reason = _finish_reason(sequence, token)
            if sequence.finish_reason is not None:
                segments += sequence.text.flush()
                break
        kept, tokens = verdict.accepted[:taken], verdict.tokens[:taken]
        _keep_nodes(sequence, kept)
        sequence.num_draft_tokens += len(draft)
        sequence.num_copied_tokens += len(kept)
        sequence.accepted_lengths.append(len(kept))
        if sequence.drafter is not None:
            sequence.drafter.observe(draft, kept, tokens)
        if sequence.finish_reason is not None:
            self.remove(sequence)
        return _chunk(sequence, tokens, segments)

    def cancel(self, sequence: Sequence) -> StreamChunk:
        """Stop a waiting or running request; what it has written so far is its answer."""
        sequence.finish_reason = "cancelled"
        segments = sequence.text.flush()
        self.remove(sequence)
        return _chunk(sequence, (), segments)

    def remove(self, sequence: Sequence) -> None:
        """Take a request off; its session keeps its texts and computed KV, every other slot becomes free."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        self.running.remove(sequence)
        try:
            self._stop_drafting(sequence)
        finally:
            self._release(sequence)
            self._hand_over_slots(sequence)

    def detach(self, sequence: Sequence) -> None:
        """Take a running request out of its memory, which is erased; it gets another one that ends with it."""
        memory = sequence.memory
        if memory is None:
            return
        memory.owner = None  # nothing of it is saved any more
        try:
            self._stop_drafting(sequence)
        finally:
            memory.erase()
            self._use(sequence, self._sessions.open(None).memory)

    def _stop_drafting(self, sequence: Sequence) -> None:
        """Finish a request's drafter and save its texts; whatever happens, nothing stays open in the memory."""
        drafter, memory = sequence.drafter, sequence.memory
        sequence.drafter = sequence.memory = None
        try:
            if drafter is not None:
                drafter.finish()
        finally:
            if memory is not None:
                memory.end_call()
                self._sessions.save(memory)

    def _hand_over_slots(self, sequence: Sequence) -> None:
        """The session keeps the KV of its last call, instead of that of the call before."""
        session, computed = sequence.session, sequence.num_computed
        if session is None or not session.is_kept or not self._reuses_kv:
            self._pool.release(sequence.slots)
            return
        self._pool.release(session.take_slots(0)[1])
        self._pool.release(sequence.slots[computed:])
        session.keep_slots(sequence.token_ids[:computed], sequence.slots[:computed])


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    if token in sequence.eos_token_ids or sequence.text.stopped:
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_total_tokens else None


def _keep_nodes(sequence: Sequence, kept: Seq[int]) -> None:
    """Make the slots of accepted draft nodes the next ones of the sequence.

    Draft nodes were written to the slots behind `num_computed` in node order. Listing the accepted ones first keeps
    their KV without moving it; the others are written over by the next step.
    """
    base, count = sequence.num_computed, len(kept)
    if tuple(kept) != tuple(range(count)):
        window = sequence.slots[base : base + max(kept) + 1]
        others = [node for node in range(len(window)) if node not in set(kept)]
        sequence.slots[base : base + len(window)] = window[[*kept, *others]]
    sequence.num_computed = base + count


def _chunk(sequence: Sequence, token_ids: tuple[int, ...], segments: list[Segment]) -> StreamChunk:
    """What the caller hears of a step, with the whole answer once it is finished."""
    sequence.segments += segments
    text = "".join(segment.text for segment in segments)
    output = None if sequence.finish_reason is None else _output(sequence, sequence.finish_reason)
    return StreamChunk(sequence.request.request_id, text, token_ids, _joined(segments), output)


def _joined(segments: Seq[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind as one segment."""
    groups = itertools.groupby(segments, key=lambda segment: segment.copied)
    return tuple(Segment("".join(segment.text for segment in group), copied) for copied, group in groups)


def _output(sequence: Sequence, finish_reason: FinishReason) -> GenerationOutput:
    return GenerationOutput(
        request_id=sequence.request.request_id,
        text="".join(segment.text for segment in sequence.segments),
        token_ids=tuple(sequence.token_ids[sequence.num_prompt_tokens :]),
        finish_reason=finish_reason,
        usage=sequence.usage(),
        draft_stats=sequence.draft_stats(),
        timing=sequence.timing(),
        segments=_joined(sequence.segments),
    )
