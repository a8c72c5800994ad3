"""transformers as a writer of an evaluation run: `generate` on the same prompts and weights as the run's drafters."""

from __future__ import annotations

from collections.abc import Sequence

from copyspec_engine import ContextOverflowError, Engine, GenerationRequest
from copyspec_engine.cli.demo.figures import GENERATE, LOOKUP
from copyspec_engine.cli.demo.peers import Peers
from copyspec_engine.lab.evaluation.benchmarks import Task
from copyspec_engine.lab.evaluation.records import TurnRecord
from copyspec_engine.lab.evaluation.writing import EngineSubject, Messages, Writer, session_of

__all__ = ["PEER_NAMES", "WithPeers"]

_LANES = {"generate": GENERATE, "prompt-lookup": LOOKUP}
PEER_NAMES = tuple(_LANES)
_WARM_UP_TOKENS = 4


class WithPeers:
    """A subject whose writers may be `PEER_NAMES` too; those read the whole prompt in every turn, as their users do.

    Args:
        subject: answers for all other writers.
        drafter: name of one of those; the tokens that its earlier answers had are those that peers read of equal texts.

    Raises:
        CopySpecError: transformers cannot load the checkpoint a second time.
    """

    def __init__(self, subject: EngineSubject, drafter: str) -> None:
        self._subject, self._drafter = subject, drafter
        self._engine: Engine = subject.engine
        self._peers = Peers(self._engine)

    def warm_up(self, task: Task, writers: Sequence[Writer]) -> None:
        """See `Subject`."""
        self._subject.warm_up(task, [writer for writer in writers if writer.name not in PEER_NAMES])
        prompt_ids = self._engine.tokenize(GenerationRequest(messages=[{"role": "user", "content": "Hello."}]))
        for name in {writer.name for writer in writers} & set(PEER_NAMES):
            self._peers.ask(_LANES[name], prompt_ids, _WARM_UP_TOKENS)

    def write(self, task: Task, turn: int, messages: Messages, writer: Writer) -> TurnRecord:
        """See `Subject`."""
        if writer.name not in PEER_NAMES:
            return self._subject.write(task, turn, messages, writer)
        own = tuple(dict(message) for message in messages)
        request = GenerationRequest(messages=own, session_id=session_of(task, self._drafter))
        prompt_ids = self._engine.tokenize(request)
        limit = self._engine.info.max_model_len
        room = min(self._subject.max_new_tokens, limit - len(prompt_ids))
        if room < 1:
            raise ContextOverflowError(len(prompt_ids) + 1, limit)
        answer = self._peers.ask(_LANES[writer.name], prompt_ids, room)
        token_ids, ttft_s = answer.token_ids or (), answer.ttft_s or 0.0
        return TurnRecord(
            task=task.id,
            category=task.category,
            turn=turn,
            writer=writer.name,
            messages=own,
            text=self._engine.decode(token_ids),
            token_ids=token_ids,
            prompt_tokens=len(prompt_ids),
            finish_reason="length" if len(token_ids) == room else "stop",
            forward_passes=answer.forward_passes or len(token_ids),
            prefill_s=ttft_s,
            decode_s=answer.seconds - ttft_s,
        )

    def forget(self, task: Task, writers: Sequence[Writer]) -> None:
        """See `Subject`."""
        self._subject.forget(task, writers)

    def gap(self, plain: TurnRecord, position: int, other: int) -> float | None:
        """See `Subject`."""
        return self._subject.gap(plain, position, other)

    def close(self) -> None:
        """End what was started for the peers."""
        self._peers.close()
