"""Where a text goes on: pointers into the index, at the end of the text and at each branch point of a draft tree.

A branch point is the end of the text, or what is behind a node. Its pointers are the positions in the index where a
text goes on that ends like the text and the path so far. One comes from a match, from following the source that is
being rewritten over an edit (replaced, inserted or deleted tokens), or from the start of something declared.

All of it is compiled. Tuples are handed on that hold just what is read, or to code that is `inlined`: others cost
time. Not covered: what the pointers say together (candidates.py), and which branch points there are (growth.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled, inlined
from copyspec_engine.memory.acceptance import CONTINUED, DELETED, INSERTED, MATCHED, REPLACED
from copyspec_engine.memory.index import (
    BREAK,
    LENGTH,
    MAX_MATCH_TOKENS,
    POSITION,
    IndexArrays,
    find_matches,
    match_length,
)

__all__ = [
    "AGREEMENT",
    "ANSWER_END",
    "DEPTH",
    "LENGTH",
    "MOST_POINTERS",
    "NODE_COLUMNS",
    "NUM_POINTERS",
    "NUM_STARTS",
    "ORIGIN",
    "PARENT",
    "POINTER_COLUMNS",
    "POSITION",
    "SOURCE",
    "TAIL_SIZE",
    "TARGET",
    "TOKEN",
    "TREE",
    "CallState",
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
"""Pointers of one branch point, most."""
_STARTS = 8
_ROOT_STEPS, _INNER_STEPS = 32, 3
"""Entries of one hash chain that are looked at, at the root and inside the tree."""
_LOOKUP_FACTOR = 6.0
"""Inside the tree a branch point is looked up anew if it is at least this many times as likely as a node must be."""
_SHORT_LENGTH = 2
_SURE_LENGTH = 16
"""With a match this long nothing shorter is looked up inside the tree."""
_NUM_ALIGNMENTS = 2
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

# Entries of `CallState.ingredients`.
LONGEST_MATCH, AGREEMENT, TREE, RESYNC, START = range(5)
# Entries of `CallState.sizes`.
TAIL_SIZE, ROOT_POINTERS, NUM_STARTS, ANSWER_END = range(4)
# Columns of the tables: of nodes (from the last one on: AT and AGE of each alignment), of pointers (behind POSITION and
# LENGTH, as matches have them), of alignments.
TOKEN, PARENT, SOURCE, DEPTH, NUM_POINTERS, _ALIGNMENT = range(6)
ORIGIN, TARGET = 2, 3
_AT, _AGE, _FOLLOWED = range(3)

NODE_COLUMNS, POINTER_COLUMNS = _ALIGNMENT + 2 * _NUM_ALIGNMENTS, 4

Table: TypeAlias = npt.NDArray[np.int64]

Fields: TypeAlias = tuple[npt.NDArray[Any], ...]
"""A named tuple of arrays as a plain one, which compiled code takes in a third of the time."""


class CallState(NamedTuple):
    """What a call knows between two steps."""

    tail: Table
    """The last tokens of the text, last one first, shape (MAX_MATCH_TOKENS,)."""
    sizes: Table
    """TAIL_SIZE: tokens in `tail`; ROOT_POINTERS; NUM_STARTS: start hypotheses; ANSWER_END: the position at which the
    answer is written. Shape (4,)."""
    alignments: Table
    """Of each source that is being rewritten its next position (AT), the tokens written since the text parted from it
    (AGE; 0: on track, -1: none), and the tokens in a row in which the text FOLLOWED it; shape (2, 3)."""
    pointers: Table
    """The root's, shape (MOST_POINTERS, POINTER_COLUMNS): POSITION, LENGTH in tokens that match before it, ORIGIN, and
    the TARGET token it points to, which is filled in as late as candidates are looked for."""
    starts: Table
    """Positions where an answer may start, and their origins, shape (_STARTS, 2)."""
    eos_token_ids: Table
    """Nothing is drafted behind these, shape (n,)."""
    ingredients: npt.NDArray[np.bool_]
    """What takes part, shape (5,)."""


def make_call(eos_token_ids: Table, ingredients: npt.NDArray[np.bool_]) -> CallState:
    """The state of a call before its prompt; of both arrays `CallState` says more."""
    return CallState(
        tail=np.zeros(MAX_MATCH_TOKENS, dtype=np.int64),
        sizes=np.zeros(4, dtype=np.int64),
        alignments=np.full((_NUM_ALIGNMENTS, 3), -1, dtype=np.int64),
        pointers=np.zeros((MOST_POINTERS, POINTER_COLUMNS), dtype=np.int64),
        starts=np.zeros((_STARTS, 2), dtype=np.int64),
        eos_token_ids=eos_token_ids,
        ingredients=ingredients,
    )


@compiled
def token_at(text: Fields, position: int) -> int:
    """The token at a position, or BREAK where nothing can be copied; `text`: `IndexArrays.tokens` and `.bounds`."""
    ring, bounds = text
    if position < bounds[0] or position >= bounds[1]:
        return BREAK
    return ring[position & (len(ring) - 1)]


@compiled
def _add_pointer(
    pointers: Table,  # (MOST_POINTERS, POINTER_COLUMNS)
    count: int,
    position: int,
    length: int,
    origin: int,
) -> int:
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
    text: Fields,
    pointers: Table,  # (MOST_POINTERS, POINTER_COLUMNS)
    count: int,
    alignment: tuple[int, int],
    last: int,
    suffix: Table,  # (suffix_length,) or longer
    suffix_length: int,
) -> int:
    """Where the source that is being rewritten goes on: on track, or if its tokens were replaced, added to or deleted.

    Args:
        text: as for `token_at`.
        pointers: those there are; added to.
        count: how many there are.
        alignment: the source's next position when the text parted from it, and the tokens written since then.
        last: the last token of the text.
        suffix: what matches are measured with, last token first.
        suffix_length: how many tokens of it count; 0: no match is measured.

    Returns:
        The new count.
    """
    at, age = alignment
    ring, begin = text[0], text[1][0]
    if age == 0:
        return _add_pointer(pointers, count, at, match_length(ring, begin, at, suffix, suffix_length), CONTINUED)
    if token_at(text, at + age) != BREAK:
        length = match_length(ring, begin, at + age, suffix, suffix_length)
        replaced = REPLACED if age == 1 else REPLACED + 1 if age <= 3 else REPLACED + 2
        count = _add_pointer(pointers, count, at + age, length, replaced)
    length = match_length(ring, begin, at, suffix, suffix_length)
    count = _add_pointer(pointers, count, at, length, INSERTED if age == 1 else INSERTED + 1)
    for skipped in range(_WINDOW):
        token = token_at(text, at + skipped)
        if token == BREAK:
            break
        if token == last:
            found = at + skipped + 1
            length = match_length(ring, begin, found, suffix, suffix_length)
            return _add_pointer(pointers, count, found, length, DELETED if skipped <= 3 else DELETED + 1)
    return count


@compiled
def _take_over(
    pointers: Table,  # (MOST_POINTERS, POINTER_COLUMNS)
    count: int,
    alignments: Table,  # (2, 3)
) -> None:
    """Unless the source being rewritten is on track, the longest match takes its place if it is long enough."""
    best = 0
    for i in range(count):
        if pointers[i, LENGTH] > pointers[best, LENGTH]:
            best = i
    if count == 0 or pointers[best, LENGTH] < _ALIGNED_LENGTH or alignments[0, _AGE] == 0:
        return
    at = pointers[best, POSITION]
    if alignments[0, _AGE] > 0 and abs(alignments[0, _AT] - at) > _NEAR:
        alignments[1] = alignments[0]
    alignments[0, _AT], alignments[0, _AGE], alignments[0, _FOLLOWED] = at, 0, pointers[best, LENGTH]


@compiled
def find_root(index: IndexArrays, call: CallState, is_first: bool) -> None:
    """Find the pointers at the end of the text.

    Args:
        index: of the memory.
        call: the text so far; changed.
        is_first: nothing of the answer is written yet.
    """
    chains, text = (index.tokens, index.heads, index.previous, index.bounds), (index.tokens, index.bounds)
    tail, pointers, alignments, ingredients = call.tail, call.pointers, call.alignments, call.ingredients
    size = call.sizes[TAIL_SIZE] if ingredients[LONGEST_MATCH] else min(call.sizes[TAIL_SIZE], 2)
    count = find_matches(chains, tail, size, pointers, 0, _MATCHES, _ROOT_STEPS)
    for i in range(count):
        pointers[i, ORIGIN] = MATCHED
    if ingredients[RESYNC]:
        _take_over(pointers, count, alignments)
        for row in range(_NUM_ALIGNMENTS):
            at, age = alignments[row, _AT], alignments[row, _AGE]
            if age >= 0:
                count = _add_edits(text, pointers, count, (at, age), tail[0], tail, size)
            if age == 0:  # the text followed its source for longer than matches are measured
                for i in range(count):
                    if pointers[i, POSITION] == at:
                        pointers[i, LENGTH] = max(pointers[i, LENGTH], alignments[row, _FOLLOWED])
    if is_first and ingredients[START]:
        for i in range(call.sizes[NUM_STARTS]):
            count = _add_pointer(pointers, count, call.starts[i, 0], 0, call.starts[i, 1])
    call.sizes[ROOT_POINTERS] = count


@compiled
def follow(index: IndexArrays, call: CallState, tokens: Table) -> None:
    """Move a call on by tokens that were written, shape (n,); to be called before they are indexed."""
    tail, alignments, text = call.tail, call.alignments, (index.tokens, index.bounds)
    for token in tokens:
        for row in range(_NUM_ALIGNMENTS):
            if alignments[row, _AGE] == 0 and token_at(text, alignments[row, _AT]) == token:
                alignments[row, _AT] += 1
                alignments[row, _FOLLOWED] += 1
            elif alignments[row, _AGE] >= 0:
                alignments[row, _AGE] += 1
                alignments[row, _FOLLOWED] = 0
                if alignments[row, _AGE] > _LOST_AGE:
                    alignments[row, _AGE] = -1
    kept = max(len(tail) - len(tokens), 0)
    for i in range(kept):
        tail[len(tail) - 1 - i] = tail[kept - 1 - i]
    for i in range(len(tail) - kept):
        tail[i] = tokens[len(tokens) - 1 - i]
    call.sizes[TAIL_SIZE] = min(call.sizes[TAIL_SIZE] + len(tokens), len(tail))


@compiled
def enter_root(
    nodes: Table,  # (slots, NODE_COLUMNS)
    pointers: Table,  # (slots, MOST_POINTERS, POINTER_COLUMNS)
    root: tuple[Table, Table, Table],
) -> None:
    """Make slot 0 the end of the text; `root`: `CallState.sizes`, `.alignments` and `.pointers`."""
    sizes, alignments, found = root
    for i in range(sizes[ROOT_POINTERS]):
        for column in range(TARGET):
            pointers[0, i, column] = found[i, column]
    nodes[0, DEPTH], nodes[0, NUM_POINTERS] = 0, sizes[ROOT_POINTERS]
    for row in range(_NUM_ALIGNMENTS):
        for column in range(2):
            nodes[0, _ALIGNMENT + 2 * row + column] = alignments[row, column]


@compiled
def enter(
    text: Fields,
    nodes: Table,  # (slots, NODE_COLUMNS)
    pointers: Table,  # (slots, MOST_POINTERS, POINTER_COLUMNS)
    parent: int,
    slot: int,
    token: int,
) -> None:
    """Make `slot` the branch point behind a node with `token` that follows the one of slot `parent`.

    `text` is as for `token_at`; the candidates at `parent` have been looked for.
    """
    nodes[slot, TOKEN], nodes[slot, PARENT], nodes[slot, DEPTH] = token, parent - 1, nodes[parent, DEPTH] + 1
    count = 0
    for i in range(nodes[parent, NUM_POINTERS]):
        if pointers[parent, i, TARGET] == token:
            pointers[slot, count, POSITION] = pointers[parent, i, POSITION] + 1
            pointers[slot, count, LENGTH] = pointers[parent, i, LENGTH] + 1
            pointers[slot, count, ORIGIN] = pointers[parent, i, ORIGIN]
            count += 1
    nodes[slot, NUM_POINTERS] = count
    for row in range(_NUM_ALIGNMENTS):
        column = _ALIGNMENT + 2 * row
        at, age = nodes[parent, column + _AT], nodes[parent, column + _AGE]
        if age == 0 and token_at(text, at) == token:
            at += 1
        elif age >= 0:
            age += 1
        nodes[slot, column + _AT], nodes[slot, column + _AGE] = at, age


@compiled
def _suffix_at(
    nodes: Table,  # (slots, NODE_COLUMNS)
    suffix: Table,  # (MAX_MATCH_TOKENS,)
    tail: Table,  # (MAX_MATCH_TOKENS,)
    tail_size: int,
    slot: int,
) -> int:
    """Write the tokens before a branch point, the path's and then the text's, to `suffix`; how many there are."""
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
def last_two(
    nodes: Table,  # (slots, NODE_COLUMNS)
    tail: Table,  # (MAX_MATCH_TOKENS,)
    tail_size: int,
    slot: int,
) -> tuple[int, int]:
    """The two tokens before a branch point; the first one is -1 if there is none."""
    if slot == 0:
        return tail[1] if tail_size > 1 else -1, tail[0]
    parent = nodes[slot, PARENT]
    return nodes[parent + 1, TOKEN] if parent >= 0 else tail[0], nodes[slot, TOKEN]


@inlined
def complete_pointers(index: Fields, call: Fields, scratch: Fields, slot: int, least: float) -> int:
    """Add to the pointers that a node has from its parent, where that can matter; how many it has then.

    Args:
        index: as `IndexArrays`.
        call: as `CallState`.
        scratch: as `Scratch`.
        slot: the node's.
        least: what a node must reach.
    """
    ring, heads, previous, bounds, _, _, _ = index
    tail, sizes, _, _, _, _, ingredients = call
    nodes, probabilities, all_pointers, _, _, _, suffix, _, _, _ = scratch
    pointers, probability = all_pointers[slot], probabilities[slot]
    count = nodes[slot, NUM_POINTERS]
    longest = 0
    for i in range(count):
        longest = max(longest, pointers[i, LENGTH])
    if longest <= _SHORT_LENGTH and probability < 2.0 * least:
        count = 0  # nothing behind a match this short is likely enough
    else:
        if longest < _SURE_LENGTH and probability > _LOOKUP_FACTOR * least and ingredients[LONGEST_MATCH]:
            matched, size = count, _suffix_at(nodes, suffix, tail, sizes[TAIL_SIZE], slot)
            chains = (ring, heads, previous, bounds)
            count = find_matches(chains, suffix, size, pointers, count, _INNER_MATCHES, _INNER_STEPS)
            for i in range(matched, count):
                pointers[i, ORIGIN] = MATCHED
        if ingredients[RESYNC]:
            for row in range(_NUM_ALIGNMENTS):
                at, age = nodes[slot, _ALIGNMENT + 2 * row + _AT], nodes[slot, _ALIGNMENT + 2 * row + _AGE]
                if age >= 0 and age <= _INNER_AGE:
                    count = _add_edits((ring, bounds), pointers, count, (at, age), nodes[slot, TOKEN], suffix, 0)
    return count
