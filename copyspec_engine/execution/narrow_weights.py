"""Weights in the precision that they came in, laid out so that a kernel reads them once and in order.

What a number stands for is that of the float32 weight, to the last bit; only its bytes are fewer. Output rows lie side
by side in blocks of `LANES`, so that one vector instruction serves one input of a whole block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = ["LANES", "NarrowWeight", "from_gguf", "narrow_weight"]

LANES = 16
"""Output rows of a block."""
_ALIGNMENT = 64
"""Bytes; a vector of float32 of the widest instructions."""
_PANEL = 1 << 20
"""Weights that are laid out at a time: what is needed for that besides the result stays small."""
_BFLOAT16_SHIFT = np.uint32(16)

Kind = Literal["float32", "bfloat16", "float16", "4-bit", "8-bit"]
Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class NarrowWeight:
    """A matrix of shape (out_features, in_features); lanes behind the last row are zeros."""

    kind: Kind
    out_features: int
    in_features: int
    codes: Array
    """In blocks of `LANES` rows. "bfloat16", "float16": their bits, uint16 (blocks, in, LANES). "4-bit": uint8 (blocks,
    in / 2, LANES), input 2i in the low half and 2i + 1 in the high half. "8-bit": int8 (blocks, in, LANES)."""
    scales: Array | None
    """Of "4-bit" and "8-bit": (blocks, in / group, LANES); float16 where that is exact for all, else float32."""
    least: Array | None
    """Of the shape and type of `scales`: a value is scale * code + least; None: it is scale * code."""
    group: int
    """Inputs that share a scale, 16 or 32; 0 where there are none."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (self.codes, self.scales, self.least) if array is not None)

    def dequantised(self, first_row: int, last_row: int) -> Float32Array:
        """Rows from `first_row` up to and without `last_row`, shape (rows, in)."""
        blocks = slice(first_row // LANES, -(-last_row // LANES))
        values = self._values(self.codes[blocks], blocks, axis=1)
        rows: Float32Array = values.transpose(0, 2, 1).reshape(-1, self.in_features)
        first = first_row % LANES
        return rows[first : first + last_row - first_row]

    def rows(self, ids: npt.NDArray[np.int64]) -> Float32Array:
        """The rows of these numbers, in their order, shape (ids, in)."""
        places = (ids // LANES, slice(None), ids % LANES)
        return self._values(self.codes[places], places, axis=1)

    def _values(self, codes: Array, places: Any, axis: int) -> Float32Array:  # noqa: ANN401 - an index of NumPy
        """What codes stand for; inputs go along `axis`."""
        values: Float32Array
        if self.kind == "float16":
            values = codes.view(np.float16).astype(np.float32)
            return values
        if self.kind == "bfloat16":
            values = (codes.astype(np.uint32) << _BFLOAT16_SHIFT).view(np.float32)
            return values
        if self.kind == "4-bit":
            halves = np.stack((codes & np.uint8(15), codes >> np.uint8(4)), axis=axis + 1)
            codes = halves.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :])
        assert self.scales is not None
        values = codes.astype(np.float32)
        values *= np.repeat(self.scales[places].astype(np.float32), self.group, axis)
        if self.least is not None:
            values += np.repeat(self.least[places].astype(np.float32), self.group, axis)
        return values


def narrow_weight(weight: torch.Tensor) -> NarrowWeight | None:
    """A weight in half of float32's bytes.

    Args:
        weight: on a CPU, shape (out, in); bfloat16, float16, or float32.

    Returns:
        None: it holds values that neither bfloat16 nor float16 has.
    """
    if weight.dtype == torch.bfloat16:
        return _of_halves("bfloat16", weight.detach().view(torch.uint16).numpy())
    if weight.dtype == torch.float16:
        return _of_halves("float16", weight.detach().view(torch.uint16).numpy())
    if weight.dtype != torch.float32:
        return None
    values: Float32Array = weight.detach().numpy()
    panels = list(_panels(*values.shape))
    if all(not (values[rows].view(np.uint32) & np.uint32(0xFFFF)).any() for rows in panels):
        return _of_halves("bfloat16", values, lambda part: (part.view(np.uint32) >> _BFLOAT16_SHIFT).astype(np.uint16))
    if all(_as_float16(values[rows]) is not None for rows in panels):
        return _of_halves("float16", values, lambda part: part.astype(np.float16).view(np.uint16))
    return None


def _of_halves(
    kind: Literal["bfloat16", "float16"], values: Array, bits: Callable[[Array], Array] = lambda part: part
) -> NarrowWeight:
    num_rows, width = values.shape
    codes = _aligned((-(-num_rows // LANES), width, LANES), np.uint16)
    for rows in _panels(num_rows, width):
        _lay_out(bits(values[rows]), rows.start, codes)
    return NarrowWeight(kind, num_rows, width, codes, None, None, 0)


def from_gguf(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType, in_features: int) -> NarrowWeight | None:
    """A weight of a GGUF file.

    What it stands for is what `gguf.quants.dequantize` makes of the bytes, to the last bit but for the sign of a zero:
    the products of scales and codes are exact in float32, so that at most the addition rounds, as it does there.

    Args:
        raw: the file's bytes, shape (out, bytes of a row).
        kind: their type.
        in_features: values of a row.

    Returns:
        None: there are no kernels for this type.
    """
    if kind.name in ("F16", "BF16"):
        return _of_halves("float16" if kind.name == "F16" else "bfloat16", raw.view(np.uint16))
    form = _FORMS.get(kind.name)
    if form is None:
        return None
    num_rows, num_blocks, num_groups = len(raw), -(-len(raw) // LANES), in_features // form.group
    packed = form.kind == "4-bit"
    size, code_type = (in_features // 2, np.uint8) if packed else (in_features, np.int8)
    codes = _aligned((num_blocks, size, LANES), code_type)
    scales = _aligned((num_blocks, num_groups, LANES), np.float16)
    least = _aligned(scales.shape, np.float16) if form.has_least else None
    for rows in _panels(num_rows, in_features):
        values = form.read(raw[rows].reshape(-1, in_features // form.block, raw.shape[1] * form.block // in_features))
        part = values.codes.reshape(-1, in_features)
        _lay_out(part[:, ::2] | part[:, 1::2] << np.uint8(4) if packed else part.view(np.int8), rows.start, codes)
        scales = _lay_out_exactly(values.scales.reshape(-1, num_groups), rows.start, scales)
        if least is not None and values.least is not None:
            least = _lay_out_exactly(values.least.reshape(-1, num_groups), rows.start, least)
    if least is not None and least.dtype != scales.dtype:
        scales, least = _as_float32(scales), _as_float32(least)
    return NarrowWeight(form.kind, num_rows, in_features, codes, scales, least, form.group)


# ---- layout ----------------------------------------------------------------------------------------------------------


def _aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An array whose first byte lies where vectors may; its last block is zeros."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    array: Array = room[start : start + size].view(dtype).reshape(shape)
    array[-1:] = 0
    return array


def _panels(num_rows: int, width: int) -> Iterator[slice]:
    """Rows in whole blocks, but for the last."""
    step = max(_PANEL // width // LANES, 1) * LANES
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _lay_out(rows: Array, first_row: int, target: Array) -> None:
    """Write rows, shape (rows, width), into blocks, shape (blocks, width, LANES), from a whole block on."""
    block, whole = first_row // LANES, len(rows) // LANES
    sides = rows[: whole * LANES].reshape(whole, LANES, rows.shape[1])
    target[block : block + whole] = sides.transpose(0, 2, 1)
    if rest := len(rows) % LANES:
        target[block + whole, :, :rest] = rows[whole * LANES :].T


def _lay_out_exactly(rows: Float32Array, first_row: int, target: Array) -> Array:
    """The same, into float16 or float32; a target of float32 in place of one that does not hold them exactly."""
    if target.dtype == np.float16 and _as_float16(rows) is None:
        target = _as_float32(target)
    _lay_out(rows, first_row, target)
    return target


def _as_float16(values: Float32Array) -> Array | None:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else None


def _as_float32(array: Array) -> Array:
    wide = _aligned(array.shape, np.float32)
    wide[:] = array
    return wide


# ---- GGUF's formats --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Values:
    """Blocks of a GGUF file, shape (rows, blocks, ...)."""

    codes: Array
    """uint8, or int8 where there is no least; one for each value."""
    scales: Float32Array
    """One for each group."""
    least: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class _Form:
    """One of GGUF's formats."""

    kind: Literal["4-bit", "8-bit"]
    block: int
    """Values of a block."""
    group: int
    """Values that share a scale."""
    has_least: bool
    read: Callable[[npt.NDArray[np.uint8]], _Values]
    """Of shape (rows, blocks, bytes of a block)."""


def _half(raw: npt.NDArray[np.uint8]) -> Float32Array:
    """Two bytes of each block as a number, shape (rows, blocks, 1)."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: npt.NDArray[np.uint8], run: int) -> Array:
    """Codes of 4 bits; of each `run` bytes first the low halves, then the high ones."""
    runs = raw.reshape(*raw.shape[:2], -1, run)
    return np.stack((runs & np.uint8(15), runs >> np.uint8(4)), axis=-2).reshape(*raw.shape[:2], -1)


def _fifth_bits(raw: npt.NDArray[np.uint8]) -> Array:
    """Bit i of four bytes as bit 4 of code i."""
    bits: Array = np.unpackbits(raw, axis=-1, bitorder="little") << np.uint8(4)
    return bits


def _q4_0(raw: npt.NDArray[np.uint8]) -> _Values:
    scales = _half(raw[..., :2])
    return _Values(_nibbles(raw[..., 2:], 16), scales, -8 * scales)


def _q4_1(raw: npt.NDArray[np.uint8]) -> _Values:
    return _Values(_nibbles(raw[..., 4:], 16), _half(raw[..., :2]), _half(raw[..., 2:4]))


def _q5_0(raw: npt.NDArray[np.uint8]) -> _Values:
    codes = _nibbles(raw[..., 6:], 16) | _fifth_bits(raw[..., 2:6])
    return _Values(codes.view(np.int8) - np.int8(16), _half(raw[..., :2]))


def _q5_1(raw: npt.NDArray[np.uint8]) -> _Values:
    codes = _nibbles(raw[..., 8:], 16) | _fifth_bits(raw[..., 4:8])
    return _Values(codes, _half(raw[..., :2]), _half(raw[..., 2:4]))


def _q8_0(raw: npt.NDArray[np.uint8]) -> _Values:
    return _Values(np.ascontiguousarray(raw[..., 2:]).view(np.int8), _half(raw[..., :2]))


def _six_bit_scales(raw: npt.NDArray[np.uint8]) -> tuple[Float32Array, Float32Array]:
    """Scales and least of a block's eight groups: both of 6 bits, times a number of the block."""
    packed = raw[..., 4:16]
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((low & 63, rest & 15 | low >> 2 & 48), axis=-1)
    least = np.concatenate((high & 63, rest >> 4 | high >> 2 & 48), axis=-1)
    return _half(raw[..., :2]) * scales.astype(np.float32), -_half(raw[..., 2:4]) * least.astype(np.float32)


def _q4_k(raw: npt.NDArray[np.uint8]) -> _Values:
    return _Values(_nibbles(raw[..., 16:], 32), *_six_bit_scales(raw))


def _q5_k(raw: npt.NDArray[np.uint8]) -> _Values:
    bits = raw[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    codes = _nibbles(raw[..., 48:], 32) | bits.reshape(*raw.shape[:2], -1) << np.uint8(4)
    return _Values(codes, *_six_bit_scales(raw))


def _q6_k(raw: npt.NDArray[np.uint8]) -> _Values:
    low = _nibbles(raw[..., :128], 64)
    halves = raw[..., 128:192].reshape(*raw.shape[:2], 2, 1, 32)
    high = halves >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
    codes = low | high.reshape(*raw.shape[:2], -1) << np.uint8(4)
    scales = np.ascontiguousarray(raw[..., 192:208]).view(np.int8).astype(np.float32)
    return _Values(codes.view(np.int8) - np.int8(32), _half(raw[..., 208:]) * scales)


_FORMS = {
    "Q4_0": _Form("4-bit", 32, 32, True, _q4_0),
    "Q4_1": _Form("4-bit", 32, 32, True, _q4_1),
    "Q4_K": _Form("4-bit", 256, 32, True, _q4_k),
    "Q5_0": _Form("8-bit", 32, 32, False, _q5_0),
    "Q5_1": _Form("8-bit", 32, 32, True, _q5_1),
    "Q5_K": _Form("8-bit", 256, 32, True, _q5_k),
    "Q6_K": _Form("8-bit", 256, 16, False, _q6_k),
    "Q8_0": _Form("8-bit", 32, 32, False, _q8_0),
}
