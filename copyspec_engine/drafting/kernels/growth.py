"""Growing a draft tree, the most likely node first, for as long as a node is worth its time.

Every branch point of a tree, which is the end of the text or behind a node, has candidates for its next node
(candidates.py), from where texts go on that end like the text and the path so far (branch_points.py). A candidate's
chance times the probability that the better ones are wrong, times that of its branch point, is the probability that it
will be written. Nodes are added in that order, while

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
    MOST_POINTERS,
    NODE_COLUMNS,
    POINTER_COLUMNS,
    SOURCE,
    TOKEN,
    Table,
    enter,
    enter_root,
)
from copyspec_engine.drafting.kernels.candidates import (
    CANDIDATE_COLUMNS,
    FIRST_FEATURE,
    MOST_CANDIDATES,
    Tables,
    find_candidates,
)
from copyspec_engine.drafting.tree import best_prefix
from copyspec_engine.memory.acceptance import alternatives_worth, calibrated, calibrated_all, learn_outcome
from copyspec_engine.memory.index import MAX_MATCH_TOKENS

__all__ = ["MARGIN", "Scratch", "damped_pace", "grow", "make_scratch", "walk"]

_MOST_WAITING = 4096
"""Candidates waiting to become nodes."""
MARGIN = 1.05
"""A node must be worth this many times its cost: near the limit nothing is gained, and estimates err."""
_PACE_POWER = 0.8
"""Power of the measured pace: a mean over stretches of copying and of fresh text, which are far apart, would keep the
cheap guesses away from fresh text."""
_SLOT = 1
"""Column of the table of waiting candidates, which has TOKEN and SOURCE too: of the node that it would follow."""


class Scratch(NamedTuple):
    """Working memory of one growth. Slot 0 is the root, slot i + 1 is node i. Nothing in it outlives the growth."""

    nodes: Table
    """TOKEN, PARENT node, SOURCE (as in `DraftTree`), DEPTH, NUM_POINTERS, alignments; shape (slots, NODE_COLUMNS)."""
    probabilities: npt.NDArray[np.float64]
    """Of each branch point to be reached, shape (slots,)."""
    pointers: Table
    """Of each branch point as in `CallState`, shape (slots, MOST_POINTERS, POINTER_COLUMNS)."""
    candidates: Table
    """Of the branch point looked at last: TOKEN, POINTER, SOURCE, CANDIDATE_ORIGIN, features; shape (MOST_CANDIDATES,
    CANDIDATE_COLUMNS)."""
    log_odds: npt.NDArray[np.float64]
    """Of those candidates that have a pointer, shape (MOST_CANDIDATES,)."""
    chances: npt.NDArray[np.float64]
    """Of each candidate: the probability that it is right if the better ones are wrong; shape (MOST_CANDIDATES,)."""
    suffix: Table
    """Tokens before a branch point, last one first, shape (MAX_MATCH_TOKENS,)."""
    waiting: Table
    """TOKEN, SLOT and SOURCE of each candidate that may become a node, shape (_MOST_WAITING, 3)."""
    keys: npt.NDArray[np.float64]
    """Their probabilities, as a heap, shape (_MOST_WAITING,)."""
    heap: Table
    """Their rows in `waiting`, as the heap goes, shape (_MOST_WAITING,)."""


def make_scratch(max_nodes: int) -> Scratch:
    """Working memory for trees of up to `max_nodes` nodes."""
    slots = max_nodes + 1
    return Scratch(
        nodes=np.zeros((slots, NODE_COLUMNS), dtype=np.int64),
        probabilities=np.zeros(slots),
        pointers=np.zeros((slots, MOST_POINTERS, POINTER_COLUMNS), dtype=np.int64),
        candidates=np.zeros((MOST_CANDIDATES, CANDIDATE_COLUMNS), dtype=np.int64),
        log_odds=np.zeros(MOST_CANDIDATES),
        chances=np.zeros(MOST_CANDIDATES),
        suffix=np.zeros(MAX_MATCH_TOKENS, dtype=np.int64),
        waiting=np.zeros((_MOST_WAITING, 3), dtype=np.int64),
        keys=np.zeros(_MOST_WAITING),
        heap=np.zeros(_MOST_WAITING, dtype=np.int64),
    )


# ---- the heap of waiting candidates: keys and items of shape (>= size + 1,), largest key first -----------------------


@compiled
def _push(keys: npt.NDArray[np.float64], heap: npt.NDArray[np.int64], size: int, key: float, item: int) -> None:
    """Add an item to a heap of `size` items; there must be room."""
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
def damped_pace(pace: npt.NDArray[np.float64]) -> float:
    """Tokens that a pass of one token's cost is worth, from `Acceptance.pace`."""
    return max(pace[0] / pace[1], 1.0) ** _PACE_POWER


# ---- growth --------------------------------------------------------------------------------------------------------


@compiled
def grow(tables: Tables, marginal: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> int:
    """Grow a draft; node i is in row i + 1 of `scratch.nodes` and in `scratch.probabilities[i + 1]`.

    Args:
        tables: what to draft from; only `scratch` is changed. It is for at least `len(marginal)` nodes.
        marginal: cost of each further node on the convex hull of the curve, shape (most nodes,).
        seconds: cost of a pass with 0, 1, ... nodes, shape (most nodes + 1,), in passes of one token, as `marginal`.

    Returns:
        The number of nodes.
    """
    index, _, (_, paths, pace_seen, counts), call, scratch = tables
    text = (index[0], index[3])
    _, sizes, alignments, root_pointers, _, eos_token_ids, _ = call
    nodes, probabilities, pointers, candidates, _, chances, _, waiting, keys, heap = scratch
    pace, worth = MARGIN * damped_pace(pace_seen), alternatives_worth(counts)
    slot = seen = size = 0
    probabilities[0] = 1.0
    enter_root(nodes, pointers, (sizes, alignments, root_pointers))
    while slot < len(marginal):
        least = pace * marginal[slot]
        if slot == 0 or not _is_in(nodes[slot, TOKEN], eos_token_ids):
            count = find_candidates(tables, slot, (least, worth, least))
            left = probabilities[slot]
            for j in range(count):
                likely = left * chances[j]
                left *= 1.0 - chances[j]
                if likely > least and calibrated(paths, likely) > least and seen < len(waiting):
                    waiting[seen, TOKEN], waiting[seen, SOURCE] = candidates[j, TOKEN], candidates[j, SOURCE]
                    waiting[seen, _SLOT] = slot
                    _push(keys, heap, size, likely, seen)
                    seen += 1
                    size += 1
        if size == 0 or calibrated(paths, keys[0]) <= least:
            break
        row = heap[0]
        slot += 1
        probabilities[slot] = keys[0]
        _pop(keys, heap, size)
        size -= 1
        enter(text, nodes, pointers, waiting[row, _SLOT], slot, waiting[row, TOKEN])
        nodes[slot, SOURCE] = waiting[row, SOURCE]
    return best_prefix(calibrated_all(paths, probabilities[1 : slot + 1]), seconds[: slot + 1], pace)


@compiled
def walk(tables: Tables, written: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], least: float) -> None:
    """Learn from the tokens that were written: look at each branch point on their path as if it were in a tree.

    Args:
        tables: what was drafted from; the weights of `acceptance` are changed. `scratch` is for at least `len(written)`
            branch points, and `call` is the text before them.
        written: the accepted tokens of a draft and the token after them, shape (n,).
        probabilities: those of the accepted nodes, shape (n - 1,) or longer.
        least: what a node had to reach.
    """
    index, _, acceptance, call, scratch = tables
    _, sizes, alignments, root_pointers, _, _, _ = call
    nodes, reached, pointers, candidates, _, _, _, _, _, _ = scratch
    enter_root(nodes, pointers, (sizes, alignments, root_pointers))
    for slot in range(len(written)):
        reached[slot] = probabilities[slot - 1] if slot > 0 else 1.0
        # What an alternative is worth is to be learnt before it is worth drafting.
        count = find_candidates(tables, slot, (least, 1.0, 0.0))
        learn_outcome(acceptance[0], candidates, FIRST_FEATURE, count, written[slot])
        if slot + 1 < len(written):
            enter((index[0], index[3]), nodes, pointers, slot, slot + 1, written[slot])
