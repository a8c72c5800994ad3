"""Growing a draft tree, the most likely node first, for as long as a node is worth its time.

Every place in a tree (the end of the text, or behind a node) holds pointers: positions in the index where a text goes
on that ends like the text and the path so far. Grouped by the token they point to they are the candidates for the next
node. A pointer comes from a match, from following the source that is being rewritten over an edit (replaced, inserted
or deleted tokens), or from the start of something declared. Behind all matches come the most frequent tokens.

A candidate's hazard (survival.py) times the probability that the better ones are wrong, times that of its place, is
the probability that it will be written. Nodes are added in that order, while

    probability  >  pace * cost of one more token in the pass

where the pace is about what the conversation gets, in tokens per unit of time, and the cost is the slope of the lower
convex hull of the measured curve. In the end the prefix of the nodes with the largest gain is kept.

All of it is compiled. Not covered: the life of a call (drafter.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.copies import RECYCLED
from copyspec_engine.copy_index import BREAK, FREQUENT, MAX_MATCH_TOKENS, IndexArrays, find_matches, match_length
from copyspec_engine.recycled import NUM_CANDIDATES, NUM_CHANCES, find_kept
from copyspec_engine.survival import (
    BY_AGREEMENT,
    BY_DISTANCE,
    BY_FREQUENCY,
    BY_MATCH,
    BY_ORIGIN,
    BY_RANK,
    BY_RECYCLED,
    BY_SHARE,
    BY_SUPPORT,
    CONTINUED,
    DELETED,
    INSERTED,
    MATCHED,
    NUM_DEPTHS,
    NUM_DISTANCES,
    NUM_FEATURES,
    NUM_FREQUENCIES,
    NUM_LENGTHS,
    NUM_RANKS,
    REPLACED,
    calibrated,
    depth_bucket,
    hazard,
    learn_outcome,
    length_bucket,
    recycled_worth,
)

__all__ = [
    "MARGIN",
    "Call",
    "Scratch",
    "drawn_pace",
    "find_root",
    "follow",
    "grow",
    "make_call",
    "make_scratch",
    "walk",
]

_MATCHES, _INNER_MATCHES = 24, 6
"""Pointers that come from matches, at the root and inside the tree."""
_POINTERS = _MATCHES + 10
_STARTS = 8
_CANDIDATES = _POINTERS + NUM_CANDIDATES + FREQUENT
_PENDING = 4096
"""Candidates waiting to become nodes."""
_ROOT_STEPS, _INNER_STEPS = 32, 3
_LOOK = 6.0
"""A place inside the tree is looked up anew if it is at least this many times as likely as a node must be."""
_SHORT_LENGTH = 2
_SURE_LENGTH = 16
"""With a match this long nothing shorter is looked up inside the tree."""
_NUM_ALIGNMENTS = 2
_ALIGNED_LENGTH = 8
"""Tokens that must match for a source to count as the one that is being rewritten."""
_LOST_AGE = 24
"""Tokens after which a text that parted from its source has lost it."""
_INNER_AGE = 4
_WINDOW = 48
"""How far on in a source the text is looked for after a deletion."""
_SHARED_LENGTH = 4
"""With a match this long, what shorter ones go on with says nothing any more."""
_NEARBY_LENGTH = 8
"""With a match this long, how far back it is says nothing any more."""
MARGIN = 1.05
"""A node must be worth this many times its cost: near the limit nothing is gained, and estimates err."""
_DRAWN = 0.8
"""Power of the measured pace: a mean over stretches of copying and of fresh text, which are far apart, would keep the
cheap guesses away from fresh text."""
_NEAR = 96
"""Sources closer than this are the same one."""
_TINY = 1e-9

# Ingredients, for measuring what each of them gives.
LONGEST_MATCH, AGREEMENT, TREE, RESYNC, START = range(5)


# Columns of the tables below.
TOKEN, PARENT, SOURCE, DEPTH, POINTERS, AT, AGE = 0, 1, 2, 3, 4, 5, 6  # and AT, AGE of the second alignment
POSITION, LENGTH, ORIGIN = 0, 1, 2
_FEATURES = 3
"""First column with a candidate's features, behind its token, best pointer and source."""
_RANK, _SUPPORT = _FEATURES + NUM_FEATURES - 2, _FEATURES + NUM_FEATURES - 1
"""Columns of the last two: its rank among the candidates of its place, and whether the model held it likely before."""

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
    """The root's: position, tokens that match before it, origin; shape (_POINTERS, 3)."""
    starts: Table
    """Positions where an answer may start, and their origins, shape (_STARTS, 2)."""


class Scratch(NamedTuple):
    """Working memory of one growth. Slot 0 is the root, slot i + 1 is node i. Nothing in it outlives the growth."""

    nodes: Table
    """Token, parent node, source position (0: none), depth, number of pointers, alignments; shape (slots, 9)."""
    probabilities: npt.NDArray[np.float64]
    """Of each node, shape (slots,)."""
    pointers: Table
    """As in `Call`, shape (slots, _POINTERS, 3)."""
    groups: Table
    """The token that each pointer of a place points to, and the origin of each candidate, shape (2, _POINTERS)."""
    candidates: Table
    """Those of the place that was looked at last: token, pointer, source, features."""
    log_odds: npt.NDArray[np.float64]
    """Of these candidates."""
    hazards: npt.NDArray[np.float64]
    """The same as probabilities."""
    suffix: Table
    """Tokens before a place, last one first."""
    waiting: Table
    """Slot, token and source of each candidate that may become a node, shape (_PENDING, 3)."""
    keys: npt.NDArray[np.float64]
    """Their probabilities, as a heap."""
    heap: Table
    """Their rows in `waiting`, as the heap goes."""


def make_call() -> Call:
    """The state of a call before its prompt."""
    return Call(
        tail=np.zeros(MAX_MATCH_TOKENS, dtype=np.int64),
        sizes=np.zeros(4, dtype=np.int64),
        alignments=np.full((_NUM_ALIGNMENTS, 3), -1, dtype=np.int64),
        pointers=np.zeros((_POINTERS, 3), dtype=np.int64),
        starts=np.zeros((_STARTS, 2), dtype=np.int64),
    )


def make_scratch(max_nodes: int) -> Scratch:
    """Working memory for trees of up to `max_nodes` nodes."""
    slots = max_nodes + 1
    return Scratch(
        nodes=np.zeros((slots, AT + 2 * _NUM_ALIGNMENTS), dtype=np.int64),
        probabilities=np.zeros(slots),
        pointers=np.zeros((slots, _POINTERS, 3), dtype=np.int64),
        groups=np.zeros((2, _POINTERS), dtype=np.int64),
        candidates=np.zeros((_CANDIDATES, _FEATURES + NUM_FEATURES), dtype=np.int64),
        log_odds=np.zeros(_CANDIDATES),
        hazards=np.zeros(_CANDIDATES),
        suffix=np.zeros(MAX_MATCH_TOKENS, dtype=np.int64),
        waiting=np.zeros((_PENDING, 3), dtype=np.int64),
        keys=np.zeros(_PENDING),
        heap=np.zeros(_PENDING, dtype=np.int64),
    )


# ---- pointers ------------------------------------------------------------------------------------------------------
# Inner functions take arrays, not the tuples above: compiled code is several times faster on them.


@compiled
def _token_at(ring: npt.NDArray[np.int32], bounds: Table, position: int) -> int:
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
    if _token_at(ring, bounds, at + age) != BREAK:
        length = match_length(ring, begin, at + age, suffix, suffix_length)
        replaced = REPLACED if age == 1 else REPLACED + 1 if age <= 3 else REPLACED + 2
        count = _add_pointer(pointers, count, at + age, length, replaced)
    length = match_length(ring, begin, at, suffix, suffix_length)
    count = _add_pointer(pointers, count, at, length, INSERTED if age == 1 else INSERTED + 1)
    for skipped in range(_WINDOW):
        token = _token_at(ring, bounds, at + skipped)
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
        for row in range(_NUM_ALIGNMENTS):
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
        for row in range(_NUM_ALIGNMENTS):
            if alignments[row, 1] == 0 and _token_at(arrays.tokens, arrays.bounds, alignments[row, 0]) == token:
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


# ---- candidates ----------------------------------------------------------------------------------------------------


@compiled
def _enter_root(nodes: Table, pointers: Table, found: Table, count: int, alignments: Table) -> None:
    """Make slot 0 the end of the text, where `count` pointers were found."""
    for i in range(count):
        for column in range(3):
            pointers[0, i, column] = found[i, column]
    nodes[0, DEPTH], nodes[0, POINTERS] = 0, count
    for row in range(_NUM_ALIGNMENTS):
        nodes[0, AT + 2 * row], nodes[0, AGE + 2 * row] = alignments[row, 0], alignments[row, 1]


@compiled
def _enter(
    ring: npt.NDArray[np.int32], bounds: Table, nodes: Table, pointers: Table, parent: int, slot: int, token: int
) -> None:
    """Make `slot` the place behind a node with `token` whose parent is the place `parent`."""
    nodes[slot, TOKEN], nodes[slot, PARENT], nodes[slot, DEPTH] = token, parent - 1, nodes[parent, DEPTH] + 1
    count = 0
    for i in range(nodes[parent, POINTERS]):
        position = pointers[parent, i, POSITION]
        if _token_at(ring, bounds, position) == token:
            pointers[slot, count, POSITION] = position + 1
            pointers[slot, count, LENGTH] = pointers[parent, i, LENGTH] + 1
            pointers[slot, count, ORIGIN] = pointers[parent, i, ORIGIN]
            count += 1
    nodes[slot, POINTERS] = count
    for row in range(_NUM_ALIGNMENTS):
        at, age = nodes[parent, AT + 2 * row], nodes[parent, AGE + 2 * row]
        if age == 0 and _token_at(ring, bounds, at) == token:
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
def _last_two(nodes: Table, tail: Table, tail_size: int, slot: int) -> tuple[int, int]:
    """The two tokens before a place; the first one is -1 if there is none."""
    if slot == 0:
        return tail[1] if tail_size > 1 else -1, tail[0]
    parent = nodes[slot, PARENT]
    return nodes[parent + 1, TOKEN] if parent >= 0 else tail[0], nodes[slot, TOKEN]


@compiled
def _group(
    ring: npt.NDArray[np.int32],
    bounds: Table,
    pointers: Table,
    num_pointers: int,
    groups: Table,
    candidates: Table,
) -> int:
    """Group a place's pointers by the token they point to; how many candidates there are."""
    count = 0
    for i in range(num_pointers):
        token = groups[0, i] = _token_at(ring, bounds, pointers[i, POSITION])
        if token == BREAK:
            continue
        group = 0
        while group < count and candidates[group, 0] != token:
            group += 1
        origin = pointers[i, ORIGIN]
        if group == count:
            candidates[count, 0], candidates[count, 1], groups[1, count] = token, i, origin
            count += 1
            continue
        other = candidates[group, 1]
        longer = pointers[i, LENGTH] - pointers[other, LENGTH]
        if longer > 0 or (longer == 0 and pointers[i, POSITION] > pointers[other, POSITION]):
            candidates[group, 1] = i
        if origin != MATCHED and (groups[1, group] == MATCHED or origin < groups[1, group]):
            groups[1, group] = origin
    return count


@compiled
def _agreement(pointers: Table, num_pointers: int, groups: Table, token: int, length: int) -> tuple[int, int]:
    """How far other matches go on with `token` too: those about as long as `length`, and for short ones all of them."""
    floor = max(1, min(length, 3), min(length, MAX_MATCH_TOKENS) // 2)
    same = near = same_of_all = all_matches = 0
    for i in range(num_pointers):
        if groups[0, i] != BREAK and pointers[i, LENGTH] > 0:
            hit = 1 if groups[0, i] == token else 0
            all_matches += 1
            same_of_all += hit
            if pointers[i, LENGTH] >= floor:
                near += 1
                same += hit
    agreement = share = 0
    if near > 1 and same == near:
        agreement = 1 if near <= 3 else 2
    elif near > 1:
        agreement = 3 if same * 3 > near * 2 else 4 if same * 3 > near else 5
    if all_matches > 1 and length < _SHARED_LENGTH:
        share = 1 + min(same_of_all * 6 // all_matches, 5)
        share += 12 if all_matches > 12 else 6 if all_matches > 4 else 0
    return agreement, share


@compiled
def _distance(length: int, away: int) -> int:
    """Bucket of how far back a short match is: powers of four."""
    if length >= _NEARBY_LENGTH:
        return 0
    distance = 1
    while distance < NUM_DISTANCES - 1 and away >> (2 * distance + 1) > 0:
        distance += 1
    return distance


@compiled
def _support(likely: npt.NDArray[np.int32], chances: npt.NDArray[np.int8], kept: int, kind: int, token: int) -> int:
    """The feature of a token that matches, by what is kept in row `kept` of the recycled candidates."""
    feature = BY_SUPPORT + kind * (1 + NUM_CHANCES)
    for i in range(likely.shape[1]):
        if likely[kept, i] == token:
            return feature + 1 + chances[kept, i]
    return feature


@compiled
def _rank(
    weights: npt.NDArray[np.float64],
    pointers: Table,
    num_pointers: int,
    depth: int,
    end: int,
    groups: Table,
    candidates: Table,
    count: int,
    log_odds: npt.NDArray[np.float64],
    likely: npt.NDArray[np.int32],
    chances: npt.NDArray[np.int8],
    kept: int,
    kind: int,
    agreements: bool,
) -> None:
    """Write each candidate's features and log-odds, and bring the best one to the front."""
    for j in range(count):
        best = candidates[j, 1]
        position, length, origin = pointers[best, POSITION], pointers[best, LENGTH], groups[1, j]
        agreement = share = 0
        if agreements:
            agreement, share = _agreement(pointers, num_pointers, groups, candidates[j, 0], length)
        drafted = depth if origin != MATCHED and length < depth else min(length, depth)
        candidates[j, 2] = position
        candidates[j, 3] = BY_MATCH + length_bucket(max(length - depth, 0)) * NUM_DEPTHS + depth_bucket(drafted)
        candidates[j, 4] = BY_AGREEMENT + agreement * NUM_LENGTHS + length_bucket(length)
        candidates[j, 5] = BY_ORIGIN + origin * NUM_DEPTHS + depth_bucket(depth)
        candidates[j, 6] = BY_SHARE + share
        candidates[j, 7] = BY_DISTANCE + _distance(length, max(end - position, 1))
        odds = 0.0
        for feature in range(_FEATURES, _RANK):
            odds += weights[candidates[j, feature]]
        candidates[j, _SUPPORT] = -1
        if kept >= 0:
            candidates[j, _SUPPORT] = _support(likely, chances, kept, kind, candidates[j, 0])
            odds += weights[candidates[j, _SUPPORT]]
        log_odds[j] = odds
        i = j  # insertion sort: there are few, and they are nearly in order
        while i > 0 and log_odds[i] > log_odds[i - 1]:
            log_odds[i], log_odds[i - 1] = log_odds[i - 1], log_odds[i]
            groups[1, i], groups[1, i - 1] = groups[1, i - 1], groups[1, i]
            for column in range(candidates.shape[1]):
                candidates[i, column], candidates[i - 1, column] = candidates[i - 1, column], candidates[i, column]
            i -= 1
    for j in range(count):
        candidates[j, _RANK] = BY_RANK + min(j, NUM_RANKS - 1)
        log_odds[j] += weights[candidates[j, _RANK]]


@compiled
def _place_of(candidates: Table, count: int, token: int) -> int:
    """Which of the first `count` candidates a token is; -1 if none."""
    for j in range(count):
        if candidates[j, 0] == token:
            return j
    return -1


@compiled
def _rest(hazards: npt.NDArray[np.float64], count: int, probability: float) -> float:
    """Of a place's probability, what is left behind its first `count` candidates."""
    for j in range(count):
        probability *= 1.0 - hazards[j]
    return probability


@compiled
def _add_recycled(
    likely: npt.NDArray[np.int32],
    chances: npt.NDArray[np.int8],
    kept: int,
    kind: int,
    weights: npt.NDArray[np.float64],
    candidates: Table,
    hazards: npt.NDArray[np.float64],
    count: int,
    probability: float,
    worth: float,
    least: float,
) -> int:
    """Add the tokens in row `kept` of the recycled candidates, as far as they may reach `least`; the new count."""
    for i in range(likely.shape[1]):
        token = np.int64(likely[kept, i])
        if token < 0:
            break
        feature = BY_RECYCLED + kind * NUM_CHANCES + chances[kept, i]
        chance = worth * hazard(weights[feature])
        if probability * chance > least and _place_of(candidates, count, token) < 0:
            candidates[count, 0], candidates[count, 2], hazards[count] = token, RECYCLED, chance
            candidates[count, _FEATURES], candidates[count, _FEATURES + 1] = feature, -1
            probability *= 1.0 - chance
            count += 1
    return count


@compiled
def _add_frequent(
    frequent: Table,
    total: int,
    weights: npt.NDArray[np.float64],
    candidates: Table,
    hazards: npt.NDArray[np.float64],
    count: int,
    probability: float,
    least: float,
) -> int:
    """Add frequent tokens behind the `count` candidates, as long as they may reach `least`; the new count.

    A recycled one that is likelier for being frequent is frequent.
    """
    matched = count
    for i in range(FREQUENT):
        token, times = frequent[0, i], frequent[1, i]
        if times == 0:
            break
        bucket = 0
        while bucket < NUM_FREQUENCIES - 1 and times << (bucket + 4) < total:  # from 1/16 down
            bucket += 1
        chance = hazard(weights[BY_FREQUENCY + bucket])
        if probability * chance <= least:
            break
        place = _place_of(candidates, matched, token)
        if place < 0:
            place, probability = count, probability * (1.0 - chance)
            count += 1
        elif candidates[place, 2] != RECYCLED or hazards[place] >= chance:
            continue
        candidates[place, 0], candidates[place, 2], hazards[place] = token, 0, chance
        candidates[place, _FEATURES], candidates[place, _FEATURES + 1] = BY_FREQUENCY + bucket, -1
    return count


@compiled
def _complete(
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
        for row in range(_NUM_ALIGNMENTS):
            at, age = nodes[slot, AT + 2 * row], nodes[slot, AGE + 2 * row]
            if age >= 0 and age <= _INNER_AGE:
                count = _add_edits(ring, bounds, pointers, count, at, age, nodes[slot, TOKEN], suffix, 0)
    return count


@compiled
def _candidates(
    ring: npt.NDArray[np.int32],
    heads: npt.NDArray[np.int32],
    previous: npt.NDArray[np.int32],
    bounds: Table,
    frequent: Table,
    total: int,
    weights: npt.NDArray[np.float64],
    nodes: Table,
    pointers: Table,
    groups: Table,
    candidates: Table,
    log_odds: npt.NDArray[np.float64],
    hazards: npt.NDArray[np.float64],
    keys: Table,
    likely: npt.NDArray[np.int32],
    chances: npt.NDArray[np.int8],
    suffix: Table,
    tail: Table,
    sizes: Table,
    slot: int,
    probability: float,
    least: float,
    worth: float,
    least_recycled: float,
    ingredients: npt.NDArray[np.bool_],
) -> int:
    """The candidates behind a place that is reached with `probability`, best first; how many there are.

    The arrays are those of `IndexArrays`, `Survival`, `Scratch`, `RecycledArrays` and `Call`; `pointers` are the
    place's own. Recycled candidates are worth the share `worth` of what they look like, and have a least probability
    of their own.
    """
    if slot > 0:
        nodes[slot, POINTERS] = _complete(
            ring,
            heads,
            previous,
            bounds,
            nodes,
            pointers,
            suffix,
            tail,
            sizes[0],
            slot,
            probability,
            least,
            ingredients,
        )
    num_pointers, depth = nodes[slot, POINTERS], nodes[slot, DEPTH]
    count = _group(ring, bounds, pointers, num_pointers, groups, candidates)
    before, last = _last_two(nodes, tail, sizes[0], slot)
    kept, kind = find_kept(keys, before, last)
    _rank(
        weights,
        pointers,
        num_pointers,
        depth,
        sizes[3],
        groups,
        candidates,
        count,
        log_odds,
        likely,
        chances,
        kept,
        kind,
        ingredients[AGREEMENT],
    )
    for j in range(count):
        hazards[j] = hazard(log_odds[j])
    matched = count
    if kept >= 0:
        count = _add_recycled(
            likely,
            chances,
            kept,
            kind,
            weights,
            candidates,
            hazards,
            count,
            _rest(hazards, count, probability),
            worth,
            least_recycled,
        )
    if not ingredients[TREE]:
        if count > matched > 0 and _rest(hazards, matched, 1.0) * hazards[matched] > hazards[0]:
            candidates[0], hazards[0] = candidates[matched], hazards[matched]
        return min(count, 1)
    return _add_frequent(
        frequent, total, weights, candidates, hazards, count, _rest(hazards, count, probability), least
    )


# ---- the heap of waiting candidates --------------------------------------------------------------------------------


@compiled
def _push(keys: npt.NDArray[np.float64], heap: npt.NDArray[np.int64], size: int, key: float, item: int) -> None:
    """Add an item to a heap of `size` items, largest key first; there must be room."""
    i = size
    while i > 0 and keys[(i - 1) // 2] < key:
        above = (i - 1) // 2
        keys[i], heap[i] = keys[above], heap[above]
        i = above
    keys[i], heap[i] = key, item


@compiled
def _pop(keys: npt.NDArray[np.float64], heap: npt.NDArray[np.int64], size: int) -> None:
    """Drop the first of `size` items."""
    key, item = keys[size - 1], heap[size - 1]
    i = 0
    while 2 * i + 1 < size - 1:
        below = 2 * i + 1
        if below + 1 < size - 1 and keys[below + 1] > keys[below]:
            below += 1
        if keys[below] <= key:
            break
        keys[i], heap[i] = keys[below], heap[below]
        i = below
    keys[i], heap[i] = key, item


@compiled
def _is_in(token: int, tokens: Table) -> bool:
    for other in tokens:
        if other == token:
            return True
    return False


@compiled
def drawn_pace(paces: npt.NDArray[np.float64]) -> float:
    """Tokens that a pass of one token's cost is worth, from `Survival.pace`."""
    return max(paces[0] / paces[1], 1.0) ** _DRAWN


# ---- growth --------------------------------------------------------------------------------------------------------


@compiled
def grow(
    arrays: Fields,
    recycled: Fields,
    survival: Fields,
    scratch: Fields,
    call: Fields,
    marginal: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64],
    eos_token_ids: npt.NDArray[np.int64],
    ingredients: npt.NDArray[np.bool_],
) -> int:
    """Grow a draft; node i is in row i + 1 of `scratch.nodes` and in `scratch.probabilities[i + 1]`.

    Args:
        arrays: the index, as `IndexArrays`.
        recycled: candidates of earlier passes, as `RecycledArrays`; empty ones if they take no part.
        survival: what was learnt, as `Survival`; not changed.
        scratch: `Scratch` for at least `len(marginal)` nodes.
        call: the text so far, as `Call`.
        marginal: cost of each further node on the convex hull of the curve, shape (most nodes,).
        seconds: cost of a pass with 0, 1, ... nodes, shape (most nodes + 1,), in passes of one token, as `marginal`.
        eos_token_ids: nothing is drafted behind these.
        ingredients: what takes part, shape (5,).

    Returns:
        The number of nodes.
    """
    ring, heads, previous, bounds, _, frequent, counted = arrays
    recycled_keys, _, likely_tokens, chances = recycled
    weights, paths, paces, counts = survival
    nodes, probabilities, pointers, groups, candidates, log_odds, hazards, suffix, waiting, keys, heap = scratch
    tail, sizes, alignments, found, _ = call
    pace, worth = MARGIN * drawn_pace(paces), recycled_worth(counts)
    total, most = max(counted[0], 1), len(marginal)
    slot = seen = size = best = 0
    probability, gain, best_gain = 1.0, 0.0, 0.0
    _enter_root(nodes, pointers, found, sizes[1], alignments)
    while slot < most:
        least = pace * marginal[slot]
        if slot == 0 or not _is_in(nodes[slot, TOKEN], eos_token_ids):
            count = _candidates(
                ring,
                heads,
                previous,
                bounds,
                frequent,
                total,
                weights,
                nodes,
                pointers[slot],
                groups,
                candidates,
                log_odds,
                hazards,
                recycled_keys,
                likely_tokens,
                chances,
                suffix,
                tail,
                sizes,
                slot,
                probability,
                least,
                worth,
                least,
                ingredients,
            )
            for j in range(count):
                likely = probability * hazards[j]
                probability *= 1.0 - hazards[j]
                if likely > least and calibrated(paths, likely) > least and seen < len(waiting):
                    waiting[seen, 0] = slot
                    waiting[seen, 1], waiting[seen, 2] = candidates[j, 0], candidates[j, 2]
                    _push(keys, heap, size, likely, seen)
                    seen += 1
                    size += 1
        if size == 0 or calibrated(paths, keys[0]) <= least:
            break
        probability, row = keys[0], heap[0]
        _pop(keys, heap, size)
        size -= 1
        slot += 1
        _enter(ring, bounds, nodes, pointers, waiting[row, 0], slot, waiting[row, 1])
        nodes[slot, SOURCE], probabilities[slot] = waiting[row, 2], probability
        gain += calibrated(paths, probability)
        if gain - pace * (seconds[slot] - seconds[0]) > best_gain:
            best_gain, best = gain - pace * (seconds[slot] - seconds[0]), slot
    return best


@compiled
def walk(
    arrays: Fields,
    recycled: Fields,
    survival: Fields,
    scratch: Fields,
    call: Fields,
    written: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
    least: float,
    ingredients: npt.NDArray[np.bool_],
) -> None:
    """Learn from the tokens that were written: look at each place on their path as if it were in a tree.

    Args:
        arrays: the index, as `IndexArrays`.
        recycled: as for `grow`.
        survival: as `Survival`; its weights are changed.
        scratch: `Scratch` for at least `len(written)` places.
        call: the text before `written`, as `Call`.
        written: the accepted tokens of a draft and the token after them, shape (n,).
        probabilities: those of the accepted nodes, shape (n - 1,) or longer.
        least: what a node had to reach.
        ingredients: what takes part, shape (5,).
    """
    ring, heads, previous, bounds, _, frequent, counted = arrays
    recycled_keys, _, likely_tokens, chances = recycled
    weights, _, _, _ = survival
    nodes, _, pointers, groups, candidates, log_odds, hazards, suffix, _, _, _ = scratch
    tail, sizes, alignments, found, _ = call
    total = max(counted[0], 1)
    _enter_root(nodes, pointers, found, sizes[1], alignments)
    for slot in range(len(written)):
        count = _candidates(
            ring,
            heads,
            previous,
            bounds,
            frequent,
            total,
            weights,
            nodes,
            pointers[slot],
            groups,
            candidates,
            log_odds,
            hazards,
            recycled_keys,
            likely_tokens,
            chances,
            suffix,
            tail,
            sizes,
            slot,
            probabilities[slot - 1] if slot > 0 else 1.0,
            least,
            1.0,
            0.0,  # what a candidate is worth is to be learnt before it is worth drafting
            ingredients,
        )
        learn_outcome(weights, candidates, _FEATURES, count, written[slot])
        if slot + 1 < len(written):
            _enter(ring, bounds, nodes, pointers, slot, slot + 1, written[slot])
