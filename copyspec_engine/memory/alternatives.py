"""The model's own other candidates, kept to be drafted again: a bounded table from one or two tokens to the next ones.

Each pass that checks a draft tells, for every token it reads, which tokens the model held likely to come next; all but
one of them are usually thrown away. Here they are kept under the last two tokens and under the last one alone, and
offered as branches where these tokens come up again (Token Recycling, Luo et al., ACL 2025, arXiv 2408.08696, which has
the last token only). What the model said last replaces what it said before.

A key falls into one of many small groups of entries, and the oldest entry of a full group gives way. Keys are compared
in full: what is found was stored under that very key.

Not covered: how likely an alternative is to be right (acceptance.py), and the tree (drafting/kernels/growth.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled

__all__ = [
    "NO_ALTERNATIVES",
    "NUM_ALTERNATIVES",
    "NUM_BUCKETS",
    "Alternatives",
    "AlternativesArrays",
    "AlternativesTable",
    "buckets_of",
    "contexts_of",
    "find_alternatives",
]

NUM_ALTERNATIVES = 8
"""Next tokens kept under each key."""

_WAYS = 4
"""Entries in a group."""
_SMALLEST, _LARGEST = 1 << 10, 1 << 16
"""Entries at first and at most: 52 bytes each, so 3.4 MB."""
_SPARE = 4
"""While it may still grow, a table has this many times the entries it uses: then hardly ever a group is full."""
_NONE = -1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

_LEAST_ODDS, _STEP = -5.0, 0.75
NUM_BUCKETS = 13
"""Buckets of an alternative's probability: steps of 0.75 in log-odds from 0.7 % up."""


class Alternatives(NamedTuple):
    """What a pass held likely at some branch points of one row."""

    contexts: npt.NDArray[np.int64]
    """The last two tokens before each, the one before the last -1 if there is none; shape (points, 2)."""
    tokens: npt.NDArray[np.int32]
    """The likeliest tokens behind each, most likely first, shape (points, NUM_ALTERNATIVES); -1 where there are
    fewer."""
    buckets: npt.NDArray[np.int8]
    """Bucket of the probability of each, 0 to NUM_BUCKETS - 1, same shape."""


class AlternativesArrays(NamedTuple):
    """The arrays of a table, for compiled code; a row for each entry."""

    keys: npt.NDArray[np.int64]
    """Shape (entries,); -1: free."""
    stamps: npt.NDArray[np.int64]
    """When each was stored, counted in entries, shape (entries,)."""
    tokens: npt.NDArray[np.int32]
    """As in `Alternatives`, shape (entries, NUM_ALTERNATIVES)."""
    buckets: npt.NDArray[np.int8]
    """As in `Alternatives`, shape (entries, NUM_ALTERNATIVES)."""


def buckets_of(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    """Bucket of each probability, same shape; -1 for what is too unlikely, or no number, to be kept."""
    likely = np.clip(np.nan_to_num(probabilities, nan=0.0), 1e-12, 1.0 - 1e-9)
    buckets = np.floor((np.log(likely / (1.0 - likely)) - _LEAST_ODDS) / _STEP)
    return np.clip(buckets, _NONE, NUM_BUCKETS - 1).astype(np.int8)


# ---- compiled ------------------------------------------------------------------------------------------------------


@compiled
def _key(before: int, last: int) -> int:
    """The key of two tokens, or of the last one alone if `before` is -1."""
    return ((before + 1) << 32) | last


@compiled
def _group(key: int, size: int) -> int:
    """The first row of a key's group in a table of `size` entries, a power of two."""
    value = np.uint64(key) * _MULTIPLIER
    value ^= value >> np.uint64(32)
    first: int = np.int64(value & np.uint64(size // _WAYS - 1)) * _WAYS
    return first


@compiled
def lookup(keys: npt.NDArray[np.int64], before: int, last: int) -> int:
    """The row of what was stored under two tokens, or under `last` alone if `before` is -1; -1: nothing was.

    `keys` as in `AlternativesArrays`.
    """
    key = _key(before, last)
    first = _group(key, len(keys))
    for row in range(first, first + _WAYS):
        if keys[row] == key:
            return row
    return -1


@compiled
def find_alternatives(keys: npt.NDArray[np.int64], before: int, last: int) -> tuple[int, int]:
    """(row, 0) of what is kept under two tokens, else (row, 1) of that under the last one alone, else (-1, 0)."""
    if len(keys) == 0:
        return -1, 0
    row = lookup(keys, before, last)
    if row >= 0:
        return row, 0
    row = lookup(keys, -1, last)
    return row, 1 if row >= 0 else 0


@compiled
def _row_for(arrays: AlternativesArrays, key: int) -> int:
    """The row to store a key in: its own, else a free one of its group, else the one stored longest ago."""
    first = _group(key, len(arrays.keys))
    best = first
    for row in range(first, first + _WAYS):
        if arrays.keys[row] == key:
            return row
        if arrays.stamps[row] < arrays.stamps[best]:  # a free one has 0
            best = row
    return best


@compiled
def _store(
    arrays: AlternativesArrays,
    clock: int,
    contexts: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
    buckets: npt.NDArray[np.int8],
) -> int:
    """Store what follows contexts, shape (points, 2), under both of their keys; how many free rows that took.

    Tokens and buckets are as in `Alternatives`.
    """
    taken = 0
    for point in range(len(contexts)):
        for alone in range(2):
            before = contexts[point, 0]
            if alone == 1:
                before = -1
            elif before < 0:
                continue
            key = _key(before, contexts[point, 1])
            row = _row_for(arrays, key)
            taken += 1 if arrays.keys[row] == _NONE else 0
            clock += 1
            arrays.keys[row], arrays.stamps[row] = key, clock
            for i in range(arrays.tokens.shape[1]):
                arrays.tokens[row, i], arrays.buckets[row, i] = tokens[point, i], buckets[point, i]
    return taken


@compiled
def _move(old: AlternativesArrays, new: AlternativesArrays, order: npt.NDArray[np.int64]) -> None:
    """Store the rows `order`, shape (n,), of one table in a larger one, which is empty."""
    for row in order:
        to = _row_for(new, old.keys[row])
        new.keys[to], new.stamps[to] = old.keys[row], old.stamps[row]
        for i in range(old.tokens.shape[1]):
            new.tokens[to, i], new.buckets[to, i] = old.tokens[row, i], old.buckets[row, i]


# ---- the table -----------------------------------------------------------------------------------------------------


class AlternativesTable:
    """What a model held likely behind one and two tokens, in the texts of one conversation or one pool.

    Args:
        max_entries: a power of two from 1,024 on; it starts smaller and grows as it fills.
    """

    def __init__(self, max_entries: int = _LARGEST) -> None:
        self._max_entries = max_entries
        self._clock = self._num_entries = 0
        self.arrays = _empty(min(_SMALLEST, max_entries))

    def __len__(self) -> int:
        """Keys that are stored."""
        return self._num_entries

    @property
    def num_bytes(self) -> int:
        """Main memory that the table takes; it does not shrink but by `erase`."""
        return sum(array.nbytes for array in self.arrays)

    def add(self, alternatives: Alternatives) -> None:
        """Keep what was likely; under the same tokens, what is later replaces what is earlier."""
        most = self._num_entries + 2 * len(alternatives.contexts)
        while _SPARE * most > len(self.arrays.keys) < self._max_entries:
            self._grow()
        self._num_entries += _store(self.arrays, self._clock, *alternatives)
        self._clock += 2 * len(alternatives.contexts)

    def find(self, before: int, last: int) -> list[tuple[int, int]]:
        """(token, bucket of its probability) stored under two tokens, or under `last` alone if `before` is -1."""
        row = lookup(self.arrays.keys, before, last)
        if row < 0:
            return []
        pairs = zip(self.arrays.tokens[row].tolist(), self.arrays.buckets[row].tolist(), strict=True)
        return [(token, chance) for token, chance in pairs if token != _NONE]

    def erase(self) -> None:
        """Forget everything."""
        self.arrays = _empty(min(_SMALLEST, self._max_entries))
        self._num_entries = 0

    def _grow(self) -> None:
        old = self.arrays
        self.arrays = _empty(2 * len(old.keys))
        used = np.flatnonzero(old.keys != _NONE)
        _move(old, self.arrays, used[np.argsort(old.stamps[used])])
        self._num_entries = int((self.arrays.keys != _NONE).sum())


def contexts_of(
    ending: tuple[int, int], tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]
) -> npt.NDArray[np.int64]:
    """The last two tokens before branch points of a row, shape (len(nodes), 2).

    Args:
        ending: the last two tokens of its text.
        tokens: of its draft.
        parents: of its draft.
        nodes: the draft nodes behind which they are; -1: the text's end.
    """
    return np.array(
        [
            ending if node < 0 else (ending[1] if parents[node] < 0 else tokens[parents[node]], tokens[node])
            for node in nodes
        ],
        dtype=np.int64,
    ).reshape(-1, 2)


def _empty(size: int) -> AlternativesArrays:
    return AlternativesArrays(
        keys=np.full(size, _NONE, dtype=np.int64),
        stamps=np.zeros(size, dtype=np.int64),
        tokens=np.full((size, NUM_ALTERNATIVES), _NONE, dtype=np.int32),
        buckets=np.zeros((size, NUM_ALTERNATIVES), dtype=np.int8),
    )


NO_ALTERNATIVES = _empty(0)
"""A table for where nothing is recycled."""
