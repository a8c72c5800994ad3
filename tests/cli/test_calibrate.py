"""`copyspec calibrate` and what `copyspec info` says of it: the table, the files, the exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from copyspec_engine import EngineConfig
from copyspec_engine.cli.main import app
from copyspec_engine.execution import pass_cost
from copyspec_engine.execution.calibration import kept_curves
from copyspec_engine.lab.replay import load_cost_curve

CURVE = ((1, 0.004), (2, 0.005), (64, 0.02))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """run("calibrate", ...) -> the command's result on the bundled model, whose passes cost what `CURVE` says."""
    assert not cache.exists()
    monkeypatch.setattr(pass_cost, "measure_pass_cost", lambda *_args, **_options: CURVE)

    def invoke(command: str, *words: str, columns: int = 200) -> Result:
        named = () if "--model" in words else ("--model", "bundled")
        return CliRunner().invoke(app, [command, *named, *words, "--device", "cpu"], env={"COLUMNS": str(columns)})

    return invoke


def test_it_shows_tokens_milliseconds_and_passes_of_one_token(run: Callable[..., Result]) -> None:
    result = run("calibrate")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["1", "4", "1.00"] in rows
    assert ["2", "5", "1.25"] in rows
    assert ["64", "20", "5.00"] in rows
    assert "bundled on cpu in float32" in result.output


def test_it_keeps_the_curve_and_says_where(run: Callable[..., Result]) -> None:
    result = run("calibrate")
    (curve,) = kept_curves()
    assert curve.cost.points == CURVE
    assert str(curve.path) in result.output


def test_it_measures_anew_what_was_kept(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    run("calibrate")
    other = tuple((width, 2 * seconds) for width, seconds in CURVE)
    monkeypatch.setattr(pass_cost, "measure_pass_cost", lambda *_args, **_options: other)
    run("calibrate")
    (curve,) = kept_curves()
    assert curve.cost.points == other


def test_its_file_is_a_cost_model_and_a_step_cost(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    assert run("calibrate", "--json", str(path)).exit_code == 0
    assert load_cost_curve(str(path)).points == CURVE
    assert EngineConfig(step_cost=json.loads(path.read_text())).step_cost == CURVE


def test_a_curve_that_cannot_be_kept_is_shown_with_exit_code_1(run: Callable[..., Result], cache: Path) -> None:
    cache.write_text("in the way")
    result = run("calibrate")
    assert result.exit_code == 1
    assert "5.00" in result.output
    assert f"Not kept: {cache} cannot be written" in result.output


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Callable[..., Result], tmp_path: Path, cache: Path
) -> None:
    result = run("calibrate", "--json", str(tmp_path / "no" / "cost.json"))
    assert result.exit_code == 2
    assert "there is no folder" in " ".join(result.output.split())
    assert not cache.exists()


def test_a_model_that_is_not_there_is_one_line(run: Callable[..., Result]) -> None:
    result = run("calibrate", "--model", "./no/such/model")
    assert result.exit_code == 2
    assert "no such file or folder" in " ".join(result.output.split())


def test_info_says_when_the_costs_were_measured_and_where_they_are_kept(run: Callable[..., Result]) -> None:
    run("calibrate")
    (curve,) = kept_curves()
    result = run("info")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "1 token: 4 ms, 2 tokens: 5 ms, 64 tokens: 20 ms" in text
    assert curve.measured_at in text
    assert curve.path.name in text
    assert str(curve.path) in run("info", columns=50).output  # in one piece, to be copied


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_bundled_model_is_measured_and_kept(cache: Path, device: str) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--model", "bundled", "--device", device], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    (curve,) = kept_curves()
    assert curve.path.is_relative_to(cache)
    assert [width for width, _ in curve.cost.points] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert curve.facts["model"] == "bundled"
