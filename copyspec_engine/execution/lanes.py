"""Vector code for compiled functions, and the pieces that more of it is made of.

Numba makes vectors out of loops where it can; where it could not keep sums in registers, a few operations are written
down as LLVM has them: those here, sums of products with weights (lane_products.py), and attention (lane_attention.py).
All of them take addresses (of float32 where nothing else is said) and add up in an order that does not depend on how
many rows there are: a row's bits are the same alone and among others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from copyspec_engine.execution.narrow_weights import LANES

__all__ = [
    "BFLOAT16",
    "EIGHT_BITS",
    "EIGHT_BITS_BY_16",
    "EIGHT_BITS_LEAST",
    "FLOAT16",
    "FLOAT32",
    "FLOAT_TYPE",
    "FOUR_BITS",
    "HALF_TYPE",
    "INT64_TYPE",
    "KINDS",
    "LANES",
    "QUANTIZED",
    "VECTOR_TYPE",
    "WIDE_SCALES",
    "WIDTH",
    "Value",
    "add_and_fetch",
    "constant",
    "dot",
    "fetch",
    "fma",
    "greatest",
    "intrinsic_of",
    "load",
    "load_bfloat16",
    "load_floats",
    "loop",
    "number_at",
    "pointer",
    "prefetch",
    "put_bfloat16",
    "put_number",
    "sleep",
    "spread",
    "store",
    "total",
    "zero",
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
FLOAT32, BFLOAT16, FLOAT16, FOUR_BITS, EIGHT_BITS, EIGHT_BITS_LEAST, EIGHT_BITS_BY_16 = range(1, 8)
"""How weights are stored; the quantized ones in groups of 32 inputs (the last: 16), each with a scale for every lane.

`FOUR_BITS` and `EIGHT_BITS_LEAST` have a least value too. Scales are float16, or float32 where `WIDE_SCALES` is added.
"""
WIDE_SCALES = 16
QUANTIZED = (FOUR_BITS, EIGHT_BITS, EIGHT_BITS_LEAST, EIGHT_BITS_BY_16)
KINDS = (FLOAT32, BFLOAT16, FLOAT16, *QUANTIZED, *(kind + WIDE_SCALES for kind in QUANTIZED))
FLOAT_TYPE, HALF_TYPE, INT64_TYPE = ir.FloatType(), ir.HalfType(), ir.IntType(64)
VECTOR_TYPE = ir.VectorType(FLOAT_TYPE, WIDTH)
Value = Any  # llvmlite's values have no types
_Result = TypeVar("_Result")


def intrinsic_of(
    result: type[_Result], *, prefer_literal: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., _Result]]:
    """Numba's `intrinsic`, with the type that its call has for a reader."""

    def decorate(function: Callable[..., Any]) -> Callable[..., _Result]:
        return cast("Callable[..., _Result]", intrinsic(prefer_literal=prefer_literal)(function))

    return decorate


@intrinsic_of(float)
def dot(typing_context: Any, a: Any, b: Any, count: Any) -> Any:
    """The sum of the products of `count` numbers at two addresses, float32."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        first, second, length = values
        vectors = builder.udiv(length, constant(2 * WIDTH))

        def step(number: Value, so_far: Sequence[Value]) -> list[Value]:
            offset = builder.mul(number, constant(8 * WIDTH))
            result = []
            for half, total in enumerate(so_far):
                at = builder.add(offset, constant(4 * WIDTH * half))
                pair = [load(builder, builder.add(base, at), VECTOR_TYPE, 4) for base in (first, second)]
                result.append(fma(builder, pair[0], pair[1], total))
            return result

        halves = loop(builder, constant(0), vectors, [zero()] * 2, step)
        total = _fold_lanes(builder, builder.fadd(*halves), _sum)

        def rest(number: Value, so_far: Sequence[Value]) -> list[Value]:
            at = builder.mul(number, constant(4))
            pair = [load(builder, builder.add(base, at), FLOAT_TYPE, 4) for base in (first, second)]
            return [builder.fma(pair[0], pair[1], so_far[0])]

        (total,) = loop(builder, builder.mul(vectors, constant(2 * WIDTH)), length, [total], rest)
        return total

    return types.float32(a, b, count), generate


@intrinsic_of(float)
def greatest(typing_context: Any, a: Any, vectors: Any) -> Any:
    """The greatest of `vectors` times `WIDTH` numbers at an address, one vector at least."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        return _fold(builder, values[0], values[1], _greater)

    return types.float32(a, vectors), generate


@intrinsic_of(float)
def total(typing_context: Any, a: Any, vectors: Any) -> Any:
    """The sum of `vectors` times `WIDTH` numbers at an address, one vector at least."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        return _fold(builder, values[0], values[1], _sum)

    return types.float32(a, vectors), generate


@intrinsic_of(float)
def number_at(typing_context: Any, address: Any) -> Any:
    """The float32 at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        return load(builder, values[0], FLOAT_TYPE, 4)

    return types.float32(address), generate


@intrinsic_of(int)
def put_number(typing_context: Any, address: Any, number: Any) -> Any:
    """Write a float32 to an address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        store(builder, values[1], values[0])
        return constant(0)

    return types.int64(address, types.float32), generate


@intrinsic_of(int)
def put_bfloat16(typing_context: Any, address: Any, number: Any) -> Any:
    """Write a float32 to an address as the nearest bfloat16, of two as near the even one."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        word = ir.IntType(32)
        bits = builder.bitcast(values[1], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF))), ir.Constant(word, 16))
        is_none = builder.fcmp_unordered("uno", values[1], values[1])
        half = builder.trunc(builder.select(is_none, ir.Constant(word, 0x7FC0), rounded), ir.IntType(16))
        builder.store(half, pointer(builder, values[0], ir.IntType(16)), align=2)
        return constant(0)

    return types.int64(address, types.float32), generate


# ---- threads that wait for each other --------------------------------------------------------------------------------


@intrinsic_of(int)
def add_and_fetch(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 at an address, as one act among all threads; what it was before."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        return builder.atomic_rmw("add", pointer(builder, values[0], INT64_TYPE), values[1], "acq_rel")

    return types.int64(address, amount), generate


@intrinsic_of(int)
def fetch(typing_context: Any, address: Any) -> Any:
    """An int64 at an address as other threads have last written it, and all that they wrote before."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Value]) -> Value:
        return builder.load_atomic(pointer(builder, values[0], INT64_TYPE), "acquire", 8)

    return types.int64(address), generate


# ---- what vector code is made of -------------------------------------------------------------------------------------


def constant(value: int) -> Value:
    """An int64."""
    return ir.Constant(INT64_TYPE, value)


def zero() -> Value:
    """A vector of zeros."""
    return ir.Constant(VECTOR_TYPE, [0.0] * WIDTH)


def pointer(builder: Any, address: Value, kind: Any) -> Value:
    """An address as a pointer to something of a type."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, address: Value, kind: Any, align: int) -> Value:
    """What is at an address: something of a type, which lies at a multiple of `align` bytes."""
    return builder.load(pointer(builder, address, kind), align=align)


def load_floats(builder: Any, address: Value, kind: Any, size: int) -> Value:
    """A vector of numbers of a type, `size` bytes each, as float32."""
    read = load(builder, address, ir.VectorType(kind, WIDTH), size)
    return read if kind is FLOAT_TYPE else builder.fpext(read, VECTOR_TYPE)


def load_bfloat16(builder: Any, at: Value) -> Value:
    """A vector of bfloat16 numbers, as float32."""
    words = ir.VectorType(ir.IntType(32), WIDTH)
    upper = builder.zext(load(builder, at, ir.VectorType(ir.IntType(16), WIDTH), 2), words)
    return builder.bitcast(builder.shl(upper, ir.Constant(words, [16] * WIDTH)), VECTOR_TYPE)


def store(builder: Any, value: Value, address: Value) -> None:
    """Write a value to an address."""
    builder.store(value, pointer(builder, address, value.type), align=4)


def prefetch(builder: Any, address: Value) -> None:
    """Ask for a line of the cache; an address that is nobody's does no harm."""
    word, byte = ir.IntType(32), ir.IntType(8)
    kind, name = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word]), "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    to_read, keep, data = (ir.Constant(word, number) for number in (0, 3, 1))
    builder.call(function, (pointer(builder, address, byte), to_read, keep, data))


def spread(builder: Any, number: Value) -> Value:
    """A vector that holds one number everywhere."""
    first = builder.insert_element(ir.Constant(VECTOR_TYPE, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(VECTOR_TYPE, ir.Undefined), mask)


def fma(builder: Any, a: Value, b: Value, c: Value) -> Value:
    """A * b + c, of vectors."""
    if not _FEATURES.get("fma") and not _FEATURES.get("neon"):  # it would be a call for every number
        return builder.fadd(builder.fmul(a, b), c)
    kind = ir.FunctionType(VECTOR_TYPE, [VECTOR_TYPE] * 3)
    name = f"llvm.fma.v{WIDTH}f32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, (a, b, c))


def _sum(builder: Any, a: Value, b: Value) -> Value:
    return builder.fadd(a, b)


def _greater(builder: Any, a: Value, b: Value) -> Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _fold(builder: Any, address: Value, vectors: Value, combine: Callable[[Any, Value, Value], Value]) -> Value:
    """What becomes of the numbers of some vectors, combined lane by lane and then the lanes."""

    def step(number: Value, so_far: Sequence[Value]) -> list[Value]:
        at = builder.add(address, builder.mul(number, constant(4 * WIDTH)))
        return [combine(builder, so_far[0], load(builder, at, VECTOR_TYPE, 4))]

    (found,) = loop(builder, constant(1), vectors, [load(builder, address, VECTOR_TYPE, 4)], step)
    return _fold_lanes(builder, found, combine)


def _fold_lanes(builder: Any, vector: Value, combine: Callable[[Any, Value, Value], Value]) -> Value:
    """Pair by pair: lane i and lane i + half."""
    half = WIDTH // 2
    word = ir.IntType(32)
    while half:
        mask = ir.Constant(ir.VectorType(word, WIDTH), [(i + half) % WIDTH for i in range(WIDTH)])
        vector = combine(builder, vector, builder.shuffle_vector(vector, ir.Constant(VECTOR_TYPE, ir.Undefined), mask))
        half //= 2
    return builder.extract_element(vector, ir.Constant(word, 0))


def loop(
    builder: Any,
    begin: Value,
    end: Value,
    values: Sequence[Value],
    body: Callable[[Value, Sequence[Value]], list[Value]],
) -> list[Value]:
    """Values that go round a loop from `begin` to below `end`."""
    before = builder.block
    head, inside, behind = (builder.append_basic_block(name) for name in ("loop", "loop_body", "loop_end"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT64_TYPE)
    index.add_incoming(begin, before)
    carried = [builder.phi(value.type) for value in values]
    for phi, value in zip(carried, values, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, end), inside, behind)
    builder.position_at_end(inside)
    after = body(index, carried)
    index.add_incoming(builder.add(index, constant(1)), builder.block)
    for phi, value in zip(carried, after, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(behind)
    return carried


sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
"""Leave this core to others for so many microseconds, or a little more."""
