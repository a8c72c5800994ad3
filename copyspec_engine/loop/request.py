"""One request on its way through the engine: its tokens, its KV slots, its memory and its counts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from copyspec_engine.chat.detokenizer import TextStream
from copyspec_engine.drafting.drafter import Drafter
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.memory.index import Span
from copyspec_engine.memory.store import Session
from copyspec_engine.provenance.trail import CopyTrail
from copyspec_engine.sampling.bans import Bans
from copyspec_engine.sampling.token_counts import TokenCounts
from copyspec_engine.values.config import DrafterConfig, DraftModelUse, GenerationRequest
from copyspec_engine.values.outputs import (
    DraftStats,
    FinishReason,
    Reply,
    ReplyDelta,
    Segment,
    Timing,
    TokenLogprob,
    Usage,
)
from copyspec_engine.values.tokens import TokenArray

__all__ = [
    "Request",
    "TextGrammar",
]


class TextGrammar(Protocol):
    """Follows an answer whose form is prescribed."""

    @property
    def is_terminated(self) -> bool:
        """The answer is complete and cannot go on."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Take over tokens that were written."""
        ...


class ReplyReader(Protocol):
    """Takes one answer apart while it is written (see `replies`)."""

    def feed(self, text: str) -> list[ReplyDelta]: ...

    def finish(self) -> tuple[Reply, list[ReplyDelta]]: ...


@dataclass(slots=True, eq=False)
class Request:
    """A request's state. Only the engine's loop thread touches it after `submit`."""

    request: GenerationRequest
    token_ids: list[int]
    """Prompt, then sampled tokens."""
    num_prompt_tokens: int
    max_total_tokens: int
    """The sequence ends when it has this many tokens."""
    eos_token_ids: frozenset[int]
    """Sampling one of these ends the answer."""
    drafting: DrafterConfig
    seed: int
    text: TextStream
    prediction_ids: Sequence[int] = ()
    """A text that the answer is expected to repeat."""
    deadline_s: float = math.inf
    """When it ends at the latest, on the clock `time.perf_counter`."""
    cache_salt: str | None = None
    """Whose KV it may share, besides that of its session."""
    counts: TokenCounts = field(default_factory=TokenCounts)
    """Of `token_ids`, brought up to date before they are penalised."""
    bans: Bans | None = None
    """Tokens that may not come; None: all may."""
    grammar: TextGrammar | None = None
    """What the answer must look like."""
    reply: ReplyReader | None = None
    """Takes the answer apart, if the request asks for it."""
    draft_model: DraftModelUse = "never"
    """What the draft model is asked for; "never" where there is none, or it failed."""

    number: int = field(default_factory=itertools.count().__next__)
    """Its own, where the caller's request_id may come again."""

    session: Session | None = None
    """Set after the first admission, with the next two."""
    memory: SessionMemory | None = None
    """The session's own, or its part of the pool that the request names."""
    drafter: Drafter | None = None
    """Finished when the request ends."""
    texts: list[Span] = field(default_factory=list)
    """What it has added to the memory."""
    slots: TokenArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """The KV slots of its tokens and of some more, shape (n,); `num_computed` are filled. None while it waits."""
    num_computed: int = 0
    num_cached_tokens: int = 0

    finish_reason: FinishReason | None = None
    segments: list[Segment] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_ends: list[int] = field(default_factory=list)
    """Characters that were complete after each token of the answer."""
    trail: CopyTrail = field(default_factory=CopyTrail)
    draft_lengths: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    num_prefill_passes: int = 0
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def num_pending(self) -> int:
        """Tokens at the end that the model has not read yet; at least 1 until the sequence is finished."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_draft_tokens(self) -> int:
        """Draft nodes that fit, of whatever shape: each takes a slot, and one more token is sampled behind them."""
        return self.max_total_tokens - len(self.token_ids) - 1

    def usage(self) -> Usage:
        sampled = len(self.token_ids) - self.num_prompt_tokens
        return Usage(self.num_prompt_tokens, self.num_cached_tokens, sampled)

    def draft_stats(self) -> DraftStats:
        return DraftStats(
            num_forward_passes=len(self.accepted_lengths),
            num_prefill_passes=self.num_prefill_passes,
            num_draft_tokens=sum(self.draft_lengths),
            num_accepted_tokens=sum(self.accepted_lengths),
            draft_lengths=tuple(self.draft_lengths),
            accepted_lengths=tuple(self.accepted_lengths),
        )

    def timing(self) -> Timing:
        if not self.started_s:
            return Timing()
        first, last = self.first_token_s or self.started_s, self.last_token_s or self.started_s
        return Timing(self.started_s - self.submitted_s, first - self.submitted_s, last - self.submitted_s)
