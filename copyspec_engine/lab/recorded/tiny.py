"""A model of random weights small enough to write thousands of answers a minute, as a folder like any checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from copyspec_engine.bundled import bundled_model_path

__all__ = ["write_tiny_model"]

_WEIGHTS = {"model.safetensors", "config.json"}


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """Write a two-layer Llama with the bundled model's tokenizer and chat template, the same for the same seed.

    Weights are larger than they are initialised: with flat logits drafts would hardly ever be right.
    """
    for path in bundled_model_path().iterdir():
        if path.name not in _WEIGHTS:
            shutil.copy(path, folder)
    config = AutoConfig.from_pretrained(bundled_model_path())
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": False,
        }
    )
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(8.0)
    model.save_pretrained(folder)
