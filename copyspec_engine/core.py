"""One step: schedule, draft, run the model, sample, verify, commit. One thread owns it; callers use engine.py."""

from __future__ import annotations

import torch

from copyspec_engine.config import EngineConfig
from copyspec_engine.drafter import CostCurve, Drafter, DraftTree
from copyspec_engine.errors import RequestFailedError
from copyspec_engine.kv_pool import KVPool
from copyspec_engine.memory import SessionStore
from copyspec_engine.model_runner import LoadedModel
from copyspec_engine.outputs import StreamChunk
from copyspec_engine.sampler import sample
from copyspec_engine.scheduler import ScheduledBatch, ScheduledRow, Scheduler
from copyspec_engine.sequence import Sequence
from copyspec_engine.verify import Verdict, verify

__all__ = ["EngineCore"]

_Result = tuple[DraftTree, Verdict | None]
"""A row's draft and what became of it; no verdict for a piece of the prompt."""


class EngineCore:
    """A model with its KV pool, memory, queue and drafter, and the step that moves every running request on."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.pool = KVPool(model.num_slots)
        self.sessions = SessionStore(config.max_sessions, config.max_session_tokens, self.pool.release)
        self.scheduler = Scheduler(self.pool, self.sessions, config.max_running, config.max_prefill_tokens)
        self.drafter = Drafter(CostCurve(model.step_cost))

    def step(self) -> list[tuple[Sequence, StreamChunk | Exception]]:
        """One forward pass for every running request; what each reader is to hear of it."""
        batch = self.scheduler.schedule()
        items = [(row.sequence, self._commit(row, result)) for row, result in self._results(batch)]
        return [(sequence, item) for sequence, item in items if item is not None]

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
        drafts = [self.drafter.propose(row.sequence) if row.samples else DraftTree() for row in batch.rows]
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
            draft, verdict = result
            if verdict is not None:
                self.drafter.observe(row.sequence, draft, len(verdict.accepted))
            return self.scheduler.commit(row, draft, verdict)
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

    def _fail(self, sequence: Sequence, error: Exception) -> RequestFailedError:
        """Take a request off; only its own reader hears of the error."""
        if self.scheduler.holds(sequence):
            self.scheduler.remove(sequence)
        failure = RequestFailedError(f"The request failed with {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _sample(row: ScheduledRow, draft: DraftTree, logits: torch.Tensor) -> list[int]:
    """The target's token after the row's last token and after each draft node; nothing for a piece of the prompt."""
    if not row.samples:
        return []
    sequence = row.sequence
    positions = [len(sequence.token_ids) + depth for depth in (0, *draft.depths())]
    return sample(logits, sequence.request.sampling, sequence.seed, positions)
