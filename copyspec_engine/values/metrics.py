"""What an engine has done since it was made, and what it is doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Counts", "EngineMetrics", "Held"]


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


class Held(NamedTuple):
    """What requests hold of an engine; all of it is 0 once they are over. Rows that are kept for later do not count."""

    places: int
    """Of requests that run or wait, by the front door's book."""
    running: int
    waiting: int
    slots: int
    """Uses of KV slots that no kept row accounts for."""
    rows: int
    """What the model's runner keeps for requests besides KV."""
    draft_slots: int
    """As `slots`, of the draft model."""
    draft_rows: int
    """Requests that the draft model follows."""


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """A snapshot; counts are since the engine was made.

    `accepted_by_source` has the keys "prompt", "answer", "prediction", "frequent" (a frequent token, copied from
    nowhere), "grammar" (forced by it), "block" (drafts of the published algorithm), "draft_model" (written by one) and
    "recycled" (likely in an earlier pass).
    """

    num_running: int
    num_waiting: int
    num_kv_slots: int
    num_kv_slots_running: int
    """Held by running requests."""
    num_kv_slots_cached: int
    """Kept for later calls alone: free if they are needed."""
    num_sessions: int
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    draft_tokens: int
    draft_model_passes: int
    """Forward passes of the draft model, of however many requests each."""
    tokens_per_forward: float
    """Sampled tokens for each part that a request had in a forward pass; 1.0 for plain decoding, 0.0 before any."""
    accepted_by_source: dict[str, int]
    finished: dict[str, int]
    step_cost: tuple[tuple[int, float], ...]
    """(tokens, seconds) of a pass as reckoned now: measured at load, and corrected by what passes took since."""

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens whose KV was there already, 0 to 1."""
        return self.cached_tokens / max(self.prompt_tokens, 1)

    @property
    def kv_slots_in_use(self) -> float:
        """Share of the pool that running requests hold, 0 to 1."""
        return self.num_kv_slots_running / self.num_kv_slots
