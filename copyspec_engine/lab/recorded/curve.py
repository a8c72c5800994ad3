"""What a pass of our runner costs, and what the memory bus would allow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import LoadedModel

__all__ = ["CONTEXTS", "NODES", "ROWS", "measure_curve", "measure_limit"]

ROWS = (1, 8, 16)
NODES = (1, 64, 256, 16, 4)
"""Tokens of a row in a pass, from coarse to fine: the last one sampled and its draft."""
CONTEXTS = (256, 2048)


def measure_curve(model: LoadedModel, budget_s: float) -> list[dict[str, float]]:
    """Least seconds of passes of `rows` sequences with `nodes` tokens each behind `context` others.

    Must run before any request: it writes over KV slots. Stops where the budget or the KV pool ends; one pass is always
    measured.
    """
    deadline = time.perf_counter() + budget_s
    points: list[dict[str, float]] = []
    for rows, context, nodes in _cases():
        if points and time.perf_counter() > deadline:
            break
        if rows * (context + nodes) > model.info.num_kv_slots or context + nodes > model.info.max_model_len:
            continue
        pieces = _pieces(model.info.num_kv_slots, rows, context, nodes)
        seconds = _time_pass(model, pieces)
        for _ in range(4):  # a shape's first pass pays for set-up
            if time.perf_counter() + seconds < deadline:
                seconds = min(seconds, _time_pass(model, pieces))
        points.append({"rows": rows, "nodes": nodes, "context": context, "seconds": round(seconds, 7)})
    return sorted(points, key=lambda point: (point["rows"], point["context"], point["nodes"]))


def _cases() -> Iterator[tuple[int, int, int]]:
    for rows in ROWS:
        for context in CONTEXTS:
            for nodes in NODES:
                yield rows, context, nodes


def _pieces(num_slots: int, rows: int, context: int, nodes: int) -> list[Piece]:
    """Rows whose last token is to be read with a draft behind it, each on slots of its own."""
    draft = DraftTree.chain((0,) * (nodes - 1))
    each = np.arange(num_slots, dtype=np.int64)[: num_slots // rows * rows].reshape(rows, -1)
    return [Piece(slots, context, [0] * nodes, draft, nodes) for slots in each]


def _time_pass(model: LoadedModel, pieces: list[Piece]) -> float:
    begin = time.perf_counter()
    model.runner.forward(pieces).argmax(-1).tolist()
    return time.perf_counter() - begin


def measure_limit(model: PreTrainedModel, kv_bytes_per_token: int, context: int = CONTEXTS[0]) -> dict[str, float]:
    """What a step of one token behind `context` others reads, and how fast this memory can be read and written.

    An embedding table that is not the head as well is not read: a step looks up one row.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if table.weight is not head.weight:
        weights -= table.weight.numel() * table.weight.element_size()
    return {
        "bytes_per_step": weights + context * kv_bytes_per_token,
        "bandwidth_bytes_per_s": round(_copy_bandwidth(model.device)),
        "weight_bytes": weights,
        "kv_bytes_per_token": kv_bytes_per_token,
        "context": context,
    }


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by the best of some big copies."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
