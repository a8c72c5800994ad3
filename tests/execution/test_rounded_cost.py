"""A warning where weights of 8 bits are slower than float32 ones, with what was measured."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
from torch import nn

from copyspec_engine import EngineConfig
from copyspec_engine.execution import loading, rounded_cost
from copyspec_engine.execution.rounded_cost import linear_seconds, warn_where_slower
from tests.conftest import STEP_COST
from tests.execution.architectures import build_model
from tests.execution.test_runner import write_tokenizer


@pytest.mark.parametrize(("rounded", "told"), [(0.0806, True), (0.0099, False)])
def test_only_what_is_slower_is_told(
    rounded: float, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rounded_cost, "linear_seconds", lambda _: (rounded, 0.01))
    warn_where_slower(nn.Linear(2, 2), "m")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * told
    assert ("take 80.6 ms a token" in caplog.text) == told
    assert ("and 10.0 ms in float32" in caplog.text) == told


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_load_measures_the_layers_that_it_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model("llama").save_pretrained(tmp_path / "tiny")
    write_tokenizer(tmp_path / "tiny")
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(loading, "warn_where_slower", lambda model, _: seen.append(linear_seconds(model)))
    for quantization in (None, "int8"):
        config = EngineConfig(model=str(tmp_path / "tiny"), quantization=quantization, step_cost=STEP_COST)
        loading.load_model(config)
    assert len(seen) == 1
    assert min(seen[0]) > 0
    assert linear_seconds(build_model("llama")) == (0.0, 0.0)
