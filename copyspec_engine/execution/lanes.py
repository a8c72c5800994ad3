"""Vector code for compiled functions: sums of products that stay in registers, read from weights of several types.

Numba makes vectors out of loops where it can; here it could not keep sums in registers, so these few operations are
written down as LLVM has them. All of them take addresses (of float32 where nothing else is said) and add up in an order
that does not depend on how many rows there are: a row's bits are the same alone and among others.

Weights stand in blocks of `LANES` output rows that lie side by side (narrow_weights.py); a `UNIT` of them is computed
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from copyspec_engine.compiled import compiled_address
from copyspec_engine.execution.narrow_weights import LANES

__all__ = [
    "BFLOAT16",
    "CHUNK",
    "EIGHT_BITS",
    "EIGHT_BITS_BY_16",
    "EIGHT_BITS_LEAST",
    "FLOAT16",
    "FLOAT32",
    "FOUR_BITS",
    "KINDS",
    "LANES",
    "MOST_ROWS",
    "ROWS_AT_ONCE",
    "UNIT",
    "WIDTH",
    "add_and_fetch",
    "dot",
    "fetch",
    "greatest",
    "kernel",
    "multiply",
    "number_at",
    "put_bfloat16",
    "put_number",
    "score",
    "sleep",
    "total",
    "weighted_sum",
]


def _features() -> dict[str, bool]:
    """What the processor can do, or what NUMBA_CPU_FEATURES ("+avx2,-fma") leaves of it."""
    settings: Any = config  # Numba fills it in when it is imported
    named: str | None = settings.CPU_FEATURES
    if named is None:
        return dict(llvm.get_host_cpu_features())
    return {feature[1:]: feature[0] == "+" for feature in named.split(",") if feature}


_FEATURES = _features()
WIDTH = 16 if _FEATURES.get("avx512f") else 8
"""float32 numbers of a vector."""
UNIT = 4 * WIDTH
"""Output rows that are computed at a time: as many sums as hide how long each takes."""
MOST_ROWS = 8
"""Input rows that are computed at a time."""
_AHEAD = 2048
"""Bytes in front of what is read that memory is asked for: the processor itself does not look beyond a page."""
_SUMS = 8
"""Vectors of sums that are kept in registers at a time."""
CHUNK = 128
"""Positions whose keys and values are one piece of work; their parts of the softmax are put together afterwards."""
ROWS_AT_ONCE = 4
"""Queries that keys and values are read for at a time."""
_KEYS = 4
"""Keys that are read at a time."""
_KEYS_AHEAD = 32
"""How many keys further memory is asked for."""

FLOAT32, BFLOAT16, FLOAT16, FOUR_BITS, EIGHT_BITS, EIGHT_BITS_LEAST, EIGHT_BITS_BY_16 = range(1, 8)
"""How weights are stored; the quantized ones in groups of 32 inputs (the last: 16), each with a scale for every lane.

`FOUR_BITS` and `EIGHT_BITS_LEAST` have a least value too. Scales are float16, or float32 where `WIDE_SCALES` is added.
"""
WIDE_SCALES = 16
_QUANTIZED = (FOUR_BITS, EIGHT_BITS, EIGHT_BITS_LEAST, EIGHT_BITS_BY_16)
KINDS = (FLOAT32, BFLOAT16, FLOAT16, *_QUANTIZED, *(kind + WIDE_SCALES for kind in _QUANTIZED))

# Columns of a linear layer. Addresses are 0 where there is nothing; `CODE_BYTES` and `SCALE_BYTES` are those of a unit.
KERNEL, CODES, SCALES, LEAST, BIAS, NUM_INPUTS, NUM_OUTPUTS, CODE_BYTES, SCALE_BYTES = range(9)
LINEAR_COLUMNS = 9

# Columns of what queries see: addresses of keys, values (slots, dim) and slots (int64), how many slots there are, at
# most CHUNK, the size of a key, and whether keys and values are FLOAT32 or BFLOAT16.
SEEN_KEYS, SEEN_VALUES, SEEN_SLOTS, SEEN_COUNT, SEEN_DIM, SEEN_STORED = range(6)
SEEN_COLUMNS = 6

_float, _half, _int64 = ir.FloatType(), ir.HalfType(), ir.IntType(64)
_vector = ir.VectorType(_float, WIDTH)
_Value = Any  # llvmlite's values have no types


# ---- sums of products ------------------------------------------------------------------------------------------------


_Result = TypeVar("_Result")


def intrinsic_of(
    result: type[_Result], *, prefer_literal: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., _Result]]:
    """Numba's `intrinsic`, with the type that its call has for a reader."""

    def decorate(function: Callable[..., Any]) -> Callable[..., _Result]:
        return cast("Callable[..., _Result]", intrinsic(prefer_literal=prefer_literal)(function))

    return decorate


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

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        _, chosen, inputs, sums, linear, number, out = values

        def column(which: int) -> _Value:
            return _load(builder, builder.add(linear, _constant(8 * which)), _int64, 8)

        codes = builder.add(column(CODES), builder.mul(number, column(CODE_BYTES)))
        scale_offset = builder.mul(number, column(SCALE_BYTES))
        scales, least = (builder.add(column(which), scale_offset) for which in (SCALES, LEAST))
        unit = inputs, sums, codes, scales, least, column(NUM_INPUTS), out
        done = builder.append_basic_block("done")
        switch = builder.switch(chosen, done)
        for count in (1, 2, 4, 8):
            block = builder.append_basic_block(f"rows_{count}")
            switch.add_case(_constant(count), block)
            builder.position_at_end(block)
            at_once = min(UNIT // WIDTH, _SUMS // count)
            for first in range(0, UNIT // WIDTH, at_once):
                _multiply_vectors(builder, kind.literal_value, count, range(first, first + at_once), unit)
            builder.branch(done)
        builder.position_at_end(done)
        return _constant(0)

    return types.int64(kind, *[types.int64] * 6), generate


@intrinsic_of(int)
def multiply(typing_context: Any, kernel: Any, rows: Any, x: Any, sums: Any, linear: Any, number: Any, out: Any) -> Any:
    """Call a `kernel`, with its arguments behind its address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        kind = ir.FunctionType(_int64, [_int64] * 6)
        return builder.call(_pointer(builder, values[0], kind), values[1:])

    return types.int64(*[types.int64] * 7), generate


def _multiply_vectors(builder: Any, kind: int, rows: int, vectors: range, values: Sequence[_Value]) -> None:
    """Products of all rows with some vectors of lanes of a unit."""
    x, sums, codes, scales, least, num_inputs, out = values
    wide_scales, stored = divmod(kind, WIDE_SCALES)
    pairs = [(row, vector) for row in range(rows) for vector in range(len(vectors))]
    read = _READERS[stored]
    steps = builder.udiv(num_inputs, _constant(read.inputs))
    placed = [_place(builder, codes, builder.mul(steps, _constant(LANES * read.bytes)), v, read.bytes) for v in vectors]

    accumulate = _accumulating(builder, read, rows, x, placed)
    zeros = [_zero()] * len(pairs)
    if stored not in _QUANTIZED:
        totals = _loop(builder, _constant(0), steps, zeros, accumulate)
    else:
        group = 16 if stored == EIGHT_BITS_BY_16 else 32
        size = 4 if wide_scales else 2
        groups = builder.udiv(num_inputs, _constant(group))
        block = builder.mul(groups, _constant(LANES * size))
        scaled, lowest = ([_place(builder, base, block, v, size) for v in vectors] for base in (scales, least))

        def read_scales(places: Sequence[_Value], number: _Value) -> list[_Value]:
            offset, kind = builder.mul(number, _constant(LANES * size)), _float if wide_scales else _half
            return [_load_floats(builder, builder.add(place, offset), kind, size) for place in places]

        def add_group(number: _Value, so_far: Sequence[_Value]) -> list[_Value]:
            """One group further: its products by their scale, and its least value by the sum of its inputs."""
            begin = builder.mul(number, _constant(group // read.inputs))
            for vector in range(0, len(vectors), LANES // WIDTH):
                ahead = builder.add(placed[vector], builder.mul(begin, _constant(LANES * read.bytes)))
                for line in range(0, group // read.inputs * LANES * read.bytes, 64):
                    _prefetch(builder, builder.add(ahead, _constant(_AHEAD + line)))
            parts = _loop(builder, begin, builder.add(begin, _constant(group // read.inputs)), zeros, accumulate)
            factors = read_scales(scaled, number)
            result = [
                _fma(builder, factors[vector], part, total)
                for (_, vector), part, total in zip(pairs, parts, so_far, strict=True)
            ]
            if stored not in (FOUR_BITS, EIGHT_BITS_LEAST):
                return result
            lows, first = read_scales(lowest, number), builder.mul(number, _constant(4 * rows))
            for index, (row, vector) in enumerate(pairs):
                at = builder.add(sums, builder.add(first, _constant(4 * row)))
                result[index] = _fma(
                    builder, lows[vector], _spread(builder, _load(builder, at, _float, 4)), result[index]
                )
            return result

        totals = _loop(builder, _constant(0), groups, zeros, add_group)
    for (row, vector), total in zip(pairs, totals, strict=True):
        at = builder.add(out, _constant(4 * UNIT * row))
        _store(builder, total, builder.add(at, _constant(4 * WIDTH * vectors[vector])))


def _accumulating(
    builder: Any, read: _Reader, rows: int, x: _Value, placed: Sequence[_Value]
) -> Callable[[_Value, Sequence[_Value]], list[_Value]]:
    """What a loop over inputs does in a step: it adds to the sums, row by row, each weight times its input."""

    def accumulate(step: _Value, so_far: Sequence[_Value]) -> list[_Value]:
        offset = builder.mul(step, _constant(LANES * read.bytes))
        weights = [read.weights(builder, builder.add(place, offset)) for place in placed]
        first, result = builder.add(x, builder.mul(step, _constant(4 * rows * read.inputs))), list(so_far)
        for i in range(read.inputs):
            for row in range(rows):
                at = builder.add(first, _constant(4 * (i * rows + row)))
                spread = _spread(builder, _load(builder, at, _float, 4))
                for vector in range(len(placed)):
                    index = row * len(placed) + vector
                    result[index] = _fma(builder, spread, weights[vector][i], result[index])
        return result

    return accumulate


class _Reader:
    """How weights are read: `inputs` of each lane at a time, from `bytes` bytes."""

    def __init__(self, inputs: int, num_bytes: int, weights: Callable[[Any, _Value], list[_Value]]) -> None:
        self.inputs, self.bytes, self.weights = inputs, num_bytes, weights


def _float32(builder: Any, at: _Value) -> list[_Value]:
    return [_load(builder, at, _vector, 4)]


def _bfloat16(builder: Any, at: _Value) -> list[_Value]:
    words = ir.VectorType(ir.IntType(32), WIDTH)
    upper = builder.zext(_load(builder, at, ir.VectorType(ir.IntType(16), WIDTH), 2), words)
    return [builder.bitcast(builder.shl(upper, ir.Constant(words, [16] * WIDTH)), _vector)]


def _float16(builder: Any, at: _Value) -> list[_Value]:
    return [_load_floats(builder, at, _half, 2)]


def _four_bits(builder: Any, at: _Value) -> list[_Value]:
    words = ir.VectorType(ir.IntType(32), WIDTH)
    both = builder.zext(_load(builder, at, ir.VectorType(ir.IntType(8), WIDTH), 1), words)
    low = builder.and_(both, ir.Constant(words, [15] * WIDTH))
    return [builder.sitofp(part, _vector) for part in (low, builder.lshr(both, ir.Constant(words, [4] * WIDTH)))]


def _eight_bits(builder: Any, at: _Value) -> list[_Value]:
    words = ir.VectorType(ir.IntType(32), WIDTH)
    return [builder.sitofp(builder.sext(_load(builder, at, ir.VectorType(ir.IntType(8), WIDTH), 1), words), _vector)]


_READERS = {
    FLOAT32: _Reader(1, 4, _float32),
    BFLOAT16: _Reader(1, 2, _bfloat16),
    FLOAT16: _Reader(1, 2, _float16),
    FOUR_BITS: _Reader(2, 1, _four_bits),
    **dict.fromkeys((EIGHT_BITS, EIGHT_BITS_LEAST, EIGHT_BITS_BY_16), _Reader(1, 1, _eight_bits)),
}


@intrinsic_of(float)
def dot(typing_context: Any, a: Any, b: Any, count: Any) -> Any:
    """The sum of the products of `count` numbers at two addresses, float32."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        first, second, length = values
        vectors = builder.udiv(length, _constant(2 * WIDTH))

        def step(number: _Value, so_far: Sequence[_Value]) -> list[_Value]:
            offset = builder.mul(number, _constant(8 * WIDTH))
            result = []
            for half, total in enumerate(so_far):
                at = builder.add(offset, _constant(4 * WIDTH * half))
                pair = [_load(builder, builder.add(base, at), _vector, 4) for base in (first, second)]
                result.append(_fma(builder, pair[0], pair[1], total))
            return result

        halves = _loop(builder, _constant(0), vectors, [_zero()] * 2, step)
        total = _fold_lanes(builder, builder.fadd(*halves), _sum)

        def rest(number: _Value, so_far: Sequence[_Value]) -> list[_Value]:
            at = builder.mul(number, _constant(4))
            pair = [_load(builder, builder.add(base, at), _float, 4) for base in (first, second)]
            return [builder.fma(pair[0], pair[1], so_far[0])]

        (total,) = _loop(builder, builder.mul(vectors, _constant(2 * WIDTH)), length, [total], rest)
        return total

    return types.float32(a, b, count), generate


@intrinsic_of(int)
def score(typing_context: Any, seen: Any, rows: Any, queries: Any, out: Any, ahead: Any) -> Any:
    """Products of queries with the keys that they see.

    Args:
        typing_context: Numba's.
        seen: address of `SEEN_COLUMNS` int64.
        rows: queries, 1 to `ROWS_AT_ONCE`.
        queries: address of them, one behind the other.
        out: shape (rows, `CHUNK`), the last product of each repeated up to a multiple of `WIDTH`.
        ahead: 1: memory is asked for the values at the same slots, and for keys further on; 0: for none.
    """

    def generate(_context: Any, builder: Any, _signature: Any, given: Sequence[_Value]) -> _Value:
        seen, chosen, *rest = given
        _for_rows(builder, seen, chosen, lambda rows, stored: _score_rows(builder, stored(builder, seen), rows, *rest))
        return _constant(0)

    return types.int64(*[types.int64] * 5), generate


class _Seen:
    """Keys or values at some slots, as a kernel reads them."""

    def __init__(self, builder: Any, columns: _Value, kind: int) -> None:
        self._builder, self._kind, self.size = builder, kind, 2 if kind == BFLOAT16 else 4
        self.keys, self.values, self._slots, self.count, self.dim, _ = (
            _load(builder, builder.add(columns, _constant(8 * which)), _int64, 8) for which in range(SEEN_COLUMNS)
        )
        self.row_bytes = builder.mul(self.dim, _constant(self.size))
        self.vectors = builder.udiv(self.dim, _constant(WIDTH))
        self.blocks = builder.udiv(builder.add(self.count, _constant(WIDTH - 1)), _constant(WIDTH))

    def row(self, base: _Value, number: _Value) -> _Value:
        """Where the keys or values of a slot begin; behind the last slot those of the last one."""
        builder, last = self._builder, self._builder.sub(self.count, _constant(1))
        number = builder.select(builder.icmp_signed("<", number, last), number, last)
        slot = _load(builder, builder.add(self._slots, builder.mul(number, _constant(8))), _int64, 8)
        return builder.add(base, builder.mul(slot, self.row_bytes))

    def vector(self, at: _Value) -> _Value:
        return (_bfloat16 if self._kind == BFLOAT16 else _float32)(self._builder, at)[0]

    def number(self, at: _Value) -> _Value:
        if self._kind != BFLOAT16:
            return _load(self._builder, at, _float, 4)
        bits = self._builder.zext(_load(self._builder, at, ir.IntType(16), 2), ir.IntType(32))
        return self._builder.bitcast(self._builder.shl(bits, ir.Constant(ir.IntType(32), 16)), _float)

    def ask(self, base: _Value, number: _Value) -> None:
        """Ask memory for the row of a slot."""
        builder, row = self._builder, self.row(base, number)

        def line(number: _Value, _: Sequence[_Value]) -> list[_Value]:
            _prefetch(builder, builder.add(row, builder.mul(number, _constant(64))))
            return []

        lines = builder.udiv(builder.add(self.row_bytes, _constant(63)), _constant(64))
        _loop(builder, _constant(0), lines, [], line)


def _score_rows(builder: Any, seen: _Seen, rows: int, queries: _Value, out: _Value, ahead: _Value) -> None:
    def block(number: _Value, _: Sequence[_Value]) -> list[_Value]:
        first = builder.mul(number, _constant(WIDTH))
        with builder.if_then(builder.icmp_signed("!=", ahead, _constant(0))):

            def ask(key: _Value, _: Sequence[_Value]) -> list[_Value]:
                seen.ask(seen.values, key)
                seen.ask(seen.keys, builder.add(key, _constant(_KEYS_AHEAD)))
                return []

            _loop(builder, first, builder.add(first, _constant(WIDTH)), [], ask)
        few = range(0, WIDTH, _KEYS)
        found = [_score_few(builder, seen, rows, queries, builder.add(first, _constant(i))) for i in few]
        for row in range(rows):
            at = builder.add(out, builder.add(_constant(4 * CHUNK * row), builder.mul(first, _constant(4))))
            _store(builder, _sum_pairs(builder, [those[row] for those in found]), at)
        return []

    _loop(builder, _constant(0), seen.blocks, [], block)
    whole = builder.mul(seen.vectors, _constant(WIDTH))
    with builder.if_then(builder.icmp_signed("<", whole, seen.dim)):
        _score_rest(builder, seen, rows, queries, out)


def _score_few(builder: Any, seen: _Seen, rows: int, queries: _Value, first: _Value) -> list[_Value]:
    """For each row a vector of partial sums: those of a few keys in turn."""
    places = [seen.row(seen.keys, builder.add(first, _constant(i))) for i in range(_KEYS)]

    def step(number: _Value, so_far: Sequence[_Value]) -> list[_Value]:
        offset, result = builder.mul(number, _constant(seen.size * WIDTH)), []
        read = [seen.vector(builder.add(place, offset)) for place in places]
        for row in range(rows):
            at = builder.add(queries, builder.mul(seen.dim, _constant(4 * row)))
            query = _load(builder, builder.add(at, builder.mul(number, _constant(4 * WIDTH))), _vector, 4)
            result += [_fma(builder, query, key, so_far[_KEYS * row + i]) for i, key in enumerate(read)]
        return result

    sums = _loop(builder, _constant(0), seen.vectors, [_zero()] * (rows * _KEYS), step)
    return [_sum_pairs(builder, sums[_KEYS * row : _KEYS * (row + 1)]) for row in range(rows)]


def _score_rest(builder: Any, seen: _Seen, rows: int, queries: _Value, out: _Value) -> None:
    """Add the products of the numbers behind a key's last whole vector."""
    whole = builder.mul(seen.vectors, _constant(WIDTH))

    def add_rest(key: _Value, _: Sequence[_Value]) -> list[_Value]:
        place = seen.row(seen.keys, key)
        for row in range(rows):
            at = builder.add(out, builder.add(_constant(4 * CHUNK * row), builder.mul(key, _constant(4))))
            query = builder.add(queries, builder.mul(seen.dim, _constant(4 * row)))

            def product(number: _Value, so_far: Sequence[_Value], query: _Value = query) -> list[_Value]:
                other = _load(builder, builder.add(query, builder.mul(number, _constant(4))), _float, 4)
                number = seen.number(builder.add(place, builder.mul(number, _constant(seen.size))))
                return [builder.fma(other, number, so_far[0])]

            _store(builder, _loop(builder, whole, seen.dim, [_load(builder, at, _float, 4)], product)[0], at)
        return []

    _loop(builder, _constant(0), builder.mul(seen.blocks, _constant(WIDTH)), [], add_rest)


@intrinsic_of(int)
def weighted_sum(typing_context: Any, seen: Any, rows: Any, weights: Any, out: Any, out_bytes: Any) -> Any:
    """Sums of values times weights.

    Args:
        typing_context: Numba's.
        seen: address of `SEEN_COLUMNS` int64.
        rows: sums, 1 to `ROWS_AT_ONCE`.
        weights: shape (rows, `CHUNK`).
        out: where they are written, each of them (dim,).
        out_bytes: how far each is behind the one before.
    """

    def generate(_context: Any, builder: Any, _signature: Any, given: Sequence[_Value]) -> _Value:
        seen, chosen, *rest = given
        _for_rows(builder, seen, chosen, lambda rows, stored: _sum_rows(builder, stored(builder, seen), rows, *rest))
        return _constant(0)

    return types.int64(*[types.int64] * 5), generate


def _sum_rows(builder: Any, seen: _Seen, rows: int, weights: _Value, out: _Value, out_bytes: _Value) -> None:
    def columns(first: _Value, at_once: int, width: int) -> None:
        """Some columns: `at_once` vectors, or a single number where `width` is 1."""
        source = builder.add(seen.values, builder.mul(first, _constant(seen.size)))

        def step(number: _Value, so_far: Sequence[_Value]) -> list[_Value]:
            place, result = seen.row(source, number), []
            places = [builder.add(place, _constant(seen.size * width * i)) for i in range(at_once)]
            read = [seen.number(at) if width == 1 else seen.vector(at) for at in places]
            for row in range(rows):
                at = builder.add(weights, builder.add(_constant(4 * CHUNK * row), builder.mul(number, _constant(4))))
                weight, begun = _load(builder, at, _float, 4), so_far[at_once * row :]
                if width == 1:
                    result.append(builder.fma(weight, read[0], begun[0]))
                else:
                    spread = _spread(builder, weight)
                    result += [_fma(builder, spread, value, begun[i]) for i, value in enumerate(read)]
            return result

        zeros = [ir.Constant(_float, 0.0) if width == 1 else _zero()] * (rows * at_once)
        for index, total in enumerate(_loop(builder, _constant(0), seen.count, zeros, step)):
            row, column = divmod(index, at_once)
            target = builder.add(
                builder.add(out, builder.mul(out_bytes, _constant(row))), _constant(4 * width * column)
            )
            _store(builder, total, builder.add(target, builder.mul(first, _constant(4))))

    def over(begin: _Value, end: _Value, at_once: int, width: int) -> None:
        def body(number: _Value, _: Sequence[_Value]) -> list[_Value]:
            columns(builder.mul(number, _constant(at_once * width)), at_once, width)
            return []

        _loop(builder, begin, end, [], body)

    at_once = _columns_at_once(rows)
    wide = builder.udiv(seen.vectors, _constant(at_once))
    over(_constant(0), wide, at_once, WIDTH)
    over(builder.mul(wide, _constant(at_once)), seen.vectors, 1, WIDTH)
    over(builder.mul(seen.vectors, _constant(WIDTH)), seen.dim, 1, 1)


def _columns_at_once(rows: int) -> int:
    """Vectors of columns whose sums, of all rows, stay in registers: of up to 64 numbers, as most heads have."""
    registers = 2 * WIDTH  # there are twice as many of the wide ones
    return next(vectors for vectors in (8, 4, 2) if vectors * WIDTH <= 64 and vectors * rows < registers)


def _for_rows(builder: Any, seen: _Value, chosen: _Value, body: Callable[[int, Callable[..., _Seen]], None]) -> None:
    """Write code for each number of rows and each type of what they see, of which one is run."""
    done = builder.append_basic_block("done")
    stored = _load(builder, builder.add(seen, _constant(8 * SEEN_STORED)), _int64, 8)
    switch = builder.switch(builder.add(builder.mul(stored, _constant(ROWS_AT_ONCE + 1)), chosen), done)
    for kind in (FLOAT32, BFLOAT16):
        for rows in range(1, ROWS_AT_ONCE + 1):
            block = builder.append_basic_block(f"rows_{rows}_of_{kind}")
            switch.add_case(_constant((ROWS_AT_ONCE + 1) * kind + rows), block)
            builder.position_at_end(block)
            body(rows, partial(_Seen, kind=kind))
            builder.branch(done)
    builder.position_at_end(done)


@intrinsic_of(float)
def greatest(typing_context: Any, a: Any, vectors: Any) -> Any:
    """The greatest of `vectors` times `WIDTH` numbers at an address, one vector at least."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        return _fold(builder, values[0], values[1], _greater)

    return types.float32(a, vectors), generate


@intrinsic_of(float)
def total(typing_context: Any, a: Any, vectors: Any) -> Any:
    """The sum of `vectors` times `WIDTH` numbers at an address, one vector at least."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        return _fold(builder, values[0], values[1], _sum)

    return types.float32(a, vectors), generate


@intrinsic_of(float)
def number_at(typing_context: Any, address: Any) -> Any:
    """The float32 at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        return _load(builder, values[0], _float, 4)

    return types.float32(address), generate


@intrinsic_of(int)
def put_number(typing_context: Any, address: Any, number: Any) -> Any:
    """Write a float32 to an address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        _store(builder, values[1], values[0])
        return _constant(0)

    return types.int64(address, types.float32), generate


@intrinsic_of(int)
def put_bfloat16(typing_context: Any, address: Any, number: Any) -> Any:
    """Write a float32 to an address as the nearest bfloat16, of two as near the even one."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        word = ir.IntType(32)
        bits = builder.bitcast(values[1], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF))), ir.Constant(word, 16))
        is_none = builder.fcmp_unordered("uno", values[1], values[1])
        half = builder.trunc(builder.select(is_none, ir.Constant(word, 0x7FC0), rounded), ir.IntType(16))
        builder.store(half, _pointer(builder, values[0], ir.IntType(16)), align=2)
        return _constant(0)

    return types.int64(address, types.float32), generate


# ---- threads that wait for each other --------------------------------------------------------------------------------


@intrinsic_of(int)
def add_and_fetch(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 at an address, as one act among all threads; what it was before."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        return builder.atomic_rmw("add", _pointer(builder, values[0], _int64), values[1], "acq_rel")

    return types.int64(address, amount), generate


@intrinsic_of(int)
def fetch(typing_context: Any, address: Any) -> Any:
    """An int64 at an address as other threads have last written it, and all that they wrote before."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[_Value]) -> _Value:
        return builder.load_atomic(_pointer(builder, values[0], _int64), "acquire", 8)

    return types.int64(address), generate


# ---- what all of them are made of ------------------------------------------------------------------------------------


def _constant(value: int) -> _Value:
    return ir.Constant(_int64, value)


def _zero() -> _Value:
    return ir.Constant(_vector, [0.0] * WIDTH)


def _pointer(builder: Any, address: _Value, kind: Any) -> _Value:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: _Value, kind: Any, align: int) -> _Value:
    return builder.load(_pointer(builder, address, kind), align=align)


def _load_floats(builder: Any, address: _Value, kind: Any, size: int) -> _Value:
    read = _load(builder, address, ir.VectorType(kind, WIDTH), size)
    return read if kind is _float else builder.fpext(read, _vector)


def _store(builder: Any, value: _Value, address: _Value) -> None:
    builder.store(value, _pointer(builder, address, value.type), align=4)


def _prefetch(builder: Any, address: _Value) -> None:
    """Ask for a line of the cache; an address that is nobody's does no harm."""
    word, byte = ir.IntType(32), ir.IntType(8)
    kind, name = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word]), "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    to_read, keep, data = (ir.Constant(word, number) for number in (0, 3, 1))
    builder.call(function, (_pointer(builder, address, byte), to_read, keep, data))


def _spread(builder: Any, number: _Value) -> _Value:
    """A vector that holds one number everywhere."""
    first = builder.insert_element(ir.Constant(_vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(_vector, ir.Undefined), mask)


def _fma(builder: Any, a: _Value, b: _Value, c: _Value) -> _Value:
    """A * b + c, of vectors."""
    if not _FEATURES.get("fma") and not _FEATURES.get("neon"):  # it would be a call for every number
        return builder.fadd(builder.fmul(a, b), c)
    kind = ir.FunctionType(_vector, [_vector] * 3)
    name = f"llvm.fma.v{WIDTH}f32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, (a, b, c))


def _sum(builder: Any, a: _Value, b: _Value) -> _Value:
    return builder.fadd(a, b)


def _greater(builder: Any, a: _Value, b: _Value) -> _Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _fold(builder: Any, address: _Value, vectors: _Value, combine: Callable[[Any, _Value, _Value], _Value]) -> _Value:
    """What becomes of the numbers of some vectors, combined lane by lane and then the lanes."""

    def step(number: _Value, so_far: Sequence[_Value]) -> list[_Value]:
        at = builder.add(address, builder.mul(number, _constant(4 * WIDTH)))
        return [combine(builder, so_far[0], _load(builder, at, _vector, 4))]

    (found,) = _loop(builder, _constant(1), vectors, [_load(builder, address, _vector, 4)], step)
    return _fold_lanes(builder, found, combine)


def _fold_lanes(builder: Any, vector: _Value, combine: Callable[[Any, _Value, _Value], _Value]) -> _Value:
    """Pair by pair: lane i and lane i + half."""
    half = WIDTH // 2
    word = ir.IntType(32)
    while half:
        mask = ir.Constant(ir.VectorType(word, WIDTH), [(i + half) % WIDTH for i in range(WIDTH)])
        vector = combine(builder, vector, builder.shuffle_vector(vector, ir.Constant(_vector, ir.Undefined), mask))
        half //= 2
    return builder.extract_element(vector, ir.Constant(word, 0))


def _sum_pairs(builder: Any, vectors: Sequence[_Value]) -> _Value:
    """One vector of what several hold in turn, each summed pair by pair: as many neighbours as there are vectors."""
    word = ir.IntType(32)
    while len(vectors) > 1:
        halves = []
        for first, second in zip(vectors[::2], vectors[1::2], strict=True):
            pair = [
                builder.shuffle_vector(
                    first, second, ir.Constant(ir.VectorType(word, WIDTH), list(range(odd, 2 * WIDTH, 2)))
                )
                for odd in range(2)
            ]
            halves.append(builder.fadd(*pair))
        vectors = halves
    return vectors[0]


def _place(builder: Any, base: _Value, block_bytes: _Value, vector: int, size: int) -> _Value:
    """Where a unit's vector of lanes begins, in numbers of `size` bytes."""
    block, lane = divmod(vector * WIDTH, LANES)
    return builder.add(base, builder.add(builder.mul(block_bytes, _constant(block)), _constant(lane * size)))


def _loop(
    builder: Any,
    begin: _Value,
    end: _Value,
    values: Sequence[_Value],
    body: Callable[[_Value, Sequence[_Value]], list[_Value]],
) -> list[_Value]:
    """Values that go round a loop from `begin` to below `end`."""
    before = builder.block
    head, inside, behind = (builder.append_basic_block(name) for name in ("loop", "loop_body", "loop_end"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_int64)
    index.add_incoming(begin, before)
    carried = [builder.phi(value.type) for value in values]
    for phi, value in zip(carried, values, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, end), inside, behind)
    builder.position_at_end(inside)
    after = body(index, carried)
    index.add_incoming(builder.add(index, _constant(1)), builder.block)
    for phi, value in zip(carried, after, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(behind)
    return carried


sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
"""Leave this core to others for so many microseconds, or a little more."""
