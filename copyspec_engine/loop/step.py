"""One step: schedule, draft, run the model, sample, verify, commit. One thread owns it; callers use the engine room."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch

from copyspec_engine.chat.known_ids import KnownIds
from copyspec_engine.drafting.cost import LiveCost
from copyspec_engine.drafting.drafter import DraftingPolicy, wants_alternatives
from copyspec_engine.drafting.tree import DraftTree, Run
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.execution.threads import one_torch_thread
from copyspec_engine.kv.slots import KVSlots
from copyspec_engine.loop.conversation import Conversations
from copyspec_engine.loop.draft_model import DraftWriter
from copyspec_engine.loop.mix import Combination
from copyspec_engine.loop.request import Request
from copyspec_engine.loop.scheduler import Counts, Scheduler, StepRow
from copyspec_engine.memory.database import MemoryDatabase
from copyspec_engine.memory.file import MemoryFile
from copyspec_engine.memory.store import TextStore
from copyspec_engine.memory.view import Snapshot
from copyspec_engine.provenance.trail import trace
from copyspec_engine.sampling.likely_tokens import add_alternatives, add_logprobs
from copyspec_engine.sampling.sampler import SampleRow, sample
from copyspec_engine.sampling.verify import Verdict, verify
from copyspec_engine.values.config import AdaptiveDrafter, EngineConfig, NoDrafter, is_database
from copyspec_engine.values.errors import ConfigError, MemoryFileError, RequestFailedError
from copyspec_engine.values.info import EngineMetrics, Held, SessionInfo
from copyspec_engine.values.outputs import FinishReason, StreamChunk
from copyspec_engine.values.tokens import TokenArray

__all__ = ["EngineCore"]

logger = logging.getLogger(__name__)

_PER_SESSION = 2
"""Rows of KV that are kept for each session: its own, and one of a call without a session."""
_UNMEASURED = ((1, 1.0), (2, 2.0))
"""Stands in for the cost of a pass where nothing is drafted."""


class EngineCore:
    """A model with its KV, conversations, queue and drafting, and the step that moves every running request on."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.text_store, self._open_error = _open_memory(config.memory_path, model)
        is_stateful = model.info.drafting_error is not None  # nothing of a text can be read without all before it
        max_kept = 0 if is_stateful else _PER_SESSION * config.max_sessions
        per_owner = None if config.max_sessions_per_owner is None else _PER_SESSION * config.max_sessions_per_owner
        self.kv = KVSlots(model.info.num_kv_slots, max_kept, per_owner)
        draft_kv = None if model.draft is None else KVSlots(model.draft.info.num_kv_slots, max_kept, per_owner)
        vocab_size = model.runner.vocab_size
        self.conversations = Conversations(config, self.kv, draft_kv, self.text_store, vocab_size)
        self.counts = Counts()
        most_read = min(config.max_prefill_tokens, model.exact_width or config.max_prefill_tokens)
        self.scheduler = Scheduler(self.kv, config.max_running, most_read, self.counts)
        self.cost = LiveCost(model.info.step_cost or _UNMEASURED, is_fixed=not model.cost_is_measured)
        self.policy = DraftingPolicy(self.cost.relative)
        self.combination: Combination | None = None
        if model.draft is not None and draft_kv is not None and config.draft_model is not None:
            draft_model = DraftWriter(model.draft, draft_kv, vocab_size, config.max_prefill_tokens)
            self.combination = Combination(draft_model, self.policy, self.cost, config.draft_model.max_tokens)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Request, StreamChunk | Exception]]:
        """One forward pass for every running request; what each reader is to hear of it."""
        heard = self._expire()
        self.scheduler.admit()
        heard += self._begin_drafting()
        rows = self.scheduler.schedule()
        with self._learning_cost(rows):
            for group in _attempts(rows):
                with _noting_errors(group):
                    self._draft(group)
                    logits = self._run(group)
                    with one_torch_thread():
                        sampled = self._sample(group, logits)
                        self._verify(group, logits, sampled)
            heard += self._commit(rows)
        return heard

    def _expire(self) -> list[tuple[Request, StreamChunk | Exception]]:
        """End the requests whose time is over."""
        return [(request, self._stop(request, "timeout")) for request in self.scheduler.expired()]

    def _begin_drafting(self) -> list[tuple[Request, StreamChunk | Exception]]:
        """Give requests that have none their drafters, or end those of which that fails."""
        failed: list[tuple[Request, StreamChunk | Exception]] = []
        for request in [request for request in self.scheduler.running if request.drafting.drafter is None]:
            asked, drafting = request.asked, request.drafting
            try:
                self.conversations.open(request)
                assert drafting.memory is not None
                with drafting.memory.noting(drafting.texts):
                    drafting.drafter = self.policy.begin(
                        asked.drafter,
                        drafting.memory,
                        request.sequence.token_ids,
                        asked.eos_token_ids,
                        asked.prediction_ids,
                        owner=request.account,
                    )
            except Exception as error:
                failed.append((request, self._fail(request, error)))
        return failed

    def _draft(self, rows: Sequence[StepRow]) -> None:
        """What to verify behind each row's last token; nothing behind a piece of a prompt. Can be done again."""
        width = sum(row.num_tokens for row in rows)
        sampling = [row for row in rows if row.is_sampled]
        for row in sampling:
            row.draft = self._copies(row, width)
        if self.combination is not None:
            self._ask_draft_model(self.combination, sampling, width)
        drafters = [row.request.drafting.drafter for row in sampling]
        shared = self.policy.share(drafters, [row.draft for row in sampling], width)
        known = self.model.runner.vocab_size  # a tokenizer may hold more, and a grammar force it
        for row, draft in zip(sampling, shared, strict=True):
            row.draft = self.scheduler.fit(row, draft.below(known))

    def _copies(self, row: StepRow, width: int) -> DraftTree:
        """What a row would like to verify in a pass that reads `width` tokens anyway."""
        request, room = row.request, self._room(row)
        if isinstance(request.asked.drafter, AdaptiveDrafter) and not request.progress.first_token_s:
            room = self.policy.without_delay(width, room)
        drafter, grammar = request.drafting.drafter, request.answer.grammar
        draft = DraftTree() if drafter is None else drafter.propose(width, room)
        return draft if grammar is None else grammar.prune(draft, room)

    def _ask_draft_model(self, combination: Combination, rows: Sequence[StepRow], width: int) -> None:
        """Add to the rows' copies what the draft model writes."""
        copies, rooms = [row.draft for row in rows], [self._room(row) for row in rows]
        extended = combination.extend([row.request for row in rows], copies, rooms, width)
        for row, room, draft in zip(rows, rooms, extended, strict=True):
            grammar = row.request.answer.grammar
            row.draft = draft if draft is row.draft or grammar is None else grammar.prune(draft, room)

    def _room(self, row: StepRow) -> int:
        """Most draft nodes behind the pending tokens of a request."""
        drafter, exact_width = row.request.asked.drafter, self.model.exact_width
        if isinstance(drafter, NoDrafter):
            return 0
        room = row.request.max_draft_tokens
        if isinstance(drafter, AdaptiveDrafter):
            room = min(room, drafter.max_draft_tokens)
        return room if exact_width is None else min(room, exact_width - row.num_tokens)

    def _run(self, rows: Sequence[StepRow]) -> torch.Tensor:
        """The step's forward pass; shape (sum of 1 + len(draft) over the rows that sample, vocabulary)."""
        logits = self.model.runner.forward([row.piece for row in rows])
        self.counts.num_steps += 1
        return logits

    def _sample(self, rows: Sequence[StepRow], logits: torch.Tensor) -> list[tuple[SampleRow, list[int]]]:
        """The model's own tokens behind the text of each row that samples and behind each node of its draft."""
        asked = [_sample_row(row) for row in rows if row.is_sampled]
        return list(zip(asked, sample(logits, asked), strict=True)) if asked else []

    def _verify(
        self, rows: Sequence[StepRow], logits: torch.Tensor, sampled: Sequence[tuple[SampleRow, list[int]]]
    ) -> None:
        """How far each draft holds these tokens. Changes no request, so that a step can be repeated."""
        asked = [one for one, _ in sampled]
        verdicts = [verify(one.draft, tokens) for one, tokens in sampled]
        add_alternatives(logits, asked, verdicts)
        add_logprobs(logits, asked, verdicts)
        for row, verdict in zip((row for row in rows if row.is_sampled), verdicts, strict=True):
            verdict.runs = _runs(row, verdict)
            row.verdict = verdict

    def _commit(self, rows: Sequence[StepRow]) -> list[tuple[Request, StreamChunk | Exception]]:
        """Take over what the pass gave each row, or end its request if that failed."""
        heard: list[tuple[Request, StreamChunk | Exception]] = []
        for row in rows:
            try:
                if row.error is not None:
                    raise row.error
                chunk: StreamChunk | Exception | None = self._take(row)
            except Exception as error:
                chunk = self._fail(row.request, error)
            if chunk is not None:
                heard.append((row.request, chunk))
        return heard

    def _take(self, row: StepRow) -> StreamChunk | None:
        """Write down what a row has sampled; one that only read prompt tokens has nothing to tell."""
        request, verdict = row.request, row.verdict
        request.sequence.num_computed += row.num_tokens
        if verdict is None:
            request.progress.num_prefill_passes += 1
            return None
        if self.combination is not None:
            self.combination.observe(request, verdict.tokens)
        segments = request.write(verdict)
        request.sequence.keep_nodes(verdict.accepted)
        request.progress.draft_lengths.append(len(row.draft))
        request.progress.accepted_lengths.append(len(verdict.accepted))
        self.counts.note(len(row.draft), len(verdict.tokens), [(run.num_tokens, run.kind) for run in verdict.runs])
        request.drafting.observe(row.draft, verdict)
        if request.answer.finish_reason is not None:
            self._end(request)
        return request.chunk(segments, verdict.tokens, (verdict.logprobs or ())[: len(verdict.tokens)])

    @contextmanager
    def _learning_cost(self, rows: Sequence[StepRow]) -> Iterator[None]:
        """Take in what a step takes, unless it is another kind of step: one that reads of a prompt, or goes wrong."""
        start, drafting = time.perf_counter(), self._drafting_s
        yield
        if rows and all(row.num_tokens == 1 and row.error is None for row in rows):
            seconds = time.perf_counter() - start - (self._drafting_s - drafting)
            if self.cost.observe(len(rows) + sum(len(row.draft) for row in rows), seconds):
                self.policy.cost = self.cost.relative

    @property
    def _drafting_s(self) -> float:
        """Seconds that a draft model has taken so far."""
        return 0.0 if self.combination is None else self.combination.seconds

    # ---- requests that come and go ---------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether there is work for a step."""
        return bool(self.scheduler)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add(request)

    def cancel(self, request: Request) -> StreamChunk | Exception | None:
        """Stop a request; its last chunk, or None if it finished before."""
        return self._stop(request, "cancelled") if self.scheduler.holds(request) else None

    def _stop(self, request: Request, reason: FinishReason) -> StreamChunk | Exception:
        """End a waiting or running request early; what it has written so far is its answer."""
        try:
            request.answer.finish_reason = reason
            segments = request.answer.text.flush()
            self._end(request)
            return request.chunk(segments)
        except Exception as error:
            return self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> Exception:
        """Take a request off; only its own reader hears of the error.

        What was wrong with the request itself is told as it is: of a grammar it may show only in the middle.
        """
        try:
            request.answer.finish_reason = None
            if self.scheduler.holds(request):
                self._end(request)
        except Exception:
            logger.exception("request %s failed, and so did its drafter's end", request.id)
        if isinstance(error, ConfigError):
            return error
        failure = RequestFailedError(f"The request failed with {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _end(self, request: Request) -> None:
        """A request is over: its conversation keeps what it may, everything else becomes free."""
        self.scheduler.remove(request)
        self.counts.finished[request.answer.finish_reason or "failed"] += 1
        try:
            self.conversations.keep(request)
        finally:
            self.model.runner.release(request.id)
            if self.combination is not None:
                self.combination.release(request)

    # ---- for the front door ----------------------------------------------------------------------------------------

    @property
    def known_ids(self) -> KnownIds:
        """What conversations were written with; for any thread."""
        return self.conversations.known_ids

    @property
    def draft_model_error(self) -> str | None:
        """Why the draft model is not asked any more; None if it is, or there is none."""
        return None if self.combination is None else self.combination.error

    @property
    def memory_error(self) -> str | None:
        """Why conversations are not kept outside of main memory, or cannot be for now; None if they are."""
        return self._open_error if self.text_store is None else self.text_store.error

    def look(self, session_id: str) -> Snapshot:
        """What a conversation remembers."""
        return self.conversations.look(session_id)

    def take_in(
        self, session_id: str, texts: Sequence[tuple[int, TokenArray]], owner: str | None
    ) -> Generator[int, None, None]:
        """See `ConversationMemory.load`; in pieces, so that steps come between."""
        return self.conversations.take_in(session_id, texts, owner)

    def sessions(self, owner: str | None) -> list[SessionInfo]:
        """See `Engine.sessions`."""
        return self.conversations.sessions(owner)

    def forget(self, session_id: str) -> bool:
        """Erase a conversation; calls of it in flight go on and keep nothing."""
        return self.conversations.forget(session_id, self.scheduler.in_flight)

    def forget_pool(self, name: str) -> bool:
        """Erase a shared pool, as `forget` does a conversation."""
        return self.conversations.forget_pool(name, self.scheduler.in_flight)

    def metrics(self) -> EngineMetrics:
        """A snapshot of what runs, and all counts."""
        counts, pool, cached = self.counts, self.kv.pool, self.kv.cache.num_idle_slots
        return EngineMetrics(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_kv_slots=pool.num_slots,
            num_kv_slots_running=pool.num_slots - pool.num_free - cached,
            num_kv_slots_cached=cached,
            num_sessions=len(self.conversations),
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
            step_cost=self.cost.points if self.model.info.step_cost else (),
        )

    def held(self) -> Held:
        """What requests hold."""
        return Held(
            places=0,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            slots=self.kv.num_held,
            rows=self.model.runner.num_rows,
            draft_slots=0 if self.combination is None else self.combination.draft_model.kv.num_held,
            draft_rows=0 if self.combination is None else self.combination.num_requests,
        )

    def close(self) -> None:
        """Save what could not be saved before, and let go of the memory file or database; no step may follow."""
        self.conversations.store.save_all()
        if self.text_store is not None:
            self.text_store.close()


def _attempts(rows: list[StepRow]) -> Iterator[list[StepRow]]:
    """All rows together; if that fails each on its own, so that only the culprit fails."""
    if rows:
        yield rows
    if len(rows) > 1 and (error := rows[0].error) is not None:
        logger.warning("a step of %d requests failed and is run again one by one", len(rows), exc_info=error)
        for row in rows:
            row.error = None
            yield [row]


@contextmanager
def _noting_errors(rows: Sequence[StepRow]) -> Iterator[None]:
    """An error meanwhile is the error of all these rows."""
    try:
        yield
    except Exception as error:
        for row in rows:
            row.error = error


def _open_memory(path: str | None, model: LoadedModel) -> tuple[TextStore | None, str | None]:
    """The memory file or database, or why there is none."""
    if path is None:
        return None, None
    try:
        kind = MemoryDatabase if is_database(path) else MemoryFile
        return kind.open(path, model.tokenizer.fingerprint()), None
    except MemoryFileError as error:
        logger.error("Conversations are kept in memory only: %s", error)
        return None, str(error)


def _runs(row: StepRow, verdict: Verdict) -> Sequence[Run]:
    """Where a row's accepted nodes came from; to be asked before any row is written."""
    memory, accepted, sources = row.request.drafting.memory, list(verdict.accepted), row.draft.sources
    if not accepted:
        return ()
    if memory is None or not len(sources):
        return (Run(len(accepted), "frequent"),)
    return trace(memory.index, sources[accepted].tolist())


def _sample_row(row: StepRow) -> SampleRow:
    """What decides the tokens behind a row's last token and behind each node of its draft."""
    asked, answer, draft, token_ids = row.request.asked, row.request.answer, row.draft, row.request.sequence.token_ids
    params = asked.call.sampling
    if params.has_penalties:
        answer.counts.update(token_ids, asked.num_prompt_tokens)
    return SampleRow(
        params,
        asked.seed,
        len(token_ids),
        draft,
        answer.counts,
        allowed=None if answer.grammar is None else answer.grammar.masks(draft),
        banned=None if asked.bans is None else asked.bans.at(token_ids, draft),
        ending=_ending(token_ids) if wants_alternatives(row.request.drafting.drafter) else None,
    )


def _ending(token_ids: Sequence[int]) -> tuple[int, int]:
    """The last two tokens of a text; -1 where there is none."""
    return token_ids[-2] if len(token_ids) > 1 else -1, token_ids[-1]
