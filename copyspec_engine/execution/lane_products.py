"""Sums of products with weights that stay in registers, read as the weights are stored.

Weights stand in blocks of `LANES` output rows that lie side by side (narrow_weights.py); a `UNIT` of them is computed
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from copyspec_engine.compiled import compiled_address
from copyspec_engine.execution.lanes import (
    BFLOAT16,
    EIGHT_BITS,
    EIGHT_BITS_BY_16,
    EIGHT_BITS_LEAST,
    FLOAT16,
    FLOAT32,
    FLOAT_TYPE,
    FOUR_BITS,
    HALF_TYPE,
    INT64_TYPE,
    LANES,
    QUANTIZED,
    VECTOR_TYPE,
    WIDE_SCALES,
    WIDTH,
    Value,
    constant,
    fma,
    intrinsic_of,
    load,
    load_bfloat16,
    load_floats,
    loop,
    pointer,
    prefetch,
    spread,
    store,
    zero,
)

__all__ = [
    "BIAS",
    "CODES",
    "CODE_BYTES",
    "KERNEL",
    "LEAST",
    "LINEAR_COLUMNS",
    "MOST_ROWS",
    "NUM_INPUTS",
    "NUM_OUTPUTS",
    "SCALES",
    "SCALE_BYTES",
    "UNIT",
    "Kernel",
    "kernel",
    "multiply",
]

UNIT = 4 * WIDTH
"""Output rows that are computed at a time: as many sums as hide how long each takes."""
MOST_ROWS = 8
"""Input rows that are computed at a time."""
_AHEAD = 2048
"""Bytes in front of what is read that memory is asked for: the processor itself does not look beyond a page."""
_SUMS = 8
"""Vectors of sums that are kept in registers at a time."""
# Columns of a linear layer. Addresses are 0 where there is nothing; `CODE_BYTES` and `SCALE_BYTES` are those of a unit.
KERNEL, CODES, SCALES, LEAST, BIAS, NUM_INPUTS, NUM_OUTPUTS, CODE_BYTES, SCALE_BYTES = range(9)
LINEAR_COLUMNS = 9
Kernel = int
"""The address of a compiled function that multiplies some rows with a unit of weights of one kind."""


@cache
def kernel(kind: int) -> Kernel:
    """The function for weights of a kind; compiled at the first call.

    It is called by its address (`multiply`), so that the kinds that a model does not have need not be compiled, and
    none is compiled again into what calls it. Its arguments are int64, all but two of them addresses: how many rows,
    1, 2, 4 or 8; inputs (num_inputs, rows), with what the rows have of an input side by side; the sums of the inputs of
    each group (num_inputs / 32, rows); a linear layer's columns (see `LINEAR_COLUMNS`); the number of the unit; the
    outputs (rows, UNIT), which are written.
    """

    def multiply_unit(rows: int, x: int, sums: int, linear: int, number: int, out: int) -> int:
        return _multiply(kind, rows, x, sums, linear, number, out)

    return compiled_address(multiply_unit, types.int64(*[types.int64] * 6))


@intrinsic_of(int, prefer_literal=True)
def _multiply(typing_context: Any, kind: Any, rows: Any, x: Any, sums: Any, linear: Any, number: Any, out: Any) -> Any:
    """See `kernel`; `kind` is a constant."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        _, chosen, inputs, sums, linear, number, out = values

        def column(which: int) -> Value:
            return load(builder, builder.add(linear, constant(8 * which)), INT64_TYPE, 8)

        codes = builder.add(column(CODES), builder.mul(number, column(CODE_BYTES)))
        scale_offset = builder.mul(number, column(SCALE_BYTES))
        scales, least = (builder.add(column(which), scale_offset) for which in (SCALES, LEAST))
        unit = inputs, sums, codes, scales, least, column(NUM_INPUTS), out
        done = builder.append_basic_block("done")
        switch = builder.switch(chosen, done)
        for count in (1, 2, 4, 8):
            block = builder.append_basic_block(f"rows_{count}")
            switch.add_case(constant(count), block)
            builder.position_at_end(block)
            at_once = min(UNIT // WIDTH, _SUMS // count)
            for first in range(0, UNIT // WIDTH, at_once):
                _multiply_vectors(builder, kind.literal_value, count, range(first, first + at_once), unit)
            builder.branch(done)
        builder.position_at_end(done)
        return constant(0)

    return types.int64(kind, *[types.int64] * 6), generate


@intrinsic_of(int)
def multiply(typing_context: Any, kernel: Any, rows: Any, x: Any, sums: Any, linear: Any, number: Any, out: Any) -> Any:
    """Call a `kernel`, with its arguments behind its address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        kind = ir.FunctionType(INT64_TYPE, [INT64_TYPE] * 6)
        return builder.call(pointer(builder, values[0], kind), values[1:])

    return types.int64(*[types.int64] * 7), generate


def _multiply_vectors(builder: Any, kind: int, rows: int, vectors: range, values: Sequence[Value]) -> None:
    """Products of all rows with some vectors of lanes of a unit."""
    x, sums, codes, scales, least, num_inputs, out = values
    wide_scales, stored = divmod(kind, WIDE_SCALES)
    pairs = [(row, vector) for row in range(rows) for vector in range(len(vectors))]
    read = _READERS[stored]
    steps = builder.udiv(num_inputs, constant(read.inputs))
    placed = [_place(builder, codes, builder.mul(steps, constant(LANES * read.bytes)), v, read.bytes) for v in vectors]

    accumulate = _accumulating(builder, read, rows, x, placed)
    zeros = [zero()] * len(pairs)
    if stored not in QUANTIZED:
        totals = loop(builder, constant(0), steps, zeros, accumulate)
    else:
        group = 16 if stored == EIGHT_BITS_BY_16 else 32
        size = 4 if wide_scales else 2
        groups = builder.udiv(num_inputs, constant(group))
        block = builder.mul(groups, constant(LANES * size))
        scaled, lowest = ([_place(builder, base, block, v, size) for v in vectors] for base in (scales, least))

        def read_scales(places: Sequence[Value], number: Value) -> list[Value]:
            offset, kind = builder.mul(number, constant(LANES * size)), FLOAT_TYPE if wide_scales else HALF_TYPE
            return [load_floats(builder, builder.add(place, offset), kind, size) for place in places]

        def add_group(number: Value, so_far: Sequence[Value]) -> list[Value]:
            """One group further: its products by their scale, and its least value by the sum of its inputs."""
            begin = builder.mul(number, constant(group // read.inputs))
            for vector in range(0, len(vectors), LANES // WIDTH):
                ahead = builder.add(placed[vector], builder.mul(begin, constant(LANES * read.bytes)))
                for line in range(0, group // read.inputs * LANES * read.bytes, 64):
                    prefetch(builder, builder.add(ahead, constant(_AHEAD + line)))
            parts = loop(builder, begin, builder.add(begin, constant(group // read.inputs)), zeros, accumulate)
            factors = read_scales(scaled, number)
            result = [
                fma(builder, factors[vector], part, total)
                for (_, vector), part, total in zip(pairs, parts, so_far, strict=True)
            ]
            if stored not in (FOUR_BITS, EIGHT_BITS_LEAST):
                return result
            lows, first = read_scales(lowest, number), builder.mul(number, constant(4 * rows))
            for index, (row, vector) in enumerate(pairs):
                at = builder.add(sums, builder.add(first, constant(4 * row)))
                result[index] = fma(
                    builder, lows[vector], spread(builder, load(builder, at, FLOAT_TYPE, 4)), result[index]
                )
            return result

        totals = loop(builder, constant(0), groups, zeros, add_group)
    for (row, vector), total in zip(pairs, totals, strict=True):
        at = builder.add(out, constant(4 * UNIT * row))
        store(builder, total, builder.add(at, constant(4 * WIDTH * vectors[vector])))


def _accumulating(
    builder: Any, read: _Reader, rows: int, x: Value, placed: Sequence[Value]
) -> Callable[[Value, Sequence[Value]], list[Value]]:
    """What a loop over inputs does in a step: it adds to the sums, row by row, each weight times its input."""

    def accumulate(step: Value, so_far: Sequence[Value]) -> list[Value]:
        offset = builder.mul(step, constant(LANES * read.bytes))
        weights = [read.weights(builder, builder.add(place, offset)) for place in placed]
        first, result = builder.add(x, builder.mul(step, constant(4 * rows * read.inputs))), list(so_far)
        for i in range(read.inputs):
            for row in range(rows):
                at = builder.add(first, constant(4 * (i * rows + row)))
                repeated = spread(builder, load(builder, at, FLOAT_TYPE, 4))
                for vector in range(len(placed)):
                    index = row * len(placed) + vector
                    result[index] = fma(builder, repeated, weights[vector][i], result[index])
        return result

    return accumulate


class _Reader:
    """How weights are read: `inputs` of each lane at a time, from `bytes` bytes."""

    def __init__(self, inputs: int, num_bytes: int, weights: Callable[[Any, Value], list[Value]]) -> None:
        self.inputs, self.bytes, self.weights = inputs, num_bytes, weights


def _float16(builder: Any, at: Value) -> list[Value]:
    return [load_floats(builder, at, HALF_TYPE, 2)]


def _four_bits(builder: Any, at: Value) -> list[Value]:
    words = ir.VectorType(ir.IntType(32), WIDTH)
    both = builder.zext(load(builder, at, ir.VectorType(ir.IntType(8), WIDTH), 1), words)
    low = builder.and_(both, ir.Constant(words, [15] * WIDTH))
    return [builder.sitofp(part, VECTOR_TYPE) for part in (low, builder.lshr(both, ir.Constant(words, [4] * WIDTH)))]


def _eight_bits(builder: Any, at: Value) -> list[Value]:
    words = ir.VectorType(ir.IntType(32), WIDTH)
    return [builder.sitofp(builder.sext(load(builder, at, ir.VectorType(ir.IntType(8), WIDTH), 1), words), VECTOR_TYPE)]


_READERS = {
    FLOAT32: _Reader(1, 4, lambda builder, at: [load(builder, at, VECTOR_TYPE, 4)]),
    BFLOAT16: _Reader(1, 2, lambda builder, at: [load_bfloat16(builder, at)]),
    FLOAT16: _Reader(1, 2, _float16),
    FOUR_BITS: _Reader(2, 1, _four_bits),
    **dict.fromkeys((EIGHT_BITS, EIGHT_BITS_LEAST, EIGHT_BITS_BY_16), _Reader(1, 1, _eight_bits)),
}


def _place(builder: Any, base: Value, block_bytes: Value, vector: int, size: int) -> Value:
    """Where a unit's vector of lanes begins, in numbers of `size` bytes."""
    block, lane = divmod(vector * WIDTH, LANES)
    return builder.add(base, builder.add(builder.mul(block_bytes, constant(block)), constant(lane * size)))
