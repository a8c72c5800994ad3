"""Attention over the KV pool, plugged into any transformers decoder.

Importing this module registers the attention function "copyspec". A forward pass reads the new tokens of all its rows
side by side, as one text; it hands a `KVBatch` to this function through the model's keyword arguments. All new keys and
values are written to their slots at once, then each row attends over its own slots: gathered, row by row, or read in
place by the kernels of paged_attention.py where the batch says where its rows are for them.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from copyspec_engine.execution import paged_attention
from copyspec_engine.execution.paged_attention import PagedRows, Scoring
from copyspec_engine.values.errors import UnsupportedModelError
from copyspec_engine.values.tokens import TokenArray

__all__ = ["ATTENTION_NAME", "KVBatch", "KVRow", "KVStore"]

ATTENTION_NAME = "copyspec"

Slots = slice | torch.Tensor


class KVStore:
    """The pool's tensors: for each layer keys and values of shape (kv_heads, slots, head_dim).

    A layer's tensors are made when it first writes, since only then its shapes are known for certain. They have one
    slot more than the pool, which takes what is computed for padding.

    Args:
        num_slots: of the pool.
        dtype: what keys and values are kept in; None: what they are computed in.
    """

    def __init__(self, num_slots: int, dtype: torch.dtype | None = None) -> None:
        self.num_slots, self.dtype = num_slots, dtype
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.scorings: dict[int, Scoring] = {}
        """What each layer has asked of attention."""

    @property
    def num_layers(self) -> int:
        """Layers that have written."""
        return len(self.layers)

    @property
    def bytes_per_token(self) -> int:
        return sum(t.element_size() * t.shape[0] * t.shape[2] for layer in self.layers.values() for t in layer)

    @property
    def padding_slot(self) -> int:
        return self.num_slots

    def layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values; made for such as these, each (kv_heads, new, head_dim), if there are none yet."""
        if layer not in self.layers:
            self.layers[layer] = (self._empty(key), self._empty(value))
        return self.layers[layer]

    def write(
        self, layer: int, slots: Slots, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of new tokens, each (kv_heads, new, head_dim); returns the layer's."""
        keys, values = self.layer(layer, key, value)
        keys[:, slots] = key.to(keys.dtype)
        values[:, slots] = value.to(values.dtype)
        return keys, values

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros rather than uninitialised memory: a masked slot's NaN would still spoil a softmax sum.
        shape, dtype = (like.shape[0], self.num_slots + 1, like.shape[2]), self.dtype or like.dtype
        return (
            _lazy_zeros(shape, dtype)
            if like.device.type == "cpu"
            else torch.zeros(shape, dtype=dtype, device=like.device)
        )


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the CPU for which the system finds memory when they are written: slots that nobody uses take none."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private), dtype=dtype).view(shape)


class Row(Protocol):
    """One row's part in a forward pass: `KVRow`, or `OrderedRow` where bits count."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def new_positions(self) -> torch.Tensor: ...

    def on(self, device: torch.device) -> Row: ...

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor: ...


@dataclass(slots=True)
class KVRow:
    """Where one row's tokens are, for one forward pass.

    Args:
        start: the first of its new tokens among those of the pass.
        num_new: its new tokens.
        read: slots of the whole row, the new tokens last, `context` of them.
        positions: position of each token of the row, shape (context,).
        visible: which of the new tokens each new token sees, shape (new, new); None for a plain chain.
    """

    start: int
    num_new: int
    read: Slots
    positions: torch.Tensor
    visible: torch.Tensor | None
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def on(self, device: torch.device) -> KVRow:
        """The same on another device."""
        visible = None if self.visible is None else self.visible.to(device)
        return replace(
            self,
            read=on_device(self.read, device),
            positions=self.positions.to(device),
            visible=visible,
            _masks={},
        )

    @property
    def stop(self) -> int:
        """Behind its last token in the pass."""
        return self.start + self.num_new

    @property
    def new_positions(self) -> torch.Tensor:
        """Of its new tokens, shape (new,)."""
        return self.positions[-self.num_new :]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """What its new tokens read from the pool, shape (1, heads, new, value_dim).

        Args:
            query: shape (1, heads, new, key_dim).
            keys: the layer's, shape (kv_heads, slots, key_dim).
            values: the layer's, shape (kv_heads, slots, value_dim).
            scoring: what becomes of the products of queries and keys.
        """
        keys, values = (read(stored, self.read).to(query.dtype) for stored in (keys, values))
        mask = self.mask(scoring.window, query.dtype)
        if scoring.softcap is not None or scoring.sinks is not None:
            return _eager_attention(query[0], keys, values, mask, scoring)
        return _fused_attention(query, keys, values, mask, scoring.scaling)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores, shape (new, context): 0 or -inf; None if every new token sees the whole row."""
        context = len(self.positions)
        if window is not None and context <= window:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window, dtype, context)
        return self._masks[window]

    def _build_mask(self, window: int | None, dtype: torch.dtype, context: int) -> torch.Tensor | None:
        new, device = self.num_new, self.positions.device
        if new == 1 and window is None:
            return None
        hidden = torch.ones((new, context), dtype=torch.bool, device=device).triu_(context - new + 1)
        if self.visible is not None:
            hidden[:, context - new :] = ~self.visible
        if window is not None:
            distance = self.positions[context - new :, None] - self.positions[None, :]  # (new, context)
            hidden |= distance >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


@dataclass(slots=True)
class KVBatch:
    """The rows of one forward pass.

    Args:
        store: the pool's tensors.
        write: slots of the new tokens of all rows, `written` of them; what stands behind them in the pass is padding.
        written: see above.
        rows: one for each sequence, in the order of their tokens.
        paged: the same for kernels, instead of the three above.
        device: where `write` and `rows` are; None with `paged`, whose layers are all on one device.
    """

    store: KVStore
    write: Slots = field(default_factory=lambda: slice(0))
    written: int = 0
    rows: Sequence[Row] = ()
    paged: PagedRows | None = None
    device: torch.device | None = None
    _copies: dict[torch.device, KVBatch] = field(default_factory=dict)

    def on(self, device: torch.device) -> KVBatch:
        """The same on a layer's own device, where a model's layers are on several."""
        if self.paged is not None or device == self.device:
            return self
        if device not in self._copies:
            rows = [row.on(device) for row in self.rows]
            self._copies[device] = replace(
                self, write=on_device(self.write, device), rows=rows, device=device, _copies={}
            )
        return self._copies[device]


def slots_of(slots: TokenArray) -> Slots:
    """Slots in one ascending run are read in place, as a slice; others are gathered."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first == len(slots) - 1 and (len(slots) < 3 or bool((np.diff(slots) == 1).all())):
        return slice(first, last + 1)
    return torch.from_numpy(slots)


def read(stored: torch.Tensor, slots: Slots) -> torch.Tensor:
    """What stands in some slots of a layer's keys or values."""
    # Indexing with a tensor takes several times as long on a CPU as selecting does.
    return stored[:, slots] if isinstance(slots, slice) else stored.index_select(1, slots)


def on_device(slots: Slots, device: torch.device) -> Slots:
    return slots if isinstance(slots, slice) else slots.to(device)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, new, head_dim)
    key: torch.Tensor,  # (1, kv_heads, new, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | int | None = None,
    *,
    kv_batch: KVBatch | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attention of each row's new tokens over its slots; refuses what it does not know rather than ignore it.

    In place of a mask the model hands on what `_window` said.
    """
    scoring = _scoring(type(module).__name__, attention_mask, kv_batch is not None, options)
    assert kv_batch is not None
    kv_batch = kv_batch.on(query.device)
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv_batch.store.scorings[layer] = scoring
    if kv_batch.paged is not None:
        keys, values = kv_batch.store.layer(layer, key[0], value[0])
        paged_attention.write(key[0], value[0], keys, values, kv_batch.paged.write)
        return paged_attention.attend(query[0], keys, values, kv_batch.paged, scoring)[None], None
    written = kv_batch.written
    keys, values = kv_batch.store.write(layer, kv_batch.write, key[0, :, :written], value[0, :, :written])
    parts = [row.attend(query[:, :, row.start : row.stop], keys, values, scoring) for row in kv_batch.rows]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    if out.shape[2] < query.shape[2]:  # padding reads nothing
        out = F.pad(out, (0, 0, 0, query.shape[2] - out.shape[2]))
    return out.transpose(1, 2).contiguous(), None  # (1, new, heads, head_dim)


def _scoring(name: str, mask: object, has_batch: bool, options: Mapping[str, Any]) -> Scoring:
    """What a model of class `name` asks for by the options of its attention.

    Raises:
        UnsupportedModelError: this engine does not serve that.
    """
    sliding_window, dropout, is_causal = (options.get(name) for name in ("sliding_window", "dropout", "is_causal"))
    masked = isinstance(mask, torch.Tensor)
    window = mask if isinstance(mask, int) else sliding_window
    if not has_batch or masked or dropout or is_causal is False or (sliding_window or window) != window:
        raise UnsupportedModelError(
            f"{name} asks for attention that this engine does not serve "
            f"(kv_batch={has_batch}, mask={masked}, {dropout=}, {is_causal=}, {sliding_window=}, {window=})"
        )
    unknown = sorted(option for option, given in options.items() if given is not None and option not in _KNOWN)
    if unknown:
        raise UnsupportedModelError(f"{name} passes unknown attention options: {', '.join(unknown)}")
    return Scoring(options.get("scaling"), window, options.get("softcap"), options.get("s_aux"))


_READ = {"scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal"}
_HARMLESS = {
    "cache_position",
    "output_attentions",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "use_cache",
}
"""Keywords that do not change the scores: positions are in the rotated keys already, the rest asks for more outputs."""
_KNOWN = _READ | _HARMLESS


def _fused_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """SDPA; a single new token packs the query heads of a group as rows, which spares repeating keys and values."""
    _, heads, new, _ = query.shape
    grouped = heads != keys.shape[0]
    if new == 1 and grouped:
        packed = query.reshape(1, keys.shape[0], -1, query.shape[-1])  # (1, kv_heads, heads / kv_heads, head_dim)
        out = F.scaled_dot_product_attention(packed, keys[None], values[None], attn_mask=mask, scale=scaling)
        return out.reshape(1, heads, 1, -1)
    return F.scaled_dot_product_attention(
        query, keys[None], values[None], attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def _eager_attention(
    query: torch.Tensor,  # (heads, new, head_dim)
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2) or a learnt sink per head (gpt-oss), which SDPA does not have."""
    heads, new, dim = query.shape
    kv_heads, context, _ = keys.shape
    packed = query.reshape(kv_heads, -1, dim)  # (kv_heads, heads / kv_heads * new, head_dim)
    scores = packed @ keys.transpose(1, 2) * scoring.factor(dim)
    scores = scores.view(heads, new, context)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks
        scores = torch.cat((scores, sinks.view(heads, 1, 1).expand(heads, new, 1).to(scores.dtype)), dim=-1)
    weights = scores.float().softmax(dim=-1)[..., :context].to(query.dtype)
    return (weights.view(kv_heads, -1, context) @ values).view(1, heads, new, -1)


def _window(*_args: object, config: Any, local_size: int | None = None, **_others: object) -> int | None:  # noqa: ANN401
    """The window of the mask that a model asks for, which not all models tell the attention; None if it is full.

    Raises:
        UnsupportedModelError: the model looks at chunks of the text rather than at a window that moves with it.
    """
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError("attention in chunks is not supported: a token would see no further than its chunk")
    return local_size


def keep_out_of_compiled_code() -> None:
    """From now on compiled layers end their code in front of this attention, and go on behind it."""
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(_attend))  # type: ignore[no-untyped-call]


AttentionInterface.register(ATTENTION_NAME, _attend)
AttentionMaskInterface.register(ATTENTION_NAME, _window)
