"""How likely a copied token is right: features of a candidate, and weights on them that are learnt online.

A branch point of a draft has candidates for its next token, best first. The model gives each one's chance: the
probability that it is right given that the better ones are wrong. It is logistic and additive in a handful of discrete
features, so that it learns from few examples, stays finite whatever the text, and a factor is one table lookup. The
weights start from values fitted to recorded conversations (`scripts/fit_acceptance.py`), follow each conversation
quickly and all of its owner slowly (per_owner.py). What is shared between these are numbers, never a token.

Two things more are learnt: how far the probability of a whole path is to be corrected, by its size, and the pace of a
conversation in tokens per second, which decides what a draft token must earn.

Not covered: where candidates come from (drafting/kernels/branch_points.py, drafting/kernels/candidates.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.memory.alternatives import NUM_BUCKETS

__all__ = [
    "BY_AGREEMENT",
    "BY_ALTERNATIVE",
    "BY_DISTANCE",
    "BY_FREQUENCY",
    "BY_MATCH",
    "BY_ORIGIN",
    "BY_RANK",
    "BY_SHARE",
    "BY_SUPPORT",
    "CONTINUED",
    "DECLARED",
    "DELETED",
    "INSERTED",
    "MATCHED",
    "NUM_DEPTHS",
    "NUM_DISTANCES",
    "NUM_FEATURES",
    "NUM_FREQUENCIES",
    "NUM_LENGTHS",
    "NUM_RANKS",
    "NUM_WEIGHTS",
    "REPLACED",
    "STARTED",
    "Acceptance",
    "alternatives_worth",
    "blend",
    "calibrated",
    "calibrated_all",
    "depth_bucket",
    "first_guess",
    "fresh_acceptance",
    "learn_alternatives",
    "learn_outcome",
    "learn_pace",
    "learn_paths",
    "length_bucket",
    "sigmoid",
]

# Where a candidate comes from; the numbers of edits are split by how long ago the text and its source parted.
MATCHED, CONTINUED, REPLACED, INSERTED, DELETED, STARTED, DECLARED = 0, 1, 2, 5, 7, 9, 10
_NUM_ORIGINS = 11

_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 96, 192, 384)
_DEPTHS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_LENGTHS, NUM_DEPTHS = len(_LENGTHS), len(_DEPTHS)
_NUM_AGREEMENTS = 6
NUM_RANKS = 5
_NUM_SHARES = 19
NUM_DISTANCES = 9
NUM_FREQUENCIES = 10


def _buckets(bounds: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """Table from a number to its bucket; the last one is open, shape (size,)."""
    return np.searchsorted(np.array(bounds), np.arange(size), side="right").astype(np.int64) - 1


_LENGTH_BUCKETS, _DEPTH_BUCKETS = _buckets(_LENGTHS, _LENGTHS[-1] + 1), _buckets(_DEPTHS, _DEPTHS[-1] + 1)

# First weight of each feature.
BY_MATCH = 0
"""Tokens that matched before the draft, by tokens of the draft since then."""
BY_AGREEMENT = BY_MATCH + len(_LENGTHS) * len(_DEPTHS)
"""Do other long matches go on with the same token, by match length."""
BY_ORIGIN = BY_AGREEMENT + _NUM_AGREEMENTS * len(_LENGTHS)
"""Origin of the candidate, by depth in the draft."""
BY_RANK = BY_ORIGIN + _NUM_ORIGINS * len(_DEPTHS)
BY_SHARE = BY_RANK + NUM_RANKS
"""Share of this token among all matches, by their number."""
BY_DISTANCE = BY_SHARE + _NUM_SHARES
"""How far back a short match is."""
BY_FREQUENCY = BY_DISTANCE + NUM_DISTANCES
"""Only for frequent tokens without any match: share of the token in the text."""
BY_ALTERNATIVE = BY_FREQUENCY + NUM_FREQUENCIES
"""Only for alternatives without any match: the share they had, by what they were kept under."""
BY_SUPPORT = BY_ALTERNATIVE + 2 * NUM_BUCKETS
"""Only where candidates were kept: whether a match's token is one of them, and the share it had, by the same."""
NUM_WEIGHTS = BY_SUPPORT + 2 * (1 + NUM_BUCKETS)

NUM_FEATURES = 7
"""Features of a candidate that has a match, most; an alternative or a frequent token has one."""

# Replayed conversations have no logits: these were learnt, and rounded, from what a small language model wrote freely.
_ALTERNATIVE_ODDS = (
    *(-5.3, -3.9, -2.6, -1.8, -1.6, -1.4, -1.0, -0.4, 0.3, 1.0, 1.8, 2.6, 3.3),
    *(-6.0, -4.1, -2.9, -2.5, -2.2, -2.0, -1.7, -1.3, -0.7, 0.0, 0.7, 1.5, 2.3),
)
_SUPPORT_ODDS = (
    *(-0.7, 0.0, -0.3, -0.3, -0.3, -0.2, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4),
    *(-0.7, 0.0, -0.2, -0.1, 0.0, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.3),
)

_MOST = 8.0
"""Weights stay within plus and minus this."""
_RATE = 0.02
"""Step size of online learning."""
_NUM_PATH_BUCKETS = 20
_ALL_PATHS = _NUM_PATH_BUCKETS
"""Column of all sizes together, but for paths that are nearly sure, which say nothing of the others."""
_SURE_PATH = 0.9
_PATH_PRIOR = 5.0
"""Right nodes that what is known of all sizes counts as, for one size; and that trust counts as, for all."""
_PATH_MEMORY = 200.0
_LEAST_FACTOR = 0.4
_ALTERNATIVES_RATE = 0.1
"""Step size for alternatives, of whose worth in a conversation little is known before."""
_ALTERNATIVES_PRIOR = 4.0
"""Tokens that are expected of alternatives before what became of them says much."""
_ALTERNATIVES_MEMORY = 0.998
"""What is left of that from one draft to the next: what was worth little is tried again, seldom."""
_LEAST_WORTH = 0.02
_ALTERNATIVES_SPEED = 10.0
"""How much faster that is shared than the rest."""
_PACE_STEP = 0.01
_PACE_START = 10.0


class Acceptance(NamedTuple):
    """Learnt state, for compiled code."""

    weights: npt.NDArray[np.float64]
    """Log-odds by feature, shape (NUM_WEIGHTS,)."""
    paths: npt.NDArray[np.float64]
    """Probability predicted for drafted paths and how many were right, by size and of all, shape (2, 21)."""
    pace: npt.NDArray[np.float64]
    """Tokens of a mean step, its cost in passes of one token, and steps seen; shape (3,)."""
    alternatives: npt.NDArray[np.float64]
    """Probability predicted for alternatives in drafts, and how many of them were right; shape (2,)."""

    def copy(self) -> Acceptance:
        return Acceptance(*(array.copy() for array in self))


@cache
def _fitted_weights() -> tuple[float, ...]:
    stored = json.loads((Path(__file__).parent / "acceptance.json").read_text())
    if len(stored["weights"]) != NUM_WEIGHTS:
        raise ValueError(f"Got {len(stored['weights'])} weights in acceptance.json but expected {NUM_WEIGHTS}")
    return tuple(stored["weights"])


def first_guess() -> list[float]:
    """Weights to start fitting from: a copy that has gone on for n tokens ends at the next one with about 1.2 / n."""
    weights = np.zeros(NUM_WEIGHTS)
    for i, length in enumerate(_LENGTHS):
        for j, depth in enumerate(_DEPTHS):
            chance = max(1 - 1.2 / (1.15 * length + 1.3 * depth + 1.3), 0.08)
            weights[BY_MATCH + i * NUM_DEPTHS + j] = np.log(chance / (1 - chance))
    agreements, ranks = (0, 0.3, 0.6, 0.3, -0.3, -1), (0, -0.5, -0.8, -1, -1.2)
    origins = (0, 0.2, 1, 0.5, 0.3, 1, 0.5, 1.5, 0.5, 2, 4)
    weights[BY_AGREEMENT:BY_ORIGIN] = np.repeat(agreements, NUM_LENGTHS)
    weights[BY_ORIGIN:BY_RANK] = np.repeat(origins, NUM_DEPTHS)
    weights[BY_RANK:BY_SHARE] = ranks
    weights[BY_FREQUENCY:BY_ALTERNATIVE] = (-2, -2.5, -3, -3.5, -4.2, -5, -5.5, -6, -7, -8)
    weights[BY_ALTERNATIVE:BY_SUPPORT] = _ALTERNATIVE_ODDS
    weights[BY_SUPPORT:] = _SUPPORT_ODDS
    guess: list[float] = weights.tolist()
    return guess


def fresh_acceptance(weights: Sequence[float] | None = None) -> Acceptance:
    """The state before anything was seen; `weights` default to the fitted ones."""
    return Acceptance(
        weights=np.array(_fitted_weights() if weights is None else weights, dtype=np.float64),
        paths=np.zeros((2, _NUM_PATH_BUCKETS + 1)),
        pace=np.array([1.5, 1.0, 0.0]),
        alternatives=np.zeros(2),
    )


def blend(into: Acceptance, other: Acceptance, share: float) -> None:
    """Move what `into` knows towards `other`, but for the paths; 0 leaves it, 1 replaces it."""
    into.weights[:] += share * (other.weights - into.weights)
    into.pace[:2] += share * (other.pace[:2] - into.pace[:2])
    into.alternatives[:] += min(_ALTERNATIVES_SPEED * share, 1.0) * (other.alternatives - into.alternatives)


@compiled
def length_bucket(length: int) -> int:
    """Row of a match length in the tables of weights."""
    return _LENGTH_BUCKETS[min(length, len(_LENGTH_BUCKETS) - 1)]


@compiled
def depth_bucket(depth: int) -> int:
    """Column of a depth in the tables of weights."""
    return _DEPTH_BUCKETS[min(depth, len(_DEPTH_BUCKETS) - 1)]


@compiled
def sigmoid(log_odds: float) -> float:
    """Probability from log-odds."""
    return 1.0 / (1.0 + np.exp(-log_odds))


@compiled
def learn_outcome(
    weights: npt.NDArray[np.float64], candidates: npt.NDArray[np.int64], first: int, count: int, right: int
) -> None:
    """Learn from a branch point whose next token is known: a gradient step for each candidate down to the right one.

    Args:
        weights: changed.
        candidates: a row for each, best one first: its token in column 0, the indices of its weights from column
            `first` on, -1 behind the last one; shape (>= count, first + NUM_FEATURES).
        first: see above.
        count: how many candidates there are.
        right: the token that was written.
    """
    for i in range(count):
        used, log_odds = 0, 0.0
        while used < NUM_FEATURES and candidates[i, first + used] >= 0:
            log_odds += weights[candidates[i, first + used]]
            used += 1
        hit = candidates[i, 0] == right
        surprise = (1.0 if hit else 0.0) - sigmoid(log_odds)
        for f in range(used):
            feature = candidates[i, first + f]
            step = surprise * (_ALTERNATIVES_RATE if BY_ALTERNATIVE <= feature < BY_SUPPORT else _RATE)
            weights[feature] = min(max(weights[feature] + step, -_MOST), _MOST)
        if hit:
            break


@compiled
def _path_bucket(probability: float) -> int:
    return min(int(-2.0 * np.log2(max(probability, 1e-9))), _NUM_PATH_BUCKETS - 1)


@compiled
def calibrated(paths: npt.NDArray[np.float64], probability: float) -> float:
    """Probability of a path, corrected downwards by what became of paths of that size; `paths` as in `Acceptance`.

    Of many estimates those are drafted that came out high, so on the average they are too high.
    """
    bucket = _path_bucket(probability)
    usual = (paths[1, _ALL_PATHS] + _PATH_PRIOR) / (paths[0, _ALL_PATHS] + _PATH_PRIOR)
    factor = (paths[1, bucket] + usual * _PATH_PRIOR) / (paths[0, bucket] + _PATH_PRIOR)
    return probability * min(max(factor, _LEAST_FACTOR), 1.0)


@compiled
def calibrated_all(paths: npt.NDArray[np.float64], probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`calibrated` for many paths, shape (n,)."""
    found = np.empty(len(probabilities))
    for i in range(len(probabilities)):
        found[i] = calibrated(paths, probabilities[i])
    return found


@compiled
def learn_paths(
    acceptance: Acceptance, probabilities: npt.NDArray[np.float64], accepted: npt.NDArray[np.int64]
) -> None:
    """Learn from the probabilities of a draft's nodes, shape (n,), and which nodes were accepted, shape (accepted,)."""
    paths = acceptance.paths
    for probability in probabilities:
        paths[0, _path_bucket(probability)] += probability
        if probability < _SURE_PATH:
            paths[0, _ALL_PATHS] += probability
    for node in accepted:
        paths[1, _path_bucket(probabilities[node])] += 1.0
        if probabilities[node] < _SURE_PATH:
            paths[1, _ALL_PATHS] += 1.0
    for bucket in range(_NUM_PATH_BUCKETS + 1):
        if paths[0, bucket] > _PATH_MEMORY:
            paths[:, bucket] /= 2.0


@compiled
def alternatives_worth(alternatives: npt.NDArray[np.float64]) -> float:
    """What alternatives are worth of their probability, by what became of drafted ones (`Acceptance.alternatives`)."""
    factor = (alternatives[1] + _ALTERNATIVES_PRIOR) / (alternatives[0] + _ALTERNATIVES_PRIOR)
    return min(max(factor, _LEAST_WORTH), 1.0)


@compiled
def learn_alternatives(alternatives: npt.NDArray[np.float64], predicted: float, right: int) -> None:
    """Learn from a draft: the probabilities of its alternatives before any correction, and how many were right."""
    alternatives *= _ALTERNATIVES_MEMORY
    alternatives[0] += predicted
    alternatives[1] += right


@compiled
def learn_pace(acceptance: Acceptance, num_tokens: int, cost: float) -> None:
    """Learn from a step that wrote `num_tokens` for `cost` passes of one token."""
    pace = acceptance.pace
    pace[2] += 1.0
    step = max(_PACE_STEP, 1.0 / (_PACE_START + pace[2]))
    pace[0] += step * (num_tokens - pace[0])
    pace[1] += step * (cost - pace[1])
