"""What passes take in use: the curve that was measured at load, corrected by every step that runs.

A pass alone, measured for a second, is not what a step costs: there are sampling, a longer context, the rest of the
step, other load on the machine, and a second can be a bad one. Widths that are hardly ever used say little of
themselves, so that what was seen of others counts for them too, and a bad experience is forgotten with time: else what
seemed dear once would never be tried again.

Not covered: measuring at load (execution/pass_cost.py, execution/calibration.py).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.drafting.cost import CostCurve, Points

__all__ = ["LiveCost"]

_DOUBLINGS = 11
"""Widths with an estimate of their own: 1, 2, 4, ..., 1024."""
_ALL, _DRAFTED, _EACH = 0, 1, 2
"""Parts of the state: what every pass takes more than was measured; each one with a draft; one of 2, 4, ... tokens."""
_SPREADS = np.array([1.0, 0.4, *[0.2] * (_DOUBLINGS - 1)])
"""How far each of them is from 0, for all that is known at first (standard deviation of a logarithm)."""
_MEMORY = 0.999
"""What is left of each from one pass to the next."""
_NOISE = 0.25
"""How far a single pass is off (standard deviation of a logarithm)."""
_OUTLIER = 2.0
"""A pass that is off by more standard deviations counts as one that is off by so many: something else came between."""
_NOTABLE = 0.05
"""A change of what a width costs by less is not worth a new curve."""


class LiveCost:
    """A cost curve that follows what passes take.

    The logarithm of the ratio of what a pass takes to what the given curve says is estimated by a Kalman filter, with
    linear interpolation between widths of powers of two.

    Args:
        points: what a pass takes by its tokens, as measured at load or as somebody reckons.
        is_fixed: they stay as they are, whatever passes take.
    """

    def __init__(self, points: Points, *, is_fixed: bool) -> None:
        self._given, self._is_fixed = CostCurve(points), is_fixed
        self._widths = sorted({width for width, _ in points} | {1 << i for i in range(_DOUBLINGS)})
        self._seconds = np.array([float(self._given.seconds(width)[0]) for width in self._widths])
        self._parts = np.array([_parts(width) for width in self._widths])
        self._state = np.zeros(len(_SPREADS))
        self._covariance = np.diag(_SPREADS**2)
        self._shown = np.zeros(len(self._widths))
        """Estimates, apart from what concerns every pass, that `relative` was made from."""
        self.unit = points[0][1]
        """What a pass of one token takes, as far as is known by now."""
        self.relative = self._given.relative()
        """What passes take in passes of one token, as far as is known by now."""

    @property
    def points(self) -> Points:
        """What passes take, as far as is known by now."""
        return tuple((width, self.unit * cost) for width, cost in self.relative.points)

    def passes(self, width: int, unit: float) -> float:
        """What a pass of `width` tokens takes, in units of `unit`."""
        return float(self.relative.seconds(width)[0]) * self.unit / unit

    def observe(self, width: int, seconds: float) -> bool:
        """A pass of `width` tokens, at least 1, took `seconds`; whether `relative` is another curve now."""
        if self._is_fixed or seconds <= 0:
            return False
        found = math.log(seconds / float(self._given.seconds(width)[0]))
        _learn(self._state, self._covariance, _parts(width), found)
        every = float(self._state[_ALL])
        self.unit = self._given.points[0][1] * math.exp(every)
        estimates = self._parts @ self._state - every
        if np.abs(estimates - self._shown).max() < _NOTABLE:
            return False
        self._shown = estimates
        # A wider pass does all the work of a narrower one.
        relative = np.maximum.accumulate(self._seconds * np.exp(estimates)) / self._seconds[0]
        self.relative = CostCurve(tuple(zip(self._widths, relative.tolist(), strict=True)))
        return True


@compiled
def _learn(
    state: npt.NDArray[np.float64], covariance: npt.NDArray[np.float64], parts: npt.NDArray[np.float64], found: float
) -> None:
    """One step of the filter: the sum of the `parts` of the state was found to be `found`. Changes both arrays."""
    size = len(state)
    reach = np.zeros(size)
    expected, variance = 0.0, _NOISE**2
    for i in range(size):
        state[i] *= _MEMORY
        covariance[i] *= _MEMORY**2
        covariance[i, i] += (1.0 - _MEMORY**2) * _SPREADS[i] ** 2
    for i in range(size):
        for j in range(size):
            reach[i] += covariance[i, j] * parts[j]
        expected += parts[i] * state[i]
        variance += parts[i] * reach[i]
    most = _OUTLIER * np.sqrt(variance)
    gain = min(max(found - expected, -most), most) / variance
    for i in range(size):
        state[i] += gain * reach[i]
        for j in range(size):
            covariance[i, j] -= reach[i] * reach[j] / variance


@cache
def _parts(width: int) -> npt.NDArray[np.float64]:
    """How much each part of the state has to do with a pass of `width` tokens, shape (len(state),)."""
    doublings = min(math.log2(width), _DOUBLINGS - 1)
    parts = np.zeros(len(_SPREADS))
    parts[_ALL], parts[_DRAFTED] = 1.0, min(doublings, 1.0)
    low = int(doublings)
    for at, share in ((low, 1 - (doublings - low)), (low + 1, doublings - low)):
        if at >= 1 and share > 0:
            parts[_EACH + at - 1] = share
    parts.flags.writeable = False
    return parts
