"""Tiny random models of several architectures, over the byte tokenizer, so that stop texts and chats work on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.model_runner import prepare
from copyspec_engine.testing import ByteTokenizer

HALF_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": 24}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, **HALF_SLIDING}),
    "phi3": (Phi3Config, {}),
    "mixtral": (MixtralConfig, {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "attn_logit_softcapping": 2.0, **HALF_SLIDING}),
    "gpt_oss": (GptOssConfig, {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **HALF_SLIDING}),
}
END = 257
STEP_COST = ((1, 1.0), (8, 1.1), (64, 1.6))
"""A fixed curve: drafts must not depend on how busy the test machine is."""


def build_model(name: str, seed: int = 1) -> PreTrainedModel:
    config_class, extra = ARCHITECTURES[name]
    if name == "gpt_oss":
        extra = extra | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    config = config_class(
        vocab_size=258,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3 if name in ("qwen2", "phi3") else 4,
        num_key_value_heads=1 if name in ("qwen2", "phi3") else 2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        **extra,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    if name == "gpt_oss":
        for module in model.modules():
            if hasattr(module, "sinks"):
                torch.nn.init.normal_(module.sinks, std=1.0)
    return model


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """make_engine("llama", **options) -> an engine over a tiny random model; closed after the test."""
    engines: list[Engine] = []

    def make(name: str = "llama", *, seed: int = 1, **options: Any) -> Engine:
        config = EngineConfig(**{"model": f"tiny-{name}", "step_cost": STEP_COST, **options})
        loaded = prepare(build_model(name, seed), ByteTokenizer(), config)
        engines.append(Engine(config, model=loaded))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def assert_all_slots_free(engine: Engine) -> None:
    """After every request is over, only rows that are kept for later calls use slots, each as often as it says."""
    core = engine._core
    users = np.zeros(core.pool.num_slots, dtype=np.int32)
    for row in core.cache._rows.values():
        assert len(row.slots) == len(row.token_ids) == len(np.unique(row.slots))
        users[row.slots] += 1
    assert (users == core.pool.users).all()
    assert core.pool.num_free == (users == 0).sum()
    assert not core.scheduler
    assert not engine._requests
