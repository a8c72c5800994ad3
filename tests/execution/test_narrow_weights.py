"""Narrow weights stand for what the float32 weights are, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from copyspec_engine.execution.narrow_panels import dequantise_across
from copyspec_engine.execution.narrow_weights import LANES, NarrowWeight, from_gguf, narrow_weight

OUT, IN = 43, 768
"""A last block that is not full, and several blocks of each format in a row."""
HALVES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q4_K: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,), Kind.Q8_0: (0,),
}  # fmt: skip
"""Where the bytes of a block are float16 numbers."""
RNG = np.random.default_rng(7)


def random_bytes(kind: Kind, rows: int, width: int, most: float = 50_000.0) -> np.ndarray[Any, Any]:
    """A tensor of any bytes but for scales, which are finite."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = RNG.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    for place in HALVES.get(kind, ()):
        numbers = RNG.uniform(-1.0, 1.0, raw.shape[:2]) * most * 2.0 ** RNG.integers(-30, 1, raw.shape[:2])
        raw[..., place : place + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def assert_laid_out(weight: NarrowWeight, width: int) -> None:
    for array in (weight.codes, weight.scales, weight.least):
        if array is not None:
            assert array.flags.c_contiguous
            assert array.ctypes.data % 64 == 0
            assert array.shape[::2] == (-(-weight.out_features // LANES), LANES)
            assert not array[-1, :, weight.out_features % LANES or LANES :].any()
    assert weight.in_features == width
    assert weight.nbytes == sum(a.nbytes for a in (weight.codes, weight.scales, weight.least) if a is not None)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_what_a_file_says_is_what_is_read(kind: Kind) -> None:
    raw = random_bytes(kind, OUT, IN)
    expected = dequantize(raw, kind)
    weight = from_gguf(raw, kind, IN)
    assert weight is not None
    assert_laid_out(weight, IN)
    assert weight.kind == ("4-bit" if kind.name.startswith("Q4") else "8-bit")
    assert weight.codes.dtype == (np.uint8 if weight.kind == "4-bit" else np.int8)
    assert weight.group == (16 if kind == Kind.Q6_K else 32)
    assert (weight.least is None) == (kind in (Kind.Q5_0, Kind.Q6_K, Kind.Q8_0))
    assert np.array_equal(weight.dequantised(0, OUT), expected)
    assert np.array_equal(weight.dequantised(19, 38), expected[19:38])
    ids = np.array([42, 0, 17, 17, 31])
    assert np.array_equal(weight.rows(ids), expected[ids])


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_many_rows_are_read_in_panels(kind: Kind) -> None:
    raw = random_bytes(kind, 4112, 256)
    weight = from_gguf(raw, kind, 256)
    assert weight is not None
    assert np.array_equal(weight.dequantised(0, 4112), dequantize(raw, kind))


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_scales_are_half_precision_where_that_is_exact(kind: Kind) -> None:
    weight = from_gguf(random_bytes(kind, OUT, IN, most=1.0), kind, IN)
    assert weight is not None
    assert weight.scales is not None
    assert weight.scales.dtype == (np.float32 if kind.name.endswith("K") else np.float16)
    assert weight.least is None or weight.least.dtype == weight.scales.dtype


def test_scales_are_float32_where_the_least_value_needs_it() -> None:
    """-8 times a scale above 8,192 is beyond float16; here behind panels that were laid out already."""
    raw = random_bytes(Kind.Q4_0, 4112, 256, most=1.0)
    raw[-1, :2] = np.array([60_000.0], np.float16).view(np.uint8)
    weight = from_gguf(raw, Kind.Q4_0, 256)
    assert weight is not None
    assert weight.scales is not None
    assert weight.least is not None
    assert weight.scales.dtype == weight.least.dtype == np.float32
    assert_laid_out(weight, 256)
    assert np.array_equal(weight.dequantised(0, 4112), dequantize(raw, Kind.Q4_0))


def test_codes_lie_side_by_side_as_the_kernels_read_them() -> None:
    raw = random_bytes(Kind.Q4_1, OUT, 64)
    weight = from_gguf(raw, Kind.Q4_1, 64)
    assert weight is not None
    nibbles = raw.reshape(OUT, 2, 20)[33, 1, 4:]
    assert weight.codes[2, 16 : 16 + 8, 1].tolist() == [
        int(low) | int(high) << 4 for low, high in (nibbles & 15).reshape(8, 2)
    ]
    assert weight.codes[2, 24:32, 1].tolist() == [
        int(low) | int(high) << 4 for low, high in (nibbles >> 4).reshape(8, 2)
    ]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q2_K, Kind.IQ4_NL], ids=lambda kind: kind.name)
def test_other_formats_stay_wide(kind: Kind) -> None:
    assert from_gguf(random_bytes(kind, OUT, IN), kind, IN) is None


def halves(dtype: torch.dtype, out: int = OUT, width: int = 50) -> torch.Tensor:
    """Every kind of number but infinity and NaN: also the smallest."""
    bits = torch.from_numpy(RNG.integers(0, 2**16, (out, width), dtype=np.uint16)).view(dtype)
    return torch.where(bits.isfinite(), bits, torch.zeros((), dtype=dtype))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [False, True])
def test_half_precision_is_kept_also_where_it_was_upcast(stored: torch.dtype, upcast: bool) -> None:
    values = halves(stored)
    weight = narrow_weight(values.float() if upcast else values)
    assert weight is not None
    assert_laid_out(weight, 50)
    assert (weight.kind, weight.group, weight.scales, weight.least) == (str(stored).split(".")[1], 0, None, None)
    assert np.array_equal(weight.dequantised(0, OUT), values.float().numpy())
    assert np.array_equal(weight.rows(np.array([40, 3])), values[[40, 3]].float().numpy())
    assert weight.nbytes == 2 * 48 * 50


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_half_precision_of_a_file_is_kept(kind: Kind, dtype: torch.dtype) -> None:
    values = halves(dtype, width=64)
    weight = from_gguf(values.view(torch.uint8).numpy(), kind, 64)
    assert weight is not None
    assert weight.kind == str(dtype).split(".")[1]
    assert np.array_equal(weight.dequantised(0, OUT), values.float().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_value_of_full_precision_keeps_a_weight_wide(dtype: torch.dtype) -> None:
    values = halves(dtype, 4112, 256).float()
    assert narrow_weight(values) is not None
    values[-1, -1] = 1.0 + 2.0**-23
    assert narrow_weight(values) is None
    assert narrow_weight(values.double()) is None


def test_a_weight_that_is_no_whole_row_after_row_is_read_too() -> None:
    values = halves(torch.bfloat16, 64, 64).T
    for given in (values, values.float()):
        weight = narrow_weight(given)
        assert weight is not None
        assert np.array_equal(weight.dequantised(0, 64), values.float().numpy())


def test_fewer_rows_than_a_block_are_one_block() -> None:
    raw = random_bytes(Kind.Q8_0, 5, 64)
    weight = from_gguf(raw, Kind.Q8_0, 64)
    assert weight is not None
    assert_laid_out(weight, 64)
    assert np.array_equal(weight.dequantised(0, 5), dequantize(raw, Kind.Q8_0))


@pytest.mark.parametrize("kind", [*HALVES, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_rows_are_the_same_as_columns(kind: Kind) -> None:
    values = halves(torch.float16 if kind == Kind.F16 else torch.bfloat16, width=IN).view(torch.uint8).numpy()
    weight = from_gguf(random_bytes(kind, OUT, IN) if kind in HALVES else values, kind, IN)
    assert weight is not None
    columns = np.full((IN, 2 * LANES), np.nan, np.float32)
    dequantise_across(weight, slice(1, 3), columns)
    assert np.array_equal(columns[:, : OUT - LANES].T, weight.dequantised(LANES, OUT))
    assert not columns[:, OUT - LANES :].any()
