"""How likely a draft model's next token is right, and right where no copy says the same: learnt from what was written.

Counts by bucket, which fade, so that the estimates follow a change; where there are few they lean on a first guess.
They are apart from what is learnt about copies (acceptance.py): the two only meet in how strongly copies stand there.

Not covered: what is made of the estimates (loop/mix.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["DraftAcceptance", "DraftedToken"]

_STRENGTHS, _STRENGTH_MIDDLES = (0.02, 0.2, 0.5, 0.8), (0.0, 0.1, 0.35, 0.65, 0.9)
_CHANCES, _CHANCE_MIDDLES = (0.3, 0.5, 0.7, 0.85, 0.95), (0.2, 0.4, 0.6, 0.78, 0.9, 0.97)
_DEPTHS = (2, 3, 5)
_FIRST_GUESS = 0.75
"""A little more than draft models reach, so that they get a chance to show what they are worth."""
_TRUST = 24.0
"""Tokens that it counts as: bad luck at the start must not be the end of it."""
_PRIOR = 6.0
"""Tokens that what is known on the whole counts as, of a token of one kind."""
_COPIES_PRIOR = 3.0
"""Right copies that trust in them counts as."""
_MEMORY = 120.0
"""Tokens in a bucket at which its counts are halved."""
_AGEING = 0.006
"""Share of what is known that is forgotten in each step that does without the draft model."""


class DraftedToken(NamedTuple):
    """A token that the draft model wrote, and what was known of it then."""

    token: int
    probability: float
    """By the draft model itself."""
    strength: float
    """Probability that copies in the draft hold the right token at this depth."""
    is_copied: bool
    """A copy says the same."""


class _FadingCounts:
    """How often something was expected, and how often it was so, by bucket.

    Args:
        shape: of the buckets, and of what is counted in each: what was expected first.
    """

    def __init__(self, *shape: int) -> None:
        self.counts = np.zeros(shape)

    def add(self, bucket: tuple[int, ...], seen: Sequence[float]) -> None:
        """Count something; what is old fades, so that the estimates follow a change."""
        counts = self.counts[bucket]
        counts += seen
        if counts[0] > _MEMORY:
            counts /= 2

    def share(self, bucket: tuple[int, ...], prior: float, prior_right: float, which: int = 1) -> float:
        """How often it was so, as if `prior` more had been expected and `prior_right` of these had been so."""
        counts = self.counts[bucket].tolist()
        return float((counts[which] + prior_right) / (counts[0] + prior))


class DraftAcceptance:
    """What is known of a draft model's tokens: of all, by depth, and by what the draft model itself says."""

    def __init__(self) -> None:
        strengths = len(_STRENGTH_MIDDLES)
        self._all = _FadingCounts(2)
        """Tokens seen and right."""
        self._depths = _FadingCounts(strengths, len(_DEPTHS) + 1, 3)
        """Tokens seen, right, and right where no copy said the same, by strength and depth."""
        self._chances = _FadingCounts(strengths, 2, len(_CHANCE_MIDDLES), 2)
        """Tokens seen and right, by strength, whether a copy says the same, and the draft model's probability."""
        self._copies = _FadingCounts(strengths, 2)
        """First tokens of copies that were expected to be right and that were, by strength."""

    def copy(self) -> DraftAcceptance:
        other = DraftAcceptance()
        other.blend(self, 1.0)
        return other

    def blend(self, other: DraftAcceptance, share: float) -> None:
        """Move towards `other`; 0 changes nothing, 1 takes over."""
        for name, own in vars(self).items():
            own.counts += share * (getattr(other, name).counts - own.counts)

    def trust(self, strength: float) -> float:
        """What copies that stand this strongly are worth of it: where a draft model pays, they are often weaker."""
        return min(self._copies.share((bisect_right(_STRENGTHS, strength),), _COPIES_PRIOR, _COPIES_PRIOR), 1.0)

    def learn_copies(self, strength: float, right: bool) -> None:
        """Learn whether copies that stood this strongly held the next token."""
        self._copies.add((bisect_right(_STRENGTHS, strength),), (strength, right))

    def expected(self, strength: float, depth: int) -> tuple[float, float]:
        """How likely a token that is yet to be written will be right, and right where no copy says the same.

        Args:
            strength: probability that copies hold the right token at this depth.
            depth: from 1; the tokens before it are taken to be right.
        """
        guess = self._all.share((), _TRUST, _TRUST * _FIRST_GUESS)
        bucket = bisect_right(_STRENGTHS, strength), bisect_right(_DEPTHS, depth)
        right, others = _PRIOR * guess, 1 - _STRENGTH_MIDDLES[bucket[0]]
        return self._depths.share(bucket, _PRIOR, right), self._depths.share(bucket, _PRIOR, right * others, which=2)

    def chance(self, drafted: DraftedToken) -> float:
        """How likely a token is right that the draft model has written, if those before it are."""
        bucket = _bucket(drafted)
        strength, chance = _STRENGTH_MIDDLES[bucket[0]], _CHANCE_MIDDLES[bucket[2]]
        guess = 1 - (1 - chance) * (1 - strength) if drafted.is_copied else chance * (1 - strength / 2)
        return self._chances.share(bucket, _PRIOR, _PRIOR * guess)

    def learn(self, drafts: Sequence[DraftedToken], written: Sequence[int]) -> None:
        """Learn from a chain of tokens of the draft model and what was written instead, or as it said."""
        for depth, (drafted, token) in enumerate(zip(drafts, written, strict=False), 1):
            right = drafted.token == token
            at = bisect_right(_STRENGTHS, drafted.strength), bisect_right(_DEPTHS, depth)
            self._all.add((), (1.0, right))
            self._depths.add(at, (1.0, right, right and not drafted.is_copied))
            self._chances.add(_bucket(drafted), (1.0, right))
            if not right:
                return

    def age(self, strength: float) -> None:
        """A step did without the draft model, where copies stand this strongly: what is known gets older."""
        self._all.counts *= 1 - _AGEING
        self._depths.counts[bisect_right(_STRENGTHS, strength)] *= 1 - _AGEING


def _bucket(drafted: DraftedToken) -> tuple[int, int, int]:
    return (
        bisect_right(_STRENGTHS, drafted.strength),
        int(drafted.is_copied),
        bisect_right(_CHANCES, drafted.probability),
    )
