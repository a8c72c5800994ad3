"""What may come next at a branch point of a draft tree, and how likely each of it is.

A branch point's pointers (branch_points.py), grouped by the token they point to, are the candidates for the next node;
behind them come alternatives of earlier passes and the most frequent tokens. Each has features, and by their weights
(memory/acceptance.py) a chance: the probability that it is right given that the better ones are wrong.

All of it is compiled. Not covered: which branch points are looked at (growth.py).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled, inlined
from copyspec_engine.drafting.kernels.branch_points import (
    AGREEMENT,
    ANSWER_END,
    DEPTH,
    LENGTH,
    MOST_POINTERS,
    NUM_POINTERS,
    ORIGIN,
    POSITION,
    SOURCE,
    TAIL_SIZE,
    TARGET,
    TOKEN,
    TREE,
    Fields,
    Table,
    complete_pointers,
    last_two,
    token_at,
)
from copyspec_engine.drafting.tree import ALTERNATIVE
from copyspec_engine.memory.acceptance import (
    BY_AGREEMENT,
    BY_ALTERNATIVE,
    BY_DISTANCE,
    BY_FREQUENCY,
    BY_MATCH,
    BY_ORIGIN,
    BY_RANK,
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
    length_bucket,
    sigmoid,
)
from copyspec_engine.memory.alternatives import NUM_ALTERNATIVES, NUM_BUCKETS, find_alternatives
from copyspec_engine.memory.index import BREAK, FREQUENT, MAX_MATCH_TOKENS

__all__ = ["CANDIDATE_COLUMNS", "FIRST_FEATURE", "MOST_CANDIDATES", "Tables", "find_candidates"]

Tables: TypeAlias = tuple[Fields, Fields, Fields, Fields, Fields]
"""What drafting reads and writes: `IndexArrays`, `AlternativesArrays` (empty ones if they take no part), `Acceptance`,
`CallState` and `Scratch`, each as a plain tuple."""

MOST_CANDIDATES = MOST_POINTERS + NUM_ALTERNATIVES + FREQUENT
"""Candidates of one branch point, most."""
_SHARED_LENGTH = 4
"""With a match this long, what shorter ones go on with says nothing any more."""
_NEARBY_LENGTH = 8
"""With a match this long, how far back it is says nothing any more."""

# Columns of the table of candidates, which has TOKEN and SOURCE too: the best pointer, the origin of all of them, and
# from FIRST_FEATURE on the features, -1 behind the last one. The last two are the rank among the candidates of one
# branch point, and whether the model held it likely before.
_POINTER, _ORIGIN = 1, 3
FIRST_FEATURE = 4
CANDIDATE_COLUMNS = FIRST_FEATURE + NUM_FEATURES
_MATCH, _AGREED, _CAME_FROM, _SHARE, _DISTANCE, _RANK, _SUPPORT = range(FIRST_FEATURE, CANDIDATE_COLUMNS)


@inlined
def _group(
    text: Fields,
    pointers: Table,  # (MOST_POINTERS, POINTER_COLUMNS)
    num_pointers: int,
    candidates: Table,  # (MOST_CANDIDATES, CANDIDATE_COLUMNS)
) -> int:
    """Group a branch point's pointers by the token they point to; how many candidates there are.

    `text` is as for `token_at`.
    """
    count = 0
    for i in range(num_pointers):
        token = pointers[i, TARGET] = token_at(text, pointers[i, POSITION])
        if token == BREAK:
            continue
        group = 0
        while group < count and candidates[group, TOKEN] != token:
            group += 1
        origin = pointers[i, ORIGIN]
        if group == count:
            candidates[count, TOKEN], candidates[count, _POINTER], candidates[count, _ORIGIN] = token, i, origin
            count += 1
            continue
        other = candidates[group, _POINTER]
        longer = pointers[i, LENGTH] - pointers[other, LENGTH]
        if longer > 0 or (longer == 0 and pointers[i, POSITION] > pointers[other, POSITION]):
            candidates[group, _POINTER] = i
        if origin != MATCHED and (candidates[group, _ORIGIN] == MATCHED or origin < candidates[group, _ORIGIN]):
            candidates[group, _ORIGIN] = origin
    return count


@compiled
def _agreement(
    pointers: Table,  # (MOST_POINTERS, POINTER_COLUMNS)
    num_pointers: int,
    token: int,
    length: int,
) -> tuple[int, int]:
    """How far other matches go on with `token` too: those about as long as `length`, and for short ones all of them."""
    floor = max(1, min(length, 3), min(length, MAX_MATCH_TOKENS) // 2)
    same = near = same_of_all = all_matches = 0
    for i in range(num_pointers):
        if pointers[i, TARGET] != BREAK and pointers[i, LENGTH] > 0:
            hit = 1 if pointers[i, TARGET] == token else 0
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
def _support(alternatives: Fields, row: int, kind: int, token: int) -> int:
    """The feature of a token that matches, by the row of alternatives kept behind the last tokens.

    Args:
        alternatives: `AlternativesArrays.tokens` and `.chances`.
        row: which of them are kept there.
        kind: 0 behind the last two tokens, 1 behind the last one alone.
        token: the candidate.
    """
    tokens, buckets = alternatives
    feature = BY_SUPPORT + kind * (1 + NUM_BUCKETS)
    for i in range(tokens.shape[1]):
        if tokens[row, i] == token:
            return feature + 1 + buckets[row, i]
    return feature


@inlined
def _describe(
    candidate: Table,  # (CANDIDATE_COLUMNS,)
    point: tuple[Table, int, int, int],
    agreements: bool,
) -> None:
    """Write a candidate's source and features, but for its rank and its support.

    Args:
        candidate: changed.
        point: the pointers of its branch point, how many there are, its depth, and where the answer is written.
        agreements: what other pointers go on with takes part.
    """
    pointers, num_pointers, depth, end = point
    best, origin = candidate[_POINTER], candidate[_ORIGIN]
    position, length = pointers[best, POSITION], pointers[best, LENGTH]
    agreement = share = 0
    if agreements:
        agreement, share = _agreement(pointers, num_pointers, candidate[TOKEN], length)
    drafted = depth if origin != MATCHED and length < depth else min(length, depth)
    candidate[SOURCE] = position
    candidate[_MATCH] = BY_MATCH + length_bucket(max(length - depth, 0)) * NUM_DEPTHS + depth_bucket(drafted)
    candidate[_AGREED] = BY_AGREEMENT + agreement * NUM_LENGTHS + length_bucket(length)
    candidate[_CAME_FROM] = BY_ORIGIN + origin * NUM_DEPTHS + depth_bucket(depth)
    candidate[_SHARE] = BY_SHARE + share
    candidate[_DISTANCE] = BY_DISTANCE + _distance(length, max(end - position, 1))


@inlined
def _rank(
    weights: npt.NDArray[np.float64],  # (NUM_WEIGHTS,)
    found: tuple[Table, npt.NDArray[np.float64]],
    count: int,
    point: tuple[Table, int, int, int],
    alternatives: Fields,
    kept: tuple[int, int],
    agreements: bool,
) -> None:
    """Write each candidate's features and log-odds, and bring the best one to the front.

    Args:
        weights: of the features.
        found: `Scratch.candidates` and `.log_odds`; changed.
        count: how many candidates there are.
        point: as for `_describe`.
        alternatives: as for `_support`.
        kept: row and kind, as for `_support`; row -1: there are none.
        agreements: as for `_describe`.
    """
    candidates, log_odds = found
    row, kind = kept
    for j in range(count):
        _describe(candidates[j], point, agreements)
        odds = 0.0
        for feature in range(FIRST_FEATURE, _RANK):
            odds += weights[candidates[j, feature]]
        candidates[j, _SUPPORT] = -1
        if row >= 0:
            candidates[j, _SUPPORT] = _support(alternatives, row, kind, candidates[j, TOKEN])
            odds += weights[candidates[j, _SUPPORT]]
        log_odds[j] = odds
        i = j  # insertion sort: there are few, and they are nearly in order
        while i > 0 and log_odds[i] > log_odds[i - 1]:
            log_odds[i], log_odds[i - 1] = log_odds[i - 1], log_odds[i]
            for column in range(CANDIDATE_COLUMNS):
                candidates[i, column], candidates[i - 1, column] = candidates[i - 1, column], candidates[i, column]
            i -= 1
    for j in range(count):
        candidates[j, _RANK] = BY_RANK + min(j, NUM_RANKS - 1)
        log_odds[j] += weights[candidates[j, _RANK]]


@compiled
def _number_of(
    candidates: Table,  # (MOST_CANDIDATES, CANDIDATE_COLUMNS)
    count: int,
    token: int,
) -> int:
    """Which of the first `count` candidates a token is; -1 if none."""
    for j in range(count):
        if candidates[j, TOKEN] == token:
            return j
    return -1


@compiled
def _left(
    chances: npt.NDArray[np.float64],  # (MOST_CANDIDATES,)
    count: int,
    probability: float,
) -> float:
    """Of a branch point's probability, what its first `count` candidates leave."""
    for j in range(count):
        probability *= 1.0 - chances[j]
    return probability


@inlined
def _add_alternatives(
    weights: npt.NDArray[np.float64],  # (NUM_WEIGHTS,)
    found: tuple[Table, npt.NDArray[np.float64]],
    count: int,
    alternatives: Fields,
    kept: tuple[int, int],
    probability: float,
    limits: tuple[float, float, float],
) -> int:
    """Add the alternatives that are kept, as far as they may be likely enough.

    Args:
        weights: of the features.
        found: `Scratch.candidates` and `.chances`; added to.
        count: how many candidates there are.
        alternatives: as for `_support`.
        kept: row and kind, as for `_support`.
        probability: what the candidates leave of that of the branch point.
        limits: as for `find_candidates`.

    Returns:
        How many there are now.
    """
    candidates, chances = found
    tokens, buckets = alternatives
    row, kind = kept
    _, worth, least = limits
    for i in range(tokens.shape[1]):
        token = np.int64(tokens[row, i])
        if token < 0:
            break
        feature = BY_ALTERNATIVE + kind * NUM_BUCKETS + buckets[row, i]
        chance = worth * sigmoid(weights[feature])
        if probability * chance > least and _number_of(candidates, count, token) < 0:
            candidates[count, TOKEN], candidates[count, SOURCE], chances[count] = token, ALTERNATIVE, chance
            candidates[count, FIRST_FEATURE], candidates[count, FIRST_FEATURE + 1] = feature, -1
            probability *= 1.0 - chance
            count += 1
    return count


@inlined
def _add_frequent(
    frequent: Table,  # (2, FREQUENT)
    total: int,
    weights: npt.NDArray[np.float64],  # (NUM_WEIGHTS,)
    found: tuple[Table, npt.NDArray[np.float64]],
    count: int,
    probability: float,
    least: float,
) -> int:
    """Add frequent tokens behind the candidates, as long as they may be likely enough.

    An alternative that is likelier for being frequent is frequent.

    Args:
        frequent: as in `IndexArrays`.
        total: tokens counted.
        weights: of the features.
        found: `Scratch.candidates` and `.chances`; added to.
        count: how many candidates there are.
        probability: what they leave of that of the branch point.
        least: what a node must reach.

    Returns:
        How many there are now.
    """
    candidates, chances = found
    matched = count
    for i in range(FREQUENT):
        token, times = frequent[0, i], frequent[1, i]
        if times == 0:
            break
        bucket = 0
        while bucket < NUM_FREQUENCIES - 1 and times << (bucket + 4) < total:  # from 1/16 down
            bucket += 1
        chance = sigmoid(weights[BY_FREQUENCY + bucket])
        if probability * chance <= least:
            break
        number = _number_of(candidates, matched, token)
        if number < 0:
            number, probability = count, probability * (1.0 - chance)
            count += 1
        elif candidates[number, SOURCE] != ALTERNATIVE or chances[number] >= chance:
            continue
        candidates[number, TOKEN], candidates[number, SOURCE], chances[number] = token, 0, chance
        candidates[number, FIRST_FEATURE], candidates[number, FIRST_FEATURE + 1] = BY_FREQUENCY + bucket, -1
    return count


@inlined
def find_candidates(tables: Tables, slot: int, limits: tuple[float, float, float]) -> int:
    """The candidates at the branch point of a slot, best first, in `scratch.candidates` and `.chances`.

    Args:
        tables: what to draft from; only `scratch` is changed.
        slot: of a branch point that was entered, with its probability in `scratch.probabilities`.
        limits: what a node must reach; the share of what alternatives look like that they are worth; what a node must
            reach that is an alternative.

    Returns:
        How many there are.
    """
    index, (keys, _, tokens, buckets), (weights, _, _, _), call, scratch = tables
    ring, _, _, bounds, _, frequent, counted = index
    tail, sizes, _, _, _, _, ingredients = call
    nodes, probabilities, pointers, candidates, log_odds, chances, _, _, _, _ = scratch
    if slot > 0:
        nodes[slot, NUM_POINTERS] = complete_pointers(index, call, scratch, slot, limits[0])
    num_pointers, alternatives, found = nodes[slot, NUM_POINTERS], (tokens, buckets), (candidates, chances)
    count = _group((ring, bounds), pointers[slot], num_pointers, candidates)
    before, last = last_two(nodes, tail, sizes[TAIL_SIZE], slot)
    kept = find_alternatives(keys, before, last)
    point = (pointers[slot], num_pointers, nodes[slot, DEPTH], sizes[ANSWER_END])
    _rank(weights, (candidates, log_odds), count, point, alternatives, kept, ingredients[AGREEMENT])
    for j in range(count):
        chances[j] = sigmoid(log_odds[j])
    matched = count
    if kept[0] >= 0:
        left = _left(chances, count, probabilities[slot])
        count = _add_alternatives(weights, found, count, alternatives, kept, left, limits)
    if not ingredients[TREE]:
        if count > matched > 0 and _left(chances, matched, 1.0) * chances[matched] > chances[0]:
            candidates[0], chances[0] = candidates[matched], chances[matched]
        count = min(count, 1)
    else:
        left = _left(chances, count, probabilities[slot])
        count = _add_frequent(frequent, max(counted[0], 1), weights, found, count, left, limits[0])
    return count
