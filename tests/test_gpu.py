"""What must hold on a CUDA GPU, and that the script that checks it there does its work (on the CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.model_runner import prepare
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST, build_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
PROMPT = tuple(b"the cat sat on the mat; the cat ate the rat; the dog sat on the log; " * 2)


def answer(engine: Engine, drafter: str, **sampling: Any) -> tuple[int, ...]:
    params = SamplingParams(**{"max_tokens": 64, **sampling})
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=params, drafter=drafter)  # type: ignore[arg-type]
    return engine.generate(request).token_ids


def cuda_engine(name: str, dtype: str) -> Engine:
    config = EngineConfig(model=f"tiny-{name}", device="cuda", step_cost=STEP_COST)
    model = build_model(name).to("cuda").to(getattr(__import__("torch"), dtype))
    return Engine(config, model=prepare(model, ByteTokenizer(), config))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral"])
def test_drafting_changes_no_token_on_a_gpu_in_float32(name: str) -> None:
    with cuda_engine(name, "float32") as engine:
        assert engine.info.device.startswith("cuda")
        plain = answer(engine, "none")
        assert answer(engine, "adaptive") == plain
        assert answer(engine, "copyspec") == plain
        seeded = answer(engine, "none", temperature=0.8, seed=3)
        assert answer(engine, "adaptive", temperature=0.8, seed=3) == seeded


@pytest.mark.gpu
def test_a_model_in_bfloat16_runs_and_repeats_itself() -> None:
    with cuda_engine("llama", "bfloat16") as engine:
        assert engine.info.dtype == "bfloat16"
        assert answer(engine, "adaptive") == answer(engine, "adaptive")


@pytest.mark.gpu
def test_auto_takes_the_gpu_for_the_bundled_model() -> None:
    with Engine(EngineConfig(dtype="float32")) as engine:
        assert engine.info.device.startswith("cuda")
        messages = ({"role": "user", "content": "one two three"}, {"role": "user", "content": "Repeat the document."})
        assert engine.generate(GenerationRequest(messages=messages)).text == "one two three"


# The script itself


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


def test_the_gpu_script_runs_on_a_cpu_and_writes_its_figures(tmp_path: Path) -> None:
    result = run_script(str(tmp_path), "--device", "cpu", "--architectures", "llama", "mixtral", "--skip-demo")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["ok"] is True
    assert report["device"] == "cpu"
    assert len(report["checks"]) == 2
    for check in report["checks"].values():
        assert check["differing"] == []
        assert check["forward_passes"]["adaptive"] < check["forward_passes"]["none"] == 3 * 48


def test_the_gpu_script_without_a_gpu_says_so_and_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run_script(str(tmp_path / "out"))
    assert result.returncode == 2
    assert "no CUDA GPU here" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run_script().returncode == 2
