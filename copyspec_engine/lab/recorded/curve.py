"""What a pass of our runner costs, and what the memory bus would allow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.loop.request import Request
from copyspec_engine.loop.scheduler import ScheduledBatch, ScheduledRow
from copyspec_engine.values.config import GenerationRequest, NoDrafter

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
        if rows * (context + nodes) > model.num_slots or context + nodes > model.max_model_len:
            continue
        batch = _batch(model, rows, context)
        drafts = [DraftTree((0,) * (nodes - 1), tuple(range(-1, nodes - 2)))] * rows
        seconds = _time_pass(model, batch, drafts)
        for _ in range(4):  # a shape's first pass pays for set-up
            if time.perf_counter() + seconds < deadline:
                seconds = min(seconds, _time_pass(model, batch, drafts))
        points.append({"rows": rows, "nodes": nodes, "context": context, "seconds": round(seconds, 7)})
    return sorted(points, key=lambda point: (point["rows"], point["context"], point["nodes"]))


def _cases() -> Iterator[tuple[int, int, int]]:
    for rows in ROWS:
        for context in CONTEXTS:
            for nodes in NODES:
                yield rows, context, nodes


def _batch(model: LoadedModel, rows: int, context: int) -> ScheduledBatch:
    """Rows whose last token is to be read, each on slots of its own."""
    each = model.num_slots // rows
    return ScheduledBatch(
        tuple(ScheduledRow(_sequence(model, context, row * each, each), 1, samples=True) for row in range(rows))
    )


def _sequence(model: LoadedModel, context: int, first_slot: int, num_slots: int) -> Request:
    ids = [0] * (context + 1)
    return Request(
        request=GenerationRequest(prompt_token_ids=ids),
        token_ids=ids,
        num_prompt_tokens=len(ids),
        max_total_tokens=num_slots,
        eos_token_ids=frozenset(),
        drafting=NoDrafter(),
        seed=0,
        text=model.tokenizer.text_stream(()),
        slots=np.arange(first_slot, first_slot + num_slots, dtype=np.int64),
        num_computed=context,
    )


def _time_pass(model: LoadedModel, batch: ScheduledBatch, drafts: list[DraftTree]) -> float:
    begin = time.perf_counter()
    model.runner.forward(batch, drafts).argmax(-1).tolist()
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
