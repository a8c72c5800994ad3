"""`copyspec calibrate`: measures what a pass costs by its tokens, keeps it for later loads, and shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine import CopySpecError, Engine, EngineConfig, EngineInfo
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.files import check_writable, write_text
from copyspec_engine.execution.calibration import KeptCurve, kept_curves
from copyspec_engine.values.folders import cache_dir

__all__ = ["CalibrateOptions", "kept_curve_of", "run_calibrate"]


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What to measure, and where to write the points."""

    config: EngineConfig
    json: Path | None
    """File for [[tokens, seconds], ...]."""


def run_calibrate(options: CalibrateOptions, console: Console) -> int:
    """Loads the model, which measures it; returns the exit code: 1 if the curve could not be kept.

    Raises:
        ConfigError: the file for the points cannot be written.
        CopySpecError: the model runs without drafting.
    """
    if options.json:
        check_writable(options.json, "--json")
    with loading(options.config.model) as shown:
        engine = Engine(options.config.model_copy(update={"step_cost": "remeasure"}), on_progress=shown)
    with engine:
        info = engine.info
    if info.drafting_error is not None:
        raise CopySpecError(f"There is nothing to measure: {info.model} runs without drafting. {info.drafting_error}")
    heading = f"Cost of a pass of {info.model} on {info.device} in {info.dtype}"
    console.print(escape(heading), _table(info), sep="\n")
    if options.json:
        write_text(options.json, json.dumps(info.step_cost) + "\n", "--json")
        console.print(f"Points written to {escape(str(options.json))}.", soft_wrap=True)
    kept = kept_curve_of(info)
    if kept is None:
        console.print(f"[red]Not kept:[/] {escape(str(cache_dir()))} cannot be written.", soft_wrap=True)
        return 1
    console.print(f"Kept in {escape(str(kept.path))}; later loads use it while it holds.", soft_wrap=True)
    return 0


def kept_curve_of(info: EngineInfo) -> KeptCurve | None:
    """Where the curve that an engine uses is kept; None if it is not, or was given by the caller."""
    return next((curve for curve in kept_curves() if curve.cost.points == info.step_cost), None)


def _table(info: EngineInfo) -> Table:
    grid = Table(box=box.SIMPLE)
    for heading in ("tokens", "ms", "passes of one token"):
        grid.add_column(heading, justify="right")
    single = info.step_cost[0][1]
    for width, seconds in info.step_cost:
        grid.add_row(str(width), f"{1000 * seconds:.3g}", f"{seconds / single:.2f}")
    return grid
