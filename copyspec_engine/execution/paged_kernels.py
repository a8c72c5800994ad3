"""Triton kernels of `paged_attention`: imported where Triton is, and only then.

Names: a tile holds a few new tokens of one row with all query heads of one KV head; a split is a part of the row's
columns; column c of a row is its token c, whose keys and values lie in slot `slots[slot_start + c]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_kernel", "combine_kernel", "write_kernel"]


@triton.jit
def write_kernel(
    key, value, keys, values, write,
    key_head, key_token, value_head, value_token, num_slots,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """One token and KV head: copy its key and value to its slot."""
    token = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    at = head * num_slots + tl.load(write + token)
    k = tl.arange(0, KEY_PAD)
    v = tl.arange(0, VALUE_PAD)
    new_key = tl.load(key + head * key_head + token * key_token + k, mask=k < KEY_DIM)
    new_value = tl.load(value + head * value_head + token * value_token + v, mask=v < VALUE_DIM)
    tl.store(keys + at * KEY_DIM + k, new_key, mask=k < KEY_DIM)
    tl.store(values + at * VALUE_DIM + v, new_value, mask=v < VALUE_DIM)


@triton.jit
def _add_columns(
    q, keys, values, slot, inside, seen, acc, top, weight, scaling, softcap,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Take columns into a softmax that goes on: weighted values, highest score and sum of weights of each query."""
    k = tl.arange(0, KEY_PAD)
    v = tl.arange(0, VALUE_PAD)
    key = tl.load(keys + slot[:, None] * KEY_DIM + k[None, :], mask=inside[:, None] & (k < KEY_DIM)[None, :], other=0.0)
    score = tl.dot(q, tl.trans(key), input_precision="ieee") * scaling
    if HAS_SOFTCAP:
        score = softcap * (1.0 - 2.0 / (tl.exp(score * (2.0 / softcap)) + 1.0))  # tanh, finite at both ends
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    zero = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: exp(-inf - 0) is 0, not NaN
    share = tl.exp(score - zero[:, None])
    scale = tl.exp(top - zero)
    value = tl.load(
        values + slot[:, None] * VALUE_DIM + v[None, :], mask=inside[:, None] & (v < VALUE_DIM)[None, :], other=0.0
    )
    acc = acc * scale[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
    return acc, new_top, weight * scale + tl.sum(share, 1)


@triton.jit
def attend_kernel(
    query, keys, values, out, partial, tops, weights, sinks,
    slots, slot_start, context, start, num_new, positions, visible,
    query_head, query_token, num_slots, words, scaling, softcap, window,
    ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One tile, KV head and split: attention of the tile's tokens over the split's columns."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(1) * GROUP

    # Tiles are dealt out to the rows in their order, as many as a row's new tokens fill.
    row_ids = tl.arange(0, ROWS_PAD)
    widths = tl.load(num_new + row_ids, mask=row_ids < ROWS, other=0)
    ends = tl.cumsum((widths + TOKENS - 1) // TOKENS, 0)
    row = tl.sum((ends <= tile).to(tl.int32), 0)
    if row >= ROWS:
        return
    first = (tile - tl.max(tl.where(ends <= tile, ends, 0), 0)) * TOKENS

    new = tl.load(num_new + row)
    begin = tl.load(start + row)
    base = tl.load(context + row) - new  # below 0 for the padding, which has no columns
    table = slots + tl.load(slot_start + row)
    lane = tl.arange(0, BLOCK_M)
    token = first + lane // GROUP_PAD
    head = kv_head * GROUP + lane % GROUP_PAD
    is_real = (token < new) & (lane % GROUP_PAD < GROUP)
    position = tl.load(positions + begin + token, mask=token < new, other=2147483647)

    # Columns that some token of the tile may see, and this split's part of them.
    high = base + tl.minimum(first + TOKENS, new)
    low = tl.minimum(base, 0)
    if HAS_WINDOW:
        low = tl.minimum(base, tl.min(position, 0) - window + 1)
    low = tl.maximum(low, 0)
    blocks = (tl.maximum(high - low, 0) + BLOCK_N - 1) // BLOCK_N
    span = (blocks + SPLITS - 1) // SPLITS * BLOCK_N
    left = low + split * span
    right = tl.minimum(left + span, high)

    k = tl.arange(0, KEY_PAD)
    v = tl.arange(0, VALUE_PAD)
    at = query + head[:, None] * query_head + (begin + token)[:, None] * query_token + k[None, :]
    q = tl.load(at, mask=is_real[:, None] & (k < KEY_DIM)[None, :], other=0.0)
    keys += kv_head.to(tl.int64) * num_slots * KEY_DIM
    values += kv_head.to(tl.int64) * num_slots * VALUE_DIM
    acc = tl.zeros((BLOCK_M, VALUE_PAD), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # What the row had before: its token c stands at position c.
    stop = tl.minimum(right, base)
    for n in range(left, stop, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        inside = column < stop
        slot = tl.load(table + column, mask=inside, other=0).to(tl.int64)
        seen = is_real[:, None] & inside[None, :]
        if HAS_WINDOW:
            seen = seen & (position[:, None] - column[None, :] < window)
        acc, top, weight = _add_columns(
            q, keys, values, slot, inside, seen, acc, top, weight, scaling, softcap,
            KEY_DIM, VALUE_DIM, KEY_PAD, VALUE_PAD, HAS_SOFTCAP,
        )  # fmt: skip

    # Its new tokens: a tree, each node at its depth.
    for n in range(tl.maximum(left, base), right, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        inside = column < right
        slot = tl.load(table + column, mask=inside, other=0).to(tl.int64)
        node = column - base
        bits = visible + (begin + token)[:, None] * words + (node // 32)[None, :]
        word = tl.load(bits, mask=is_real[:, None] & inside[None, :], other=0)
        seen = ((word >> (node % 32)[None, :]) & 1) != 0
        if HAS_WINDOW:
            there = tl.load(positions + begin + node, mask=inside, other=0)
            seen = seen & (position[:, None] - there[None, :] < window)
        acc, top, weight = _add_columns(
            q, keys, values, slot, inside, seen, acc, top, weight, scaling, softcap,
            KEY_DIM, VALUE_DIM, KEY_PAD, VALUE_PAD, HAS_SOFTCAP,
        )  # fmt: skip

    place = (begin + token) * heads + head
    if SPLITS == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=is_real, other=0.0).to(tl.float32)
            peak = tl.maximum(top, sink)
            scale = tl.exp(top - peak)
            acc = acc * scale[:, None]
            weight = weight * scale + tl.exp(sink - peak)
        acc = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        to = out + place.to(tl.int64)[:, None] * VALUE_DIM + v[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=is_real[:, None] & (v < VALUE_DIM)[None, :])
    else:
        place = place.to(tl.int64) * SPLITS + split
        tl.store(tops + place, top, mask=is_real)
        tl.store(weights + place, weight, mask=is_real)
        to = partial + place[:, None] * VALUE_DIM + v[None, :]
        is_any = is_real & (top != float("-inf"))  # the others are not read
        tl.store(to, acc, mask=is_any[:, None] & (v < VALUE_DIM)[None, :])


@triton.jit
def combine_kernel(
    out, partial, tops, weights, sinks,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One token and query head: the splits' parts together. SPLITS is a power of two."""
    head = tl.program_id(1)
    place = (tl.program_id(0) * tl.num_programs(1) + head).to(tl.int64)
    at = place * SPLITS + tl.arange(0, SPLITS)
    v = tl.arange(0, VALUE_PAD)
    top = tl.load(tops + at)
    peak = tl.max(top, 0)
    if HAS_SINKS:
        peak = tl.maximum(peak, tl.load(sinks + head).to(tl.float32))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.exp(top - peak)
    parts = tl.load(
        partial + at[:, None] * VALUE_DIM + v[None, :],
        mask=(top != float("-inf"))[:, None] & (v < VALUE_DIM)[None, :],
        other=0.0,
    )
    weight = tl.sum(tl.load(weights + at) * scale, 0)
    if HAS_SINKS:
        weight += tl.exp(tl.load(sinks + head).to(tl.float32) - peak)
    acc = tl.sum(parts * scale[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + place * VALUE_DIM + v, acc.to(out.dtype.element_ty), mask=v < VALUE_DIM)
