"""Where a text goes on: pointers into the index, at the end of the text and at each place of a draft tree.

A place is the end of the text, or behind a node. Its pointers are the positions in the index where a text goes on that
ends like the text and the path so far. One comes from a match, from following the source that is being rewritten over
an edit (replaced, inserted or deleted tokens), or from the start of something declared.

All of it is compiled. Not covered: what the pointers say together (candidates.py), and which places there are
(growth.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.memory.acceptance import CONTINUED, DELETED, INSERTED, MATCHED, REPLACED
from copyspec_engine.memory.index import BREAK, MAX_MATCH_TOKENS, IndexArrays, find_matches, match_length

__all__ = [
    "AGE",
    "AGREEMENT",
    "AT",
    "DEPTH",
    "LENGTH",
    "MOST_POINTERS",
    "NUM_ALIGNMENTS",
    "ORIGIN",
    "PARENT",
    "POINTERS",
    "POSITION",
    "SOURCE",
    "TOKEN",
    "TREE",
    "Call",
    "Fields",
    "Table",
    "complete_pointers",
    "enter",
    "enter_root",
    "find_root",
    "follow",
    "last_two",
    "make_call",
    "token_at",
]

_MATCHES, _INNER_MATCHES = 24, 6
"""Pointers that come from matches, at the root and inside the tree."""
MOST_POINTERS = _MATCHES + 10
"""Pointers of one place, most."""
_STARTS = 8
_ROOT_STEPS, _INNER_STEPS = 32, 3
_LOOK = 6.0
"""A place inside the tree is looked up anew if it is at least this many times as likely as a node must be."""
_SHORT_LENGTH = 2
_SURE_LENGTH = 16
"""With a match this long nothing shorter is looked up inside the tree."""
NUM_ALIGNMENTS = 2
"""Sources that may be rewritten at the same time."""
_ALIGNED_LENGTH = 8
"""Tokens that must match for a source to count as the one that is being rewritten."""
_LOST_AGE = 24
"""Tokens after which a text that parted from its source has lost it."""
_INNER_AGE = 4
_WINDOW = 48
"""How far on in a source the text is looked for after a deletion."""
_NEAR = 96
"""Sources closer than this are the same one."""

# Ingredients, for measuring what each of them gives.
LONGEST_MATCH, AGREEMENT, TREE, RESYNC, START = range(5)

# Columns of the tables of nodes and of pointers.
TOKEN, PARENT, SOURCE, DEPTH, POINTERS, AT, AGE = 0, 1, 2, 3, 4, 5, 6  # and AT, AGE of the second alignment
POSITION, LENGTH, ORIGIN = 0, 1, 2

Table: TypeAlias = npt.NDArray[np.int64]

Fields: TypeAlias = tuple[npt.NDArray[Any], ...]
"""A named tuple of arrays as a plain one, which compiled code takes in a third of the time."""


class Call(NamedTuple):
    """What a call knows between two steps."""

    tail: Table
    """The last tokens of the text, last one first, shape (MAX_MATCH_TOKENS,)."""
    sizes: Table
    """Tokens in `tail`, pointers at the root, start hypotheses, and the position at which the answer is written; shape
    (4,)."""
    alignments: Table
    """For each source that is being rewritten: its next position, the tokens written since the text parted from it (0:
    on track, -1: none), and the tokens in a row in which the text followed it; shape (2, 3)."""
    pointers: Table
    """The root's: position, tokens that match before it, origin; shape (MOST_POINTERS, 3)."""
    starts: Table
    """Positions where an answer may start, and their origins, shape (_STARTS, 2)."""


def make_call() -> Call:
    """The state of a call before its prompt."""
    return Call(
        tail=np.zeros(MAX_MATCH_TOKENS, dtype=np.int64),
        sizes=np.zeros(4, dtype=np.int64),
        alignments=np.full((NUM_ALIGNMENTS, 3), -1, dtype=np.int64),
        pointers=np.zeros((MOST_POINTERS, 3), dtype=np.int64),
        starts=np.zeros((_STARTS, 2), dtype=np.int64),
    )


# Inner functions take arrays, not the tuples above: compiled code is several times faster on them.


@compiled
def token_at(ring: npt.NDArray[np.int32], bounds: Table, position: int) -> int:
    """The token at a position, or BREAK where nothing can be copied."""
    if position < bounds[0] or position >= bounds[1]:
        return BREAK
    return ring[position & (len(ring) - 1)]


@compiled
def _add_pointer(pointers: Table, count: int, position: int, length: int, origin: int) -> int:
    """Add a pointer, or say where one that is there already comes from; the new count."""
    for i in range(count):
        if pointers[i, POSITION] == position:
            if pointers[i, ORIGIN] == MATCHED:
                pointers[i, ORIGIN] = origin
            return count
    if count < len(pointers):
        pointers[count, POSITION], pointers[count, LENGTH], pointers[count, ORIGIN] = position, length, origin
        count += 1
    return count


@compiled
def _add_edits(
    ring: npt.NDArray[np.int32],
    bounds: Table,
    pointers: Table,
    count: int,
    at: int,
    age: int,
    last: int,
    suffix: Table,
    suffix_length: int,
) -> int:
    """Where the source that is being rewritten goes on: on track, or if its tokens were replaced, added to or deleted.

    `at` is the source's next position when the text parted from it, `age` the tokens written since then, `last` the
    last one of them. Matches are measured with `suffix`, unless `suffix_length` is 0. Returns the new count.
    """
    begin = bounds[0]
    if age == 0:
        return _add_pointer(pointers, count, at, match_length(ring, begin, at, suffix, suffix_length), CONTINUED)
    if token_at(ring, bounds, at + age) != BREAK:
        length = match_length(ring, begin, at + age, suffix, suffix_length)
        replaced = REPLACED if age == 1 else REPLACED + 1 if age <= 3 else REPLACED + 2
        count = _add_pointer(pointers, count, at + age, length, replaced)
    length = match_length(ring, begin, at, suffix, suffix_length)
    count = _add_pointer(pointers, count, at, length, INSERTED if age == 1 else INSERTED + 1)
    for skipped in range(_WINDOW):
        token = token_at(ring, bounds, at + skipped)
        if token == BREAK:
            break
        if token == last:
            found = at + skipped + 1
            length = match_length(ring, begin, found, suffix, suffix_length)
            return _add_pointer(pointers, count, found, length, DELETED if skipped <= 3 else DELETED + 1)
    return count


@compiled
def _take_over(pointers: Table, count: int, alignments: Table) -> None:
    """Unless the source being rewritten is on track, the longest match takes its place if it is long enough."""
    best = 0
    for i in range(count):
        if pointers[i, LENGTH] > pointers[best, LENGTH]:
            best = i
    if count == 0 or pointers[best, LENGTH] < _ALIGNED_LENGTH or alignments[0, 1] == 0:
        return
    at = pointers[best, POSITION]
    if alignments[0, 1] > 0 and abs(alignments[0, 0] - at) > _NEAR:
        alignments[1] = alignments[0]
    alignments[0, 0], alignments[0, 1], alignments[0, 2] = at, 0, pointers[best, LENGTH]


@compiled
def find_root(arrays: IndexArrays, call: Call, ingredients: npt.NDArray[np.bool_], is_first: bool) -> None:
    """Find the pointers at the end of the text.

    Args:
        arrays: the index.
        call: the text so far; changed.
        ingredients: what takes part, shape (5,).
        is_first: nothing of the answer is written yet.
    """
    ring, bounds = arrays.tokens, arrays.bounds
    tail, pointers, alignments = call.tail, call.pointers, call.alignments
    size = call.sizes[0] if ingredients[LONGEST_MATCH] else min(call.sizes[0], 2)
    count = find_matches(ring, arrays.heads, arrays.previous, bounds, tail, size, pointers, 0, _MATCHES, _ROOT_STEPS)
    for i in range(count):
        pointers[i, ORIGIN] = MATCHED
    if ingredients[RESYNC]:
        _take_over(pointers, count, alignments)
        for row in range(NUM_ALIGNMENTS):
            at, age = alignments[row, 0], alignments[row, 1]
            if age >= 0:
                count = _add_edits(ring, bounds, pointers, count, at, age, tail[0], tail, size)
            if age == 0:  # the text followed its source for longer than matches are measured
                for i in range(count):
                    if pointers[i, POSITION] == at:
                        pointers[i, LENGTH] = max(pointers[i, LENGTH], alignments[row, 2])
    if is_first and ingredients[START]:
        for i in range(call.sizes[2]):
            count = _add_pointer(pointers, count, call.starts[i, 0], 0, call.starts[i, 1])
    call.sizes[1] = count


@compiled
def follow(arrays: IndexArrays, call: Call, tokens: Table) -> None:
    """Move a call on by tokens that were written; to be called before they are indexed."""
    tail, alignments = call.tail, call.alignments
    for token in tokens:
        for row in range(NUM_ALIGNMENTS):
            if alignments[row, 1] == 0 and token_at(arrays.tokens, arrays.bounds, alignments[row, 0]) == token:
                alignments[row, 0] += 1
                alignments[row, 2] += 1
            elif alignments[row, 1] >= 0:
                alignments[row, 1] += 1
                alignments[row, 2] = 0
                if alignments[row, 1] > _LOST_AGE:
                    alignments[row, 1] = -1
    kept = max(len(tail) - len(tokens), 0)
    for i in range(kept):
        tail[len(tail) - 1 - i] = tail[kept - 1 - i]
    for i in range(len(tail) - kept):
        tail[i] = tokens[len(tokens) - 1 - i]
    call.sizes[0] = min(call.sizes[0] + len(tokens), len(tail))


@compiled
def enter_root(nodes: Table, pointers: Table, found: Table, count: int, alignments: Table) -> None:
    """Make slot 0 the end of the text, where `count` pointers were found."""
    for i in range(count):
        for column in range(3):
            pointers[0, i, column] = found[i, column]
    nodes[0, DEPTH], nodes[0, POINTERS] = 0, count
    for row in range(NUM_ALIGNMENTS):
        nodes[0, AT + 2 * row], nodes[0, AGE + 2 * row] = alignments[row, 0], alignments[row, 1]


@compiled
def enter(
    ring: npt.NDArray[np.int32], bounds: Table, nodes: Table, pointers: Table, parent: int, slot: int, token: int
) -> None:
    """Make `slot` the place behind a node with `token` whose parent is the place `parent`."""
    nodes[slot, TOKEN], nodes[slot, PARENT], nodes[slot, DEPTH] = token, parent - 1, nodes[parent, DEPTH] + 1
    count = 0
    for i in range(nodes[parent, POINTERS]):
        position = pointers[parent, i, POSITION]
        if token_at(ring, bounds, position) == token:
            pointers[slot, count, POSITION] = position + 1
            pointers[slot, count, LENGTH] = pointers[parent, i, LENGTH] + 1
            pointers[slot, count, ORIGIN] = pointers[parent, i, ORIGIN]
            count += 1
    nodes[slot, POINTERS] = count
    for row in range(NUM_ALIGNMENTS):
        at, age = nodes[parent, AT + 2 * row], nodes[parent, AGE + 2 * row]
        if age == 0 and token_at(ring, bounds, at) == token:
            at += 1
        elif age >= 0:
            age += 1
        nodes[slot, AT + 2 * row], nodes[slot, AGE + 2 * row] = at, age


@compiled
def _suffix_at(nodes: Table, suffix: Table, tail: Table, tail_size: int, slot: int) -> int:
    """Write the tokens before a place, the path's and then the text's, to `suffix`; how many there are."""
    size, node = 0, slot - 1
    while node >= 0 and size < len(suffix):
        suffix[size] = nodes[node + 1, TOKEN]
        size += 1
        node = nodes[node + 1, PARENT]
    for i in range(min(tail_size, len(suffix) - size)):
        suffix[size] = tail[i]
        size += 1
    return size


@compiled
def last_two(nodes: Table, tail: Table, tail_size: int, slot: int) -> tuple[int, int]:
    """The two tokens before a place; the first one is -1 if there is none."""
    if slot == 0:
        return tail[1] if tail_size > 1 else -1, tail[0]
    parent = nodes[slot, PARENT]
    return nodes[parent + 1, TOKEN] if parent >= 0 else tail[0], nodes[slot, TOKEN]


@compiled
def complete_pointers(
    ring: npt.NDArray[np.int32],
    heads: npt.NDArray[np.int32],
    previous: npt.NDArray[np.int32],
    bounds: Table,
    nodes: Table,
    pointers: Table,
    suffix: Table,
    tail: Table,
    tail_size: int,
    slot: int,
    probability: float,
    least: float,
    ingredients: npt.NDArray[np.bool_],
) -> int:
    """Add to the pointers that a node has from its parent, where that can matter; how many it has then."""
    count = nodes[slot, POINTERS]
    longest = 0
    for i in range(count):
        longest = max(longest, pointers[i, LENGTH])
    if longest <= _SHORT_LENGTH and probability < 2.0 * least:
        return 0  # nothing behind a match this short is likely enough
    if longest < _SURE_LENGTH and probability > _LOOK * least and ingredients[LONGEST_MATCH]:
        matched, size = count, _suffix_at(nodes, suffix, tail, tail_size, slot)
        count = find_matches(ring, heads, previous, bounds, suffix, size, pointers, count, _INNER_MATCHES, _INNER_STEPS)
        for i in range(matched, count):
            pointers[i, ORIGIN] = MATCHED
    if ingredients[RESYNC]:
        for row in range(NUM_ALIGNMENTS):
            at, age = nodes[slot, AT + 2 * row], nodes[slot, AGE + 2 * row]
            if age >= 0 and age <= _INNER_AGE:
                count = _add_edits(ring, bounds, pointers, count, at, age, nodes[slot, TOKEN], suffix, 0)
    return count
