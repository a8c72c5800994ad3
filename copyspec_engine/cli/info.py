"""`copyspec info`: what is installed and, once it is loaded, how the model sits in memory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine import EngineConfig, EngineInfo, inspect_model
from copyspec_engine.cli.calibrate import kept_curve_of
from copyspec_engine.cli.exits import loading

__all__ = ["for_a_report", "run_info"]

_OF_THE_USER = ("memory_path", "memory_error")


def run_info(config: EngineConfig, console: Console, *, as_json: bool = False) -> int:
    """Loads the model and prints what it is, where it runs and what it takes; returns the exit code 0.

    Args:
        config: what to load.
        console: to print on.
        as_json: print what belongs into a report of a bug instead.
    """
    with loading(config.model) as shown:
        info = inspect_model(config, shown)
    if as_json:
        console.print_json(json.dumps(for_a_report(info)))
    else:
        _print(_rows(info), console)
    return 0


def for_a_report(info: EngineInfo) -> dict[str, Any]:
    """All of `info` that others may read: of a model in a folder only the folder's name, and no other paths."""
    facts = {name: value for name, value in dataclasses.asdict(info).items() if name not in _OF_THE_USER}
    for name in ("model", "draft_model", "model_source", "draft_model_source"):
        facts[name] = facts[name] and _without_folders(facts[name])
    for name in ("drafting_error", "execution_error", "draft_model_error"):
        if facts[name]:
            facts[name] = facts[name].replace(info.model, facts["model"]).replace(str(Path.home()), "~")
    return {"answers": info.lossless, **facts}


def _without_folders(model: str) -> str:
    path = Path(os.path.expanduser(model))
    return path.name if path.exists() or path.is_absolute() else model


def _rows(info: EngineInfo) -> dict[str, str]:
    slots, kept = info.num_kv_slots, kept_curve_of(info)
    return {
        "model": info.model,
        "read from": info.model_source,
        "architecture": info.architecture,
        "parameters": f"{info.num_parameters:,}",
        "weights": f"{_size(info.weight_bytes)} in {info.dtype} and {_size(info.narrow_weight_bytes)} in fewer bits",
        "device": _device(info),
        "dtype": info.dtype if info.quantization is None else f"{info.dtype} ({info.quantization})",
        "longest context": f"{info.max_model_len:,} tokens",
        "KV cache": f"{slots:,} tokens of {info.kv_bytes_per_token:,} bytes in {info.kv_dtype or info.dtype}, "
        f"{_size(slots * info.kv_bytes_per_token)}",
        "tool calling": info.tool_calling or "no",
        "drafting": "yes" if info.drafting_error is None else f"no: {info.drafting_error}",
        "answers": info.lossless,
        "cost of a pass": ", ".join(_cost(width, seconds) for width, seconds in info.step_cost) or "-",
        "cost measured": f"{kept.measured_at}, kept in {kept.path}" if kept else "when it was loaded, not kept",
        "sampling defaults": _options(info.sampling_defaults),
        "defaults not done": ", ".join(info.sampling_defaults_not_done) or "-",
        "loading took": ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in info.load_seconds.items()),
        "check": _check(info),
        "passes": info.execution + (f" ({info.execution_error})" if info.execution_error else ""),
        "CPU threads": f"{info.cpu_threads}, {info.cpu_features}",
        "system": info.system,
        **{f"{name} version": version for name, version in sorted(info.versions.items())},
    }


def _print(rows: dict[str, str], console: Console) -> None:
    """A row for each value; a word that finds no room beside the names, a path, stays one word to copy."""
    width = max(map(cell_len, rows))
    for name, value in rows.items():
        if max(map(cell_len, value.split()), default=0) > console.width - width - 3:
            console.print(f" [bold]{name:{width}}[/] {escape(value)}", soft_wrap=True)
            continue
        grid = Table(show_header=False, box=None)
        grid.add_column(no_wrap=True, width=width)
        grid.add_column()
        grid.add_row(f"[bold]{name}[/]", escape(value))
        console.print(grid)


def _cost(width: int, seconds: float) -> str:
    return f"{width} token{'s' * (width > 1)}: {1000 * seconds:.3g} ms"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "-"


def _device(info: EngineInfo) -> str:
    free, total = info.device_memory
    return f"{info.device} ({info.device_name}, {_size(free)} of {_size(total)} free)"


def _check(info: EngineInfo) -> str:
    if info.check_difference is None:
        return "-"
    return f"logits differ from the model's own by {info.check_difference:.2g}"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"
