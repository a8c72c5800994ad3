"""What a forward pass costs by the number of its tokens: as it was measured, and as passes in use have it since.

A pass alone, measured for a second at load, is not what a step costs: there are sampling, a longer context, the rest of
the step, other load on the machine, and a second can be a bad one. Widths that are hardly ever used say little of
themselves, so that what was seen of others counts for them too, and a bad experience is forgotten with time: else what
seemed dear once would never be tried again.

Not covered: measuring at load (execution/pass_cost.py), and keeping measured points (execution/calibration.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.values.config import Points

__all__ = [
    "CostCurve",
    "LiveCost",
    "Points",
    "undisturbed",
]


_MAX_WIDTH = 2048
_MAX_HULLS = 16
_MOST_FOR_SECOND = 1.0
"""Cost of a second token in a pass, at most, as a share of a pass of one: from two tokens on other kernels run."""
_MOST_PER_TOKEN = 0.25
"""Cost of each token after the second, at most, as a share of a pass of one."""


class CostCurve:
    """Seconds (in any unit) of one forward pass by its number of tokens.

    Between measured points it is interpolated. Beyond the last one it is straight, as steep as the steepest line from
    any point to the last.

    Args:
        points: see `Points`.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self.points = tuple(points)
        self._end, self._end_seconds = points[-1]
        self._tail = max((self._end_seconds - seconds) / (self._end - width) for width, seconds in points[:-1])
        self._grid = self._at(np.arange(_MAX_WIDTH + 1))
        self._hulls: dict[int, npt.NDArray[np.float64]] = {}

    def relative(self) -> CostCurve:
        """The same in passes of one token."""
        unit = self.points[0][1]
        return CostCurve([(width, seconds / unit) for width, seconds in self.points])

    def seconds(self, width: int, count: int = 1) -> npt.NDArray[np.float64]:
        """Cost of passes of `width`, `width` + 1, ... tokens, shape (count,), read-only."""
        if width + count > len(self._grid):
            return self._at(np.arange(width, width + count))
        return self._grid[width : width + count]

    def marginal(self, width: int, count: int) -> npt.NDArray[np.float64]:
        """Cost of each further token of a pass of `width` tokens, if enough of them follow; shape (count,), read-only.

        Entry i is the slope, between `width` + i and `width` + i + 1 tokens, of the lower convex hull of the curve from
        `width` on. It never falls: a cheap stair behind an expensive step is averaged with that step, so that whoever
        goes on while the next token is worth its cost does not stop in front of it. Where such a walk stops between
        two corners of the hull the pass costs more than the sum; `seconds` is exact.

            CostCurve([(1, 1.0), (2, 1.5), (6, 1.5), (8, 2.5)]).marginal(1, 7)  ->  5 times 0.1, then 2 times 0.5
        """
        hull = self._hulls.get(width)
        if hull is None or len(hull) < count:
            hull = self._hull(width, max(count, _MAX_WIDTH - width))
            if len(self._hulls) < _MAX_HULLS or width in self._hulls:  # nearly every step starts from one token
                self._hulls[width] = hull
        return hull[:count]

    def _at(self, widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        inside = np.interp(widths, [w for w, _ in self.points], [s for _, s in self.points])
        seconds: npt.NDArray[np.float64] = inside + np.maximum(widths - self._end, 0) * self._tail
        seconds.flags.writeable = False
        return seconds

    def _hull(self, width: int, count: int) -> npt.NDArray[np.float64]:
        """Slopes of the hull from `width` on, shape (count,)."""
        corners = [(width, float(self.seconds(width)[0]))]
        slopes: list[float] = []
        for point in (point for point in self.points if point[0] > width):
            while slopes and slopes[-1] >= _slope(corners[-1], point):
                corners.pop()
                slopes.pop()
            slopes.append(_slope(corners[-1], point))
            corners.append(point)
        lengths = np.diff([w for w, _ in corners])
        hull = np.full(count, max(self._tail, *slopes[-1:], 0.0))
        inner = np.repeat(slopes, lengths)[:count]
        hull[: len(inner)] = inner
        hull.flags.writeable = False
        return hull


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def undisturbed(points: Sequence[tuple[int, float]]) -> Points:
    """Measured (tokens, seconds) as they would be on a machine that does nothing else; other load only adds time.

    A wider pass does all the work of a narrower one: where it was quicker, the narrower one was disturbed. And more
    tokens never cost nearly as much as passes of their own, since the weights are read anyway, but for the second one,
    behind which other kernels run: where they seem to, everything was disturbed, which must not keep long matches from
    being drafted.
    """
    widths, seconds = np.array([w for w, _ in points]), np.array([s for _, s in points])
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]
    most = seconds[0] * (1 + _MOST_FOR_SECOND + _MOST_PER_TOKEN * (widths[1:] - 2))
    seconds[1:] = np.minimum(seconds[1:], most)
    return tuple(zip(widths.tolist(), seconds.tolist(), strict=True))


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
