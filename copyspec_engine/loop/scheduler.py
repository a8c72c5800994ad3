"""Who runs next, on which KV slots, and what becomes of a step's tokens.

Requests are admitted in the order in which they came, as soon as there are slots for what is to be read of them, and
take more slots as they grow. Every running request takes part in every step: with its last token and a draft, or with a
piece of its prompt. When slots run out, rows kept for later calls give way first, then the request admitted last: it
waits with all it has written, and goes on when there is room, computing anew what is no longer kept.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from copyspec_engine.drafting.drafter import Drafter, answer_texts
from copyspec_engine.drafting.tree import DraftTree, Run
from copyspec_engine.kv.prefix_cache import PrefixCache
from copyspec_engine.kv.slots import KVPool
from copyspec_engine.loop.request import Request
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.memory.index import Span
from copyspec_engine.memory.store import SessionStore
from copyspec_engine.provenance.trail import cut
from copyspec_engine.sampling.verify import Verdict
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.explanation import NOT_COPIED
from copyspec_engine.values.metrics import Counts
from copyspec_engine.values.outputs import FinishReason, GenerationOutput, Reply, Segment, StreamChunk, TokenLogprob
from copyspec_engine.values.tokens import TokenArray

__all__ = ["ScheduledBatch", "ScheduledRow", "Scheduler", "session_key", "session_keys"]

_AHEAD = 256
"""Slots that a row takes at a time while many are free, so that it lies in one piece."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """A sequence's part in one step: its next `num_tokens` pending tokens."""

    sequence: Request
    num_tokens: int
    samples: bool
    """The row's last pending token is among them, so a token is sampled and a draft may follow."""


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The rows of one step, of any lengths."""

    rows: tuple[ScheduledRow, ...]

    @property
    def num_tokens(self) -> int:
        """Pending tokens that the step reads, drafts not counted."""
        return sum(row.num_tokens for row in self.rows)


class Scheduler:
    """Queue, running requests and the KV slots of both.

    Args:
        pool: the KV slots.
        cache: rows of KV that are kept for later calls.
        sessions: what is remembered between calls.
        max_running: requests admitted at once.
        max_prefill_tokens: prompt tokens in one step, of all rows together.
        release: told of each request that is over.
    """

    def __init__(
        self,
        pool: KVPool,
        cache: PrefixCache,
        sessions: SessionStore,
        max_running: int,
        max_prefill_tokens: int,
        release: Callable[[Request], None],
    ) -> None:
        self._pool, self._cache, self._sessions, self._release = pool, cache, sessions, release
        self._max_running, self._max_prefill_tokens = max_running, max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """Admitted, and not over yet."""
        self.counts = Counts()
        self._stuck: Request | None = None
        """The first in the queue, once there were no slots for it."""

    def __bool__(self) -> bool:
        """Whether there is work."""
        return bool(self.waiting or self.running)

    def holds(self, sequence: Request) -> bool:
        """Whether a request is running or waiting."""
        return sequence in self.running or sequence in self.waiting

    @property
    def in_flight(self) -> list[Request]:
        """Running requests and waiting ones."""
        return [*self.running, *self.waiting]

    def expired(self) -> list[Request]:
        """Requests whose time is over."""
        now = time.perf_counter()
        return [sequence for sequence in self.in_flight if sequence.deadline_s <= now]

    def add(self, sequence: Request) -> None:
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Take in waiting requests, as many as fit."""
        while self.waiting and len(self.running) < self._max_running and self.waiting[0] is not self._stuck:
            if not self._admit(self.waiting[0]):
                self._stuck = self.waiting[0]  # until somebody gives up slots
                return
            self.running.append(self.waiting.popleft())

    def schedule(self) -> ScheduledBatch:
        """Give every running request its part of the next step, and slots for it.

        What a step reads of prompts is shared out evenly, so that a long prompt keeps nobody waiting.
        """
        rows: list[ScheduledRow] = []
        left, readers = self._max_prefill_tokens, sum(sequence.num_pending > 1 for sequence in self.running)
        for sequence in list(self.running):
            if sequence not in self.running:  # it had to give way to one before it
                continue
            count = sequence.num_pending
            if count > 1:
                count = min(count, max(left // readers, 1))
                left, readers = left - count, readers - 1
            if self._secure(sequence, count):
                rows.append(ScheduledRow(sequence, count, samples=count == sequence.num_pending))
        return ScheduledBatch(tuple(rows))

    def fit(self, row: ScheduledRow, draft: DraftTree) -> DraftTree:
        """As much of a draft as there are slots for; nobody gives way for a draft."""
        sequence, needed = row.sequence, row.sequence.num_computed + row.num_tokens + len(draft)
        if needed > len(sequence.slots):
            self._extend(sequence, min(needed - len(sequence.slots), self._pool.num_free))
        return draft.first(len(sequence.slots) - sequence.num_computed - row.num_tokens)

    def _secure(self, sequence: Request, count: int) -> bool:
        """Slots for the next `count` tokens of a running request; False if it had to give way itself."""
        missing = sequence.num_computed + count - len(sequence.slots)
        if missing <= 0:
            return True
        ahead = min(_AHEAD, sequence.max_total_tokens - len(sequence.slots))
        wanted = max(missing, min(ahead, (self._pool.num_free + self._cache.num_idle_slots) // 4))
        self._cache.evict(wanted)
        if self._pool.num_free < missing:
            self._take_back_spare()
        while self._pool.num_free < missing:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
            self._cache.evict(missing)
        self._extend(sequence, min(wanted, self._pool.num_free))
        return True

    def _extend(self, sequence: Request, count: int) -> None:
        """Take `count` slots more for a row, where it ends if they are free."""
        after = int(sequence.slots[-1]) if len(sequence.slots) else None
        sequence.slots = np.concatenate((sequence.slots, self._pool.allocate(count, after=after)))

    @property
    def _num_spare(self) -> int:
        return sum(max(len(sequence.slots) - len(sequence.token_ids), 0) for sequence in self.running)

    def _take_back_spare(self) -> None:
        """Free what rows hold ahead of their tokens, for drafts of earlier steps or to lie in one piece."""
        for sequence in self.running:
            length = len(sequence.token_ids)
            self._pool.release(sequence.slots[length:])
            sequence.slots = sequence.slots[:length]

    def _preempt(self, sequence: Request) -> None:
        """Make a running request wait again; what it has computed is kept as long as there is room for it."""
        self._stuck = None
        self.counts.num_preemptions += 1
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        computed = sequence.num_computed
        self._pool.release(sequence.slots[computed:])
        self._cache.keep(
            _call_key(sequence), _tokens(sequence, computed), sequence.slots[:computed], sequence.cache_salt
        )
        sequence.slots, sequence.num_computed = sequence.slots[:0], 0

    def _admit(self, sequence: Request) -> bool:
        """Give a request the KV that is kept of its beginning, and slots for the rest of it; False: it has to wait."""
        # The last token is always computed: its logits choose the next one.
        tokens = _tokens(sequence, len(sequence.token_ids) - 1)
        owners = [_call_key(sequence), *session_keys(sequence.request)]
        prefix = self._cache.match(tokens, owners, sequence.cache_salt)
        self._pool.share(prefix)
        need = len(sequence.token_ids) - len(prefix)
        if self._pool.num_free + self._cache.num_idle_slots + self._num_spare < need:
            self._pool.release(prefix)
            return False
        self._cache.drop(_call_key(sequence))
        self._cache.evict(need)
        if self._pool.num_free < need:
            self._take_back_spare()
        if not sequence.started_s:
            sequence.started_s = time.perf_counter()
            sequence.num_cached_tokens = len(prefix)
            self.counts.num_prompt_tokens += sequence.num_prompt_tokens
            self.counts.num_cached_tokens += len(prefix)
        sequence.slots, sequence.num_computed = prefix.copy(), len(prefix)
        self._extend(sequence, need)
        return True

    def open_memory(self, sequence: Request) -> None:
        """Bind a request to its session and the memory that it copies from, unless it is already."""
        if sequence.memory is not None:
            return
        request = sequence.request
        sequence.session = self._sessions.open(request.session_id, keep_texts=request.keep_texts)
        if request.memory_pool is None:
            self._use(sequence, sequence.session.memory)
        else:
            self._use(sequence, self._sessions.open_pool(request.memory_pool, _owner(request)))

    def _use(self, sequence: Request, memory: SessionMemory) -> None:
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

    def _append(self, sequence: Request, draft: DraftTree, verdict: Verdict) -> StreamChunk:
        """Add sampled tokens until one of them ends the answer; what lies behind it is dropped, as if never drafted."""
        now = time.perf_counter()
        sequence.first_token_s = sequence.first_token_s or now
        sequence.last_token_s = now
        segments: list[Segment] = []
        taken = 0
        for token, copied in zip(verdict.tokens, _copied(verdict), strict=True):
            sequence.token_ids.append(token)
            if token not in sequence.eos_token_ids:
                segments += sequence.text.push(token, copied=copied)
            taken += 1
            sequence.text_ends.append(sequence.text.num_characters)
            if sequence.grammar is not None:
                sequence.grammar.advance((token,))
            sequence.finish_reason = _finish_reason(sequence, token)
            if sequence.finish_reason is not None:
                segments += sequence.text.flush()
                break
        kept, tokens = verdict.accepted[:taken], verdict.tokens[:taken]
        runs = cut(verdict.runs, len(kept))
        sequence.trail.note(len(sequence.text_ends) - taken, runs)
        _keep_nodes(sequence, kept)
        sequence.draft_lengths.append(len(draft))
        sequence.accepted_lengths.append(len(kept))
        self._count(draft, runs, len(tokens))
        if sequence.drafter is not None and sequence.memory is not None:
            with sequence.memory.noting(sequence.texts):
                sequence.drafter.observe(draft, kept, tokens)
        if verdict.candidates is not None and sequence.memory is not None:
            sequence.memory.recycled.add(verdict.candidates)
        if sequence.finish_reason is not None:
            self.remove(sequence)
        return _chunk(sequence, tokens, segments, (verdict.logprobs or ())[:taken])

    def _count(self, draft: DraftTree, runs: Sequence[Run], num_tokens: int) -> None:
        counts = self.counts
        counts.num_row_passes += 1
        counts.num_completion_tokens += num_tokens
        counts.num_draft_tokens += len(draft)
        for run in runs:
            counts.accepted[run.kind] += run.num_tokens

    def stop(self, sequence: Request, reason: FinishReason) -> StreamChunk:
        """End a waiting or running request early; what it has written so far is its answer."""
        sequence.finish_reason = reason
        segments = sequence.text.flush()
        self.remove(sequence)
        return _chunk(sequence, (), segments)

    def remove(self, sequence: Request) -> None:
        """Take a request off; its texts and computed KV are kept for later calls, every other slot becomes free.

        Of one that failed (it has no finish_reason) nothing is kept, since that may be what failed it.
        """
        self._stuck = None
        self.counts.finished[sequence.finish_reason or "failed"] += 1
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        try:
            self._stop_drafting(sequence, keep=sequence.finish_reason is not None)
        finally:
            self._release(sequence)
            self._hand_over_slots(sequence)

    def detach(self, sequence: Request) -> None:
        """Take a request out of its memory, which is erased; it gets another one that ends with it."""
        memory = sequence.memory
        if memory is None:  # it waits, and has none yet
            sequence.session = self._sessions.open(None)
            self._use(sequence, sequence.session.memory)
            return
        memory.owner = None  # nothing of it is saved any more
        try:
            self._stop_drafting(sequence, keep=True)
        finally:
            sequence.trail.withdraw()
            memory.erase()
            self._use(sequence, self._sessions.open(None).memory)

    def _stop_drafting(self, sequence: Request, *, keep: bool) -> None:
        """Finish a request's drafter and save its texts, or take them out of the memory again.

        Whatever happens, nothing stays open there.
        """
        drafter, memory = sequence.drafter, sequence.memory
        sequence.drafter = sequence.memory = None
        if memory is None:
            return
        try:
            with memory.noting(sequence.texts):
                _make_out_copies(sequence, memory, drafter)
                if drafter is not None:
                    drafter.finish()
        except Exception:
            keep = False
            raise
        finally:
            if not keep:
                memory.withdraw(sequence.texts)
            memory.end_call()
            self._sessions.save(memory)

    def _hand_over_slots(self, sequence: Request) -> None:
        """Keep the KV of a finished call, instead of that of its session's call before; free what is not kept."""
        computed, slots = sequence.num_computed, sequence.slots
        sequence.slots = slots[:0]
        self._cache.drop(_call_key(sequence))
        is_kept = sequence.session is not None and sequence.session.is_kept
        owner = _session_key(sequence) if is_kept else None
        if sequence.request.session_id is None and sequence.cache_salt is not None:
            owner = _call_key(sequence)
        if owner is None or not computed or sequence.finish_reason is None:
            self._pool.release(slots)
            return
        self._pool.release(slots[computed:])
        self._cache.keep(owner, _tokens(sequence, computed), slots[:computed], sequence.cache_salt)


def _make_out_copies(sequence: Request, memory: SessionMemory, drafter: Drafter | None) -> None:
    sequence.trail.make_out(
        sequence.token_ids,
        sequence.num_prompt_tokens,
        memory,
        answer_texts(drafter),
        sequence.prediction_ids,
        is_others=partial(_is_others, sequence.request, memory),
    )


def _owner(request: GenerationRequest) -> str | None:
    """Whose texts a pool keeps those of a call as; None: nobody's who could come back for them."""
    return request.session_id if request.keep_texts else None


def _is_others(request: GenerationRequest, memory: SessionMemory, text: Span) -> bool:
    """Whether a text is of a pool and may be another caller's: all calls without a session are one part of it."""
    return request.memory_pool is not None and (_owner(request) is None or not memory.has(text))


def _copied(verdict: Verdict) -> Iterator[bool]:
    """Of each token of a verdict, whether it was copied."""
    for run in verdict.runs:
        yield from (run.kind not in NOT_COPIED,) * run.num_tokens
    yield False  # the bonus token


def session_key(session_id: str) -> str:
    """Under which the prefix cache keeps a session's row."""
    return f"session:{session_id}"


def session_keys(request: GenerationRequest) -> list[str]:
    """Under which it keeps what a call may begin with."""
    return [session_key(name) for name in (request.session_id, request.continues) if name is not None]


def _session_key(sequence: Request) -> str | None:
    session_id = sequence.request.session_id
    return None if session_id is None else session_key(session_id)


def _call_key(sequence: Request) -> str:
    return f"call:{sequence.number}"


def _tokens(sequence: Request, count: int) -> TokenArray:
    return np.array(sequence.token_ids[:count], dtype=np.int64)


def _finish_reason(sequence: Request, token: int) -> FinishReason | None:
    if token in sequence.eos_token_ids or sequence.text.stopped:
        return "stop"
    if sequence.grammar is not None and sequence.grammar.is_terminated:
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_total_tokens else None


def _keep_nodes(sequence: Request, kept: Sequence[int]) -> None:
    """Make the slots of accepted draft nodes the next ones of the sequence.

    Draft nodes were written to the slots behind `num_computed` in node order. Listing the accepted ones first keeps
    their KV without moving it; the others are written over by the next step.
    """
    base, count = sequence.num_computed, len(kept)
    if tuple(kept) != tuple(range(count)):
        window = sequence.slots[base : base + max(kept) + 1]
        accepted = set(kept)
        others = [node for node in range(len(window)) if node not in accepted]
        sequence.slots[base : base + len(window)] = window[[*kept, *others]]
    sequence.num_computed = base + count


def _chunk(
    sequence: Request, token_ids: tuple[int, ...], segments: list[Segment], logprobs: tuple[TokenLogprob, ...] = ()
) -> StreamChunk:
    """What the caller hears of a step, with the whole answer once it is finished."""
    sequence.segments += segments
    sequence.logprobs += logprobs
    text = "".join(segment.text for segment in segments)
    deltas, reply = [] if sequence.reply is None else sequence.reply.feed(text), None
    if sequence.reply is not None and sequence.finish_reason is not None:
        reply, last = sequence.reply.finish()
        deltas += last
    output = None if sequence.finish_reason is None else _output(sequence, sequence.finish_reason, reply)
    heard = logprobs if sequence.request.sampling.logprobs else None
    return StreamChunk(
        sequence.request.request_id, text, token_ids, _joined(segments), output, heard, deltas=tuple(deltas)
    )


def _joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind as one segment."""
    groups = itertools.groupby(segments, key=lambda segment: segment.copied)
    return tuple(Segment("".join(segment.text for segment in group), copied) for copied, group in groups)


def _output(sequence: Request, finish_reason: FinishReason, reply: Reply | None) -> GenerationOutput:
    text = "".join(segment.text for segment in sequence.segments)
    return GenerationOutput(
        request_id=sequence.request.request_id,
        text=text,
        token_ids=tuple(sequence.token_ids[sequence.num_prompt_tokens :]),
        finish_reason=finish_reason,
        usage=sequence.usage(),
        draft_stats=sequence.draft_stats(),
        timing=sequence.timing(),
        segments=_joined(sequence.segments),
        logprobs=tuple(sequence.logprobs) if sequence.request.sampling.logprobs else None,
        reply=reply,
        copies=sequence.trail.copies(sequence.text_ends, len(text)),
        prompt_token_ids=tuple(sequence.token_ids[: sequence.num_prompt_tokens]),
    )
