"""Attention of a pass's new tokens over the slots of the KV pool, read where they lie.

The columns of a row are split over the device, so that one long row keeps all of it busy, and a second kernel puts the
parts together. Query heads that share a KV head are packed as rows of one tile, which reads the KV once for them all.
Launches depend on sizes alone and lengths are read on the device, so that a pass can be captured and replayed.

Without Triton's kernels, as on a CPU, the same function is computed by plain operations: the reference that they are
held to, too slow to serve.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

__all__ = ["PagedRows", "Scoring", "attend", "geometry", "kernels", "reference", "write"]

_MAX_SPLITS = 64
_ASSUMED_PROCESSORS = 16
"""Of a device that does not say, such as Triton's interpreter."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What becomes of the products of queries and keys.

    Args:
        scaling: what they are multiplied by; None: one over the root of the keys' size.
        window: positions that a token sees, its own among them; None: all before it.
        softcap: what scores are bent to stay below (Gemma 2).
        sinks: a learnt score per head that takes part in the softmax and has no value (gpt-oss), shape (heads,).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def factor(self, key_dim: int) -> float:
        """What products of vectors of this size are multiplied by."""
        return float(key_dim**-0.5) if self.scaling is None else self.scaling


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Where the rows of a pass are; all tensors int32, on the model's device. See `packing.pack` for the fields.

    Args:
        write: slot of each new token, shape (tokens,).
        positions: shape (tokens,).
        visible: shape (tokens, words).
        start: shape (rows,), the row of the padding counted.
        num_new: shape (rows,).
        context: shape (rows,).
        slot_start: shape (rows,).
        slots: of all rows, as far as they go.
    """

    write: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    start: torch.Tensor
    num_new: torch.Tensor
    context: torch.Tensor
    slot_start: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a launch is cut up: tiles of `block_m` query rows for `tokens` tokens, `block_n` columns at a time.

    With warps of 32 threads, and stages of columns under way at the same time.
    """

    block_m: int
    block_n: int
    tokens: int
    tiles: int
    splits: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The kernels' module; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from copyspec_engine.execution import paged_kernels

    return paged_kernels


def geometry(tokens: int, rows: int, heads: int, kv_heads: int, dim: int, itemsize: int, processors: int) -> Geometry:
    """The cut for a pass, from sizes alone.

    Args:
        tokens: of the pass, padding counted.
        rows: the row of the padding counted.
        heads: query heads.
        kv_heads: see above; a divisor of `heads`.
        dim: numbers of a key, or of a value if that is longer, padded to a power of two.
        itemsize: bytes of a number.
        processors: of the device.
    """
    group = _power_of_two(heads // kv_heads)
    # What fits the registers: 128 rows of 128 numbers, 64 of 256; few where no matrix unit takes float32.
    most = 16 if itemsize > 2 else min(128, 16384 // dim)
    block_m = max(group, min(most, max(16, _power_of_two(group * -(-tokens // rows)))))
    block_n = max(16, min(64, 16384 // (dim * itemsize)))
    each = block_m // group
    tiles = min(tokens, tokens // each + rows)
    wanted = (4 if block_m <= 32 else 2) * processors // (tiles * kv_heads)
    splits = min(_MAX_SPLITS, 1 << max(wanted, 1).bit_length() - 1)
    is_big = block_m * dim > 8192
    return Geometry(block_m, block_n, each, tiles, splits, num_warps=8 if is_big else 4, num_stages=2 if is_big else 3)


def _power_of_two(number: int) -> int:
    """The lowest one that is not below."""
    return 1 << max(number - 1, 0).bit_length()


def _uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels run on this tensor: on a GPU, or anywhere in Triton's interpreter."""
    if kernels() is None:
        return False
    if tensor.is_cuda:
        return True
    import triton

    return bool(triton.knobs.runtime.interpret)


def write(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store keys and values of new tokens in their slots.

    Args:
        key: shape (kv_heads, tokens, key_dim), the last dimension contiguous.
        value: shape (kv_heads, tokens, value_dim), likewise.
        keys: the pool's, shape (kv_heads, slots, key_dim), contiguous.
        values: the pool's, shape (kv_heads, slots, value_dim), contiguous.
        slots: int32, shape (tokens,).
    """
    module = kernels()
    if module is None or not _uses_kernels(key):
        keys[:, slots.long()] = key
        values[:, slots.long()] = value
        return
    key, value = _rows_contiguous(key), _rows_contiguous(value)
    dims = key.shape[2], value.shape[2]
    module.write_kernel[(key.shape[1], key.shape[0])](
        key, value, keys, values, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), keys.shape[1],
        *dims, *map(_power_of_two, dims), num_warps=1,
    )  # fmt: skip


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    scoring: Scoring,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of new tokens whose keys and values are in their slots already.

    Args:
        query: shape (heads, tokens, key_dim).
        keys: the pool's, shape (kv_heads, slots, key_dim), contiguous.
        values: the pool's, shape (kv_heads, slots, value_dim), contiguous.
        rows: where the rows are.
        scoring: what becomes of the products of queries and keys.
        splits: parts of the columns, a power of two; default: enough to keep the device busy.

    Returns:
        Shape (tokens, heads, value_dim), contiguous; 0 for padding.
    """
    module = kernels()
    if module is None or not _uses_kernels(query):
        return reference(query, keys, values, rows, scoring)
    window, softcap, sinks = scoring.window, scoring.softcap, scoring.sinks
    query = _rows_contiguous(query)
    heads, tokens, key_dim = query.shape
    kv_heads, num_slots, value_dim = values.shape
    num_rows = len(rows.context)
    key_pad, value_pad = (max(16, _power_of_two(dim)) for dim in (key_dim, value_dim))
    dim, processors = max(key_pad, value_pad), _processors(query.device)
    cut = geometry(tokens, num_rows, heads, kv_heads, dim, query.element_size(), processors)
    splits = cut.splits if splits is None else splits
    group = heads // kv_heads
    out = query.new_empty((tokens, heads, value_dim))
    parts = (tokens, heads, splits) if splits > 1 else (0,)
    partial = query.new_empty((*parts, value_dim), dtype=torch.float32)
    tops, weights = query.new_empty((2, *parts), dtype=torch.float32)
    module.attend_kernel[(cut.tiles, kv_heads, splits)](
        query, keys, values, out, partial, tops, weights, out if sinks is None else sinks,
        rows.slots, rows.slot_start, rows.context, rows.start, rows.num_new, rows.positions, rows.visible,
        query.stride(0), query.stride(1), num_slots, rows.visible.shape[1],
        scoring.factor(key_dim), softcap or 1.0, window or 0,
        num_rows, _power_of_two(num_rows), group, _power_of_two(group),
        key_dim, value_dim, key_pad, value_pad, cut.tokens, cut.block_m, cut.block_n, splits,
        softcap is not None, sinks is not None, window is not None,
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    if splits > 1:
        module.combine_kernel[(tokens, heads)](
            out, partial, tops, weights, out if sinks is None else sinks,
            value_dim, value_pad, splits, sinks is not None, num_warps=4,
        )  # fmt: skip
    return out


@lru_cache(maxsize=32)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _ASSUMED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: PagedRows, scoring: Scoring
) -> torch.Tensor:
    """What `attend` computes, row by row, in the type of its arguments, or in float32 where that is wider."""
    heads, tokens, _ = query.shape
    window, softcap, sinks = scoring.window, scoring.softcap, scoring.sinks
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros((tokens, heads, values.shape[2]))
    for row in range(len(rows.context)):
        context, new = int(rows.context[row]), int(rows.num_new[row])
        if not context or not new:
            continue
        start, first_slot = int(rows.start[row]), int(rows.slot_start[row])
        slots = rows.slots[first_slot : first_slot + context].long()
        positions = rows.positions[start : start + new].long()
        there = torch.cat((torch.arange(context - new, device=query.device), positions))
        nodes = torch.arange(new, device=query.device)
        words = rows.visible[start : start + new].long()[:, nodes // 32]  # (new, new)
        seen = torch.ones((new, context), dtype=torch.bool, device=query.device)
        seen[:, context - new :] = (words >> nodes % 32 & 1).bool()
        if window is not None:
            seen &= positions[:, None] - there[None, :] < window
        group = heads // keys.shape[0]
        row_keys, row_values = (pool[:, slots].to(wide).repeat_interleave(group, 0) for pool in (keys, values))
        scores = query[:, start : start + new].to(wide) @ row_keys.transpose(1, 2) * scoring.factor(query.shape[2])
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(heads, new, 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :context]
        out[start : start + new] = (weights @ row_values).transpose(0, 1).to(out.dtype)
    return out
