"""Where the last tokens of a text occurred before: the index that copying rests on.

`CopyIndex` holds one stream of token ids and finds, for the tokens at the end of a query, the most recent earlier
occurrence of their longest indexed suffix. Hashes only point; tokens decide: every hit is compared before it counts.

Not covered: which occurrence is worth copying and how far (drafter.py), and whose texts these are (memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ORDERS", "CopyIndex", "CopyMatch", "EarliestIndex", "TokenArray"]

TokenArray = npt.NDArray[np.int64]

ORDERS = (16, 8, 4, 2)
"""Lengths of the token runs that are hashed, longest first. Powers of two, so that each hash joins two of the next."""

MAX_MATCH_TOKENS = 64
"""Matches are measured up to this length: beyond it the next token survives just as well."""

_MULTIPLIERS = {2: 0x9E3779B97F4A7C15, 4: 0xC2B2AE3D27D4EB4F, 8: 0x165667B19E3779F9, 16: 0xD6E8FEB86659FD93}


class CopyMatch(NamedTuple):
    """The `length` tokens before `position` equal the end of the query; `position` is the next token to copy."""

    position: int
    length: int


class CopyIndex:
    """An append-only token stream with the most recent position of each of its 2-, 4-, 8- and 16-token runs.

    Cost: about 0.4 us a token to append in bulk, a few microseconds for a lookup whatever the size.

    Example: after `extend([5, 6, 7, 5, 6])`, `longest_match([5, 6])` is `CopyMatch(position=2, length=2)`: copying
    would go on with 7. The run at the very end is not a match, since nothing follows it yet.
    """

    def __init__(self) -> None:
        self._tokens: TokenArray = np.empty(256, dtype=np.int64)
        self._size = 0
        self._latest: dict[int, dict[int, int]] = {order: {} for order in ORDERS}

    def __len__(self) -> int:
        return self._size

    @property
    def tokens(self) -> TokenArray:
        """The stream so far, shape (len,); a view that is valid until the next `extend`."""
        return self._tokens[: self._size]

    def extend(self, tokens: Sequence[int] | TokenArray) -> None:
        """Append tokens and index the runs that now have a token after them."""
        added = np.asarray(tokens, dtype=np.int64)
        old, new = self._size, self._size + len(added)
        if new > len(self._tokens):
            grown = np.empty(max(new, 2 * len(self._tokens)), dtype=np.int64)
            grown[:old] = self._tokens[:old]
            self._tokens = grown
        self._tokens[old:new] = added
        self._size = new
        # A run that ends before position p is indexed once token p exists: the first new one ends before `old`.
        begin = max(old - ORDERS[0], 0)
        hashes = _run_hashes(self._tokens[begin : max(new - 1, begin)])
        for order, latest in self._latest.items():
            first = max(old, order)  # position that follows the first run not indexed yet
            if first < new:
                runs = hashes[order][first - order - begin :]
                latest.update(zip(runs.tolist(), range(first, new), strict=True))

    def longest_match(self, query: Sequence[int] | TokenArray) -> CopyMatch | None:
        """The most recent occurrence of the longest indexed run that ends the query, or None.

        Args:
            query: the tokens written so far; only the last 64 are looked at.
        """
        tail = np.asarray(query[-MAX_MATCH_TOKENS:], dtype=np.int64)
        hashes = _run_hashes(tail[-ORDERS[0] :])
        for order, latest in self._latest.items():
            if len(tail) < order:
                continue
            position = latest.get(int(hashes[order][-1]))
            if position is not None:
                length = self._match_length(position, tail)
                if length >= order:
                    return CopyMatch(position, length)
        return None

    def _match_length(self, position: int, tail: TokenArray) -> int:
        """How many tokens before `position` equal the end of `tail`."""
        width = min(position, len(tail))
        differs = self._tokens[position - width : position][::-1] != tail[len(tail) - width :][::-1]
        return int(differs.argmax()) if differs.any() else width

    def read(self, position: int, count: int) -> list[int]:
        """Up to `count` tokens from `position`; where they reach the end of the stream they go on from `position`.

        The wrap continues a repetition: with the stream ...a b c a b c and a copy from the second a, what is drafted
        is a b c a b c and so on.
        """
        found: list[int] = self._tokens[position : min(position + count, self._size)].tolist()
        while found and len(found) < count:
            found += found[: count - len(found)]
        return found


def _run_hashes(tokens: TokenArray) -> dict[int, npt.NDArray[np.uint64]]:
    """For each order n the 64-bit hashes of all n-token runs, shape (len(tokens) - n + 1,)."""
    runs = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xFF51AFD7ED558CCD)
    runs ^= runs >> np.uint64(32)
    hashes = {}
    for order in reversed(ORDERS):
        half = order // 2
        runs = runs[:-half] * np.uint64(_MULTIPLIERS[order]) + runs[half:] if len(runs) > half else runs[:0]
        hashes[order] = runs
    return hashes


class EarliestIndex:
    """The published lookup (arXiv 2502.08923, section 3): the earliest position that follows the last tokens."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._earliest: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def find(self, tokens: Sequence[int]) -> int | None:
        """The earliest earlier position that follows the tokens at the end, or None; indexes what is new."""
        for end in range(max(self._indexed, self._order), len(tokens)):
            self._earliest.setdefault(tuple(tokens[end - self._order : end]), end)
        self._indexed = max(self._indexed, len(tokens))
        return self._earliest.get(tuple(tokens[-self._order :]))
