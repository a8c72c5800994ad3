"""GGUF files as models: what is read is what the file says, to the last bit, and what cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, PreTrainedModel

from copyspec_engine import DraftModel, Engine, EngineConfig, GenerationRequest, LoadProgress, SamplingParams
from copyspec_engine.engine.model_facts import ModelFacts, read_model_facts
from copyspec_engine.execution.loading import read_tokenizer
from copyspec_engine.models.gguf import convert
from copyspec_engine.models.gguf_file import read_file
from copyspec_engine.models.gguf_tokenizer import build_tokenizer
from copyspec_engine.values.errors import UnsupportedModelError
from tests.conftest import STEP_COST
from tests.models.gguf_files import END, TOKENS, build, write_model

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
    counts = [(report.done, report.total) for report in told if (report.phase, report.unit) == ("convert", "it")]
    assert counts[-1][0] == counts[-1][1] == 21
    assert any(cache.rglob("model.safetensors"))


@pytest.mark.parametrize("name", SIZES)
def test_an_engine_has_the_tokenizer_of_the_file(
    name: str, models: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, models(name))
    expected = build_tokenizer(read_file(path))
    got: Any = read_tokenizer(EngineConfig(model=str(path)))
    assert got.backend.to_str() == expected.backend_tokenizer.to_str()


def test_a_draft_model_may_be_a_gguf_file_too(models: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    write_model(tmp_path / "large.gguf", models("llama"), Kind.Q8_0)
    write_model(tmp_path / "small.gguf", build("qwen2", num_hidden_layers=1, num_key_value_heads=1), Kind.Q4_0)
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(temperature=0.0, max_tokens=24))
    large, small = str(tmp_path / "large.gguf"), str(tmp_path / "small.gguf")
    with Engine(EngineConfig(model=large, step_cost=STEP_COST)) as engine:
        alone = engine.generate(request).token_ids
    draft = DraftModel(small, step_cost=((1, 0.1), (8, 0.11)))
    with Engine(EngineConfig(model=large, draft_model=draft, step_cost=STEP_COST)) as engine:
        assert engine.info.draft_model == small
        assert engine.generate(request).token_ids == alone


# ---- positions -------------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(model: PreTrainedModel) -> np.ndarray[Any, Any]:
    plain = 500_000.0 ** (-np.arange(0, 64, 2) / 64)
    return np.asarray(plain / model.model.rotary_emb.inv_freq.numpy())


def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path: Path) -> None:
    model = build("llama", max_position_embeddings=131_072, rope_parameters=LLAMA3)
    factors = llama3_factors(model)
    assert len(set(factors.round(3))) > 3
    expected = write_model(tmp_path / "m.gguf", model, factors={"rope_freqs.weight": factors})
    assert_same(read(tmp_path / "m.gguf"), expected)


def test_factors_that_are_not_those_of_llama_3_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    write_model(tmp_path / "m.gguf", model, factors={"rope_freqs.weight": np.linspace(1.0, 3.0, 32)})
    with pytest.raises(UnsupportedModelError, match=r"a rope_freqs\.weight that is not that of Llama 3"):
        convert(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
        ),
        ({"rope_type": "default"}, {"type": "none", "factor": 4.0}),
    ],
)
def test_scaled_positions_are_read(rope: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    model = build("qwen2", rope_parameters={"rope_theta": 10_000.0, **rope})
    metadata = {f"qwen2.rope.scaling.{key}": value for key, value in keys.items()}
    expected = write_model(tmp_path / "m.gguf", model, metadata=metadata)
    assert_same(read(tmp_path / "m.gguf"), expected)


def test_gemma_3_scales_its_full_layers_alone(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    model = build("gemma3_text", **SIZES["gemma3_text"], rope_parameters=rope, vocab_size=len(TOKENS) + 6)
    metadata = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    expected = write_model(tmp_path / "m.gguf", model, metadata=metadata)
    assert_same(read(tmp_path / "m.gguf"), expected)


def test_phi_3_has_factors_for_short_and_long_texts_and_turns_a_part_of_each_head(tmp_path: Path) -> None:
    long, short = np.linspace(1.0, 4.0, 24), np.linspace(1.0, 1.5, 24)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "long_factor": long.astype(np.float32).astype(float).tolist(),
        "short_factor": short.astype(np.float32).astype(float).tolist(),
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "attention_factor": 1.25,
    }
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=64, partial_rotary_factor=0.75)
    metadata = {
        "phi3.rope.dimension_count": 48,
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.rope.scaling.attn_factor": 1.25,
    }
    factors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    expected = write_model(tmp_path / "m.gguf", model, metadata=metadata, factors=factors)
    assert facts_of(tmp_path / "m.gguf").max_model_len == 64
    got = read(tmp_path / "m.gguf")
    for length in (40, 140):
        ids = torch.tensor([(PROMPT * 4)[:length]])
        with torch.inference_mode():
            assert torch.equal(got(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"head_dim": 32}),
    ],
)
def test_biases_and_narrow_heads_are_read(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = write_model(tmp_path / "m.gguf", build(name, **options), Kind.Q8_0)
    assert_same(read(tmp_path / "m.gguf"), expected)


# ---- what is known before it is converted ----------------------------------------------------------------------------


def facts_of(path: Path) -> ModelFacts:
    facts = read_model_facts(EngineConfig(model=str(path)))
    assert facts is not None
    return facts


def test_a_file_says_what_its_converted_folder_says_of_context_and_chat(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    template = "{{ eos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    write_model(path, build("llama"), Kind.F16, metadata={"tokenizer.chat_template": template})
    facts = facts_of(path)
    assert facts.max_model_len == 512
    assert facts.chat_format.is_chat
    assert facts.chat_format.tool_calling == "by prompt"
    assert not cache.exists()
    assert facts == facts_of(convert(str(path)).folder)


def test_a_base_model_and_a_broken_file_are_told_from_a_chat_model(tmp_path: Path) -> None:
    write_model(tmp_path / "base.gguf", build("llama"), Kind.F16)
    assert not facts_of(tmp_path / "base.gguf").chat_format.is_chat
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "base.gguf").read_bytes()[:100])
    assert read_model_facts(EngineConfig(model=str(broken))) is None


# ---- a real file -----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_a_real_model_cuts_text_as_it_was_taught_and_answers(smollm2: Engine) -> None:
    for text, ids in {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "<|im_start|>user\n": [1, 4093, 198],
    }.items():
        assert smollm2.encode(text) == ids
        assert smollm2.decode(ids, skip_special_tokens=False) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    assert "Paris" in smollm2.generate(GenerationRequest(messages=question, sampling=greedy)).text
