"""Plots as SVG and PNG files, and as elements of a page, drawn by matplotlib (extra `eval`).

Lines and letters are of middling brightness on no background, so that a file can be read on a dark page and on a light
one; a plot that is made for one of them has more contrast there. A file holds its
numbers in its description, which `drawn_data` reads.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from copyspec_engine import ConfigError, missing_extra
from copyspec_engine.lab.display.charts import Bars, Chart, Lines, Page, Plot
from copyspec_engine.lab.display.tables import figure as digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_installed", "drawn_data", "element", "figure_of", "save"]

INKS: dict[Page, str] = {"any": "#77808b", "light": "#3d444d", "dark": "#c9d1d9"}
COLOURS = ("#2f9e58", "#4b83d6", "#c7722a", "#a667c5", "#8a929b", "#c24d6a", "#8f8a22")
HATCHES = ("", "////", "||||", "\\\\\\\\", "xxxx", "----", "++++")  # dots would take a quarter of a megabyte
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "copyspec",  # the same ids each time
    "svg.fonttype": "path",  # the same letters everywhere
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "hatch.linewidth": 0.6,
}
_INKED: tuple[Any, ...] = (
    "text.color",
    "xtick.color",
    "ytick.color",
    "grid.color",
    "axes.edgecolor",
    "axes.labelcolor",
)
ELEMENT_INCHES = (6.0, 3.6)
WIDTH_INCHES, NARROW_INCHES, LEGEND_INCHES = 10.0, 4.6, 2.3
"""Of a file, of one for a telephone, and of a legend that stands beside the chart."""
CAPTION_LETTERS = 16.5
"""Letters of a caption in an inch."""
_FEW = 3
"""Series whose names fit into a chart."""
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def check_installed() -> None:
    """Raises `CopySpecError` now, rather than after hours of work, if `save` could not draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "eval") from None


def save(plot: Plot, path: Path) -> Path:
    """Draw a plot into a file of the kind that its name ends with; its folder is made if it is not there.

    Raises:
        CopySpecError: matplotlib is not installed.
        ConfigError: the file cannot be written.
    """
    check_installed()
    import matplotlib

    # A date, or the version of what drew it, would make each drawing another file.
    title = "; ".join(chart.title for chart in plot.charts)
    metadata = (
        {"Title": title, "Description": plot.data, "Date": None, "Creator": None}
        if path.suffix == ".svg"
        else {"Title": title, "Software": None}
    )
    with matplotlib.rc_context({**SETTINGS, **dict.fromkeys(_INKED, INKS[plot.page])}):
        figure = figure_of(plot)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata=metadata, transparent=path.suffix == ".svg", dpi=144)
        except OSError as error:
            raise ConfigError(f"Cannot write plot {path}: {error.strerror or error}") from None
    return path


def element(chart: Chart, identifier: str) -> str:
    """A chart as an `svg` element of a page, without its title; it says its figures in words too.

    Args:
        chart: what to draw.
        identifier: no other chart of the page has it; every id of the element begins with it.

    Raises:
        CopySpecError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**SETTINGS, **dict.fromkeys(_INKED, INKS["any"]), "svg.fonttype": "none"}):
        figure = Figure(figsize=ELEMENT_INCHES, layout="constrained")
        axes = figure.subplots()
        _draw(axes, chart, range(len(chart.series)), ELEMENT_INCHES[0])
        _place_notes(figure)
        if len(chart.series) > 1:
            figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=9)
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True)
    parts = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    viewed = re.search(r'viewBox="([^"]*)"', parts)
    body = parts[parts.index(">", parts.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(r"""( id="|href="#|url\(#)""", rf"\g<1>{identifier}-", body)
    body = body.replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif")  # which not every reader has
    title, words = f"{identifier}-title", f"{identifier}-desc"
    return (
        f'<svg viewBox="{viewed[1] if viewed else ""}" role="img" aria-labelledby="{title} {words}">'
        f'<title id="{title}">{escape(chart.title)}</title><desc id="{words}">{escape(_in_words(chart))}</desc>{body}'
    )


def _in_words(chart: Chart) -> str:
    parts = []
    if isinstance(chart, Bars):
        for name, values in chart.series:
            said = [f"{group} {digits(value)}" for group, value in zip(chart.groups, values, strict=True)]
            parts.append(f"{name}: {', '.join(said)}.")
    else:
        for name, points in chart.series:
            said = [f"{point[0]:g}: {digits(point[1])}" for point in points if point is not None]
            parts.append(f"{name}: {', '.join(said)}.")
    return f"{chart.y_label}. {' '.join(parts)}"


def drawn_data(path: Path) -> str:
    """`Plot.data` of the plot that an SVG file shows; "" if the file is not there or is no such plot."""
    try:
        found = ElementTree.parse(path).getroot().find(f".//{DESCRIPTION}")
    except (OSError, ElementTree.ParseError):
        return ""
    return (found.text or "") if found is not None else ""


def figure_of(plot: Plot) -> Figure:
    """A plot as matplotlib has it."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for chart in plot.charts for name, _ in chart.series))
    width = NARROW_INCHES if plot.narrow else WIDTH_INCHES
    letters = round(CAPTION_LETTERS * width)
    lines = [line for part in plot.caption.splitlines() for line in textwrap.wrap(part, letters)]
    below = 0.16 * len(lines) + 0.15  # inches
    height = 4.0 + below
    drawn = Figure(figsize=(width, height))
    drawn.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - below / height))
    outside = len(plot.charts) == 1 and len(plot.charts[0].series) > _FEW  # too many to find room among the bars
    room = (width - (outside and not plot.narrow) * LEGEND_INCHES) / len(plot.charts)
    for axes, chart in zip(drawn.subplots(1, len(plot.charts), squeeze=False)[0], plot.charts, strict=True):
        _draw(axes, chart, [names.index(name) for name, _ in chart.series], room)
        axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
        if outside and plot.narrow:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.18), ncols=2, frameon=False, fontsize=9)
        elif outside:
            drawn.legend(loc="outside right upper", frameon=False, fontsize=9)
        elif len(chart.series) > 1:
            axes.legend(frameon=False, fontsize=9)
    drawn.text(0.01, 0.08 / height, "\n".join(lines), fontsize=8, va="bottom")
    _place_notes(drawn)
    return drawn


def _draw(axes: Axes, chart: Chart, looks: Sequence[int], room: float) -> None:
    """A chart without title and legend.

    Args:
        axes: where to.
        chart: what.
        looks: numbers of colours, hatches and markers, one for each series.
        room: width in inches.
    """
    axes.set_ylabel(chart.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    if chart.reference is not None:
        axes.axhline(chart.reference, color=axes.xaxis.label.get_color(), linewidth=1, linestyle="--")
    if isinstance(chart, Bars):
        _bars(axes, chart, looks, room)
    else:
        _lines(axes, chart, looks)


def _bars(axes: Axes, chart: Bars, looks: Sequence[int], room: float) -> None:
    width = 0.8 / len(chart.series)
    for place, (name, values) in enumerate(chart.series):
        shown = [(group, value) for group, value in enumerate(values) if value is not None]
        left = [group - 0.4 + (place + 0.5) * width for group, _ in shown]
        axes.bar(
            left,
            [value for _, value in shown],
            width * 0.9,
            label=name,
            color=COLOURS[looks[place] % len(COLOURS)],
            hatch=HATCHES[looks[place] % len(HATCHES)],
            edgecolor="#ffffff66",
            linewidth=0,
        )
    letters = round(10.5 * room) // len(chart.groups)
    size = 8.5 if len(chart.groups) > 5 else 10
    if max(len(part) for group in chart.groups for part in re.split(r"[ _-]", group)) <= letters:
        axes.set_xticks(range(len(chart.groups)), [_wrapped(group, letters) for group in chart.groups], size=size)
    else:  # a word has no room: slanting
        slanting: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(chart.groups)), chart.groups, size=size, **slanting)
    if chart.shares:
        axes.yaxis.set_major_formatter("{x:.0%}")
    if chart.log:
        _log_scale(axes.set_yscale, axes.yaxis)


def _wrapped(name: str, width: int) -> str:
    """A name in lines of so many letters, broken behind commas and underscores."""
    parts = [textwrap.wrap(part.replace("_", "_ "), width + 1) for part in name.split(", ")]
    return "\n".join(line.replace("_ ", "_") for lines in parts for line in lines)


def _lines(axes: Axes, chart: Lines, looks: Sequence[int]) -> None:
    gap = (float("nan"), float("nan"))
    for look, (name, points) in zip(looks, chart.series, strict=True):
        drawn = [gap if point is None else point for point in points]
        colour, marker = COLOURS[look % len(COLOURS)], MARKERS[look % len(MARKERS)]
        axes.plot(*zip(*drawn, strict=True), label=name, color=colour, marker=marker, markersize=5, linewidth=1.6)
    axes.set_xlabel(chart.x_label)
    if chart.log_x:
        _log_scale(axes.set_xscale, axes.xaxis)
    if chart.log_y:
        _log_scale(axes.set_yscale, axes.yaxis)
    for place, (x, y, text) in enumerate(chart.notes):
        side = "right" if place and place + 1 == len(chart.notes) else "left" if place == 0 else "center"
        axes.annotate(text, (x, y), xytext=(0, 8), textcoords="offset points", fontsize=8, ha=side)


def _place_notes(figure: Figure) -> None:
    """Move notes up or down to where they cross neither a line nor another note."""
    figure.draw_without_rendering()  # only then it is known where everything stands
    for axes in figure.axes:
        paths = [line.get_transform().transform_path(line.get_path().cleaned()) for line in axes.lines]
        taken: list[Any] = []
        for note in [text for text in axes.texts if hasattr(text, "xyann")]:
            for above in (8, -16, 22, -30, 36, -44):
                note.xyann = (0, above)
                box = note.get_window_extent().padded(2)
                if not (any(path.intersects_bbox(box, filled=False) for path in paths) or box.count_overlaps(taken)):
                    break
            taken.append(box)


def _log_scale(set_scale: Any, axis: Any) -> None:  # noqa: ANN401 - of either axis
    """Numbers as people write them, rather than powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
