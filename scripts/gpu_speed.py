"""How fast passes are: attention alone, T(rows, nodes, context) against the memory bus, and recorded conversations.

Used by gpu_check.py. Models have the shape of well-known ones and random weights.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from copyspec_engine import EngineConfig
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.packing import Bucket, Piece, pack
from copyspec_engine.execution.paged_attention import PagedRows, Scoring, attend
from copyspec_engine.lab.bench.command import EngineOptions
from copyspec_engine.lab.bench.engine import measure_engine
from copyspec_engine.lab.measuring import recorded
from copyspec_engine.lab.recorded import curve
from copyspec_engine.lab.recorded.shapes import random_model
from copyspec_engine.testing import ByteTokenizer

__all__ = ["attention_times", "conversations", "step_times"]

Report = dict[str, Any]
HEADS, KV_HEADS, DIM = 32, 8, 128
TARGETS = {"plain step over the limit": 1.25, "T(64) over T(1)": 1.15, "T(256) over T(1)": 1.6}
"""At most this, for a model of 8 billion parameters in bfloat16 on a data-centre GPU."""


def attention_times(device: str, shapes: Sequence[tuple[int, int, int]]) -> Report:
    """Attention alone, for (rows, new tokens of each, tokens before): seconds, and bytes of KV read in a second."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    points = []
    for rows, new, base in shapes:
        num_slots = rows * (base + new)
        slots = np.random.default_rng(0).permutation(num_slots).reshape(rows, -1)
        pieces = [Piece(own, base, [0] * new, DraftTree.chain([0] * (new - 1)), new) for own in slots]
        bucket = Bucket.around(pieces)
        packed = np.zeros(bucket.size(pieces), dtype=np.int32)
        pack(pieces, bucket, num_slots, packed)
        flat = torch.from_numpy(packed).to(device)
        parts = {name: flat[at : at + int(np.prod(shape))].view(shape) for name, (at, shape) in bucket.fields.items()}
        parts["slots"] = flat[bucket.fields["slots"][0] :]
        paged = PagedRows(**{field.name: parts[field.name] for field in fields(PagedRows)})
        query = torch.randn((HEADS, bucket.tokens, DIM), dtype=dtype, device=device)
        keys, values = torch.randn((2, KV_HEADS, num_slots + 1, DIM), dtype=dtype, device=device)
        seconds = _median_seconds(lambda q=query, k=keys, v=values, p=paged: attend(q, k, v, p, Scoring()), device)  # type: ignore[misc]
        read = 2 * KV_HEADS * num_slots * DIM * keys.element_size()
        points.append(
            {"rows": rows, "new": new, "before": base, "seconds": seconds, "kv_bytes_per_s": round(read / seconds)}
        )
    return {"ok": True, "points": points}


def _median_seconds(work: Callable[[], object], device: str) -> float:
    """Of 20 runs; on a GPU by its own clock, of a captured graph, so that launches do not count."""
    for _ in range(3):
        work()
    if device != "cuda":
        return statistics.median(_wall_seconds(work) for _ in range(3))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            work()
    times: list[float] = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 5000)
    return statistics.median(times)


def _wall_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step_times(shape: str, device: str, out_dir: Path, budget_s: float, *, compiled: bool) -> Report:
    """T(rows, nodes, context) of one way of running passes, and how it stands to the memory bus."""
    config = EngineConfig(
        model=shape,
        device=device,
        kv_cache_tokens=max(curve.ROWS) * (max(curve.CONTEXTS) + max(curve.NODES)),
        step_cost=((1, 1.0), (64, 1.1)),
        compile_layers=compiled,
    )
    start = time.perf_counter()
    model = random_model(shape, 2, device, "auto")
    built = time.perf_counter()
    loaded = prepare(model, ByteTokenizer(), config)
    ready = time.perf_counter()
    points = curve.measure_curve(loaded, budget_s)
    limit = curve.measure_limit(model, loaded.info.kv_bytes_per_token)
    report: Report = {
        "ok": True,
        "execution": loaded.info.execution,
        "execution_error": loaded.info.execution_error,
        "build_s": round(built - start, 2),
        "prepare_s": round(ready - built, 2),
        "limit": limit,
        "curve": points,
        "targets": _targets(points, limit),
    }
    report["plot"] = _plot(points, limit, out_dir / f"steps_{shape}_{loaded.info.execution}.svg")
    print(_table(points, limit), flush=True)
    for name, target in report["targets"].items():
        print(f"    {name}: {target['value']} (at most {target['wanted']} wanted)", flush=True)
    del model, loaded
    _free()
    return report


def _targets(points: Sequence[dict[str, float]], limit: dict[str, float]) -> Report:
    """The figures that are aimed for, at the limit's own context; none where the curve does not reach."""
    times = {point["nodes"]: point["seconds"] for point in points if _is_at(point, 1, limit["context"])}
    least = limit["bytes_per_step"] / limit["bandwidth_bytes_per_s"]
    found = {}
    if 1 in times:
        found["plain step over the limit"] = times[1] / least
        found |= {f"T({nodes}) over T(1)": times[nodes] / times[1] for nodes in (64, 256) if nodes in times}
    return {
        name: {"value": round(value, 4), "wanted": TARGETS[name], "met": value <= TARGETS[name]}
        for name, value in found.items()
    }


def _is_at(point: dict[str, float], rows: int, context: float) -> bool:
    return (point["rows"], point["context"]) == (rows, context)


def _table(points: Sequence[dict[str, float]], limit: dict[str, float]) -> str:
    """A line for each rows and context: milliseconds by nodes, and the limit of one node."""
    nodes = sorted({point["nodes"] for point in points})
    lines = ["    rows context " + "".join(f"{f'T({n:g})':>10}" for n in nodes) + "     limit (ms)"]
    for rows, context in sorted({(point["rows"], point["context"]) for point in points}):
        times = {point["nodes"]: point["seconds"] * 1e3 for point in points if _is_at(point, int(rows), context)}
        cells = "".join(f"{times[n]:10.3f}" if n in times else " " * 10 for n in nodes)
        lines.append(f"    {rows:4g} {context:7g} {cells} {_limit_s(limit, rows, context) * 1e3:9.3f}")
    return "\n".join(lines)


def _limit_s(limit: dict[str, float], rows: float, context: float) -> float:
    read = limit["weight_bytes"] + rows * context * limit["kv_bytes_per_token"]
    return read / limit["bandwidth_bytes_per_s"]


def _plot(points: Sequence[dict[str, float]], limit: dict[str, float], path: Path) -> str | None:
    """T by nodes as a picture; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for rows, context in sorted({(point["rows"], point["context"]) for point in points}):
        line = sorted((point["nodes"], point["seconds"] * 1e3) for point in points if _is_at(point, int(rows), context))
        drawn = axes.plot(*zip(*line, strict=True), marker="o", label=f"{rows:g} rows, context {context:g}")
        axes.axhline(_limit_s(limit, rows, context) * 1e3, color=drawn[0].get_color(), linestyle=":", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of each row in a pass")
    axes.set_ylabel("milliseconds (dotted: reading weights and KV once)")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path.name


def conversations(options: EngineOptions, path: Path) -> Report:
    """Recorded answers written by our engine and by transformers: the ratios of `copyspec bench engine`."""
    code = recorded(measure_engine, replace(options, json=path), "scripts/gpu_check.py", Console(width=120))
    _free()
    return {"ok": code == 0, "exit_code": code, "file": path.name}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
