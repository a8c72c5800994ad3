"""How far a figure may be off by the choice of tasks: the bootstrap over conversations.

The turns of a conversation are no samples of their own, so that whole conversations are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["RESAMPLES", "interval", "median_interval"]

RESAMPLES = 2000
_SEED = 0
_LEVELS = (0.025, 0.975)

Sums = tuple[float, ...]
"""What a conversation adds to the sums of which a figure is the ratio: numerator, denominator, numerator, ..."""


def interval(conversations: Sequence[Sums]) -> tuple[float, float] | None:
    """The 95 % interval of a ratio of sums, or of a product of such ratios, over conversations.

    Args:
        conversations: of each one what it adds to the first numerator, the first denominator, the second numerator, and
            so on; shape (n, 2 * ratios).

    Returns:
        (lower, upper) limit: the 2.5th and the 97.5th percentile over `RESAMPLES` draws of n conversations; the same
        each time. None for fewer than two conversations, or where a denominator is 0.
    """
    if len(conversations) < 2:
        return None
    count = len(conversations)
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sums = drawn @ np.asarray(conversations, dtype=np.float64)
    if not np.all(sums[:, 1::2]):
        return None
    lower, upper = np.quantile(np.prod(sums[:, ::2] / sums[:, 1::2], axis=1), _LEVELS).tolist()
    return lower, upper


def median_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the median of all values over the groups that they come in, such as rounds.

    Args:
        groups: of values, none of them empty; whole groups are drawn.

    Returns:
        (lower, upper) limit, as `interval` has them; None for fewer than two groups.
    """
    if len(groups) < 2:
        return None
    drawn = np.random.default_rng(_SEED).integers(len(groups), size=(RESAMPLES, len(groups)))
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    medians = [np.median(np.concatenate([values[at] for at in draw])) for draw in drawn]
    lower, upper = np.quantile(medians, _LEVELS).tolist()
    return lower, upper
