"""One request on its way through the engine: its tokens, its KV slots, its memory and its counts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from copyspec_engine.config import DrafterConfig, GenerationRequest
from copyspec_engine.copy_index import CopyIndex, EarliestIndex, TokenArray
from copyspec_engine.memory import SessionMemory
from copyspec_engine.outputs import DraftStats, FinishReason, Segment, Timing, Usage

__all__ = ["Sequence", "TextStream"]


class TextStream(Protocol):
    """Turns sampled tokens into text, one at a time, and watches for stop texts."""

    @property
    def stopped(self) -> bool:
        """A stop text has been completed; nothing is released after it."""
        ...

    def push(self, token_id: int, *, copied: bool) -> list[Segment]:
        """The text that is certain after this token: neither half a character nor the start of a stop text."""
        ...

    def flush(self) -> list[Segment]:
        """What was held back, once no more tokens come."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state. Only the engine's loop thread touches it after `submit`."""

    request: GenerationRequest
    token_ids: list[int]
    """Prompt, then sampled tokens."""
    num_prompt_tokens: int
    max_total_tokens: int
    """The sequence ends when it has this many tokens."""
    eos_token_ids: frozenset[int]
    """Sampling one of these ends the answer."""
    drafter: DrafterConfig
    seed: int
    text: TextStream

    session: SessionMemory | None = None
    """Set at admission, with the fields down to `slots`."""
    live: CopyIndex | None = None
    """This call's own new tokens: the unseen part of the prompt and the answer as far as it is indexed."""
    num_indexed: int = 0
    """Tokens of this call that are in `live` or in the session's texts."""
    earliest: EarliestIndex | None = None
    """Reference mode's index, over this call only."""
    slots: TokenArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """The KV slot of each token, shape (max_total_tokens,); the first `num_computed` are filled."""
    num_computed: int = 0
    num_cached_tokens: int = 0

    finish_reason: FinishReason | None = None
    segments: list[Segment] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    num_prefill_passes: int = 0
    num_draft_tokens: int = 0
    num_copied_tokens: int = 0
    mean_step_tokens: float = 0.0
    """Running means over this call's steps, from which the drafter knows the going rate of tokens per second."""
    mean_step_cost: float = 0.0
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def index_new_tokens(self) -> CopyIndex:
        """`live`, brought up to date with what has been sampled since; only then does indexing cost anything."""
        if self.live is None:
            raise ValueError(f"Got request {self.request.request_id} but expected an admitted one")
        self.live.extend(self.token_ids[self.num_indexed :])
        self.num_indexed = len(self.token_ids)
        return self.live

    @property
    def num_pending(self) -> int:
        """Tokens at the end that the model has not read yet; at least 1 until the sequence is finished."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_draft_tokens(self) -> int:
        """Draft tokens that fit: one more token is sampled behind the last accepted one."""
        return self.max_total_tokens - len(self.token_ids) - 1

    def usage(self) -> Usage:
        sampled = len(self.token_ids) - self.num_prompt_tokens
        return Usage(self.num_prompt_tokens, self.num_cached_tokens, sampled)

    def draft_stats(self) -> DraftStats:
        return DraftStats(
            num_forward_passes=len(self.accepted_lengths),
            num_prefill_passes=self.num_prefill_passes,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_copied_tokens,
            accepted_lengths=tuple(self.accepted_lengths),
        )

    def timing(self) -> Timing:
        if not self.started_s:
            return Timing()
        first, last = self.first_token_s or self.started_s, self.last_token_s or self.started_s
        return Timing(self.started_s - self.submitted_s, first - self.submitted_s, last - self.submitted_s)
