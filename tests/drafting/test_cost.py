"""What a pass costs by its width, and how that follows what passes take."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine import Engine
from copyspec_engine.drafting.cost import CostCurve, LiveCost, Points, undisturbed
from copyspec_engine.testing import loop_of
from tests.conftest import STEP_COST
from tests.loop.test_lossless import PROMPT, run, same_answer

STAIRS = ((1, 1.0), (2, 1.5), (6, 1.5), (8, 2.5))
GPU = CostCurve([(1, 1.002), (256, 1.512)])
laws = settings(max_examples=100, deadline=None)


@st.composite
def measured(draw: st.DrawFn) -> Points:
    """Points as a machine may give them: flat stretches, steep steps, any unit."""
    widths = draw(st.lists(st.integers(2, 600), min_size=1, max_size=9, unique=True).map(sorted))
    steps = draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0, 20.0]), min_size=len(widths), max_size=len(widths)))
    unit = draw(st.sampled_from([1e-4, 1.0, 300.0]))
    seconds = (unit * np.cumsum([1.0, *steps])).tolist()
    return tuple(zip([1, *widths], seconds, strict=True))


WIDTHS = st.one_of(st.just(1), st.integers(1, 700), st.integers(2000, 2500))
COUNTS = st.integers(1, 900)


def close(got: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], scale: float) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * scale)


def test_the_curve_goes_through_its_points() -> None:
    curve = CostCurve([(1, 1.0), (4, 1.5), (8, 4.0)])
    assert curve.seconds(1, 8)[[0, 3, 7]].tolist() == [1.0, 1.5, 4.0]
    assert curve.points == ((1, 1.0), (4, 1.5), (8, 4.0))


def test_beyond_its_points_the_curve_is_as_steep_as_the_steepest_line_to_the_last() -> None:
    assert CostCurve([(1, 1.0), (4, 1.5), (8, 4.0)]).seconds(10)[0] == 4.0 + 2 * 2.5 / 4
    assert CostCurve([(1, 1.0), (3, 1.0), (4, 3.0), (5, 3.0)]).seconds(6)[0] == 3.0 + 1.0, "a last stair is no tail"


@laws
@given(points=measured(), start=WIDTHS, count=COUNTS)
def test_a_stretch_of_the_curve_is_its_single_costs_and_never_falls(points: Points, start: int, count: int) -> None:
    curve = CostCurve(points)
    seconds = curve.seconds(start, count)
    assert seconds.shape == (count,)
    assert (np.diff(seconds) >= -1e-9 * seconds[-1]).all()
    for i in {0, count // 2, count - 1}:
        close(seconds[i : i + 1], curve.seconds(start + i), points[0][1])


def test_the_hull_averages_a_steep_step_with_the_cheap_stair_behind_it() -> None:
    np.testing.assert_allclose(CostCurve(STAIRS).marginal(1, 9), [0.1] * 5 + [0.5] * 2 + [0.5] * 2)
    np.testing.assert_allclose(CostCurve(STAIRS).marginal(3, 6), [0.0] * 3 + [0.5] * 3)


def test_a_straight_curve_is_its_own_hull() -> None:
    np.testing.assert_allclose(GPU.marginal(1, 4000), np.full(4000, 0.002))
    np.testing.assert_allclose(GPU.marginal(40, 3), np.full(3, 0.002))


@laws
@given(points=measured(), start=WIDTHS, count=COUNTS)
def test_the_hull_is_convex_and_lies_below_the_curve(points: Points, start: int, count: int) -> None:
    curve = CostCurve(points)
    slopes, seconds = curve.marginal(start, count), curve.seconds(start, count + 1)
    assert slopes.shape == (count,)
    assert (slopes >= 0).all()
    assert (np.diff(slopes) >= 0).all()
    hull = seconds[0] + np.concatenate(([0.0], slopes.cumsum()))
    assert (hull <= seconds + 1e-9 * seconds[-1]).all()


@laws
@given(points=measured(), start=st.integers(1, 700))
def test_the_hull_meets_the_curve_at_its_corners(points: Points, start: int) -> None:
    """No larger convex function lies below the curve: wherever the slope changes, and at the last point, they meet."""
    curve, count = CostCurve(points), max(points[-1][0] - start, 1) + 3
    slopes, seconds = curve.marginal(start, count), curve.seconds(start, count + 1)
    hull = seconds[0] + np.concatenate(([0.0], slopes.cumsum()))
    bends = 1 + np.flatnonzero(np.diff(slopes) > 1e-12 * points[0][1])
    assert {int(start + bend) for bend in bends} <= {width for width, _ in points}
    close(hull[bends], seconds[bends], points[-1][1])
    close(hull[-4:], seconds[-4:], points[-1][1])


@laws
@given(points=measured(), unit=st.sampled_from([1e-6, 0.3, 1e5]), start=WIDTHS)
def test_costs_in_another_unit_give_the_same_curve_in_that_unit(points: Points, unit: float, start: int) -> None:
    curve, other = CostCurve(points), CostCurve([(width, unit * seconds) for width, seconds in points])
    close(other.seconds(start, 300), unit * curve.seconds(start, 300), unit * points[-1][1])
    close(other.marginal(start, 300), unit * curve.marginal(start, 300), unit * points[-1][1])


@laws
@given(points=measured(), queries=st.lists(st.tuples(WIDTHS, COUNTS), min_size=2, max_size=30))
def test_what_was_asked_before_changes_no_answer(points: Points, queries: list[tuple[int, int]]) -> None:
    curve = CostCurve(points)
    for start, count in queries:
        assert curve.marginal(start, count).tolist() == CostCurve(points).marginal(start, count).tolist()


def test_a_caller_cannot_write_into_the_curve() -> None:
    for shared in (GPU.seconds(1, 5), GPU.marginal(1, 5)):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 0.0


def test_measured_costs_are_cleared_of_other_load() -> None:
    assert undisturbed([(1, 1.0), (2, 9.0), (4, 1.4), (8, 2.0)]) == ((1, 1.0), (2, 1.4), (4, 1.4), (8, 2.0))
    assert undisturbed([(1, 5.0), (2, 1.0), (4, 1.0)]) == ((1, 1.0), (2, 1.0), (4, 1.0))


def test_more_tokens_never_seem_to_cost_nearly_as_much_as_passes_of_their_own() -> None:
    """Past regression: on a busy machine the measured curve kept everything from being drafted."""
    wild = [(1, 0.004), (2, 0.333), (4, 0.4), (8, 0.4), (64, 1.4)]
    assert undisturbed(wild) == ((1, 0.004), (2, 0.008), (4, 0.010), (8, 0.014), (64, 0.070))
    assert CostCurve(undisturbed(wild)).marginal(1, 500).max() < 0.3 * 0.004


def test_the_step_from_one_token_to_several_that_machines_have_is_kept() -> None:
    """Past regression: T(2) = 1.4 T(1), measured on an idle machine with two threads, was taken for other load."""
    for real in (
        ((1, 6.5), (2, 9.2), (4, 9.6), (8, 11.2), (64, 22.0), (256, 69.0)),
        ((1, 0.175), (2, 0.346), (4, 0.388), (8, 0.415), (16, 0.465), (24, 0.549)),
    ):
        assert undisturbed(real) == real


@laws
@given(points=measured())
def test_cleared_costs_are_a_curve_that_is_nowhere_above_the_measured_one(points: Points) -> None:
    cleared = undisturbed(points)
    assert [width for width, _ in cleared] == [width for width, _ in points]
    assert all(0 < got <= seen for (_, got), (_, seen) in zip(cleared, points, strict=True))
    assert [seconds for _, seconds in cleared] == sorted(seconds for _, seconds in cleared)
    assert undisturbed(cleared) == cleared


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
