"""What a model's passes cost here: measured at load, and kept for the next one (calibration.py)."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from copyspec_engine.drafting.cost import Points, undisturbed
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import calibration
from copyspec_engine.execution.accelerator import device_name
from copyspec_engine.execution.attention import (
    ATTENTION_NAME,
)
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.execution.threads import one_torch_thread
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.info import Execution
from copyspec_engine.values.tokens import TokenArray

__all__ = ["facts_of", "find_pass_cost", "measure_pass_cost"]

STEP_WIDTHS = (1, 2, 16, 4, 64, 8, 32, 256, 128)
"""Tokens of the passes that are measured, from coarse to fine: the curve's first step decides about most drafts."""
_LEAST_WIDTHS = 4
"""How many of them are measured on the slowest model."""
_CALIBRATION_CONTEXT = 256


def find_pass_cost(
    runner: ModelRunner, model: PreTrainedModel, config: EngineConfig, room: int, execution: Execution
) -> Points:
    """From the cache, or measured and kept there (see `EngineConfig.step_cost`).

    Of narrow passes the runner then takes those that are faster than wide ones.

    Args:
        runner: of the model.
        model: in memory.
        config: what was asked for.
        room: tokens that fit a pass with its context.
        execution: how its passes run.
    """
    context = min(_CALIBRATION_CONTEXT, room // 2)
    facts = facts_of(model, config.model)
    facts |= {"context": str(context), "max_width": str(min(room - context, max(STEP_WIDTHS)))}
    facts |= {"execution": execution, "exact": str(runner.exact_widths)}
    facts |= {"most_narrow_tokens": str(runner.narrow_tokens)}
    if runner.store.dtype is not None:
        facts |= {"kv_dtype": str(runner.store.dtype).removeprefix("torch.")}
    measure = partial(_measure_both_ways, runner, runner.narrow_tokens, context, room)

    def check(widths: tuple[int, ...], narrow_tokens: int) -> Points:
        runner.narrow_tokens = narrow_tokens
        return measure_pass_cost(runner, context, room, widths, budget_s=0.1)

    if config.step_cost == "remeasure":
        cost = measure(budget_s=5.0)
        calibration.keep(facts, cost)
    else:
        cost = calibration.kept_or_measured(facts, measure, check)
    runner.narrow_tokens = cost.narrow_tokens
    return cost.points


def _measure_both_ways(
    runner: ModelRunner, most: int, context: int, room: int, budget_s: float = 1.0
) -> calibration.PassCost:
    """Measure passes of up to `most` tokens as narrow and as wide ones, and take the faster way."""
    runner.narrow_tokens = most
    narrow = measure_pass_cost(runner, context, room, budget_s=budget_s)
    if not most or runner.exact_widths is not None:  # in exact ones all are narrow
        return calibration.PassCost(narrow, most)
    runner.narrow_tokens = 0
    wide = dict(measure_pass_cost(runner, context, room, budget_s=budget_s))
    faster = max((width for width, s in narrow if width <= most and s <= wide.get(width, s)), default=0)
    points = undisturbed([(width, s if width <= faster else wide.get(width, s)) for width, s in narrow])
    return calibration.PassCost(points, faster)


def measure_pass_cost(
    runner: ModelRunner, context: int, room: int, widths: Sequence[int] = STEP_WIDTHS, budget_s: float = 1.0
) -> Points:
    """Least seconds of passes of `widths` tokens behind `context` others; uses the pool's first `room` slots.

    Must run before any request: it writes over those slots. Goes round all widths for as long as `budget_s` lasts,
    so that a burst of other load cannot spoil one of them; round the narrow ones first, since behind a wide one workers
    of OpenMP still spin. On a slow model it stops at the first few, at least four, which is why `widths` go from coarse
    to fine.
    """
    slots = np.arange(room, dtype=np.int64)
    _time_pass(runner, slots, context, 1)  # the first pass of all makes the KV tensors
    deadline = time.perf_counter() + budget_s
    least: dict[int, float] = {}
    widest = room if runner.exact_widths is None else runner.exact_widths[-1]
    for width in (width for width in widths if width <= widest and context + width <= room):
        if len(least) >= min(_LEAST_WIDTHS, len(widths)) and time.perf_counter() > deadline:
            break
        seconds = _time_pass(runner, slots, context, width)
        if runner.device.type != "cpu" or seconds < budget_s / 10:  # a width's first pass pays for set-up
            deadline += seconds if runner.is_static else 0.0  # there it takes most of the budget
            seconds = _time_pass(runner, slots, context, width)
        least[width] = seconds
    narrow = [width for width in least if width <= runner.narrow_tokens]
    wide = [width for width in least if width > runner.narrow_tokens]
    rest = deadline - time.perf_counter()
    for group, until in ((narrow, deadline - rest / 2 if wide else deadline), (wide, deadline)):
        while group and time.perf_counter() + sum(least[width] for width in group) < until:
            for width in group:
                least[width] = min(least[width], _time_pass(runner, slots, context, width))
    return undisturbed(sorted((least | _stairs(runner.exact_widths or (), least)).items()))


def _stairs(exact_widths: Sequence[int], seconds: Mapping[int, float]) -> dict[int, float]:
    """Where passes are filled up: what the narrowest one takes that is filled up to each measured width."""
    pairs = pairwise((0, *exact_widths))
    return {below + 1: seconds[width] for below, width in pairs if below and width in seconds}


def _time_pass(runner: ModelRunner, slots: TokenArray, context: int, width: int) -> float:
    clock = _clock(runner.device)
    begin = clock()
    logits = runner.run([Piece(slots, context, [0] * width, DraftTree(), num_logits=width)])
    with one_torch_thread():  # as a step does
        logits.argmax(-1).tolist()
    return clock() - begin


def _clock(device: torch.device) -> Callable[[], float]:
    """The clock for a pass: on a CPU that of this thread's own work, which stands still while others have the core.

    The calling thread does its share of every parallel region, so that its work takes as long as the pass would on a
    machine that does nothing else. Windows counts it in steps of 16 ms, which is too coarse.
    """
    return time.thread_time if device.type == "cpu" and os.name == "posix" else time.perf_counter


def facts_of(model: PreTrainedModel, name: str) -> dict[str, str]:
    """All of model and machine that a pass's cost and its order of sums depend on; weights by their shapes and type."""
    device = model.device
    on_cpu = device.type == "cpu"
    return {
        "model": name,
        "architecture": type(model).__name__,
        "config": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
        "parameters": str(sum(parameter.numel() for parameter in model.parameters())),
        "device": device_name(device),
        "threads": f"{torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}" if on_cpu else "",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": ATTENTION_NAME,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
