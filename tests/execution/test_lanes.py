"""Products of rows with weights of all types, against NumPy's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from copyspec_engine.compiled import compiled
from copyspec_engine.execution import lanes
from copyspec_engine.execution.lanes import LANES, UNIT, WIDE_SCALES

INPUTS = 64
BLOCKS = UNIT // LANES


@compiled
def call(kernel: int, rows: int, given: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> None:
    x, sums = given[0], given[1]
    lanes.multiply(kernel, rows, x, sums, given.ctypes.data + 16, 0, out.ctypes.data)


@compiled
def sum_weighted(
    weights: npt.NDArray[np.float32],
    values: npt.NDArray[np.float32],
    slots: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
) -> None:
    lanes.weighted_sum(
        weights.ctypes.data, values.ctypes.data, slots.ctypes.data, len(slots), values.shape[1], out.ctypes.data
    )


@compiled
def dot(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return lanes.dot(a.ctypes.data, b.ctypes.data, len(a))


def weights_of(kind: int, rng: np.random.Generator) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.float64]]:
    """Codes, scales and least values of a unit, and what they stand for, shape (INPUTS, UNIT)."""
    stored, shape = kind % WIDE_SCALES, (BLOCKS, INPUTS, LANES)
    empty = np.zeros(0, np.float32)
    if stored in (lanes.FLOAT32, lanes.BFLOAT16, lanes.FLOAT16):
        values: npt.NDArray[Any] = rng.standard_normal(shape).astype(np.float32)
        codes: npt.NDArray[Any] = values
        if stored == lanes.BFLOAT16:
            codes = (values.view(np.uint32) >> 16).astype(np.uint16)
            values = (codes.astype(np.uint32) << 16).view(np.float32)
        elif stored == lanes.FLOAT16:
            values = codes = values.astype(np.float16)
        return [codes, empty, empty], in_lanes(values)
    group = 16 if stored == lanes.EIGHT_BITS_BY_16 else 32
    scale_type = np.float32 if kind >= WIDE_SCALES else np.float16
    scales, least = (rng.standard_normal((BLOCKS, INPUTS // group, LANES)).astype(scale_type) for _ in range(2))
    if stored == lanes.FOUR_BITS:
        codes = rng.integers(0, 256, (BLOCKS, INPUTS // 2, LANES), dtype=np.uint8)
        values = np.stack((codes & 15, codes >> 4), axis=2).reshape(shape)
    else:
        values = codes = rng.integers(-128, 128, shape, dtype=np.int8)
    values = values * np.repeat(scales.astype(np.float64), group, axis=1)
    if stored in (lanes.FOUR_BITS, lanes.EIGHT_BITS_LEAST):
        values += np.repeat(least.astype(np.float64), group, axis=1)
    return [codes, scales, least], in_lanes(values)


def in_lanes(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = values.astype(np.float64).transpose(1, 0, 2).reshape(INPUTS, UNIT)
    return found


@pytest.mark.parametrize("kind", lanes.KINDS)
def test_rows_times_weights_of_each_kind(kind: int) -> None:
    rng = np.random.default_rng(kind)
    stored, weights = weights_of(kind, rng)
    x = rng.standard_normal((8, INPUTS)).astype(np.float32)
    found = {}
    for rows in (1, 2, 4, 8):
        across = np.ascontiguousarray(x[:rows].T)
        sums = np.ascontiguousarray(x[:rows].reshape(rows, -1, 32).sum(-1).T)
        out = np.zeros((rows, UNIT), np.float32)
        codes, scales, least = (array.ctypes.data for array in stored)
        columns = [0, codes, scales, least, 0, INPUTS, UNIT, 0, 0]
        call(lanes.kernel(kind), rows, np.array([across.ctypes.data, sums.ctypes.data, *columns], np.int64), out)
        expected = x[:rows].astype(np.float64) @ weights
        np.testing.assert_allclose(out, expected, atol=2e-6 * np.abs(expected).max())
        found[rows] = out
    assert all((found[rows] == found[8][:rows]).all() for rows in found), "a row's bits depend on the others"


@pytest.mark.parametrize("dim", [1, 7, 16, 64, 80, 200])
def test_sums_over_slots(dim: int) -> None:
    rng = np.random.default_rng(dim)
    values, weights = rng.standard_normal((40, dim)).astype(np.float32), rng.random(9).astype(np.float32)
    slots = rng.permutation(40)[:9]
    out = np.ones(dim, np.float32)
    sum_weighted(weights, values, slots, out)
    np.testing.assert_allclose(out, 1 + weights.astype(np.float64) @ values[slots], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 16, 64, 80, 200])
def test_dot(count: int) -> None:
    a, b = np.random.default_rng(count).standard_normal((2, count)).astype(np.float32)
    assert dot(a, b) == pytest.approx(float(a.astype(np.float64) @ b), abs=1e-5)
