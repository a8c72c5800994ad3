"""What a forward pass costs by the number of its tokens.

Not covered: measuring it, which needs the model (see `model_runner`), and keeping measured points (`calibration`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

__all__ = ["CostCurve", "undisturbed"]

_MAX_WIDTH = 2048
_MOST_PER_TOKEN = 0.25
"""Cost of one more token in a pass, at most, as a share of a pass of one token."""


class CostCurve:
    """Seconds (in any unit) of one forward pass by its number of tokens, interpolated between measured points."""

    def __init__(self, points: Seq[tuple[int, float]]) -> None:
        self.points = tuple(points)
        widths, seconds = np.array([w for w, _ in points], float), np.array([s for _, s in points], float)
        slope = (seconds[-1] - seconds[0]) / (widths[-1] - widths[0])
        grid = np.arange(_MAX_WIDTH + 1, dtype=float)
        self._seconds = np.interp(grid, widths, seconds) + np.maximum(grid - widths[-1], 0) * slope

    def seconds(self, width: int, count: int = 1) -> npt.NDArray[np.float64]:
        """Cost of passes of `width`, `width` + 1, ... tokens, shape (count,)."""
        start = min(width, _MAX_WIDTH + 1 - count)
        seconds: npt.NDArray[np.float64] = self._seconds[start : start + count]
        return seconds


def undisturbed(points: Seq[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Measured (tokens, seconds) as they would be on a machine that does nothing else; other load only adds time.

    A wider pass does all the work of a narrower one: where it was quicker, the narrower one was disturbed. And one more
    token never costs as much as a pass of its own, since the weights are read anyway: where it seems to, everything was
    disturbed, which must not keep long matches from being drafted.
    """
    widths, seconds = np.array([w for w, _ in points]), np.array([s for _, s in points])
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]
    seconds = np.minimum(seconds, seconds[0] * (1 + _MOST_PER_TOKEN * (widths - 1)))
    return tuple(zip(widths.tolist(), seconds.tolist(), strict=True))
