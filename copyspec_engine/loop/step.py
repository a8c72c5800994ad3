"""One step: schedule, draft, run the model, sample, verify, commit. One thread owns it; callers use the engine room."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from copyspec_engine.chat.known_ids import ExactTokens
from copyspec_engine.compiled import counting_compilations
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import DraftingPolicy, likely_nodes, wants_candidates
from copyspec_engine.drafting.live_cost import LiveCost
from copyspec_engine.drafting.tree import DraftTree, Run
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.grammar.state import GrammarState
from copyspec_engine.kv.prefix_cache import PrefixCache
from copyspec_engine.kv.slots import KVPool
from copyspec_engine.loop.draft_model import DraftModel
from copyspec_engine.loop.mix import Combination
from copyspec_engine.loop.request import Request
from copyspec_engine.loop.scheduler import ScheduledBatch, ScheduledRow, Scheduler, session_key
from copyspec_engine.memory.alternatives import NUM_CANDIDATES, Candidates
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.memory.file import MemoryFile
from copyspec_engine.memory.store import SessionStore
from copyspec_engine.memory.view import Snapshot, snapshot
from copyspec_engine.provenance.trail import find_around, trace
from copyspec_engine.sampling.alternatives import with_candidates
from copyspec_engine.sampling.gumbel import warm_up_noise
from copyspec_engine.sampling.logprobs import with_logprobs
from copyspec_engine.sampling.sampler import SampleRow, sample
from copyspec_engine.sampling.verify import Verdict, verify
from copyspec_engine.values.config import AdaptiveDrafter, EngineConfig, NoDrafter
from copyspec_engine.values.errors import MemoryFileError, RequestFailedError
from copyspec_engine.values.metrics import EngineMetrics
from copyspec_engine.values.outputs import FinishReason, StreamChunk
from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["EngineCore", "warm_up"]

logger = logging.getLogger(__name__)

_Result = tuple[DraftTree, Verdict | None]
"""A row's draft and what became of it; no verdict for a piece of the prompt."""

_PER_SESSION = 2
"""Rows of KV that are kept for each session: its own, and one of a call without a session."""
_UNMEASURED = ((1, 1.0), (2, 2.0))
"""Stands in for the cost of a pass where nothing is drafted."""


class EngineCore:
    """A model with its KV pool, memory, queue and drafting, and the step that moves every running request on."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.pool = KVPool(model.num_slots)
        self.file, self.memory_error = _open_memory(config.memory_path, model)
        is_stateful = model.drafting_error is not None  # nothing of a text can be read without all before it
        self.cache = PrefixCache(self.pool, 0 if is_stateful else _PER_SESSION * config.max_sessions)
        self.exact_tokens = ExactTokens()
        self._keeps_token_ids = config.keep_token_ids
        self.sessions = SessionStore(config, self._drop_kv, self.file, model.runner.vocab_size)
        prefill = min(config.max_prefill_tokens, model.exact_width or config.max_prefill_tokens)
        self.scheduler = Scheduler(self.pool, self.cache, self.sessions, config.max_running, prefill, self._release)
        self._cost = LiveCost(model.step_cost or _UNMEASURED, is_fixed=not model.cost_is_measured)
        self.policy = DraftingPolicy(self._cost.relative)
        self.combination = None if model.draft is None else self._combination(model.draft, config)

    def _combination(self, draft: LoadedModel, config: EngineConfig) -> Combination:
        draft_model = DraftModel(
            draft, self.model.runner.vocab_size, _PER_SESSION * config.max_sessions, config.max_prefill_tokens
        )
        assert config.draft is not None
        return Combination(draft_model, self.policy, self._cost, config.draft.max_tokens)

    def step(self) -> list[tuple[Request, StreamChunk | Exception]]:
        """One forward pass for every running request; what each reader is to hear of it."""
        expired = [(sequence, self._end(sequence, "timeout")) for sequence in self.scheduler.expired()]
        self.scheduler.admit()
        begun = [(sequence, self._begin_drafting(sequence)) for sequence in list(self.scheduler.running)]
        batch = self.scheduler.schedule()
        start, drafting = time.perf_counter(), self._drafting_s
        results = self._results(batch) if batch.rows else []
        done = [(row.sequence, self._commit(row, result)) for row, result in results]
        self._learn_cost(results, time.perf_counter() - start - (self._drafting_s - drafting))
        return [(sequence, item) for sequence, item in (*expired, *begun, *done) if item is not None]

    @property
    def _drafting_s(self) -> float:
        """Seconds that a draft model has taken so far."""
        return 0.0 if self.combination is None else self.combination.seconds

    def _learn_cost(self, results: Sequence[tuple[ScheduledRow, _Result | Exception]], seconds: float) -> None:
        """Take in what a step took, unless it was another kind of step: one that read of a prompt, or went wrong."""
        drafts = [result[0] for row, result in results if row.num_tokens == 1 and not isinstance(result, Exception)]
        if drafts and len(drafts) == len(results) and self._cost.observe(len(drafts) + sum(map(len, drafts)), seconds):
            self.policy.cost = self._cost.relative

    def _begin_drafting(self, sequence: Request) -> Exception | None:
        """Give a request that has none its drafter, or end the request if that fails."""
        if sequence.drafter is not None:
            return None
        try:
            self.scheduler.open_memory(sequence)
            assert sequence.memory is not None
            with sequence.memory.noting(sequence.texts):
                sequence.drafter = self.policy.begin(
                    sequence.drafting,
                    sequence.memory,
                    sequence.token_ids,
                    sequence.eos_token_ids,
                    sequence.prediction_ids,
                )
        except Exception as error:
            return self._fail(sequence, error)
        return None

    def _results(self, batch: ScheduledBatch) -> list[tuple[ScheduledRow, _Result | Exception]]:
        """What each row's pass gives. If the step fails its rows are run one by one, so that only the culprit fails."""
        try:
            return list(zip(batch.rows, self._verify(batch), strict=True))
        except Exception as error:
            if len(batch.rows) <= 1:
                return [(row, error) for row in batch.rows]
            logger.warning("a step of %d requests failed and is run again one by one", len(batch.rows), exc_info=True)
            return [result for row in batch.rows for result in self._results(ScheduledBatch((row,)))]

    def _verify(self, batch: ScheduledBatch) -> list[_Result]:
        """Draft, run the model, sample, compare. Changes no request, so that it can be repeated."""
        drafts = self._propose(batch)
        logits = self.model.runner.forward(batch, drafts)
        self.scheduler.counts.num_steps += 1
        rows = [_sample_row(row, draft) for row, draft in zip(batch.rows, drafts, strict=True) if row.samples]
        if not rows:
            return [(draft, None) for draft in drafts]
        verdicts = [verify(row.draft, tokens) for row, tokens in zip(rows, sample(logits, rows), strict=True)]
        verdicts = with_candidates(logits, rows, verdicts, [_ending(row) for row in batch.rows if row.samples])
        found = iter(with_logprobs(logits, rows, verdicts))
        return [
            (draft, _traced(row, draft, next(found)) if row.samples else None)
            for row, draft in zip(batch.rows, drafts, strict=True)
        ]

    def metrics(self) -> EngineMetrics:
        """A snapshot of what runs, and all counts."""
        counts, scheduler = self.scheduler.counts, self.scheduler
        cached = self.cache.num_idle_slots
        return EngineMetrics(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_kv_slots=self.pool.num_slots,
            num_kv_slots_running=self.pool.num_slots - self.pool.num_free - cached,
            num_kv_slots_cached=cached,
            num_sessions=len(self.sessions),
            num_steps=counts.num_steps,
            num_preemptions=counts.num_preemptions,
            prompt_tokens=counts.num_prompt_tokens,
            cached_tokens=counts.num_cached_tokens,
            completion_tokens=counts.num_completion_tokens,
            draft_tokens=counts.num_draft_tokens,
            draft_model_passes=0 if self.combination is None else self.combination.draft_model.num_passes,
            tokens_per_forward=counts.num_completion_tokens / max(counts.num_row_passes, 1),
            accepted_by_source={source: count for source, count in counts.accepted.items() if count},
            finished=dict(counts.finished),
            step_cost=self._cost.points if self.model.step_cost else (),
        )

    def _propose(self, batch: ScheduledBatch) -> list[DraftTree]:
        """What to verify behind each row's last token; nothing behind a piece of a prompt."""
        width = batch.num_tokens
        rows = [row for row in batch.rows if row.samples]
        drafts = [self._draft(row, width) for row in rows]
        if self.combination is not None:
            drafts = self._with_draft_model(self.combination, rows, drafts, width)
        shared = iter(self.policy.share([row.sequence.drafter for row in rows], drafts, width))
        known = self.model.runner.vocab_size  # a tokenizer may hold more, and a grammar force it
        return [
            self.scheduler.fit(row, next(shared).below(known)) if row.samples else DraftTree() for row in batch.rows
        ]

    def _draft(self, row: ScheduledRow, width: int) -> DraftTree:
        """What a row would like to verify in a pass that reads `width` tokens anyway."""
        sequence, exact_width = row.sequence, self.model.exact_width
        room = _room(row, exact_width)
        if isinstance(sequence.drafting, AdaptiveDrafter) and not sequence.first_token_s:
            room = self.policy.without_delay(width, room)
        draft = DraftTree() if sequence.drafter is None else sequence.drafter.propose(width, room)
        if isinstance(sequence.grammar, GrammarState):
            draft = sequence.grammar.prune(draft, room)
        return draft

    def _with_draft_model(
        self, combination: Combination, rows: Sequence[ScheduledRow], copies: Sequence[DraftTree], width: int
    ) -> list[DraftTree]:
        """The rows' copies and what the draft model adds to them."""
        rooms = [_room(row, self.model.exact_width) for row in rows]
        drafts = combination.extend([row.sequence for row in rows], copies, rooms, width)
        for i, (row, before) in enumerate(zip(rows, copies, strict=True)):
            grammar = row.sequence.grammar
            if drafts[i] is not before and isinstance(grammar, GrammarState):
                drafts[i] = grammar.prune(drafts[i], rooms[i])
        return drafts

    def _commit(self, row: ScheduledRow, result: _Result | Exception) -> StreamChunk | Exception | None:
        """Take over a row's result, or end its request if the row failed."""
        try:
            if isinstance(result, Exception):
                raise result
            if self.combination is not None and result[1] is not None:
                self.combination.observe(row.sequence, result[1].tokens)
            return self.scheduler.commit(row, *result)
        except Exception as error:
            return self._fail(row.sequence, error)

    def cancel(self, sequence: Request) -> StreamChunk | Exception | None:
        """Stop a request; its last chunk, or None if it finished before."""
        return self._end(sequence, "cancelled") if self.scheduler.holds(sequence) else None

    def _end(self, sequence: Request, reason: FinishReason) -> StreamChunk | Exception:
        try:
            return self.scheduler.stop(sequence, reason)
        except Exception as error:
            return self._fail(sequence, error)

    def _release(self, sequence: Request) -> None:
        self.model.runner.release(sequence)
        if self.combination is not None:
            self.combination.release(sequence)

    def _drop_kv(self, session_id: str) -> bool:
        if self.combination is not None:
            self.combination.draft_model.forget(session_id)
        self.exact_tokens.drop(session_id)
        return self.cache.drop(session_key(session_id))

    def keep_tokens(self, sequence: Request) -> None:
        """Keep a finished request's token ids for its session's next prompt."""
        session, session_id = sequence.session, sequence.request.session_id
        if not self._keeps_token_ids:
            return
        if session is not None and session.is_kept and session_id is not None and sequence.request.messages is not None:
            self.exact_tokens.keep(session_id, sequence.token_ids)

    def close(self) -> None:
        """Let go of the memory file; no step may follow."""
        if self.file is not None:
            self.file.close()

    def look(self, session_id: str) -> Snapshot:
        """What a session remembers."""
        return snapshot(self.sessions.peek(session_id))

    def forget(self, session_id: str) -> bool:
        """Erase a session (see `SessionStore.forget`); calls of it in flight go on and keep nothing."""
        for sequence in self.scheduler.in_flight:
            if sequence.request.session_id != session_id:
                continue
            if sequence.session is None or sequence.request.keep_texts:
                self._detach(sequence)
            else:  # what it copies from is not the session's
                sequence.session.is_kept = False
        had_kv = self._drop_kv(session_id)  # also that of one that keeps no texts
        return self.sessions.forget(session_id) or had_kv

    def forget_pool(self, name: str) -> bool:
        """Erase a shared pool, as `forget` does a session."""
        for sequence in self.scheduler.in_flight:
            if sequence.request.memory_pool == name:
                self._detach(sequence)
        return self.sessions.forget_pool(name)

    def _detach(self, sequence: Request) -> None:
        try:
            self.scheduler.detach(sequence)
        except Exception:  # of a drafter that is gone now; the request gets a new one
            logger.exception("the drafter of request %s did not end well", sequence.request.request_id)

    def _fail(self, sequence: Request, error: Exception) -> RequestFailedError:
        """Take a request off; only its own reader hears of the error."""
        try:
            sequence.finish_reason = None
            if self.scheduler.holds(sequence):
                self.scheduler.remove(sequence)
        except Exception:
            logger.exception("request %s failed, and so did its drafter's end", sequence.request.request_id)
        failure = RequestFailedError(f"The request failed with {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def warm_up(on_progress: OnProgress = lambda _: None) -> None:
    """Load the compiled code of drafting and sampling, or compile it.

    Everything that a call does is done here first, so that no call ever waits for a compiler. Once after an
    installation that takes about 20 seconds.

    Args:
        on_progress: told of each function that is compiled, in this thread.
    """
    on_progress(LoadProgress("compile", "loading the compiled drafting code"))

    def told(count: int) -> None:
        text = "compiling the drafting code, once after an installation"
        on_progress(LoadProgress("compile", text, done=count, unit="it"))

    with counting_compilations(told):
        _use_everything()


def _use_everything() -> None:
    """Draft, observe and sample once, on made-up tokens."""
    policy, memory = DraftingPolicy(CostCurve(((1, 1.0), (64, 1.1)))), SessionMemory(4096)
    prompt = [*range(200), *range(100)]
    for _ in range(2):
        drafter = policy.begin(AdaptiveDrafter(recycle=True), memory, prompt, prediction_ids=range(50, 150))
        draft = drafter.propose(1, 64)
        likely_nodes(drafter, draft)
        policy.share((drafter, drafter), (draft, draft), 1)
        drafter.observe(draft, (), (0,))
        drafter.finish()
        for size in (1, 1000) if wants_candidates(drafter) else ():  # until the table grows
            likely = np.ones((2, size, NUM_CANDIDATES))
            contexts = np.arange(2 * size).reshape(-1, 2)
            memory.recycled.add(Candidates(contexts, likely[0].astype(np.int32), likely[1].astype(np.int8)))
    LiveCost(((1, 1.0), (64, 1.1)), is_fixed=False).observe(1, 1.0)
    tokens = np.arange(8)
    find_around(tokens, tokens, 2, 4)
    warm_up_noise()


def _open_memory(path: str | None, model: LoadedModel) -> tuple[MemoryFile | None, str | None]:
    """The memory file, or why there is none."""
    if path is None:
        return None, None
    try:
        return MemoryFile.open(path, model.tokenizer.fingerprint()), None
    except MemoryFileError as error:
        logger.error("Conversations are kept in memory only: %s", error)
        return None, str(error)


def _traced(row: ScheduledRow, draft: DraftTree, verdict: Verdict) -> Verdict:
    """A verdict that says where its accepted nodes came from; to be asked before any row is written."""
    memory, accepted = row.sequence.memory, list(verdict.accepted)
    if not accepted:
        return verdict
    if memory is None or not len(draft.sources):
        return verdict._replace(runs=(Run(len(accepted), "frequent"),))
    return verdict._replace(runs=tuple(trace(memory.index, draft.sources[accepted].tolist())))


def _ending(row: ScheduledRow) -> tuple[int, int] | None:
    """The last two tokens of a row whose drafter wants to know what the pass holds likely."""
    token_ids = row.sequence.token_ids
    if not wants_candidates(row.sequence.drafter):
        return None
    return token_ids[-2] if len(token_ids) > 1 else -1, token_ids[-1]


def _room(row: ScheduledRow, exact_width: int | None) -> int:
    """Most draft nodes behind the pending tokens of a request."""
    sequence = row.sequence
    if isinstance(sequence.drafting, NoDrafter):
        return 0
    room = sequence.max_draft_tokens
    if isinstance(sequence.drafting, AdaptiveDrafter):
        room = min(room, sequence.drafting.max_draft_tokens)
    return room if exact_width is None else min(room, exact_width - row.num_tokens)


def _sample_row(row: ScheduledRow, draft: DraftTree) -> SampleRow:
    """What decides the tokens behind a row's last token and behind each node of its draft."""
    sequence, params = row.sequence, row.sequence.request.sampling
    if params.has_penalties:
        sequence.counts.update(sequence.token_ids, sequence.num_prompt_tokens)
    allowed = sequence.grammar.masks(draft) if isinstance(sequence.grammar, GrammarState) else None
    banned = None if sequence.bans is None else sequence.bans.at(sequence.token_ids, draft)
    return SampleRow(params, sequence.seed, len(sequence.token_ids), draft, sequence.counts, allowed, banned)
