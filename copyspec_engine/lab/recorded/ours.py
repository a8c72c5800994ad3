"""Our engine as a peer of the others: the same weights, the same record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from copyspec_engine.engine.engine import Engine
from copyspec_engine.lab.recorded.records import Turn, Written
from copyspec_engine.lab.recorded.runner import RecordedRunner
from copyspec_engine.values.config import (
    AdaptiveDrafter,
    DraftModelDrafter,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.values.outputs import GenerationOutput

__all__ = ["DRAFT_PEERS", "OUR_PEERS", "OurPeer"]

OUR_PEERS: dict[str, dict[str, Any]] = {
    "ours": {"drafter": AdaptiveDrafter(draft_model_use="never")},
    "ours-plain": {"drafter": NoDrafter()},
    "ours-draft": {"drafter": DraftModelDrafter()},
    "ours-copy-first": {"drafter": AdaptiveDrafter(draft_model_use="after-copies")},
    "ours-tree": {"drafter": AdaptiveDrafter()},
}
"""How their requests draft, by name."""
DRAFT_PEERS = ("ours-draft", "ours-copy-first", "ours-tree")
"""Those of them that need a draft model."""


class OurPeer:
    """Our engine with one way of drafting, one session a conversation.

    Args:
        engine: over `runner`.
        runner: writes the record.
        name: one of `OUR_PEERS`.
        together: send all turns of a `write` at once, rather than one after another.
    """

    def __init__(self, engine: Engine, runner: RecordedRunner, name: str, *, together: bool = False) -> None:
        self._engine, self._runner, self._options = engine, runner, OUR_PEERS[name]
        self._name = f"{name}-{uuid4().hex[:8]}"
        self._together = together
        self._sessions: set[str] = set()

    def write(self, turns: Sequence[Turn]) -> list[Written]:
        """The turns' answers."""
        if self._together:
            return self._write_all(turns)
        return [self._write(turn) for turn in turns]

    def forget(self) -> None:
        """Drop what was kept of the conversations so far."""
        for session in self._sessions:
            self._engine.forget(session)
        self._sessions.clear()

    def _write_all(self, turns: Sequence[Turn]) -> list[Written]:
        handles = [self._engine.stream(self._request(turn)) for turn in turns]
        outputs = [handle.result() for handle in handles]
        return [self._written(output, output.timing.total_s) for output in outputs]

    def _write(self, turn: Turn) -> Written:
        start = time.perf_counter()
        output = self._engine.generate(self._request(turn))
        seconds = time.perf_counter() - start
        cached = output.usage.cached_tokens
        return self._written(output, seconds, self._prefill_alone(turn, cached) if cached else None)

    def _prefill_alone(self, turn: Turn, cached: int) -> float:
        """Seconds to the first token behind the turn's new tokens and nothing else."""
        new = turn.prompt_ids[cached:]
        request = GenerationRequest(prompt_token_ids=new, drafter="none", sampling=SamplingParams(max_tokens=1))
        self._runner.answers[request.request_id] = turn.answer_ids
        return self._engine.generate(request).timing.ttft_s

    def _request(self, turn: Turn) -> GenerationRequest:
        session = f"{self._name}-{turn.source}-{turn.conversation}"
        self._sessions.add(session)
        request = GenerationRequest(
            prompt_token_ids=turn.prompt_ids,
            sampling=SamplingParams(max_tokens=turn.max_tokens),
            session_id=session,
            **self._options,
        )
        self._runner.answers[request.request_id] = turn.answer_ids
        return request

    def _written(self, output: GenerationOutput, seconds: float, prefill_s: float | None = None) -> Written:
        passes = self._runner.passes[output.request_id]
        return Written(output.token_ids, seconds, output.timing.ttft_s, passes, output.usage.cached_tokens, prefill_s)
