"""Where the last tokens of a text occurred before: the index that copying rests on.

`CopyIndex` holds the token streams of one conversation and finds, for the tokens at the end of a text, the most recent
occurrences of their longest suffixes. It is built like the window of an LZ77 compressor: hash chains over a ring of
tokens, so that appending, looking up and forgetting cost the same whatever its size. Hashes only point; tokens decide:
every hit is compared before it counts.

The loops are compiled with Numba. Not covered: which occurrence is worth copying and how far
(drafting/kernels/growth.py), and whose texts these are (conversation.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.values.tokens import TokenArray

__all__ = [
    "BREAK",
    "MAX_MATCH_TOKENS",
    "OVERLAP",
    "CopyIndex",
    "CopyMatch",
    "EarliestIndex",
    "IndexArrays",
    "Span",
    "find_matches",
]


ORDERS = np.array([16, 8, 4, 2, 1], dtype=np.int64)
"""Lengths of the token runs that are hashed, longest first."""

MAX_MATCH_TOKENS = 48
"""Matches are measured up to this length: beyond it the next token is right just as often."""

OVERLAP = 32
"""Tokens repeated before and after a text that is cut out of its surroundings, so that matches run across the cut."""

BREAK = -1
"""Stands between texts in the ring; never drafted, never part of a match."""

FREQUENT = 64
"""How many of the most frequent tokens are kept in order."""

_KNOWN_RUN = 64
"""Tokens in a row that must stand in the index already for a text not to be stored again."""

_KNOWN_STEPS = 8
"""Entries of one hash chain looked at for such a run."""

POSITION, LENGTH = 0, 1
"""Columns of a table of matches."""

_GONE = 0
"""The position of what was forgotten, and a link that points nowhere; the first token is at position 1."""

_SMALLEST = 1 << 10
_LAST_POSITION = (1 << 31) - (1 << 25)
"""Positions are stored in 32 bits; the ring is rebuilt, once in two billion tokens, before they run out."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SALT = np.uint64(0xBF58476D1CE4E5B9)


class IndexArrays(NamedTuple):
    """The arrays of an index, for compiled code. Positions count all tokens ever appended; slot = position & mask."""

    tokens: npt.NDArray[np.int32]
    """The ring of tokens, shape (capacity,)."""
    heads: npt.NDArray[np.int32]
    """The last position whose preceding run falls into a bucket, by order; 0: none. Shape (orders, capacity)."""
    previous: npt.NDArray[np.int32]
    """The position before in the same bucket, by order and slot; shape (orders, capacity)."""
    bounds: npt.NDArray[np.int64]
    """First position that is still there, and the next one to be written; shape (2,)."""
    counts: npt.NDArray[np.int32]
    """Approximate token counts (count-min sketch), shape (2, buckets)."""
    frequent: npt.NDArray[np.int64]
    """The most frequent tokens and their counts, most frequent first, shape (2, FREQUENT); count 0: none."""
    total: npt.NDArray[np.int64]
    """Tokens counted, shape (1,)."""


class CopyMatch(NamedTuple):
    """The `length` tokens before `position` equal the end of the query; `position` is the next token to copy."""

    position: int
    length: int


@dataclass(slots=True, eq=False)
class Span:
    """A text in the ring: positions `start` to `stop`; forgotten as a whole, and moved as a whole."""

    kind: int
    start: int = _GONE
    stop: int = _GONE
    first_indexed: int = _GONE
    """Where the text itself begins, behind the tokens repeated from its surroundings."""
    limit: int = _GONE
    """The position of its closing break; nothing of it is written there or behind."""
    is_open: bool = False
    """Still being written; not forgotten before it is closed."""
    used: bool = False
    """Copied from since it was written or last spared."""
    number: int = 0
    """Whoever adds texts numbers them."""


# ---- compiled ------------------------------------------------------------------------------------------------------


@compiled
def _extend_hash(value: np.uint64, token: int) -> np.uint64:
    """The hash of a run with one more token in front of it."""
    value = (value + np.uint64(token + 2)) * _MULTIPLIER
    return value ^ (value >> np.uint64(31))


@compiled
def _bucket(value: np.uint64, order: int, mask: int) -> int:
    value ^= value >> np.uint64(29)
    value *= _SALT + np.uint64(2 * order)
    value ^= value >> np.uint64(32)
    return np.int64(value & np.uint64(mask))


@compiled
def _link(arrays: IndexArrays, first: int, stop: int, begin: int) -> None:
    """Index the runs that end before the positions from `first` to `stop`, in the text that begins at `begin`."""
    mask = len(arrays.tokens) - 1
    for position in range(first, stop):
        value, depth = np.uint64(0), 0
        longest = min(ORDERS[0], position - begin)
        for row in range(len(ORDERS) - 1, -1, -1):
            order = ORDERS[row]
            if order > longest:
                break
            while depth < order:
                value = _extend_hash(value, arrays.tokens[(position - 1 - depth) & mask])
                depth += 1
            bucket = _bucket(value, order, mask)
            arrays.previous[row, position & mask] = arrays.heads[row, bucket]
            arrays.heads[row, bucket] = position


@compiled
def _count(arrays: IndexArrays, tokens: npt.NDArray[np.int64]) -> None:
    """Count tokens, shape (n,), and keep the most frequent ones in order."""
    counts, frequent, mask = arrays.counts, arrays.frequent, arrays.counts.shape[1] - 1
    for token in tokens:
        other = (token * 40503 + (token >> 7)) & mask
        counts[0, token & mask] += 1
        counts[1, other] += 1
        count = min(counts[0, token & mask], counts[1, other])
        if count <= frequent[1, FREQUENT - 1]:
            continue
        rank = FREQUENT - 1
        for i in range(FREQUENT):
            if frequent[1, i] == 0 or frequent[0, i] == token:
                rank = i
                break
        while rank > 0 and frequent[1, rank - 1] < count:
            frequent[0, rank], frequent[1, rank] = frequent[0, rank - 1], frequent[1, rank - 1]
            rank -= 1
        frequent[0, rank], frequent[1, rank] = token, count
    arrays.total[0] += len(tokens)
    if arrays.total[0] > 1 << 20:  # forget slowly, so that what is frequent now is told from what was once
        arrays.total[0] //= 2
        for i in range(counts.shape[1]):  # loops: whole-array operations take seconds to compile
            counts[0, i] >>= 1
            counts[1, i] >>= 1
        for i in range(FREQUENT):
            frequent[1, i] >>= 1


@compiled
def match_length(
    ring: npt.NDArray[np.int32],  # (capacity,)
    begin: int,
    position: int,
    suffix: npt.NDArray[np.int64],  # (most,) or longer
    most: int,
) -> int:
    """How many tokens before `position`, from `begin` on, equal `suffix` (last token first), up to `most`."""
    mask = len(ring) - 1
    most = min(most, position - begin)
    length = 0
    while length < most and ring[(position - 1 - length) & mask] == suffix[length]:
        length += 1
    return length


@compiled
def _is_found(matches: npt.NDArray[np.int64], found: int, position: int) -> bool:
    """Whether a position is among the first `found` matches; `matches` as for `find_matches`."""
    for match in matches[:found, POSITION]:
        if match == position:
            return True
    return False


@compiled
def find_matches(
    chains: tuple[npt.NDArray[Any], ...],
    suffix: npt.NDArray[np.int64],
    suffix_length: int,
    matches: npt.NDArray[np.int64],
    found: int,
    most: int,
    steps: int,
) -> int:
    """Add occurrences of a suffix, longest orders first and the most recent first, to those found already.

    Args:
        chains: the first four of `IndexArrays`.
        suffix: the tokens whose occurrences are looked for, last one first, shape (suffix_length,) or longer.
        suffix_length: how many of them there are.
        matches: the POSITION where each occurrence goes on and the LENGTH in tokens that match before it, shape
            (>= most, >= 2).
        found: occurrences in `matches` already; they are not added again.
        most: occurrences to stop at.
        steps: entries of one hash chain to look at.

    Returns:
        The number of occurrences now.
    """
    ring, heads, previous, bounds = chains
    mask, begin, end = len(ring) - 1, bounds[0], bounds[1]
    buckets = np.empty(len(ORDERS), np.int64)
    value, depth, first_row = np.uint64(0), 0, len(ORDERS)
    for row in range(len(ORDERS) - 1, -1, -1):
        order = ORDERS[row]
        if order > suffix_length:
            break
        while depth < order:
            value = _extend_hash(value, suffix[depth])
            depth += 1
        buckets[row] = _bucket(value, order, mask)
        first_row = row
    for row in range(first_row, len(ORDERS)):
        position = np.int64(heads[row, buckets[row]])
        left = steps
        # Behind the first forgotten entry the links have been written over.
        while position > begin and position < end and left > 0:
            left -= 1
            if not _is_found(matches, found, position):
                length = match_length(ring, begin, position, suffix, suffix_length)
                if length >= ORDERS[row]:
                    if found >= most:
                        return found
                    matches[found, POSITION], matches[found, LENGTH] = position, length
                    found += 1
            position = np.int64(previous[row, position & mask])
    return found


@compiled
def _known_run(arrays: IndexArrays, tokens: npt.NDArray[np.int64], first: int) -> tuple[int, int]:
    """How many of `tokens`, shape (n,), from `first` on the index holds in a row; the position behind the 16th of them.

    (0, 0) if there are not that many.
    """
    order, mask = ORDERS[0], len(arrays.tokens) - 1
    if first + order > len(tokens):
        return 0, 0
    value = np.uint64(0)
    for depth in range(order):
        value = _extend_hash(value, tokens[first + order - 1 - depth])
    position = np.int64(arrays.heads[0, _bucket(value, order, mask)])
    for _ in range(_KNOWN_STEPS):
        if position < arrays.bounds[0] + order or position >= arrays.bounds[1]:
            break
        length = 0
        start = position - order
        while (
            first + length < len(tokens)
            and start + length < arrays.bounds[1]
            and arrays.tokens[(start + length) & mask] == tokens[first + length]
        ):
            length += 1
        if length >= order:
            return length, position
        position = np.int64(arrays.previous[0, position & mask])
    return 0, 0


@compiled
def _unseen(arrays: IndexArrays, tokens: npt.NDArray[np.int64], spans: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Cut `tokens`, shape (n,), into what the index holds and what it does not.

    Writes the unseen stretches (first, stop) to the first two columns of `spans`, shape (>= len(tokens) // 64 + 2, 3),
    and a position within each known one to the third.

    Returns:
        The number of unseen stretches and of known ones.
    """
    unseen = known = start = at = 0
    while at < len(tokens):
        length, position = _known_run(arrays, tokens, at)
        if length < _KNOWN_RUN:
            at += 1
            continue
        if at > start:
            spans[unseen, 0], spans[unseen, 1] = start, at
            unseen += 1
        spans[known, 2] = position
        known += 1
        at += length
        start = at
    if len(tokens) > start:
        spans[unseen, 0], spans[unseen, 1] = start, len(tokens)
        unseen += 1
    return unseen, known


# ---- the index -----------------------------------------------------------------------------------------------------


class CopyIndex:
    """The texts of one conversation in a ring of tokens, with hash chains over their 1- to 16-token runs.

    Cost: about 0.2 us a token to append; lookups do not depend on the size; 44 bytes a token of capacity, which
    is the next power of two.

    When more than `max_tokens` are held, whole texts are forgotten, the least recently used first: the ring is swept
    from its old end, and a text that was copied from since the last sweep is written once more at the new end.

    Example: after `append([5, 6, 7, 5, 6])`, `longest_match([5, 6])` is `CopyMatch(position=3, length=2)` (positions
    start at 1): copying would go on with 7. The run at the very end is not a match, since nothing follows it yet.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"Got max_tokens={max_tokens} but expected at least 1")
        self._max_tokens = max_tokens
        self._spans: list[Span] = []
        self.arrays = _empty_arrays(_SMALLEST)

    def __len__(self) -> int:
        """Tokens held, with those that are repeated around texts."""
        return int(self.arrays.bounds[1] - self.arrays.bounds[0])

    @property
    def max_tokens(self) -> int:
        """Most tokens that are held once no text is open."""
        return self._max_tokens

    @property
    def spans(self) -> Iterator[Span]:
        """The texts that are held, oldest first."""
        return iter(self._spans)

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in self.arrays)

    def tokens_of(self, span: Span) -> TokenArray:
        """A text's own tokens, without those repeated around it, shape (n,); a copy."""
        return self.read(span.first_indexed, span.stop - span.first_indexed)

    def read(self, position: int, count: int) -> TokenArray:
        """Up to `count` tokens from `position` on, to the end of their text, shape (n,); a copy."""
        begin, end = self.arrays.bounds
        if not begin <= position <= end:
            return np.empty(0, dtype=np.int64)
        tokens = self.arrays.tokens[self._slots(position, min(position + count, int(end)))].astype(np.int64)
        breaks = np.flatnonzero(tokens == BREAK)
        return tokens[: breaks[0]] if len(breaks) else tokens

    def append(self, tokens: Sequence[int] | TokenArray, kind: int = 0, *, overlap: int = 0) -> Span:
        """Hold a text. Its first `overlap` tokens only give context: matches run into them but do not end there.

        Of a text longer than `max_tokens` the end is held.
        """
        added = np.asarray(tokens, dtype=np.int64)
        if len(added) > self._max_tokens:
            overlap = max(overlap - (len(added) - self._max_tokens), 0)
            added = added[-self._max_tokens :]
        return self._fill(self.open(len(added), kind), added, overlap)

    def append_unseen(self, tokens: Sequence[int] | TokenArray, kind: int = 0) -> list[Span]:
        """Hold those stretches of a text that are not held yet; the texts of the others count as used."""
        added = np.asarray(tokens, dtype=np.int64)
        cuts = np.empty((len(added) // _KNOWN_RUN + 2, 3), dtype=np.int64)
        num_unseen, num_known = _unseen(self.arrays, added, cuts)
        self.touch(cuts[:num_known, 2])
        spans = []
        for start, stop in cuts[:num_unseen, :2].tolist():
            before = min(OVERLAP, start)
            spans.append(self.append(added[start - before : stop + OVERLAP], kind, overlap=before))
        return spans

    def open(self, size: int, kind: int = 0) -> Span:
        """Make room for a text of up to `size` tokens that is written bit by bit."""
        self._make_room(size + 1)
        return self._place(Span(kind), size)

    def write(self, span: Span, tokens: Sequence[int] | TokenArray, *, context: bool = False) -> bool:
        """Add tokens to an open text; False if it has no room for them: open another one."""
        added = np.asarray(tokens, dtype=np.int64)
        stop = span.stop + len(added)
        if not self.has_room(span, len(added)):
            return False
        if len(added) == 0:
            return True
        if added.min() < 0:
            raise ValueError(f"Got token {added.min()} but expected ids from 0")
        self.arrays.tokens[self._slots(span.stop, stop)] = added
        if context:
            span.first_indexed = stop
        else:
            _link(self.arrays, span.stop, stop, span.start)
            _count(self.arrays, added)
        span.stop = stop
        return True

    def has_room(self, span: Span, count: int) -> bool:
        """Whether an open text can take `count` more tokens; not if it has been forgotten."""
        return self.holds(span) and span.stop + count <= span.limit

    def close(self, span: Span) -> None:
        """The text is complete; unused room at the end of the ring is given back."""
        span.is_open = False
        if self.arrays.bounds[1] == span.limit + 1:  # nothing was ever put behind it, forgotten texts included
            span.limit = span.stop
            self.arrays.bounds[1] = span.limit + 1

    def _fill(self, span: Span, tokens: TokenArray, overlap: int = 0) -> Span:
        self.write(span, tokens[:overlap], context=True)
        self.write(span, tokens[overlap:])
        self.close(span)
        return span

    def holds(self, span: Span) -> bool:
        """Whether a text has not been forgotten."""
        return span.start >= self.arrays.bounds[0]

    def erase(self, spans: Collection[Span]) -> None:
        """Forget these texts at once and leave no token of them: neither as a source nor in the counts."""
        erased = {id(span) for span in spans if self.holds(span)}
        for span in self._spans:
            if id(span) in erased:
                self.arrays.tokens[self._slots(span.start, span.limit)] = BREAK
                span.start = _GONE
        self._spans = [span for span in self._spans if id(span) not in erased]
        self.arrays.bounds[0] = self._spans[0].start if self._spans else self.arrays.bounds[1]
        for array in (self.arrays.counts, self.arrays.frequent, self.arrays.total):
            array.fill(0)
        for span in self._spans:
            _count(self.arrays, self.tokens_of(span))

    def span_at(self, position: int) -> Span | None:
        """The text that a position lies in, or lay in before it was forgotten: None."""
        behind = bisect_right(self._spans, position, key=lambda span: span.start)
        return self._spans[behind - 1] if behind and position <= self._spans[behind - 1].limit else None

    def touch(self, positions: Sequence[int] | TokenArray) -> None:
        """Count the texts at these positions as used."""
        for position in set(np.asarray(positions, dtype=np.int64).tolist()):
            span = self.span_at(position)
            if span is not None:
                span.used = True

    def matches(self, query: Sequence[int] | TokenArray, most: int = 16, steps: int = 16) -> list[CopyMatch]:
        """Up to `most` occurrences of suffixes of `query`, of which the last 48 tokens count.

        Those of the longest hashed run come first, the most recent ones among them first; at most `steps` entries of
        each hash chain are looked at.
        """
        suffix = np.asarray(query[-MAX_MATCH_TOKENS:], dtype=np.int64)[::-1].copy()
        matches = np.empty((most, 2), dtype=np.int64)
        found = find_matches(self.arrays[:4], suffix, len(suffix), matches, 0, most, steps)
        return [CopyMatch(*match) for match in matches[:found].tolist()]

    def longest_match(self, query: Sequence[int] | TokenArray) -> CopyMatch | None:
        """The longest of the `matches`, the most recent one of equally long ones, or None."""
        return max(self.matches(query), key=lambda match: (match.length, match.position), default=None)

    # ---- room ------------------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Forget old texts until `size` more tokens are within the budget; those used lately move to the new end."""
        spared: list[tuple[Span, TokenArray]] = []
        num_spared = num_forgotten = 0
        for span in self._spans:
            # A call in flight keeps its text; the ring grows for once.
            if span.is_open or len(self) + num_spared + size <= self._max_tokens:
                break
            length = span.stop - span.first_indexed + 1
            if span.used and num_spared + length + size <= self._max_tokens // 2:
                spared.append((span, self.tokens_of(span)))
                num_spared += length
            span.start = _GONE
            num_forgotten += 1
            self.arrays.bounds[0] = span.limit + 1
        del self._spans[:num_forgotten]
        self._reserve(len(self) + num_spared + size)
        for span, tokens in spared:
            self._fill(self._place(span, len(tokens)), tokens)

    def _place(self, span: Span, size: int) -> Span:
        """Give a text of up to `size` tokens its place at the end of the ring, which has room for it."""
        start = int(self.arrays.bounds[1])
        span.start = span.stop = span.first_indexed = start
        span.limit, span.is_open, span.used = start + size, True, False
        self._spans.append(span)
        self.arrays.tokens[self._slots(start, span.limit + 1)] = BREAK
        self.arrays.bounds[1] = span.limit + 1
        return span

    def _slots(self, start: int, stop: int) -> TokenArray:
        return np.arange(start, stop) & (len(self.arrays.tokens) - 1)

    def _reserve(self, size: int) -> None:
        """Grow the ring until it holds `size` tokens; number its positions afresh before they run out."""
        old, capacity = self.arrays, len(self.arrays.tokens)
        begin, end = (int(bound) for bound in old.bounds)
        renumber = end + size >= _LAST_POSITION
        if size <= capacity and not renumber:
            return
        while capacity < size:
            capacity *= 2
        shift = 1 - begin if renumber else 0
        held = old.tokens[np.arange(begin, end) & (len(old.tokens) - 1)]
        counts, frequent, total = old.counts, old.frequent, old.total
        del old, self.arrays  # a large ring need not be there twice
        self.arrays = _empty_arrays(capacity)._replace(counts=counts, frequent=frequent, total=total)
        self.arrays.bounds[:] = begin + shift, end + shift
        self.arrays.tokens[self._slots(begin + shift, end + shift)] = held
        for span in self._spans:
            span.start += shift
            span.stop += shift
            span.limit += shift
            span.first_indexed += shift
            _link(self.arrays, span.first_indexed, span.stop, span.start)


def _empty_arrays(capacity: int) -> IndexArrays:
    rows = len(ORDERS)
    return IndexArrays(
        tokens=np.full(capacity, BREAK, dtype=np.int32),
        heads=np.zeros((rows, capacity), dtype=np.int32),
        previous=np.zeros((rows, capacity), dtype=np.int32),
        bounds=np.array([1, 1], dtype=np.int64),  # position 0 means "none"
        counts=np.zeros((2, 1 << 12), dtype=np.int32),
        frequent=np.zeros((2, FREQUENT), dtype=np.int64),
        total=np.zeros(1, dtype=np.int64),
    )


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
