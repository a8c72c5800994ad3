"""One step: schedule, draft, run the model, sample, verify, commit. One thread owns it; callers use engine.py."""

from __future__ import annotations

import logging

import torch

from copyspec_engine.config import AdaptiveDrafter, EngineConfig, NoDrafter
from copyspec_engine.cost import CostCurve
from copyspec_engine.drafter import DraftingPolicy, DraftTree
from copyspec_engine.errors import MemoryFileError, RequestFailedError
from copyspec_engine.kv_pool import KVPool
from copyspec_engine.memory import SessionMemory
from copyspec_engine.memory_file import MemoryFile
from copyspec_engine.model_runner import LoadedModel
from copyspec_engine.outputs import StreamChunk
from copyspec_engine.sampler import sample
from copyspec_engine.scheduler import ScheduledBatch, ScheduledRow, Scheduler
from copyspec_engine.sequence import Sequence
from copyspec_engine.sessions import SessionStore
from copyspec_engine.verify import Verdict, verify

__all__ = ["EngineCore", "warm_up"]

logger = logging.getLogger(__name__)

_Result = tuple[DraftTree, Verdict | None]
"""A row's draft and what became of it; no verdict for a piece of the prompt."""

_UNMEASURED = ((1, 1.0), (2, 2.0))
"""Stands in for the cost of a pass where nothing is drafted."""


class EngineCore:
    """A model with its KV pool, memory, queue and drafting, and the step that moves every running request on."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.pool = KVPool(model.num_slots)
        self.file, self.memory_error = _open_memory(config.memory_path, model)
        self.sessions = SessionStore(config, self.pool.release, self.file, model.runner.vocab_size)
        drafts = model.drafting_error is None
        self.scheduler = Scheduler(
            self.pool, self.sessions, config.max_running, config.max_prefill_tokens, model.runner.release, drafts
        )
        self.policy = DraftingPolicy(CostCurve(model.step_cost or _UNMEASURED))

    def step(self) -> list[tuple[Sequence, StreamChunk | Exception]]:
        """One forward pass for every running request; what each reader is to hear of it."""
        self.scheduler.admit()
        begun = [(sequence, self._begin_drafting(sequence)) for sequence in list(self.scheduler.running)]
        batch = self.scheduler.schedule()
        done = [(row.sequence, self._commit(row, result)) for row, result in self._results(batch)]
        return [(sequence, item) for sequence, item in (*begun, *done) if item is not None]

    def _begin_drafting(self, sequence: Sequence) -> Exception | None:
        """Give a request that has none its drafter, or end the request if that fails."""
        if sequence.drafter is not None or sequence.memory is None:
            return None
        try:
            sequence.drafter = self.policy.begin(
                sequence.drafting if self.model.drafting_error is None else NoDrafter(),
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
            return [result for row in batch.rows for result in self._results(ScheduledBatch((row,)))]

    def _verify(self, batch: ScheduledBatch) -> list[_Result]:
        """Draft, run the model, sample, compare. Changes no request, so that it can be repeated."""
        drafts = [_propose(row) for row in batch.rows]
        logits = self.model.runner.forward(batch, drafts)
        sampled = [_sample(*row) for row in zip(batch.rows, drafts, logits, strict=True)]
        return [
            (draft, verify(draft, tokens) if tokens else None) for draft, tokens in zip(drafts, sampled, strict=True)
        ]

    def _commit(self, row: ScheduledRow, result: _Result | Exception) -> StreamChunk | Exception | None:
        """Take over a row's result, or end its request if the row failed."""
        try:
            if isinstance(result, Exception):
                raise result
            return self.scheduler.commit(row, *result)
        except Exception as error:
            return self._fail(row.sequence, error)

    def cancel(self, sequence: Sequence) -> StreamChunk | Exception | None:
        """Stop a request; its last chunk, or None if it finished before."""
        if not self.scheduler.holds(sequence):
            return None
        try:
            return self.scheduler.cancel(sequence)
        except Exception as error:
            return self._fail(sequence, error)

    def close(self) -> None:
        """Let go of the memory file; no step may follow."""
        if self.file is not None:
            self.file.close()

    def forget(self, session_id: str) -> bool:
        """Erase a session (see `SessionStore.forget`); calls of it in flight go on and keep nothing."""
        for sequence in self.scheduler.running:
            if sequence.request.session_id == session_id:
                self._detach(sequence)
        return self.sessions.forget(session_id)

    def forget_pool(self, name: str) -> bool:
        """Erase a shared pool, as `forget` does a session."""
        for sequence in self.scheduler.running:
            if sequence.request.memory_pool == name:
                self._detach(sequence)
        return self.sessions.forget_pool(name)

    def _detach(self, sequence: Sequence) -> None:
        try:
            self.scheduler.detach(sequence)
        except Exception:  # of a drafter that is gone now; the request gets a new one
            logger.exception("the drafter of request %s did not end well", sequence.request.request_id)

    def _fail(self, sequence: Sequence, error: Exception) -> RequestFailedError:
        """Take a request off; only its own reader hears of the error."""
        try:
            if self.scheduler.holds(sequence):
                self.scheduler.remove(sequence)
        except Exception:
            logger.exception("request %s failed, and so did its drafter's end", sequence.request.request_id)
        failure = RequestFailedError(f"The request failed with {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def warm_up() -> None:
    """Load the compiled code of drafting, or compile it: once after an installation that takes about 20 seconds.

    Everything that a call does is done here first, so that no call ever waits for a compiler.
    """
    logger.info("loading the compiled code of drafting, or compiling it if it is new, which takes about 20 s")
    policy, memory = DraftingPolicy(CostCurve(((1, 1.0), (64, 1.1)))), SessionMemory(4096)
    prompt = [*range(200), *range(100)]
    for _ in range(2):
        drafter = policy.begin(AdaptiveDrafter(), memory, prompt, prediction_ids=range(50, 150))
        draft = drafter.propose(1, 64)
        drafter.observe(draft, (), (0,))
        drafter.finish()


def _open_memory(path: str | None, model: LoadedModel) -> tuple[MemoryFile | None, str | None]:
    """The memory file, or why there is none."""
    if path is None:
        return None, None
    try:
        return MemoryFile.open(path, model.tokenizer.fingerprint()), None
    except MemoryFileError as error:
        logger.error("Conversations are kept in memory only: %s", error)
        return None, str(error)


def _propose(row: ScheduledRow) -> DraftTree:
    """What to verify behind the row's last token; nothing behind a piece of the prompt."""
    sequence = row.sequence
    if not row.samples or sequence.drafter is None:
        return DraftTree()
    return sequence.drafter.propose(row.num_tokens, sequence.max_draft_tokens)


def _sample(row: ScheduledRow, draft: DraftTree, logits: torch.Tensor) -> list[int]:
    """The target's token after the row's last token and after each draft node; nothing for a piece of the prompt."""
    if not row.samples:
        return []
    sequence = row.sequence
    positions = [len(sequence.token_ids) + depth for depth in (0, *draft.depths())]
    return sample(logits, sequence.request.sampling, sequence.seed, positions)
