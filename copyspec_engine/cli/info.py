"""`copyspec info`: what is installed and, once it is loaded, how the model sits in memory."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine import EngineConfig, shared_engine
from copyspec_engine.cli.calibrate import kept_curve_of
from copyspec_engine.cli.exits import shown_on

__all__ = ["run_info"]


def run_info(config: EngineConfig, console: Console) -> int:
    """Loads the model and prints what it is, where it runs and what it takes; returns the exit code 0."""
    with console.status(f"Loading the model {escape(config.model)} ...") as status:
        info = shared_engine(config, shown_on(status)).info
    slots, kept = info.num_kv_slots, kept_curve_of(info)
    rows = {
        "model": info.model,
        "read from": info.model_source,
        "architecture": info.architecture,
        "parameters": f"{info.num_parameters:,}",
        "device": _device_name(info.device),
        "dtype": info.dtype if info.quantization is None else f"{info.dtype} ({info.quantization})",
        "longest context": f"{info.max_model_len:,} tokens",
        "KV cache": f"{slots:,} tokens of {info.kv_bytes_per_token:,} bytes, {_size(slots * info.kv_bytes_per_token)}",
        "tool calling": info.tool_calling or "no",
        "drafting": "yes" if info.drafting_error is None else f"no: {info.drafting_error}",
        "answers": info.lossless,
        "cost of a pass": ", ".join(f"{width} tokens: {1000 * cost:.3g} ms" for width, cost in info.step_cost) or "-",
        "cost measured": f"{kept.measured_at}, kept in {kept.path}" if kept else "when it was loaded, not kept",
        "sampling defaults": _options(info.sampling_defaults),
        "defaults not done": ", ".join(info.sampling_defaults_not_done) or "-",
        "CPU threads": str(torch.get_num_threads()),
        **{f"{name} version": version for name, version in sorted(info.versions.items())},
    }
    grid = Table(show_header=False, box=None)
    for name, value in rows.items():
        grid.add_row(f"[bold]{name}[/]", escape(value))
    console.print(grid)
    return 0


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "-"


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    free, total = torch.cuda.mem_get_info(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, {_size(free)} of {_size(total)} free)"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
