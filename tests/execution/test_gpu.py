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
from copyspec_engine.execution.loading import prepare
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import STEP_COST, build_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
PROMPT = tuple(b"the cat sat on the mat; the cat ate the rat; the dog sat on the log; " * 2)


def answer(engine: Engine, drafter: str, **sampling: Any) -> tuple[int, ...]:
    params = SamplingParams(**{"max_tokens": 64, **sampling})
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=params, drafter=drafter)  # type: ignore[arg-type]
    return engine.generate(request).token_ids


def cuda_engine(name: str, dtype: str, *, compiled: bool = False) -> Engine:
    config = EngineConfig(model=f"tiny-{name}", device="cuda", step_cost=STEP_COST, compile_layers=compiled)
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
@pytest.mark.parametrize(("name", "compiled"), [("llama", True), ("llama", False), ("gemma2", False)])
def test_passes_are_captured(name: str, compiled: bool) -> None:
    with cuda_engine(name, "bfloat16", compiled=compiled) as engine:
        assert engine.info.execution_error is None
        assert engine.info.execution == ("compiled" if compiled else "graphs")
        answer(engine, "adaptive")
        passes = loop_of(engine).model.runner.passes  # type: ignore[attr-defined]
        assert passes.num_graphs > 1
        assert passes.is_capturing


@pytest.mark.gpu
def test_what_runs_beside_a_request_changes_no_token_on_a_gpu() -> None:
    with cuda_engine("gemma3", "float32") as engine:
        prompts = [PROMPT[: 20 + 10 * place] for place in range(6)]
        requests = [
            GenerationRequest(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=40)) for prompt in prompts
        ]
        alone = [
            engine.generate(request.model_copy(update={"request_id": f"a{i}"})) for i, request in enumerate(requests)
        ]
        handles = [engine.stream(request) for request in requests]
        assert [handle.result().token_ids for handle in handles] == [output.token_ids for output in alone]


@pytest.mark.gpu
def test_exact_mode_runs_on_a_gpu() -> None:
    config = EngineConfig(model="tiny-llama", device="cuda", step_cost=STEP_COST, exact=True)
    with Engine(config, model=prepare(build_model("llama").to("cuda"), ByteTokenizer(), config)) as engine:  # type: ignore[arg-type]
        assert engine.info.execution == "eager"
        assert answer(engine, "adaptive") == answer(engine, "none")


@pytest.mark.gpu
def test_auto_takes_the_gpu_for_the_bundled_model() -> None:
    with Engine(EngineConfig(model="bundled", dtype="float32")) as engine:
        assert engine.info.device.startswith("cuda")
        messages = ({"role": "user", "content": "one two three"}, {"role": "user", "content": "Repeat the document."})
        assert engine.generate(GenerationRequest(messages=messages)).text == "one two three"


# The script itself


TINY = ("--max-tokens", "40", "--conversations", "1", "--concurrency", "2", "--curve-seconds", "0")


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


def test_the_gpu_script_runs_on_a_cpu_and_writes_its_figures(tmp_path: Path) -> None:
    result = run_script(str(tmp_path), "--device", "cpu", "--architectures", "llama", "mixtral", "--skip-demo", *TINY)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["ok"] is True
    assert report["device"] == "cpu"
    equal = [check for name, check in report["checks"].items() if name.startswith("equal to generate")]
    assert len(equal) == 2
    for check in equal:
        assert check["differing"] == []
        assert check["forward_passes"]["adaptive"] < check["forward_passes"]["none"] == 3 * 48

    steps = report["checks"]["steps"]
    assert steps["execution"] == "packed"
    assert steps["curve"][0]["nodes"] == 1
    assert steps["targets"]["plain step over the limit"]["wanted"] == 1.25
    assert report["checks"]["attention alone"]["points"][0]["kv_bytes_per_s"] > 0
    for name in ("alone", "together"):
        results = json.loads((tmp_path / f"engine_{name}.json").read_text())["results"]
        assert {row["peer"] for row in results} >= {"ours", "ours-plain"}


def test_what_the_gpu_script_has_no_time_for_is_said_and_counts_as_a_failure(tmp_path: Path) -> None:
    result = run_script(str(tmp_path), "--device", "cpu", "--architectures", "llama", "--seconds", "-1")
    assert result.returncode == 1
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert all("left out" in check["error"] for check in checks.values())


def test_the_gpu_script_without_a_gpu_says_so_and_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run_script(str(tmp_path / "out"))
    assert result.returncode == 2
    assert "no CUDA GPU here" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run_script().returncode == 2
