"""Float32 of some rows of a narrow weight, for passes of many tokens: as fast as memory takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.execution.narrow_weights import LANES, NarrowWeight

__all__ = ["dequantise_across"]

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


def dequantise_across(weight: NarrowWeight, blocks: slice, out: FloatArray) -> None:
    """Write rows of a weight as columns, bit for bit as `NarrowWeight.dequantised` has them.

    Args:
        weight: of any kind.
        blocks: which blocks of rows; start and stop are given.
        out: shape (in, LANES * blocks); the lanes behind the last row are zeros.
    """
    codes = weight.codes[blocks]
    if weight.kind == "bfloat16":
        _bfloat16(codes, out)
    elif weight.scales is None:
        sides = codes.view(np.float16).transpose(1, 0, 2)
        out.reshape(sides.shape)[:] = sides
    else:
        scales = weight.scales[blocks].astype(np.float32, copy=False)
        least = scales if weight.least is None else weight.least[blocks].astype(np.float32, copy=False)
        if weight.kind == "4-bit":
            _four_bits(codes, scales, least, weight.group // 2, out)
        else:
            _eight_bits(codes, scales, least, weight.group, weight.least is not None, out)


@compiled
def _bfloat16(codes: Array, out: FloatArray) -> None:
    for i in range(codes.shape[1]):
        for b in range(codes.shape[0]):
            for lane in range(LANES):
                out[i, b * LANES + lane] = np.uint32(np.uint32(codes[b, i, lane]) << np.uint32(16)).view(np.float32)


@compiled
def _four_bits(codes: Array, scales: FloatArray, least: FloatArray, pairs: int, out: FloatArray) -> None:
    """Pairs: bytes that share a scale."""
    for b in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            group = i // pairs
            for lane in range(LANES):
                code, scale, low = codes[b, i, lane], scales[b, group, lane], least[b, group, lane]
                out[2 * i, b * LANES + lane] = scale * np.float32(code & np.uint8(15)) + low
                out[2 * i + 1, b * LANES + lane] = scale * np.float32(code >> np.uint8(4)) + low


@compiled
def _eight_bits(
    codes: Array, scales: FloatArray, least: FloatArray, group: int, has_least: bool, out: FloatArray
) -> None:
    for b in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            g = i // group
            for lane in range(LANES):
                value = scales[b, g, lane] * np.float32(codes[b, i, lane])
                out[i, b * LANES + lane] = value + least[b, g, lane] if has_least else value
