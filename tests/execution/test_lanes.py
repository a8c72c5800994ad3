"""Products of rows with weights of all types and with keys and values, against NumPy's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from copyspec_engine.compiled import compiled
from copyspec_engine.execution import lane_attention, lane_products, lanes
from copyspec_engine.execution.lane_products import UNIT
from copyspec_engine.execution.lanes import LANES, WIDE_SCALES

INPUTS = 64
BLOCKS = UNIT // LANES


@compiled
def call(kernel: int, rows: int, given: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> None:
    x, sums = given[0], given[1]
    lane_products.multiply(kernel, rows, x, sums, given.ctypes.data + 16, 0, out.ctypes.data)


@compiled
def attend(
    seen: npt.NDArray[np.int64],
    queries: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """Queries (rows, dim), their products with keys (rows, CHUNK), and sums of values times these (rows, dim)."""
    rows = queries.shape[0]
    lane_attention.score(seen.ctypes.data, rows, queries.ctypes.data, scores.ctypes.data, rows % 2)
    lane_attention.weighted_sum(seen.ctypes.data, rows, scores.ctypes.data, out.ctypes.data, 4 * out.shape[1])


@compiled
def folded(a: npt.NDArray[np.float32]) -> tuple[float, float]:
    vectors = a.size // lanes.WIDTH
    return lanes.greatest(a.ctypes.data, vectors), lanes.total(a.ctypes.data, vectors)


@compiled
def put_all(numbers: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> None:
    for i in range(numbers.size):
        lanes.put_bfloat16(out.ctypes.data + 2 * i, numbers[i])


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
        call(
            lane_products.kernel(kind), rows, np.array([across.ctypes.data, sums.ctypes.data, *columns], np.int64), out
        )
        expected = x[:rows].astype(np.float64) @ weights
        np.testing.assert_allclose(out, expected, atol=2e-6 * np.abs(expected).max())
        found[rows] = out
    assert all((found[rows] == found[8][:rows]).all() for rows in found), "a row's bits depend on the others"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 9, 37, lane_attention.CHUNK])
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 80, 200])
def test_queries_over_slots(dim: int, count: int, stored: torch.dtype) -> None:
    rng = np.random.default_rng(dim)
    keys, values = (torch.from_numpy(rng.standard_normal((150, dim))).to(stored) for _ in range(2))
    slots = rng.permutation(150)[:count]
    kind = lanes.FLOAT32 if stored == torch.float32 else lanes.BFLOAT16
    seen = np.array([keys.data_ptr(), values.data_ptr(), slots.ctypes.data, count, dim, kind], np.int64)
    queries = rng.standard_normal((lane_attention.ROWS_AT_ONCE, dim)).astype(np.float32)
    exact = queries.astype(np.float64) @ keys.double().numpy()[slots].T
    found = {}
    for rows in range(1, lane_attention.ROWS_AT_ONCE + 1):
        scores, out = np.zeros((rows, lane_attention.CHUNK), np.float32), np.full((rows, dim), np.nan, np.float32)
        attend(seen, queries[:rows], scores, out)
        assert (scores[:, count : -(-count // lanes.WIDTH) * lanes.WIDTH] == scores[:, count - 1 : count]).all()
        np.testing.assert_allclose(scores[:, :count], exact[:rows], rtol=1e-5, atol=3e-5)
        sums = scores[:, :count].astype(np.float64) @ values.double().numpy()[slots]
        np.testing.assert_allclose(out, sums, rtol=1e-5, atol=2e-6 * np.abs(exact).sum())
        found[rows] = scores[:, :count], out
    for rows, pair in found.items():
        for got, of_all in zip(pair, found[lane_attention.ROWS_AT_ONCE], strict=True):
            assert (got == of_all[:rows]).all(), "a row's bits depend on the others"


@pytest.mark.parametrize("vectors", [1, 2, 5])
def test_the_greatest_and_the_sum_of_vectors(vectors: int) -> None:
    numbers = np.random.default_rng(vectors).standard_normal(vectors * lanes.WIDTH).astype(np.float32)
    greatest, total = folded(numbers)
    assert greatest == numbers.max()
    assert total == pytest.approx(float(numbers.astype(np.float64).sum()), abs=1e-5)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    odd = np.array([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, np.inf, -np.inf, np.nan], np.float32)
    numbers = np.concatenate((odd, np.random.default_rng(0).standard_normal(1000).astype(np.float32)))
    bits = np.zeros(numbers.size, np.uint16)
    put_all(numbers, bits)
    got, expected = torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(numbers).bfloat16()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[:8], expected.signbit()[:8])


@pytest.mark.parametrize("count", [1, 7, 16, 64, 80, 200])
def test_dot(count: int) -> None:
    a, b = np.random.default_rng(count).standard_normal((2, count)).astype(np.float32)
    assert dot(a, b) == pytest.approx(float(a.astype(np.float64) @ b), abs=1e-5)
