"""Adapters of PEFT: small changes to another model's weights, which are put into them when the model is read."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ModelLoadError

__all__ = ["base_of_adapter", "merge_adapter", "tokenizer_path"]

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def base_of_adapter(path: str, config: EngineConfig) -> str | None:
    """The model that an adapter changes; None if `path` is no adapter.

    Raises:
        ModelLoadError: it is one and cannot be used: peft is not installed, it names no base model, the weights are
            to be quantized or to stay narrow, or whole weights lie beside it.
    """
    found = find_adapter_config_file(path)
    if found is None:
        return None
    what = f"Got model={config.model!r}, a PEFT adapter (adapter_config.json),"
    if importlib.util.find_spec("peft") is None:
        raise ModelLoadError(
            f'{what} but peft is not installed. Run: pip install "copyspec[peft]", or merge the adapter into its base '
            "model and give that"
        )
    if any(any(Path(path).glob(pattern)) for pattern in _WEIGHTS):
        raise ModelLoadError(f"{what} with the weights of a whole model beside it: keep one of them in the folder")
    if config.quantization is not None:
        raise ModelLoadError(f"{what} with quantization={config.quantization!r}: leave it out, or merge the adapter")
    if config.memory == "narrow":
        raise ModelLoadError(f"{what} with memory={config.memory!r}: leave it out, or merge the adapter")
    base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(f"{what} whose base_model_name_or_path is {base!r}: name its base model there")
    return os.path.expanduser(base)


def merge_adapter(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The base model with the adapter's changes in its weights."""
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(model, path)
    merged: PreTrainedModel = adapted.merge_and_unload().eval()
    return merged


def tokenizer_path(path: str, base: str | None) -> str:
    """Where the tokenizer is: beside the adapter if it has one of its own, else beside its base model."""
    return path if base is None or Path(path, "tokenizer_config.json").is_file() else base
