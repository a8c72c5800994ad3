"""Decoders of well-known shapes with random weights: a pass costs what it costs on the checkpoint of that shape."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.execution.accelerator import memory_of
from copyspec_engine.execution.checkpoint import resolve_device
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ConfigError, ModelLoadError

__all__ = ["SHAPES", "random_model", "shape_config"]

_QWEN = {
    "model_type": "qwen2",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "bundled": {},
    "qwen2.5-0.5b": {
        **_QWEN,
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b-4layers": {
        **_QWEN,
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 4,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        **_QWEN,
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN,
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA_ROPE, "factor": 32.0},
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA_ROPE, "factor": 8.0},
    },
}
"""Model type and dimensions by name, as in the checkpoints' configs; the bundled model's stand in its own. One has the
first layers of a checkpoint only, as a draft model for it."""


def shape_config(shape: str, end_token: int) -> PreTrainedConfig:
    """The config of a shape, with `end_token` as its end of a sequence.

    Raises:
        ConfigError: no such shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"Got --shape {shape} but expected one of {', '.join(SHAPES)}")
    dimensions = SHAPES[shape] or json.loads((bundled_model_path() / "config.json").read_text(encoding="utf-8"))
    ends = {"eos_token_id": end_token, "pad_token_id": end_token, "bos_token_id": None}
    config: PreTrainedConfig = AutoConfig.for_model(**{**dimensions, **ends})
    return config


def random_model(shape: str, end_token: int, device: str, dtype: str) -> PreTrainedModel:
    """A model of a shape in evaluation mode, with weights like those before training (standard deviation 0.02).

    Args:
        shape: one of `SHAPES`.
        end_token: the token that ends an answer.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, else bfloat16, as the checkpoints are.

    Raises:
        ConfigError: no such shape.
        ModelLoadError: no such device, or the weights do not fit in its memory.
    """
    config, on = shape_config(shape, end_token), resolve_device(EngineConfig(device=device))
    kind: torch.dtype = getattr(torch, dtype if dtype != "auto" else "float32" if on.type == "cpu" else "bfloat16")
    needed = sum(p.numel() * p.element_size() for p in _empty(config, kind, torch.device("meta")).parameters())
    free, _ = memory_of(on)
    if needed > free:
        raise ModelLoadError(
            f"Got --shape {shape} but its weights take {needed / 1e9:,.1f} GB in {str(kind).removeprefix('torch.')}"
            f" and {free / 1e9:,.1f} GB are free on {on}: take a smaller shape, --dtype bfloat16 or another device"
        )
    model = _empty(config, kind, on)
    _fill(model, torch.Generator(on).manual_seed(0))
    return model


def _empty(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model in evaluation mode whose weights are whatever was in the memory."""
    build: Any = AutoModelForCausalLM
    with no_init_weights(), device:
        model: Any = build.from_config(config, dtype=dtype)
    model.tie_weights()
    empty: PreTrainedModel = model.eval()
    return empty


@torch.no_grad()
def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random matrices, norms of 1, biases of 0."""
    for name, parameter in model.named_parameters():  # a tied head is named once
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
