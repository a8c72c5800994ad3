"""Plots as SVG and PNG files, drawn by matplotlib (extra `eval`).

Lines and letters are of middling brightness on no background, so that a file can be read on a dark page and on a light
one. A file holds its numbers in its description, which `drawn_data` reads.

Not covered: charts inside a page (svg.py).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from copyspec_engine import ConfigError, missing_extra
from copyspec_engine.evaluation.charts import Bars, Chart, Lines, Plot
from copyspec_engine.evaluation.figures import run_plots
from copyspec_engine.evaluation.records import RunFacts, RunFolder, TurnRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_installed", "drawn_data", "save", "write_plots"]

INK = "#77808b"
COLOURS = ("#2f9e58", "#8a929b", "#4b83d6", "#c7722a", "#a667c5", "#c24d6a", "#8f8a22")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SETTINGS = {
    "svg.hashsalt": "copyspec",  # the same ids each time
    "svg.fonttype": "path",  # the same letters everywhere
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "hatch.linewidth": 0.6,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
}
CAPTION_LETTERS = 118
"""Letters of a caption in a line, over the usual width."""
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def write_plots(
    folder: RunFolder, facts: RunFacts, records: Sequence[TurnRecord], summary: Mapping[str, Any]
) -> list[Path]:
    """Draw the plots of a run into its folder `plots`, each as SVG and as PNG.

    Args:
        folder: of the run.
        facts: of the run.
        records: of complete tasks.
        summary: the content of `summary.json`.

    Raises:
        CopySpecError: matplotlib is not installed.
        ConfigError: the files cannot be written.
    """
    check_installed()
    plots = run_plots(facts, records, summary)
    return [save(plot, folder.path / "plots" / f"{plot.name}.{ending}") for plot in plots for ending in ("svg", "png")]


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
    metadata = (
        {"Title": plot.name, "Description": plot.data, "Date": None, "Creator": None}
        if path.suffix == ".svg"
        else {"Title": plot.name, "Software": None}
    )
    with matplotlib.rc_context(SETTINGS):
        figure = _figure(plot)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata=metadata, transparent=path.suffix == ".svg", dpi=144)
        except OSError as error:
            raise ConfigError(f"Cannot write plot {path}: {error.strerror or error}") from None
    return path


def drawn_data(path: Path) -> str:
    """`Plot.data` of the plot that an SVG file shows; "" if the file is not there or is no such plot."""
    try:
        found = ElementTree.parse(path).getroot().find(f".//{DESCRIPTION}")
    except (OSError, ElementTree.ParseError):
        return ""
    return (found.text or "") if found is not None else ""


def _figure(plot: Plot) -> Figure:
    from matplotlib.figure import Figure

    lines = [line for part in plot.caption.splitlines() for line in textwrap.wrap(part, CAPTION_LETTERS)]
    below = 0.2 * len(lines) + 0.1  # inches
    height = 4.0 + below
    drawn = Figure(figsize=(10, height))
    drawn.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - below / height))
    for axes, chart in zip(drawn.subplots(1, len(plot.charts), squeeze=False)[0], plot.charts, strict=True):
        _style(axes, chart)
        if isinstance(chart, Bars):
            _bars(axes, chart)
        else:
            _lines(axes, chart)
        if len(chart.series) > 1:
            axes.legend(frameon=False, fontsize=9)
    drawn.text(0.01, 0.08 / height, "\n".join(lines), fontsize=8, va="bottom")
    return drawn


def _style(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(chart.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    if chart.reference is not None:
        axes.axhline(chart.reference, color=INK, linewidth=1, linestyle="--")


def _bars(axes: Axes, chart: Bars) -> None:
    width = 0.8 / len(chart.series)
    for place, (name, values) in enumerate(chart.series):
        shown = [(group, value) for group, value in enumerate(values) if value is not None]
        left = [group - 0.4 + (place + 0.5) * width for group, _ in shown]
        axes.bar(
            left,
            [value for _, value in shown],
            width * 0.9,
            label=name,
            color=COLOURS[place % len(COLOURS)],
            hatch=HATCHES[place % len(HATCHES)],
            edgecolor="#ffffff66",
            linewidth=0,
        )
    steep = sum(map(len, chart.groups)) > 80
    axes.set_xticks(
        range(len(chart.groups)), chart.groups, rotation=25 if steep else 0, ha="right" if steep else "center"
    )
    if chart.log:
        _log_scale(axes.set_yscale, axes.yaxis)


def _lines(axes: Axes, chart: Lines) -> None:
    gap = (float("nan"), float("nan"))
    for place, (name, points) in enumerate(chart.series):
        x, y = zip(*(gap if point is None else point for point in points), strict=True)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axes.plot(x, y, label=name, color=colour, marker=marker, markersize=5, linewidth=1.6)
    axes.set_xlabel(chart.x_label)
    if chart.log_x:
        _log_scale(axes.set_xscale, axes.xaxis)
    if chart.log_y:
        _log_scale(axes.set_yscale, axes.yaxis)
    for x, y, text in chart.notes:
        axes.annotate(text, (x, y), xytext=(0, 7), textcoords="offset points", fontsize=8, ha="center")


def _log_scale(set_scale: Any, axis: Any) -> None:  # noqa: ANN401 - of either axis
    """Numbers as people write them, rather than powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
