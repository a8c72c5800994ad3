"""Whether weights rounded to 8 bits cost time on a CPU rather than save it: measured on a model's own layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows
from torch import nn

from copyspec_engine.execution.accelerator import device_name

__all__ = ["linear_seconds", "warn_where_slower"]

logger = logging.getLogger(__name__)

_ROUNDS = 3


@torch.inference_mode()
def linear_seconds(model: nn.Module) -> tuple[float, float]:
    """What one token takes through a model's rounded linear layers, and through the same ones in float32.

    One layer of each shape is measured, on a CPU, in seconds of this thread's work.
    """
    shapes: dict[tuple[int, ...], list[nn.Linear]] = {}
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight.data) is not torch.Tensor:
            shapes.setdefault(tuple(module.weight.shape), []).append(module)
    rounded = wide = 0.0
    for layers in shapes.values():
        layer, x = layers[0], torch.ones(1, layers[0].in_features)
        weight = layer.weight.dequantize().float()
        rounded += len(layers) * _least_seconds(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
        wide += len(layers) * _least_seconds(lambda weight=weight, x=x: F.linear(x, weight))  # type: ignore[misc]
    return rounded, wide


def _least_seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(1 + _ROUNDS):
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return min(found[1:])  # the first one pays for set-up


def warn_where_slower(model: nn.Module, name: str) -> None:
    """Say so, once for a load, where rounded weights are slower than the float32 ones would be."""
    rounded, wide = linear_seconds(model)
    if rounded > wide:
        logger.warning(
            "%s: with quantization='int8' its linear layers take %.1f ms a token on this CPU (%s), and %.1f ms in "
            "float32: leave it out, or use memory='narrow', which takes little memory too",
            name,
            1e3 * rounded,
            device_name(torch.device("cpu")),
            1e3 * wide,
        )
