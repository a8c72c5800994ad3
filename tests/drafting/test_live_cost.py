"""The cost of a pass follows what passes take, so that drafts fit the machine as it is; given costs stay as given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from copyspec_engine import Engine
from copyspec_engine.drafting.cost import Points
from copyspec_engine.drafting.live_cost import LiveCost
from copyspec_engine.testing import loop_of
from tests.conftest import STEP_COST
from tests.loop.test_lossless import PROMPT, run, same_answer

MEASURED: Points = ((1, 0.010), (2, 0.011), (8, 0.012), (64, 0.020), (256, 0.060))


def relative(cost: LiveCost, width: int) -> float:
    return float(cost.relative.seconds(width)[0])


def watch(cost: LiveCost, truth: Mapping[int, float], passes: int, noise: float = 0.1, seed: int = 0) -> None:
    """Passes of random widths, most of them narrow, take what `truth` says, more or less."""
    rng = np.random.default_rng(seed)
    widths = list(truth)
    for _ in range(passes):
        width = widths[min(rng.geometric(0.4) - 1, len(widths) - 1)]
        cost.observe(width, truth[width] * float(np.exp(noise * rng.standard_normal())))


def test_before_any_pass_it_is_what_was_measured() -> None:
    cost = LiveCost(MEASURED, is_fixed=False)
    assert cost.points == pytest.approx(np.array(MEASURED))
    assert cost.unit == 0.010
    assert relative(cost, 64) == pytest.approx(2.0)


def test_passes_that_take_longer_with_a_draft_make_drafts_dearer() -> None:
    cost = LiveCost(MEASURED, is_fixed=False)
    truth = {1: 0.012, 5: 0.024, 8: 0.025, 30: 0.036}
    watch(cost, truth, 300)
    assert cost.unit == pytest.approx(0.012, rel=0.1)
    for width, seconds in truth.items():
        assert relative(cost, width) == pytest.approx(seconds / 0.012, rel=0.15), width
    assert relative(cost, 256) > 1.3 * 6.0, "what was seen of narrower drafts counts for those that nobody tried"


def test_what_slows_all_passes_down_alike_changes_no_draft() -> None:
    cost = LiveCost(MEASURED, is_fixed=False)
    watch(cost, {1: 0.03, 2: 0.033, 8: 0.036, 64: 0.06}, 400)
    assert cost.unit == pytest.approx(0.03, rel=0.1)
    for width in (2, 8, 64):
        assert relative(cost, width) == pytest.approx(dict(MEASURED)[width] / 0.010, rel=0.1)


def test_a_pass_that_was_held_up_counts_for_little() -> None:
    cost = LiveCost(MEASURED, is_fixed=False)
    watch(cost, dict(MEASURED), 200)
    before = cost.points
    cost.observe(8, 5.0)
    assert np.array(cost.points) == pytest.approx(np.array(before), rel=0.25)


def test_a_width_that_seemed_dear_is_tried_again() -> None:
    cost = LiveCost(MEASURED, is_fixed=False)
    for _ in range(30):
        cost.observe(1, 0.010)
        cost.observe(8, 0.050)
    assert relative(cost, 8) > 3.5
    for _ in range(1500):  # nobody drafts
        cost.observe(1, 0.010)
    assert relative(cost, 8) < 2.0


def test_a_wider_pass_never_seems_cheaper() -> None:
    cost = LiveCost(MEASURED, is_fixed=False)
    for seed in range(20):
        watch(cost, {1: 0.05, 2: 0.001, 9: 0.2, 100: 0.002, 3000: 0.001}, 20, 0.5, seed)
        assert (np.diff(cost.relative.seconds(1, 2000)) >= 0).all()
        assert relative(cost, 1) == pytest.approx(1.0)


def test_given_costs_stay_as_they_are() -> None:
    cost = LiveCost(MEASURED, is_fixed=True)
    assert not any(cost.observe(width, 9.0) for width in (1, 8, 64) for _ in range(50))
    assert cost.points == pytest.approx(np.array(MEASURED))


def test_it_says_when_the_curve_is_another_one() -> None:
    cost, changes = LiveCost(MEASURED, is_fixed=False), 0
    for _ in range(100):
        before = cost.relative
        changed = cost.observe(8, 0.05)
        assert changed == (cost.relative is not before)
        changes += changed
    assert 0 < changes < 50


def test_each_costs_in_passes_of_the_other() -> None:
    large, small = (LiveCost(points, is_fixed=True) for points in (MEASURED, ((1, 0.002), (64, 0.004))))
    assert small.passes(1, large.unit) == pytest.approx(0.2)
    assert small.passes(64, large.unit) == pytest.approx(0.4)


# ---- in the engine -------------------------------------------------------------------------------------------------


def watched_cost(cost: LiveCost) -> list[tuple[int, float]]:
    """What a cost is told from now on."""
    seen: list[tuple[int, float]] = []
    observe = cost.observe

    def note(width: int, seconds: float) -> bool:
        seen.append((width, seconds))
        return observe(width, seconds)

    cost.observe = note  # type: ignore[method-assign]
    return seen


def test_an_engine_learns_from_its_steps_but_those_that_read_a_prompt(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(step_cost="measured")
    seen = watched_cost(loop_of(engine).core.cost)
    plain = run(engine, PROMPT, "none", max_tokens=60)
    assert [width for width, _ in seen] == [1] * (len(plain.token_ids) - 1)
    del seen[:]
    drafted = run(engine, PROMPT, "adaptive", max_tokens=60)
    assert same_answer(plain, drafted)
    assert [width - 1 for width, _ in seen] == list(drafted.draft_stats.draft_lengths[1:])
    assert all(0 < seconds < 60 for _, seconds in seen)
    assert engine.metrics().step_cost != engine.info.step_cost
    assert loop_of(engine).core.policy.cost is loop_of(engine).core.cost.relative


def test_costs_that_were_given_are_those_of_every_step(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    run(engine, PROMPT, "adaptive", max_tokens=60)
    assert engine.metrics().step_cost == pytest.approx(np.array(STEP_COST))
    assert engine.info.step_cost == STEP_COST
