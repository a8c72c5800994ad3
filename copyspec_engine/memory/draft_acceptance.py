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

__all__ = ["DraftSurvival", "Place"]

_STRENGTHS, _STRENGTH_MIDDLES = (0.02, 0.2, 0.5, 0.8), (0.0, 0.1, 0.35, 0.65, 0.9)
_CHANCES, _CHANCE_MIDDLES = (0.3, 0.5, 0.7, 0.85, 0.95), (0.2, 0.4, 0.6, 0.78, 0.9, 0.97)
_DEPTHS = (2, 3, 5)
_FIRST_GUESS = 0.75
"""A little more than draft models reach, so that they get a chance to show what they are worth."""
_TRUST = 24.0
"""Tokens that it counts as: bad luck at the start must not be the end of it."""
_PRIOR = 6.0
"""Tokens that what is known on the whole counts as, at a place of one kind."""
_COPIES_PRIOR = 3.0
"""Right copies that trust in them counts as."""
_MEMORY = 120.0
"""Tokens in a bucket at which its counts are halved."""
_AGEING = 0.006
"""Share of what is known that is forgotten in each step that does without the draft model."""


class Place(NamedTuple):
    """A token that the draft model wrote, and what was known of it then."""

    token: int
    probability: float
    """By the draft model itself."""
    strength: float
    """Probability that copies in the draft hold the right token at this depth."""
    is_copied: bool
    """A copy says the same."""


class DraftSurvival:
    """What is known of a draft model's tokens: of all, by place, and by what the draft model itself says."""

    def __init__(self) -> None:
        self._all = np.zeros(2)
        """Tokens seen and right."""
        self._depths = np.zeros((len(_STRENGTH_MIDDLES), len(_DEPTHS) + 1, 3))
        """Tokens seen, right, and right where no copy said the same, by strength and depth."""
        self._chances = np.zeros((len(_STRENGTH_MIDDLES), 2, len(_CHANCE_MIDDLES), 2))
        """Tokens seen and right, by strength, whether a copy says the same, and the draft model's probability."""
        self._copies = np.zeros((len(_STRENGTH_MIDDLES), 2))
        """First tokens of copies that were expected to be right and that were, by strength."""

    def copy(self) -> DraftSurvival:
        other = DraftSurvival()
        other.blend(self, 1.0)
        return other

    def blend(self, other: DraftSurvival, share: float) -> None:
        """Move towards `other`; 0 changes nothing, 1 takes over."""
        self._all += share * (other._all - self._all)
        self._depths += share * (other._depths - self._depths)
        self._chances += share * (other._chances - self._chances)
        self._copies += share * (other._copies - self._copies)

    def trust(self, strength: float) -> float:
        """What copies that stand this strongly are worth of it: where a draft model pays, they are often weaker."""
        expected, right = self._copies[bisect_right(_STRENGTHS, strength)].tolist()
        return min(float((right + _COPIES_PRIOR) / (expected + _COPIES_PRIOR)), 1.0)

    def learn_copies(self, strength: float, right: bool) -> None:
        """Learn whether copies that stood this strongly held the next token."""
        _count(self._copies[bisect_right(_STRENGTHS, strength)], (strength, right))

    def expected(self, strength: float, depth: int) -> tuple[float, float]:
        """How likely a token that is yet to be written will be right, and right where no copy says the same.

        Args:
            strength: probability that copies hold the right token at this depth.
            depth: from 1; the tokens before it are taken to be right.
        """
        all_seen, all_right = self._all.tolist()
        guess = (all_right + _TRUST * _FIRST_GUESS) / (all_seen + _TRUST)
        bucket = bisect_right(_STRENGTHS, strength)
        seen, right, new = self._depths[bucket, bisect_right(_DEPTHS, depth)].tolist()
        others = 1 - _STRENGTH_MIDDLES[bucket]
        return (right + _PRIOR * guess) / (seen + _PRIOR), (new + _PRIOR * guess * others) / (seen + _PRIOR)

    def chance(self, place: Place) -> float:
        """How likely a token is right that the draft model has written, if those before it are."""
        bucket = _bucket(place)
        strength, chance = _STRENGTH_MIDDLES[bucket[0]], _CHANCE_MIDDLES[bucket[2]]
        guess = 1 - (1 - chance) * (1 - strength) if place.is_copied else chance * (1 - strength / 2)
        seen, right = self._chances[bucket].tolist()
        return float((right + _PRIOR * guess) / (seen + _PRIOR))

    def learn(self, places: Sequence[Place], written: Sequence[int]) -> None:
        """Learn from a chain of tokens of the draft model and what was written instead, or as it said."""
        for depth, (place, token) in enumerate(zip(places, written, strict=False), 1):
            right = place.token == token
            at = bisect_right(_STRENGTHS, place.strength), bisect_right(_DEPTHS, depth)
            _count(self._all, (1.0, right))
            _count(self._depths[at], (1.0, right, right and not place.is_copied))
            _count(self._chances[_bucket(place)], (1.0, right))
            if not right:
                return

    def rest(self, strength: float) -> None:
        """A step did without the draft model, at a place where copies stand this strongly: what is known gets older."""
        self._all *= 1 - _AGEING
        self._depths[bisect_right(_STRENGTHS, strength)] *= 1 - _AGEING


def _bucket(place: Place) -> tuple[int, int, int]:
    return bisect_right(_STRENGTHS, place.strength), int(place.is_copied), bisect_right(_CHANCES, place.probability)


def _count(counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]], seen: Sequence[float]) -> None:
    counts += seen
    if counts[0] > _MEMORY:
        counts /= 2
