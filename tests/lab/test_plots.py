"""Words in plots can be read: none lies over another, and no line runs through one."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from copyspec_engine.lab.display.charts import Bars, Lines, Plot

pytest.importorskip("matplotlib", reason='needs pip install "copyspec[eval]"')


@pytest.mark.parametrize("num_series", [1, 6])
def test_names_below_bars_do_not_meet(num_series: int) -> None:
    from copyspec_engine.lab.display.plots import figure_of

    names = tuple(f"{name}, turn {turn}" for name in ("mt-redundant", "mt-bench", "gsm8k") for turn in (1, 2, 3))
    series = tuple((f"a model with a name, {number}", (1.0,) * len(names)) for number in range(num_series))
    drawn = figure_of(Plot("bars", (Bars("Speed", "times", names, series),), "a caption"))
    drawn.draw_without_rendering()
    labels = drawn.axes[0].get_xticklabels()
    assert len(labels) == len(names)
    if labels[0].get_rotation() == 0:
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    else:  # slanting ones stand beside each other, a line apart
        left = [label.get_window_extent().x1 for label in labels]
        assert min(b - a for a, b in pairwise(left)) > labels[0].get_fontsize()


def test_no_line_runs_through_a_note() -> None:
    from copyspec_engine.lab.display.plots import figure_of

    series = (("a", ((100.0, 5.0), (200.0, 5.2), (2000.0, 30.0))), ("b", ((100.0, 6.0), (200.0, 6.0), (400.0, 5.8))))
    notes = ((100.0, 5.0, "a long name of a file"), (110.0, 5.1, "another name of a file"), (2000.0, 30.0, "the last"))
    drawn = figure_of(Plot("lines", (Lines("Speed", "tokens", "times", series, log_x=True, notes=notes),), "a caption"))
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(notes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for line in axes.lines:
        path = line.get_transform().transform_path(line.get_path())
        assert not any(path.intersects_bbox(box, filled=False) for box in boxes)
