"""GGUF files as models: what is read is what the file says, to the last bit, and what cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf is not installed")

from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, PreTrainedModel

from copyspec_engine import Engine, EngineConfig, GenerationRequest, LoadProgress, SamplingParams
from copyspec_engine.models.gguf import convert
from tests.conftest import STEP_COST
from tests.gguf_files import END, TOKENS, build, write_model

SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 7,
        "sliding_window": 24,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 64,
    },
    "phi3": {"sliding_window": 24},
}
KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0, Kind.F16, Kind.BF16, Kind.F32)
PROMPT = [TOKENS.index(letter) for letter in "the same words, the same words, and once more: ".replace(" ", "Ġ")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def models() -> Callable[[str], PreTrainedModel]:
    built: dict[str, PreTrainedModel] = {}

    def model_of(name: str) -> PreTrainedModel:
        if name not in built:
            built[name] = build(name, **SIZES[name])
        return built[name]

    return model_of


def read(path: Path) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(convert(str(path)).folder, dtype=torch.float32).eval()
    return model


@torch.inference_mode()
def assert_same(got: PreTrainedModel, expected: PreTrainedModel) -> None:
    ids = torch.tensor([PROMPT * 3])
    assert torch.equal(got(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_of_the_dequantised_model(
    name: str, kind: Kind, models: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    expected = write_model(path, models(name), kind)
    assert convert(str(path)).quantization == kind.name
    assert_same(read(path), expected)


def test_an_engine_answers_as_the_dequantised_model(
    models: Callable[[str], PreTrainedModel], tmp_path: Path, cache: Path
) -> None:
    expected = write_model(tmp_path / "model-Q4_0.gguf", models("llama"), Kind.Q4_0)
    told: list[LoadProgress] = []
    config = EngineConfig(model=str(tmp_path), step_cost=STEP_COST)
    with Engine(config, on_progress=told.append) as engine:
        assert engine.info.quantization == "GGUF Q4_0"
        assert engine.info.dtype == "float32"
        request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(temperature=0.0, max_tokens=24))
        answer = engine.generate(request)
    generate: Any = expected.generate
    plain = generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=END)[0, len(PROMPT) :]
    assert list(answer.token_ids) == [token for token in plain.tolist() if token != END]
    counts = [(progress.done, progress.total) for progress in told if progress.unit == "it"]
    assert counts[-1][0] == counts[-1][1] == 21
    assert any(cache.rglob("model.safetensors"))
