"""Who runs next, and on which KV slots.

Requests are admitted in the order in which they came, as soon as there are slots for what is to be read of them, and
take more slots as they grow. One that shares its beginning with a running one waits until that has computed it. Every
running request takes part in every step: with its last token and a draft, or with a piece of its prompt. When slots run
out, rows kept for later calls give way first, then the request admitted last: it waits with all it has written, and
goes on when there is room, computing anew what is no longer kept.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.kv.slots import KVSequence, KVSlots, common_prefix_length
from copyspec_engine.loop.request import Request
from copyspec_engine.sampling.verify import Verdict

__all__ = ["Counts", "Scheduler", "StepRow", "piece_of", "split_evenly"]

_WORTH_A_WAIT = 16
"""Tokens that a request rather lets another compute for both than reads beside it."""


@dataclass(slots=True)
class Counts:
    """Running totals; only the engine's loop thread changes them."""

    num_steps: int = 0
    """Forward passes, of however many requests each."""
    num_row_passes: int = 0
    """Parts that requests had in passes which sampled them a token."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that did not have to be computed."""
    num_completion_tokens: int = 0
    num_draft_tokens: int = 0
    num_preemptions: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    """Accepted draft tokens by where they came from."""
    finished: Counter[str] = field(default_factory=Counter)
    """Requests that are over, by finish reason, or "failed"."""

    def note(self, num_draft_tokens: int, num_tokens: int, accepted: Iterable[tuple[int, str]]) -> None:
        """A request's part in a pass that sampled it a token.

        Args:
            num_draft_tokens: that were verified.
            num_tokens: that were written.
            accepted: how many of the draft's, and where they came from.
        """
        self.num_row_passes += 1
        self.num_completion_tokens += num_tokens
        self.num_draft_tokens += num_draft_tokens
        for count, kind in accepted:
            self.accepted[kind] += count


@dataclass(slots=True, eq=False)
class StepRow:
    """A request's part in one step, filled in as the step goes on."""

    request: Request
    num_tokens: int
    """Pending tokens that it reads."""
    is_sampled: bool
    """The last pending token is among them, so a token is sampled and a draft may follow."""
    draft: DraftTree = field(default_factory=DraftTree)
    verdict: Verdict | None = None
    """What became of the draft; None for a piece of a prompt."""
    error: Exception | None = None
    """Why there is nothing to take over."""

    @property
    def piece(self) -> Piece:
        """What the model reads."""
        return piece_of(self.request.id, self.request.sequence, self.num_tokens, self.draft)


class Scheduler:
    """Queue, running requests and the KV slots of both.

    Args:
        kv: the model's slots.
        max_running: requests admitted at once.
        max_prefill_tokens: prompt tokens in one step, of all rows together.
        counts: of the engine.
    """

    def __init__(self, kv: KVSlots, max_running: int, max_prefill_tokens: int, counts: Counts) -> None:
        self._kv, self._counts = kv, counts
        self._max_running, self._max_prefill_tokens = max_running, max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """Admitted, and not over yet."""
        self._stuck: Request | None = None
        """The first in the queue, once there were no slots for it."""

    def __bool__(self) -> bool:
        """Whether there is work."""
        return bool(self.waiting or self.running)

    def holds(self, request: Request) -> bool:
        """Whether a request is running or waiting."""
        return request in self.running or request in self.waiting

    @property
    def in_flight(self) -> list[Request]:
        """Running requests and waiting ones."""
        return [*self.running, *self.waiting]

    def expired(self) -> list[Request]:
        """Requests whose time is over."""
        now = time.perf_counter()
        return [request for request in self.in_flight if request.asked.deadline_s <= now]

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request off, whose slots are about to be free."""
        self._stuck = None
        if request in self.waiting:
            self.waiting.remove(request)
            self._kv.cache.drop(request.number)
        else:
            self.running.remove(request)

    def admit(self) -> None:
        """Take in waiting requests, as many as fit, but for those whose beginning a running one is about to compute."""
        for request in list(self.waiting):
            if len(self.running) >= self._max_running or request is self._stuck:
                return
            if self._is_coming(request):
                continue
            if not self._admit(request):
                self._stuck = request  # until somebody gives up slots
                return
            self.waiting.remove(request)
            self.running.append(request)

    def schedule(self) -> list[StepRow]:
        """Give every running request its part of the next step, and slots for it."""
        rows: list[StepRow] = []
        pending = [request.sequence.num_pending for request in self.running]
        for request, count in zip(list(self.running), split_evenly(pending, self._max_prefill_tokens), strict=True):
            if request in self.running and self._secure(request, count):  # else it has given way to one before it
                rows.append(StepRow(request, count, is_sampled=count == request.sequence.num_pending))
        return rows

    def fit(self, row: StepRow, draft: DraftTree) -> DraftTree:
        """As much of a draft as there are slots for; nobody gives way for a draft."""
        own = row.request.sequence
        needed = own.num_computed + row.num_tokens + len(draft)
        if needed > len(own.slots):
            self._kv.extend(own, min(needed - len(own.slots), self._kv.pool.num_free))
        return draft.first(len(own.slots) - own.num_computed - row.num_tokens)

    def _secure(self, request: Request, count: int) -> bool:
        """Slots for the next `count` tokens of a running request; False if it had to give way itself."""

        def make_room() -> bool:
            if self._num_spare:
                self._take_back_spare()
                return True
            last = self.running[-1]
            self._preempt(last)
            return last is not request

        row = request.sequence
        return self._kv.secure(row, count, make_room, most=request.asked.max_total_tokens - len(row.slots))

    @property
    def _num_spare(self) -> int:
        """Slots that rows hold ahead of their tokens."""
        rows = [request.sequence for request in self.running]
        return sum(max(len(row.slots) - len(row.token_ids), 0) for row in rows)

    def _take_back_spare(self) -> None:
        for request in self.running:
            self._kv.trim(request.sequence)

    def _preempt(self, request: Request) -> None:
        """Make a running request wait again; what it has computed is kept as long as there is room for it."""
        self._stuck = None
        self._counts.num_preemptions += 1
        self.running.remove(request)
        self.waiting.appendleft(request)
        self._kv.end(request.sequence, request.number, request.asked.cache_salt, request.account)

    def _sharing(self, request: Request) -> list[KVSequence]:
        """The running sequences that a request may begin with: those of its salt."""
        salt = request.asked.cache_salt
        if salt is None or not self._kv.can_share:
            return []
        return [other.sequence for other in self.running if other.asked.cache_salt == salt]

    def _is_coming(self, request: Request) -> bool:
        """Whether running requests are computing a part of this one's text that is worth a wait."""
        text = request.sequence.token_ids[:-1]
        return any(
            common_prefix_length(text, other.token_ids) - other.num_computed >= _WORTH_A_WAIT
            for other in self._sharing(request)
        )

    def _admit(self, request: Request) -> bool:
        """Give a request what there is of its beginning's KV, and slots for the rest of it; False: it has to wait."""
        kv, row, progress = self._kv, request.sequence, request.progress
        # The last token is always computed: its logits choose the next one.
        own = [request.number, *request.begins_with]
        begun = kv.begin(row.token_ids[:-1], own, request.asked.cache_salt, self._sharing(request))
        need = len(row.token_ids) - len(begun)
        if kv.num_available + self._num_spare < need:
            kv.pool.release(begun)
            return False
        kv.cache.drop(request.number)
        kv.cache.evict(need)
        if kv.pool.num_free < need:
            self._take_back_spare()
        if not progress.started_s:
            progress.started_s = time.perf_counter()
            progress.num_cached_tokens = len(begun)
            self._counts.num_prompt_tokens += request.asked.num_prompt_tokens
            self._counts.num_cached_tokens += len(begun)
        row.slots, row.num_computed = begun, len(begun)
        kv.extend(row, need)
        return True


def split_evenly(pending: Sequence[int], most: int) -> list[int]:
    """How many tokens each row of a pass reads: a row that lacks more than one has its share of `most` of them.

    So a long prompt keeps nobody waiting, and every row reads at least one token.

    Args:
        pending: tokens that each row has not read yet, at least 1 each.
        most: of all rows together that lack more than one.
    """
    counts = []
    left, readers = most, sum(count > 1 for count in pending)
    for count in pending:
        if count > 1:
            count = min(count, max(left // readers, 1))
            left, readers = left - count, readers - 1
        counts.append(count)
    return counts


def piece_of(key: str, row: KVSequence, num_tokens: int, draft: DraftTree) -> Piece:
    """The next `num_tokens` pending tokens of a row and a draft behind them, with logits if they are the last ones."""
    base = row.num_computed
    ids = [*row.token_ids[base : base + num_tokens], *draft.tokens]
    num_logits = 1 + len(draft) if num_tokens == row.num_pending else 0
    return Piece(row.slots, base, ids, draft, num_logits, key, row.token_ids)
