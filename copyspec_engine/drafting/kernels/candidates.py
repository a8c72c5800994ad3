"""What may come next at a place of a draft tree, and how likely each of it is.

A place's pointers (branch_points.py), grouped by the token they point to, are the candidates for the next node; behind
them come recycled candidates and the most frequent tokens. Each has features, and by their weights
(memory/acceptance.py) a hazard: the probability that it is right given that the better ones are wrong.

All of it is compiled. Not covered: which places are looked at (growth.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.drafting.kernels.branch_points import (
    AGREEMENT,
    DEPTH,
    LENGTH,
    MOST_POINTERS,
    ORIGIN,
    POINTERS,
    POSITION,
    TREE,
    Table,
    complete_pointers,
    last_two,
    token_at,
)
from copyspec_engine.drafting.tree import RECYCLED
from copyspec_engine.memory.acceptance import (
    BY_AGREEMENT,
    BY_DISTANCE,
    BY_FREQUENCY,
    BY_MATCH,
    BY_ORIGIN,
    BY_RANK,
    BY_RECYCLED,
    BY_SHARE,
    BY_SUPPORT,
    MATCHED,
    NUM_DEPTHS,
    NUM_DISTANCES,
    NUM_FEATURES,
    NUM_FREQUENCIES,
    NUM_LENGTHS,
    NUM_RANKS,
    depth_bucket,
    hazard,
    length_bucket,
)
from copyspec_engine.memory.alternatives import NUM_CANDIDATES, NUM_CHANCES, find_kept
from copyspec_engine.memory.index import BREAK, FREQUENT, MAX_MATCH_TOKENS

__all__ = ["FIRST_FEATURE", "MOST_CANDIDATES", "find_candidates"]

MOST_CANDIDATES = MOST_POINTERS + NUM_CANDIDATES + FREQUENT
"""Candidates of one place, most."""
_SHARED_LENGTH = 4
"""With a match this long, what shorter ones go on with says nothing any more."""
_NEARBY_LENGTH = 8
"""With a match this long, how far back it is says nothing any more."""
FIRST_FEATURE = 3
"""First column with a candidate's features, behind its token, best pointer and source."""
_RANK, _SUPPORT = FIRST_FEATURE + NUM_FEATURES - 2, FIRST_FEATURE + NUM_FEATURES - 1
"""Columns of the last two: its rank among the candidates of its place, and whether the model held it likely before."""


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
        token = groups[0, i] = token_at(ring, bounds, pointers[i, POSITION])
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
        for feature in range(FIRST_FEATURE, _RANK):
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
            candidates[count, FIRST_FEATURE], candidates[count, FIRST_FEATURE + 1] = feature, -1
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
        candidates[place, FIRST_FEATURE], candidates[place, FIRST_FEATURE + 1] = BY_FREQUENCY + bucket, -1
    return count


@compiled
def find_candidates(
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
        nodes[slot, POINTERS] = complete_pointers(
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
    before, last = last_two(nodes, tail, sizes[0], slot)
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
