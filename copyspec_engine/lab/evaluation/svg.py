"""Charts as SVG inside a page: drawn in the page's own letters and colours, light or dark, at the width of a phone.

Every bar and line bears its series' name, so that nobody needs its colour, and each chart says its figures in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from copyspec_engine.lab.display.charts import Bars, Chart, Lines
from copyspec_engine.lab.display.tables import figure

__all__ = ["NUM_COLOURS", "drawn"]

NUM_COLOURS = 6
WIDTH = 380
BAR, GAP = 15, 9
"""Height of a bar, and of the space between two groups."""
LETTER = 6.6
"""Width of a letter, about."""
LONGEST = 16
"""Letters of a group's name that are shown; the rest is in its title."""
HEIGHT = 250
MARKERS = ("M-4-4h8v8h-8z", "M0-5L5 4H-5z", "M0-5L5 0L0 5L-5 0z", "M0 5L5-4H-5z")


def drawn(chart: Chart, identifier: str) -> str:
    """The chart as an `svg` element.

    Args:
        chart: what to draw.
        identifier: no other chart of the page has it.
    """
    height, body = _bars(chart) if isinstance(chart, Bars) else _lines(chart)
    title, words = f"{identifier}-title", f"{identifier}-desc"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{title} {words}">'
        f'<title id="{title}">{escape(chart.title)}</title><desc id="{words}">{escape(_in_words(chart))}</desc>'
        f"{''.join(body)}</svg>"
    )


def _in_words(chart: Chart) -> str:
    parts = []
    if isinstance(chart, Bars):
        for name, values in chart.series:
            said = [f"{group} {figure(value)}" for group, value in zip(chart.groups, values, strict=True)]
            parts.append(f"{name}: {', '.join(said)}.")
    else:
        for name, points in chart.series:
            said = [f"{point[0]:g}: {figure(point[1])}" for point in points if point is not None]
            parts.append(f"{name}: {', '.join(said)}.")
    return f"{chart.y_label}. {' '.join(parts)}"


def _bars(chart: Bars) -> tuple[float, list[str]]:
    """Groups from top to bottom, their bars from left to right."""
    names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in chart.groups]
    label = LETTER * max(map(len, names)) + 6
    left = label + LETTER * max(len(name) for name, _ in chart.series) + 5
    most = max((value for _, values in chart.series for value in values if value), default=1.0)
    scale = (WIDTH - left - 42) / max(most, chart.reference or 0)
    top, body = 4.0, []
    for group, name in enumerate(names):
        middle = top + BAR * len(chart.series) / 2 + 4
        body.append(_text(label - 6, middle, name, "end", chart.groups[group]))
        for place, (series, values) in enumerate(chart.series):
            value, base = values[group], top + BAR - 4
            if value is not None:
                end = left + value * scale
                body.append(
                    f'<rect class="s{place % NUM_COLOURS}" x="{left:.1f}" y="{top + 1:.1f}" '
                    f'width="{max(end - left, 1):.1f}" height="{BAR - 3}" rx="2"/>'
                )
                body.append(_text(left - 4, base, series, "end") + _text(end + 4, base, _short(value, chart)))
            top += BAR
        top += GAP
    if chart.reference is not None:
        at = left + chart.reference * scale
        body.append(f'<path class="reference" d="M{at:.1f} 2V{top - 4:.1f}"/>')
    return top, body


def _short(value: float, chart: Bars) -> str:
    if chart.shares:
        return f"{value:.0%}" if value >= 0.01 or not value else f"{value:.1%}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _text(x: float, y: float, text: str, anchor: str = "start", title: str = "") -> str:
    full = f"<title>{escape(title)}</title>" if title and title != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{full}{escape(text)}</text>'


def _lines(chart: Lines) -> tuple[float, list[str]]:
    points = [point for _, line in chart.series for point in line if point is not None]
    left, right, top, bottom = 46.0, WIDTH - 36.0, 22.0, HEIGHT - 40.0
    across, x_ticks = _axis([x for x, _ in points], left, right, chart.log_x)
    up, y_ticks = _axis(
        [0.0, *(y for _, y in points)] if not chart.log_y else [y for _, y in points], bottom, top, chart.log_y
    )
    body = [_text(left - 40, 12, chart.y_label), _text((left + right) / 2, HEIGHT - 6, chart.x_label, "middle")]
    for tick in y_ticks:
        body.append(f'<path class="grid" d="M{left} {up(tick):.1f}H{right + 8}"/>')
        body.append(_text(left - 10, up(tick) + 4, f"{tick:g}", "end"))
    body += [_text(across(tick), bottom + 17, f"{tick:g}", "middle") for tick in x_ticks]
    ends: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for place, (name, line) in enumerate(chart.series):
        places = [(across(point[0]), up(point[1])) for point in line if point is not None]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        kind, marker = f"s{place % NUM_COLOURS}", MARKERS[place % len(MARKERS)]
        body.append(f'<path class="{kind} line" d="M{path}"/>')
        body += [f'<path class="{kind}" transform="translate({x:.1f} {y:.1f})" d="{marker}"/>' for x, y in places]
        x, y = places[-1]
        ends.setdefault((int(x / 20), int(y / 14)), []).append((x, y, name))
    for same in ends.values():  # lines that end together share one label
        body.append(_text(same[0][0] + 8, same[0][1] + 4, ", ".join(name for *_, name in same)))
    return HEIGHT, body


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> tuple[Callable[[float], float], list[float]]:
    """(where a value stands, values to write at the axis)."""
    low, high = min(values), max(values)
    if high == low:
        high = low + 1
    if log:
        ratio = (end - start) / math.log(high / low)
        ticks = [4.0**power for power in range(-6, 10) if low <= 4.0**power <= high * 1.0001]
        return lambda value: start + ratio * math.log(value / low), ticks
    step = 10 ** math.floor(math.log10(high - low))
    step = next(size for size in (step / 5, step / 2, step, step * 2) if (high - low) / size <= 6)
    ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: start + (end - start) * (value - low) / (high - low), ticks
