"""Which tokens to propose for verification, and how many.

A draft is worth what it saves: its length is chosen so that expected accepted tokens, less the measured cost of
verifying them, is largest. There is no fixed block: after a long match drafts are long, on fresh text there are none.

Not covered: trees with several branches, and finding the source again after an edit.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from copyspec_engine.config import AdaptiveDrafter, CopySpecDrafter
from copyspec_engine.copy_index import MAX_MATCH_TOKENS, CopyIndex, EarliestIndex
from copyspec_engine.cost import CostCurve, undisturbed
from copyspec_engine.sequence import Sequence

__all__ = ["CostCurve", "DraftTree", "Drafter", "undisturbed"]


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Tokens proposed after the last token of a sequence.

    Node i holds `tokens[i]` and follows node `parents[i]` (-1: the sequence's last token); parents come first. A plain
    draft is a chain, parents -1, 0, 1, ...
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    match_length: int = 0
    """Tokens that matched before the draft; decides how far the draft is trusted."""

    @classmethod
    def chain(cls, tokens: Seq[int], match_length: int) -> DraftTree:
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), match_length)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    def depths(self) -> list[int]:
        """Tokens from the sequence's last token down to each node, at least 1 each, shape (len,)."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class _Survival:
    """How often a drafted token was right, by the number of tokens that had matched before it, learnt online.

    Starts from rates seen over recorded chats; each bucket forgets slowly, so that it follows the workload.
    """

    hits: npt.NDArray[np.float64] = field(init=False)
    trials: npt.NDArray[np.float64] = field(init=False)

    _PRIOR_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    _PRIOR_RATES = (0.25, 0.45, 0.6, 0.7, 0.8, 0.86, 0.91, 0.94, 0.96, 0.975, 0.985, 0.992)
    _PRIOR_WEIGHT = 8.0
    _MAX_TRIALS = 400.0

    def __post_init__(self) -> None:
        prior = np.interp(np.arange(MAX_MATCH_TOKENS + 1), self._PRIOR_LENGTHS, self._PRIOR_RATES)
        self.hits, self.trials = prior * self._PRIOR_WEIGHT, np.full(len(prior), self._PRIOR_WEIGHT)

    def rates(self, match_length: int, count: int) -> npt.NDArray[np.float64]:
        """Probability that each of `count` draft tokens is right, given that those before it are, shape (count,)."""
        lengths = np.minimum(np.arange(match_length, match_length + count), MAX_MATCH_TOKENS)
        rates: npt.NDArray[np.float64] = (self.hits / self.trials)[lengths]
        return rates

    def learn(self, match_length: int, num_accepted: int, num_drafted: int) -> None:
        """Count each accepted token as right and the first refused one as wrong; those behind it say nothing."""
        seen = min(num_accepted + 1, num_drafted)
        lengths = np.minimum(np.arange(match_length, match_length + seen), MAX_MATCH_TOKENS)
        np.add.at(self.trials, lengths, 1.0)
        np.add.at(self.hits, lengths[:num_accepted], 1.0)
        full = self.trials > self._MAX_TRIALS
        self.hits[full] /= 2
        self.trials[full] /= 2


class Drafter:
    """Proposes one draft per sequence and learns from what was accepted.

    Args:
        cost: measured seconds of a forward pass by width.
    """

    _RATE_STEP = 0.05
    """Weight of the newest step in a sequence's running means."""

    def __init__(self, cost: CostCurve) -> None:
        self._cost = cost
        self._survival = _Survival()

    def propose(self, sequence: Sequence) -> DraftTree:
        """The draft for a sequence whose pending tokens all go into this step; empty where copying does not pay."""
        room = sequence.max_draft_tokens
        if room <= 0 or sequence.drafter.name == "none":
            return DraftTree()
        if sequence.drafter.name == "copyspec":
            return self._propose_block(sequence, sequence.drafter, room)
        return self._propose_adaptive(sequence, sequence.drafter, room)

    def _propose_block(self, sequence: Sequence, options: CopySpecDrafter, room: int) -> DraftTree:
        if sequence.earliest is None:
            sequence.earliest = EarliestIndex(options.min_match_tokens)
        position = sequence.earliest.find(sequence.token_ids)
        if position is None:
            return DraftTree()
        tokens = sequence.token_ids[position : position + min(options.block, room)]
        return DraftTree.chain(tokens, options.min_match_tokens)

    def _propose_adaptive(self, sequence: Sequence, options: AdaptiveDrafter, room: int) -> DraftTree:
        found = self._longest_match(sequence)
        if found is None:
            return DraftTree()
        source, position, length = found
        most = min(options.max_draft_tokens, room)
        count = self._best_length(sequence, length, most)
        tokens = source.read(position, count)
        return DraftTree.chain(_until_end(tokens, sequence.eos_token_ids), length)

    @staticmethod
    def _longest_match(sequence: Sequence) -> tuple[CopyIndex, int, int] | None:
        """(source, position, match length): this call's own texts win over earlier calls' when equally long."""
        best: tuple[CopyIndex, int, int] | None = None
        for source in (sequence.index_new_tokens(), sequence.session.texts if sequence.session else None):
            match = source.longest_match(sequence.token_ids) if source else None
            if source and match and (best is None or match.length > best[2]):
                best = (source, match.position, match.length)
        return best

    def _best_length(self, sequence: Sequence, match_length: int, most: int) -> int:
        """The draft length whose expected tokens, less the time they cost at the going rate, is largest."""
        expected = np.concatenate(([0.0], np.cumprod(self._survival.rates(match_length, most)).cumsum()))
        cost = self._cost.seconds(sequence.num_pending, most + 1)
        return int((expected - self._going_rate(sequence) * cost).argmax())

    def _going_rate(self, sequence: Sequence) -> float:
        """Tokens per second that this call gets out of its steps; a longer draft must do better than that."""
        if not sequence.mean_step_cost:
            return 1.0 / float(self._cost.seconds(1)[0])
        return sequence.mean_step_tokens / sequence.mean_step_cost

    def observe(self, sequence: Sequence, draft: DraftTree, num_accepted: int) -> None:
        """Learn from one verified draft; called before its tokens are appended to the sequence."""
        if sequence.drafter.name != "adaptive":
            return
        if draft:
            self._survival.learn(draft.match_length, num_accepted, len(draft))
        cost = float(self._cost.seconds(1 + len(draft))[0])
        if not sequence.mean_step_cost:  # a call starts out from the pace of plain decoding
            sequence.mean_step_tokens, sequence.mean_step_cost = 1.0, float(self._cost.seconds(1)[0])
        sequence.mean_step_tokens += self._RATE_STEP * (num_accepted + 1 - sequence.mean_step_tokens)
        sequence.mean_step_cost += self._RATE_STEP * (cost - sequence.mean_step_cost)


def _until_end(tokens: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """The draft up to and including the first end-of-sequence token: nothing behind it can be accepted."""
    for i, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: i + 1]
    return tokens
