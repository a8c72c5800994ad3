"""What is learnt about copying stays a probability, whatever the text, and moves towards what happens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import copyspec_engine
from copyspec_engine import AdaptiveDrafter
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import DraftingPolicy
from copyspec_engine.memory.acceptance import (
    NUM_WEIGHTS,
    Acceptance,
    blend,
    calibrated,
    fresh_acceptance,
    learn_outcome,
    learn_pace,
    learn_paths,
    sigmoid,
)
from copyspec_engine.memory.conversation import SessionMemory
from tests.drafting.test_growth import follow

LIMIT = 8.0


def assert_is_finite(acceptance: Acceptance) -> None:
    assert all(np.isfinite(array).all() for array in acceptance)
    assert (abs(acceptance.weights) <= LIMIT).all()
    assert (acceptance.paths >= 0).all()
    assert (acceptance.pace[:2] > 0).all()


def de_bruijn_like(rng: random.Random) -> Iterator[int]:
    """Every pair of tokens goes on differently each time: what matched once is wrong the next time."""
    following: dict[tuple[int, int], int] = {}
    a, b = 0, 1
    while True:
        following[a, b] = (following.get((a, b), -1) + 1) % 7
        a, b = b, following[a, b]
        yield b
        if rng.random() < 0.001:
            following.clear()


ADVERSARIAL = {
    "random": lambda rng: iter(lambda: rng.randrange(50), None),
    "constant": lambda rng: itertools.repeat(7),
    "periodic": lambda rng: itertools.cycle(range(13)),
    "alternating": lambda rng: itertools.chain.from_iterable(
        itertools.cycle([[1, 2] * 40, [1, 3] * 40, list(range(100, 180))])
    ),
    "contradicting": de_bruijn_like,
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("start", ["fitted", "extreme"])
def test_learning_stays_finite_on_adversarial_text(kind: str, start: str) -> None:
    rng = random.Random(0)
    weights = [rng.choice([-LIMIT, LIMIT]) for _ in range(NUM_WEIGHTS)] if start == "extreme" else None
    policy, memory = DraftingPolicy(CostCurve([(1, 1.0), (256, 6.0)]), weights), SessionMemory(8192)
    source = ADVERSARIAL[kind](rng)
    for _ in range(4):
        drafter = policy.begin(AdaptiveDrafter(), memory, list(itertools.islice(source, 200)))
        for _ in range(150):
            draft = drafter.propose(1, 200)
            assert all(0.0 <= chance <= 1.0 for chance in draft.probabilities)
            answer = list(itertools.islice(source, 40))
            nodes = follow(draft, answer[:-1])
            drafter.observe(draft, nodes, answer[: len(nodes) + 1])
        drafter.finish()
        assert memory.acceptance is not None
        assert_is_finite(memory.acceptance)
        assert_is_finite(policy.acceptance.of(None))


def test_chances_are_probabilities_over_all_that_weights_can_add_up_to() -> None:
    chances = [sigmoid(odds) for odds in np.linspace(-5 * LIMIT, 5 * LIMIT, 101)]
    assert all(0.0 <= chance <= 1.0 for chance in chances)
    assert chances == sorted(chances)
    assert sigmoid(0.0) == 0.5


@pytest.mark.parametrize("right", [41, 42])
def test_an_outcome_moves_its_candidates_towards_it_and_no_others(right: int) -> None:
    candidates = np.full((2, 8), -1, dtype=np.int64)
    candidates[:, 0] = 41, 42
    candidates[0, 3:5], candidates[1, 3:5] = (0, 10), (1, 11)
    weights = np.zeros(NUM_WEIGHTS)
    for _ in range(2000):
        learn_outcome(weights, candidates, 3, 2, right)
    first, second = sigmoid(weights[0] + weights[10]), sigmoid(weights[1] + weights[11])
    if right == 41:
        assert first > 0.9
        assert weights[1] == weights[11] == 0.0  # behind the right one nothing is known
    else:
        assert first < 0.1
        assert second > 0.9
    weights[[0, 1, 10, 11]] = 0.0
    assert not weights.any()


def test_paths_that_come_true_less_often_than_predicted_are_corrected_downwards_only() -> None:
    acceptance = fresh_acceptance()
    assert calibrated(acceptance.paths, 0.5) == 0.5
    for _ in range(300):
        learn_paths(acceptance, np.full(4, 0.5), np.array([0]))  # a quarter comes true
        learn_paths(acceptance, np.full(4, 0.1), np.array([0, 1, 2]))
    assert 0.2 < calibrated(acceptance.paths, 0.5) < 0.35
    assert calibrated(acceptance.paths, 0.1) == 0.1
    assert calibrated(acceptance.paths, 0.0) == 0.0
    assert_is_finite(acceptance)


def test_the_pace_follows_the_steps() -> None:
    acceptance = fresh_acceptance()
    for _ in range(2000):
        learn_pace(acceptance, 12, 3.0)
    assert acceptance.pace[0] == pytest.approx(12, rel=0.01)
    assert acceptance.pace[1] == pytest.approx(3, rel=0.01)


def test_blending_moves_a_share_of_the_way_and_copies_are_apart() -> None:
    a, b = fresh_acceptance([0.0] * NUM_WEIGHTS), fresh_acceptance([1.0] * NUM_WEIGHTS)
    copy = a.copy()
    blend(a, b, 0.25)
    assert (a.weights == 0.25).all()
    assert (copy.weights == 0.0).all()
    assert (b.weights == 1.0).all()


def test_the_shipped_weights_fit_the_features_and_their_limits() -> None:
    path = Path(copyspec_engine.__file__).parent / "memory" / "acceptance.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert len(stored["weights"]) == NUM_WEIGHTS
    assert_is_finite(fresh_acceptance())
