"""Growing a draft tree, the most likely node first, for as long as a node is worth its time.

Every place in a tree, which is the end of the text or behind a node, has candidates for its next node (candidates.py),
from where texts go on that end like the text and the path so far (branch_points.py). A candidate's hazard times the
probability that the better ones are wrong, times that of its place, is the probability that it will be written. Nodes
are added in that order, while

    probability  >  pace * cost of one more token in the pass

where the pace is about what the conversation gets, in tokens per unit of time, and the cost is the slope of the lower
convex hull of the measured curve. In the end the prefix of the nodes with the largest gain is kept.

All of it is compiled. Not covered: the life of a call (drafting/drafter.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.drafting.kernels.branch_points import (
    AT,
    MOST_POINTERS,
    NUM_ALIGNMENTS,
    SOURCE,
    TOKEN,
    Fields,
    Table,
    enter,
    enter_root,
)
from copyspec_engine.drafting.kernels.candidates import FIRST_FEATURE, MOST_CANDIDATES, find_candidates
from copyspec_engine.drafting.tree import best_prefix
from copyspec_engine.memory.acceptance import NUM_FEATURES, calibrated, calibrated_all, learn_outcome, recycled_worth
from copyspec_engine.memory.index import MAX_MATCH_TOKENS

__all__ = ["MARGIN", "Scratch", "drawn_pace", "grow", "make_scratch", "walk"]

_PENDING = 4096
"""Candidates waiting to become nodes."""
MARGIN = 1.05
"""A node must be worth this many times its cost: near the limit nothing is gained, and estimates err."""
_DRAWN = 0.8
"""Power of the measured pace: a mean over stretches of copying and of fresh text, which are far apart, would keep the
cheap guesses away from fresh text."""


class Scratch(NamedTuple):
    """Working memory of one growth. Slot 0 is the root, slot i + 1 is node i. Nothing in it outlives the growth."""

    nodes: Table
    """Token, parent node, source position (0: none), depth, number of pointers, alignments; shape (slots, 9)."""
    probabilities: npt.NDArray[np.float64]
    """Of each node, shape (slots,)."""
    pointers: Table
    """As in `Call`, shape (slots, MOST_POINTERS, 3)."""
    groups: Table
    """The token that each pointer of a place points to, and the origin of each candidate, shape (2, MOST_POINTERS)."""
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


def make_scratch(max_nodes: int) -> Scratch:
    """Working memory for trees of up to `max_nodes` nodes."""
    slots = max_nodes + 1
    return Scratch(
        nodes=np.zeros((slots, AT + 2 * NUM_ALIGNMENTS), dtype=np.int64),
        probabilities=np.zeros(slots),
        pointers=np.zeros((slots, MOST_POINTERS, 3), dtype=np.int64),
        groups=np.zeros((2, MOST_POINTERS), dtype=np.int64),
        candidates=np.zeros((MOST_CANDIDATES, FIRST_FEATURE + NUM_FEATURES), dtype=np.int64),
        log_odds=np.zeros(MOST_CANDIDATES),
        hazards=np.zeros(MOST_CANDIDATES),
        suffix=np.zeros(MAX_MATCH_TOKENS, dtype=np.int64),
        waiting=np.zeros((_PENDING, 3), dtype=np.int64),
        keys=np.zeros(_PENDING),
        heap=np.zeros(_PENDING, dtype=np.int64),
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
    slot = seen = size = 0
    probability = 1.0
    enter_root(nodes, pointers, found, sizes[1], alignments)
    while slot < most:
        least = pace * marginal[slot]
        if slot == 0 or not _is_in(nodes[slot, TOKEN], eos_token_ids):
            count = find_candidates(
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
        enter(ring, bounds, nodes, pointers, waiting[row, 0], slot, waiting[row, 1])
        nodes[slot, SOURCE], probabilities[slot] = waiting[row, 2], probability
    return best_prefix(calibrated_all(paths, probabilities[1 : slot + 1]), seconds[: slot + 1], pace)


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
    enter_root(nodes, pointers, found, sizes[1], alignments)
    for slot in range(len(written)):
        count = find_candidates(
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
        learn_outcome(weights, candidates, FIRST_FEATURE, count, written[slot])
        if slot + 1 < len(written):
            enter(ring, bounds, nodes, pointers, slot, slot + 1, written[slot])
