"""Attention that gives a token the same bits whatever else is in the pass, and however the token came there.

A token may be decoded, drafted in a chain or on a branch, or read with a piece of a prompt. Each time the keys of its
own path stand in columns by their positions, in float32, and everything is summed in an order that only positions
decide: a score over the numbers of one key; a softmax along the columns, where zeros behind the last one change
nothing; values in blocks of 64 columns, which are added up pair by pair. Matrix products have at least as many rows as
were found to be enough for a row not to depend on their number (exact_passes.py).

Tokens share the keys in front of a draft, which are read once for all of them, in place where they lie in one piece.
Behind that each branch has its own: those of the first one for many tokens, those of the others for a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows

from copyspec_engine.execution.attention import Slots, on_device, read, slots_of
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.paged_attention import Scoring
from copyspec_engine.values.tokens import TokenArray

__all__ = ["OrderedRow"]

_BLOCK = 64
"""Columns whose values are summed in one matrix product; contexts are filled up to a multiple of it."""
_ALIGNED = 64
"""Bytes: what is read in place starts at a multiple of them, as a copy does, since kernels may look at that."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Columns that some tokens share.

    Args:
        tokens: of the row, shape (groups, tokens of a group), one may be named twice; None: one group of all of them.
        first: the first column.
        slots: of the columns, one group behind the other.
    """

    tokens: torch.Tensor | None
    first: int
    slots: Slots

    def on(self, device: torch.device) -> _Segment:
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, tokens=tokens, slots=on_device(self.slots, device))

    @property
    def num_columns(self) -> int:
        slots = self.slots
        return slots.stop - slots.start if isinstance(slots, slice) else len(slots) // self.num_groups

    @property
    def num_groups(self) -> int:
        return 1 if self.tokens is None else len(self.tokens)

    def columns(self, stored: torch.Tensor) -> torch.Tensor:
        """Its keys or values in float32, shape (kv_heads, groups, columns, dim)."""
        slots = self.slots
        if isinstance(slots, slice) and stored.shape[2] * stored.element_size() % _ALIGNED:
            slots = torch.arange(slots.start, slots.stop, device=stored.device)
        return torch.unflatten(read(stored, slots).float(), 1, (self.num_groups, -1))

    def take(self, of_row: torch.Tensor) -> torch.Tensor:
        """What is its tokens' own of a tensor of shape (kv_heads, tokens, ...), by groups."""
        return of_row[:, None] if self.tokens is None else of_row[:, self.tokens]


@dataclass(slots=True)
class OrderedRow:
    """One row's new tokens for one forward pass, each with the keys of its own path in order.

    Args:
        start: the first of its new tokens among those of the pass.
        num_new: its new tokens.
        positions: of the new tokens, the last one repeated up to the least number of them in a matrix product.
        segments: which tokens see which columns.
        num_columns: of the longest path, filled up to a full block.
    """

    start: int
    num_new: int
    positions: torch.Tensor
    segments: Sequence[_Segment]
    num_columns: int
    _hidden: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, piece: Piece, start: int, least: int, device: torch.device) -> OrderedRow:
        """The row of a piece.

        Args:
            piece: new tokens, a draft's nodes last.
            start: see above.
            least: tokens of a matrix product, at least.
            device: of the model's first layer.
        """
        positions, segments = piece.positions().astype(np.int64), _segments(piece, least)
        filled = np.pad(positions, (0, max(least - len(positions), 0)), mode="edge")
        columns = max(segment.first + segment.num_columns for segment in segments)
        return cls(start, len(positions), torch.from_numpy(filled), segments, columns).on(device)

    def on(self, device: torch.device) -> OrderedRow:
        """The same on another device."""
        segments = [segment.on(device) for segment in self.segments]
        return replace(self, positions=self.positions.to(device), segments=segments, _hidden={})

    @property
    def stop(self) -> int:
        """Behind its last token in the pass."""
        return self.start + self.num_new

    @property
    def new_positions(self) -> torch.Tensor:
        """Of its new tokens, shape (new,)."""
        return self.positions[: self.num_new]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """What its new tokens read from the pool, shape (1, heads, new, value_dim).

        Args:
            query: shape (1, heads, new, key_dim).
            keys: the layer's, shape (kv_heads, slots, key_dim).
            values: the layer's, shape (kv_heads, slots, value_dim).
            scoring: what becomes of the products of queries and keys.
        """
        kv_heads, heads, tokens = keys.shape[0], query.shape[1], len(self.positions)
        group = heads // kv_heads
        asked = F.pad(query[0].float(), (0, 0, 0, tokens - self.num_new))
        asked = torch.unflatten(asked, 0, (kv_heads, group)).transpose(1, 2)  # (kv_heads, tokens, group, dim)
        scores = asked.new_full((kv_heads, tokens, group, self.num_columns), -torch.inf)
        for segment in self.segments:
            columns = segment.columns(keys)
            products = segment.take(asked).flatten(2, 3) @ columns.transpose(2, 3)  # (..., tokens x group, columns)
            _put(scores[..., segment.first : segment.first + columns.shape[2]], segment, products, group)
        weights = self._weights(scores, scoring, query.shape[3])
        parts = asked.new_zeros((kv_heads, tokens, group, self.num_columns // _BLOCK, values.shape[2]))
        for segment in self.segments:
            columns = segment.columns(values)
            shares = segment.take(weights[..., segment.first : segment.first + columns.shape[2]])
            shares = torch.unflatten(shares, 4, (-1, _BLOCK)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
            sums = shares @ torch.unflatten(columns, 2, (-1, _BLOCK))  # (kv_heads, groups, blocks, tokens x group, dim)
            first = segment.first // _BLOCK
            _put(parts[..., first : first + sums.shape[2], :], segment, sums.transpose(2, 3), group)
        summed = _added_up(parts)[:, : self.num_new]
        return summed.transpose(1, 2).reshape(1, heads, self.num_new, -1).to(query.dtype)

    def _weights(self, scores: torch.Tensor, scoring: Scoring, dim: int) -> torch.Tensor:
        """The softmax of scores, shape (kv_heads, new, group, columns), which are changed."""
        scores *= scoring.factor(dim)
        if scoring.softcap is not None:
            scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
        scores.masked_fill_(self._hides(scoring.window), -torch.inf)
        if scoring.sinks is not None:
            sinks = scoring.sinks.float().view(scores.shape[0], 1, scores.shape[2], 1)
            scores = torch.cat((scores, sinks.expand(-1, scores.shape[1], -1, 1)), dim=-1)
        return _softmax(scores)[..., : self.num_columns]

    def _hides(self, window: int | None) -> torch.Tensor:
        """Which columns a token does not see, shape (new, 1, columns)."""
        if window not in self._hidden:
            distance = self.positions[:, None] - torch.arange(self.num_columns, device=self.positions.device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            self._hidden[window] = hidden[:, None]
        return self._hidden[window]


def _segments(piece: Piece, least: int) -> list[_Segment]:
    """Which of a piece's tokens see which columns."""
    before = piece.base // _BLOCK * _BLOCK  # full blocks that nothing new stands in
    slots = piece.slots[: piece.context].astype(np.int64, copy=False)
    own = slots[before : piece.base]
    segments = [_Segment(None, 0, slots_of(slots[:before]))] if before else []

    def filled(path: Sequence[int]) -> int:
        return -(-(len(own) + len(path)) // _BLOCK) * _BLOCK

    def columns(path: Sequence[int], count: int) -> TokenArray:
        """Slots of the tail of one path, filled up with its own first one: nobody else's is read."""
        listed = np.concatenate((own, slots[piece.base + np.array(path)]))
        return np.pad(listed, (0, count - len(listed)), constant_values=listed[0])

    if piece.draft.is_chain:
        everyone = range(len(piece.ids))
        return [*segments, _Segment(None, before, torch.from_numpy(columns(everyone, filled(everyone))))]
    (trunk, path), *others = _branches(piece)
    segments.append(_Segment(_tokens([trunk], least), before, torch.from_numpy(columns(path, filled(path)))))
    few = [(nodes[at : at + least], path) for nodes, path in others for at in range(0, len(nodes), least)]
    if few:
        length = max(filled(path) for _, path in few)
        listed = np.concatenate([columns(path, length) for _, path in few])
        segments.append(_Segment(_tokens([nodes for nodes, _ in few], least), before, torch.from_numpy(listed)))
    return segments


def _branches(piece: Piece) -> list[tuple[list[int], list[int]]]:
    """For each leaf of a draft those new tokens of its path that are on none before, and the path, pending ones too."""
    pending, parents = len(piece.ids) - len(piece.draft), piece.draft.parents
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else range(pending)), pending + node])
    inner, seen = set(parents), set[int]()
    branches = []
    for path in (path for node, path in enumerate(paths) if node not in inner):
        branches.append(([token for token in path if token not in seen], path))
        seen.update(path)
    return branches


def _tokens(groups: Sequence[Sequence[int]], least: int) -> torch.Tensor:
    """Groups as one array: the last token of each is repeated, so that each has `least`, and all have as many."""
    size = max(least, *(len(group) for group in groups))
    return torch.tensor([[*group, *[group[-1]] * (size - len(group))] for group in groups])


def _put(of_row: torch.Tensor, segment: _Segment, results: torch.Tensor, group: int) -> None:
    """Write a segment's results, shape (kv_heads, groups, tokens x group, ...), where its tokens are."""
    results = torch.unflatten(results, 2, (-1, group))
    if segment.tokens is None:
        of_row.copy_(results[:, 0])
    else:
        of_row[:, segment.tokens] = results


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Along the last dimension, with a sum that columns of -inf at its end do not change."""
    if scores.device.type == "cpu":  # adds up vectors of columns, front to back
        return scores.softmax(-1)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / _added_up(powers[..., None])


def _added_up(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension but one, pair by pair: zeros at its end do not change it."""
    while parts.shape[-2] > 1:
        if parts.shape[-2] % 2:
            parts = F.pad(parts, (0, 0, 0, 1))
        parts = parts[..., 0::2, :] + parts[..., 1::2, :]
    return parts[..., 0, :]
