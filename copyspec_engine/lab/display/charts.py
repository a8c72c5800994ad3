"""What a plot shows, as numbers: bars and lines.

Not covered: drawing (plots.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Bars", "Chart", "Lines", "Page", "Plot"]

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of bars, one bar of each series in every group."""

    title: str
    y_label: str
    groups: tuple[str, ...]
    series: tuple[tuple[str, tuple[float | None, ...]], ...]
    """(name, a height for each group); None is no bar."""
    reference: float | None = None
    """Height of a line across all groups: what plain decoding has."""
    log: bool = False
    shares: bool = False
    """Heights are shares of one, shown as percentages."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Points of each series, joined in order."""

    title: str
    x_label: str
    y_label: str
    series: tuple[tuple[str, tuple[Point | None, ...]], ...]
    """(name, points); None breaks the line."""
    reference: float | None = None
    log_x: bool = False
    log_y: bool = False
    notes: tuple[tuple[float, float, str], ...] = ()
    """(x, y, text) written into the chart."""


Chart = Bars | Lines
Page = Literal["any", "light", "dark"]
"""What a plot is looked at on."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A file with charts side by side, and what they were measured on."""

    name: str
    charts: tuple[Chart, ...]
    caption: str
    page: Page = "any"
    narrow: bool = False
    """Drawn for a telephone: letters as large beside a picture half as wide, and the names below it."""

    @property
    def data(self) -> str:
        """All that it shows, as JSON: what a drawn plot is recognised by, whatever fonts and versions drew it."""
        return json.dumps(asdict(self), sort_keys=True)
