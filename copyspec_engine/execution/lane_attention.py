"""Attention in vectors: products of queries with the keys that they see, and sums of values by their weights.

Keys and values are read where they lie, as float32 or bfloat16, once for several queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from copyspec_engine.execution.lanes import (
    BFLOAT16,
    FLOAT32,
    FLOAT_TYPE,
    INT64_TYPE,
    VECTOR_TYPE,
    WIDTH,
    Value,
    constant,
    fma,
    intrinsic_of,
    load,
    load_bfloat16,
    loop,
    prefetch,
    spread,
    store,
    zero,
)

__all__ = [
    "CHUNK",
    "ROWS_AT_ONCE",
    "SEEN_COLUMNS",
    "SEEN_COUNT",
    "SEEN_DIM",
    "SEEN_KEYS",
    "SEEN_SLOTS",
    "SEEN_STORED",
    "SEEN_VALUES",
    "score",
    "weighted_sum",
]

CHUNK = 128
"""Positions whose keys and values are one piece of work; their parts of the softmax are put together afterwards."""
ROWS_AT_ONCE = 4
"""Queries that keys and values are read for at a time."""
_KEYS = 4
"""Keys that are read at a time."""
_KEYS_AHEAD = 32
"""How many keys further memory is asked for."""
# Columns of what queries see: addresses of keys, values (slots, dim) and slots (int64), how many slots there are, at
# most CHUNK, the size of a key, and whether keys and values are FLOAT32 or BFLOAT16.
SEEN_KEYS, SEEN_VALUES, SEEN_SLOTS, SEEN_COUNT, SEEN_DIM, SEEN_STORED = range(6)
SEEN_COLUMNS = 6


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

    def generate(_context: Any, builder: Any, _signature: Any, given: Sequence[Value]) -> Value:
        seen, chosen, *rest = given
        _for_rows(builder, seen, chosen, lambda rows, stored: _score_rows(builder, stored(builder, seen), rows, *rest))
        return constant(0)

    return types.int64(*[types.int64] * 5), generate


class _Seen:
    """Keys or values at some slots, as a kernel reads them."""

    def __init__(self, builder: Any, columns: Value, kind: int) -> None:
        self._builder, self._kind, self.size = builder, kind, 2 if kind == BFLOAT16 else 4
        self.keys, self.values, self._slots, self.count, self.dim, _ = (
            load(builder, builder.add(columns, constant(8 * which)), INT64_TYPE, 8) for which in range(SEEN_COLUMNS)
        )
        self.row_bytes = builder.mul(self.dim, constant(self.size))
        self.vectors = builder.udiv(self.dim, constant(WIDTH))
        self.blocks = builder.udiv(builder.add(self.count, constant(WIDTH - 1)), constant(WIDTH))

    def row(self, base: Value, number: Value) -> Value:
        """Where the keys or values of a slot begin; behind the last slot those of the last one."""
        builder, last = self._builder, self._builder.sub(self.count, constant(1))
        number = builder.select(builder.icmp_signed("<", number, last), number, last)
        slot = load(builder, builder.add(self._slots, builder.mul(number, constant(8))), INT64_TYPE, 8)
        return builder.add(base, builder.mul(slot, self.row_bytes))

    def vector(self, at: Value) -> Value:
        return load_bfloat16(self._builder, at) if self._kind == BFLOAT16 else load(self._builder, at, VECTOR_TYPE, 4)

    def number(self, at: Value) -> Value:
        if self._kind != BFLOAT16:
            return load(self._builder, at, FLOAT_TYPE, 4)
        bits = self._builder.zext(load(self._builder, at, ir.IntType(16), 2), ir.IntType(32))
        return self._builder.bitcast(self._builder.shl(bits, ir.Constant(ir.IntType(32), 16)), FLOAT_TYPE)

    def ask(self, base: Value, number: Value) -> None:
        """Ask memory for the row of a slot."""
        builder, row = self._builder, self.row(base, number)

        def line(number: Value, _: Sequence[Value]) -> list[Value]:
            prefetch(builder, builder.add(row, builder.mul(number, constant(64))))
            return []

        lines = builder.udiv(builder.add(self.row_bytes, constant(63)), constant(64))
        loop(builder, constant(0), lines, [], line)


def _score_rows(builder: Any, seen: _Seen, rows: int, queries: Value, out: Value, ahead: Value) -> None:
    def block(number: Value, _: Sequence[Value]) -> list[Value]:
        first = builder.mul(number, constant(WIDTH))
        with builder.if_then(builder.icmp_signed("!=", ahead, constant(0))):

            def ask(key: Value, _: Sequence[Value]) -> list[Value]:
                seen.ask(seen.values, key)
                seen.ask(seen.keys, builder.add(key, constant(_KEYS_AHEAD)))
                return []

            loop(builder, first, builder.add(first, constant(WIDTH)), [], ask)
        few = range(0, WIDTH, _KEYS)
        found = [_score_few(builder, seen, rows, queries, builder.add(first, constant(i))) for i in few]
        for row in range(rows):
            at = builder.add(out, builder.add(constant(4 * CHUNK * row), builder.mul(first, constant(4))))
            store(builder, _sum_pairs(builder, [those[row] for those in found]), at)
        return []

    loop(builder, constant(0), seen.blocks, [], block)
    whole = builder.mul(seen.vectors, constant(WIDTH))
    with builder.if_then(builder.icmp_signed("<", whole, seen.dim)):
        _score_rest(builder, seen, rows, queries, out)


def _score_few(builder: Any, seen: _Seen, rows: int, queries: Value, first: Value) -> list[Value]:
    """For each row a vector of partial sums: those of a few keys in turn."""
    places = [seen.row(seen.keys, builder.add(first, constant(i))) for i in range(_KEYS)]

    def step(number: Value, so_far: Sequence[Value]) -> list[Value]:
        offset, result = builder.mul(number, constant(seen.size * WIDTH)), []
        read = [seen.vector(builder.add(place, offset)) for place in places]
        for row in range(rows):
            at = builder.add(queries, builder.mul(seen.dim, constant(4 * row)))
            query = load(builder, builder.add(at, builder.mul(number, constant(4 * WIDTH))), VECTOR_TYPE, 4)
            result += [fma(builder, query, key, so_far[_KEYS * row + i]) for i, key in enumerate(read)]
        return result

    sums = loop(builder, constant(0), seen.vectors, [zero()] * (rows * _KEYS), step)
    return [_sum_pairs(builder, sums[_KEYS * row : _KEYS * (row + 1)]) for row in range(rows)]


def _score_rest(builder: Any, seen: _Seen, rows: int, queries: Value, out: Value) -> None:
    """Add the products of the numbers behind a key's last whole vector."""
    whole = builder.mul(seen.vectors, constant(WIDTH))

    def add_rest(key: Value, _: Sequence[Value]) -> list[Value]:
        place = seen.row(seen.keys, key)
        for row in range(rows):
            at = builder.add(out, builder.add(constant(4 * CHUNK * row), builder.mul(key, constant(4))))
            query = builder.add(queries, builder.mul(seen.dim, constant(4 * row)))

            def product(number: Value, so_far: Sequence[Value], query: Value = query) -> list[Value]:
                other = load(builder, builder.add(query, builder.mul(number, constant(4))), FLOAT_TYPE, 4)
                number = seen.number(builder.add(place, builder.mul(number, constant(seen.size))))
                return [builder.fma(other, number, so_far[0])]

            store(builder, loop(builder, whole, seen.dim, [load(builder, at, FLOAT_TYPE, 4)], product)[0], at)
        return []

    loop(builder, constant(0), builder.mul(seen.blocks, constant(WIDTH)), [], add_rest)


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

    def generate(_context: Any, builder: Any, _signature: Any, given: Sequence[Value]) -> Value:
        seen, chosen, *rest = given
        _for_rows(builder, seen, chosen, lambda rows, stored: _sum_rows(builder, stored(builder, seen), rows, *rest))
        return constant(0)

    return types.int64(*[types.int64] * 5), generate


def _sum_rows(builder: Any, seen: _Seen, rows: int, weights: Value, out: Value, out_bytes: Value) -> None:
    def columns(first: Value, at_once: int, width: int) -> None:
        """Some columns: `at_once` vectors, or a single number where `width` is 1."""
        source = builder.add(seen.values, builder.mul(first, constant(seen.size)))

        def step(number: Value, so_far: Sequence[Value]) -> list[Value]:
            place, result = seen.row(source, number), []
            places = [builder.add(place, constant(seen.size * width * i)) for i in range(at_once)]
            read = [seen.number(at) if width == 1 else seen.vector(at) for at in places]
            for row in range(rows):
                at = builder.add(weights, builder.add(constant(4 * CHUNK * row), builder.mul(number, constant(4))))
                weight, begun = load(builder, at, FLOAT_TYPE, 4), so_far[at_once * row :]
                if width == 1:
                    result.append(builder.fma(weight, read[0], begun[0]))
                else:
                    repeated = spread(builder, weight)
                    result += [fma(builder, repeated, value, begun[i]) for i, value in enumerate(read)]
            return result

        zeros = [ir.Constant(FLOAT_TYPE, 0.0) if width == 1 else zero()] * (rows * at_once)
        for index, total in enumerate(loop(builder, constant(0), seen.count, zeros, step)):
            row, column = divmod(index, at_once)
            target = builder.add(builder.add(out, builder.mul(out_bytes, constant(row))), constant(4 * width * column))
            store(builder, total, builder.add(target, builder.mul(first, constant(4))))

    def over(begin: Value, end: Value, at_once: int, width: int) -> None:
        def body(number: Value, _: Sequence[Value]) -> list[Value]:
            columns(builder.mul(number, constant(at_once * width)), at_once, width)
            return []

        loop(builder, begin, end, [], body)

    at_once = _columns_at_once(rows)
    wide = builder.udiv(seen.vectors, constant(at_once))
    over(constant(0), wide, at_once, WIDTH)
    over(builder.mul(wide, constant(at_once)), seen.vectors, 1, WIDTH)
    over(builder.mul(seen.vectors, constant(WIDTH)), seen.dim, 1, 1)


def _columns_at_once(rows: int) -> int:
    """Vectors of columns whose sums, of all rows, stay in registers: of up to 64 numbers, as most heads have."""
    registers = 2 * WIDTH  # there are twice as many of the wide ones
    return next(vectors for vectors in (8, 4, 2) if vectors * WIDTH <= 64 and vectors * rows < registers)


def _for_rows(builder: Any, seen: Value, chosen: Value, body: Callable[[int, Callable[..., _Seen]], None]) -> None:
    """Write code for each number of rows and each type of what they see, of which one is run."""
    done = builder.append_basic_block("done")
    stored = load(builder, builder.add(seen, constant(8 * SEEN_STORED)), INT64_TYPE, 8)
    switch = builder.switch(builder.add(builder.mul(stored, constant(ROWS_AT_ONCE + 1)), chosen), done)
    for kind in (FLOAT32, BFLOAT16):
        for rows in range(1, ROWS_AT_ONCE + 1):
            block = builder.append_basic_block(f"rows_{rows}_of_{kind}")
            switch.add_case(constant((ROWS_AT_ONCE + 1) * kind + rows), block)
            builder.position_at_end(block)
            body(rows, partial(_Seen, kind=kind))
            builder.branch(done)
    builder.position_at_end(done)


def _sum_pairs(builder: Any, vectors: Sequence[Value]) -> Value:
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
