"""The cost curve goes through its points; its hull is convex, never above it, and meets it at its corners."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine.drafting.cost import CostCurve, Points, undisturbed

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
