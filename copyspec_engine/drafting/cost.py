"""What a forward pass costs by the number of its tokens.

Not covered: measuring it, which needs the model (execution/pass_cost.py), and keeping measured points (`calibration`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from copyspec_engine.values.config import Points

__all__ = ["CostCurve", "Points", "undisturbed"]

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
