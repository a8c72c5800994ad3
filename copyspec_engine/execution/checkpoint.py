"""What a checkpoint holds, and whether it can be served at all: read with transformers, before it is put to work."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from copyspec_engine.chat.tokenizer import ChatTokenizer
from copyspec_engine.execution.accelerator import best_device, device_count
from copyspec_engine.execution.config_checks import refuse_impossible, refuse_unreadable
from copyspec_engine.execution.narrow_loading import NarrowLayers, fill_narrow
from copyspec_engine.models.gguf import is_converted
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError, missing_extra

__all__ = [
    "eos_token_ids",
    "load_failure",
    "longest_context",
    "read_model",
    "refuse_unreadable_tokens",
    "refuse_unsupported",
    "relative_difference",
    "resolve_device",
    "tolerance",
    "vocab_size",
    "why_no_rollback",
]

logger = logging.getLogger(__name__)

_ATTENTION = {"full_attention", "sliding_attention"}
_STATEFUL = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Kinds of layers, as transformers names them, with a state that every token changes for good."""
_NO_MEMORY = {"moe", "mlp"}
_OWN_KERNELS = {
    "_attn_implementation": ("eager", "sdpa"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""What transformers itself brings along, by the attribute that chooses it."""


def resolve_device(config: EngineConfig) -> torch.device:
    """Where the model goes, or its first layers where they go to all devices.

    Raises:
        ModelLoadError: this machine has no such device.
    """
    device = config.device
    if device == "all" and not device_count("cuda"):
        raise ModelLoadError(
            f"Got device={device!r} but this machine shows no CUDA devices: leave it out to use the CPU"
        )
    if device in ("auto", "all"):
        return best_device()
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return chosen
    count = device_count(chosen.type)
    if (chosen.index or 0) >= count:
        raise ModelLoadError(
            f"Got device={device!r} but this machine shows {count} {chosen.type.upper()} devices: use 'cpu' or 'auto'"
        )
    return chosen


def read_model(path: str, device: torch.device, config: EngineConfig) -> PreTrainedModel:
    """The model with its weights, in evaluation mode, on its device or devices.

    A checkpoint's own `quantization_config` is honoured, whatever package it needs.

    Raises:
        ModelLoadError: weights are missing or have the wrong shape, or the config.json cannot be true.
        CopySpecError: a package that the options need is not installed.
    """
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    for file in ("config.json", "generation_config.json"):
        refuse_unreadable(config.model, Path(path, file))
    refuse_impossible(config.model, PreTrainedConfig.get_config_dict(path)[0], on_cpu=device.type == "cpu")
    hf_config = AutoConfig.from_pretrained(path, **options)
    refuse_unsupported(config.model, hf_config)
    _without_foreign_kernels(config.model, hf_config)
    quantized = getattr(hf_config, "quantization_config", None) is not None
    form = _form_of_weights(config, device, quantized)
    if form is not None:
        options["quantization_config"] = form
    if config.device == "all":
        options["device_map"] = "auto"
    elif quantized and device.type != "cpu":  # many kinds cannot be moved once they are read
        options["device_map"] = {"": device}
    if "device_map" in options and importlib.util.find_spec("accelerate") is None:
        raise missing_extra("accelerate", "quantization" if quantized else "multi-gpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=hf_config,
        dtype=_resolve_dtype(config.dtype, device, quantized),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, which names them
        **options,
    )
    model, report = loaded
    _refuse_incomplete(config.model, report)
    if "device_map" not in options and not (quantized and device.type == "cpu"):  # some kinds refuse even that
        model = model.to(device)
    if any(parameter.device.type in ("meta", "cpu") for parameter in model.parameters()) and config.device == "all":
        raise ModelLoadError(
            f"{config.model} does not fit in the memory of this machine's GPUs: use a smaller model, dtype='bfloat16' "
            "or quantization='int8'"
        )
    if config.memory == "narrow":
        fill_narrow(model, Path(path), config.model)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _form_of_weights(config: EngineConfig, device: torch.device, quantized: bool) -> QuantizationConfigMixin | None:
    """What transformers makes of linear layers while it reads them; None: what they are.

    Raises:
        ModelLoadError: the weights are quantized already, or the device has no narrow ones.
    """
    if config.quantization is not None:
        if quantized:
            raise ModelLoadError(
                f"Got quantization={config.quantization!r} but the weights of {config.model} are quantized already: "
                "leave it out"
            )
        return _int8_weights()
    if config.memory == "wide":
        return None
    if quantized or device.type != "cpu":
        what = (
            f"the weights of {config.model} are quantized in a way of their own"
            if quantized
            else f"{config.model} goes to {device}"
        )
        raise ModelLoadError(f"Got memory='narrow' but {what}: leave it out{'' if quantized else ', or use the CPU'}")
    return NarrowLayers()


def _refuse_incomplete(name: str, report: dict[str, Any]) -> None:
    """Turn away a model of which weights are missing or have another shape, as transformers reports."""
    absent = sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
    if absent:
        raise ModelLoadError(
            f"{name} lacks {len(absent)} weights that its config asks for, or has them in another shape (the "
            f"first: {absent[0]}): is the download complete?"
        )


def _without_foreign_kernels(name: str, hf_config: PreTrainedConfig) -> None:
    """Take back what a config.json says of attention and experts where that would be code from elsewhere.

    transformers fetches kernels of such a name from a hub. The attention is ours in any case.
    """
    for part in (hf_config, *(getattr(hf_config, key, None) for key in hf_config.sub_configs)):
        for key, known in _OWN_KERNELS.items():
            wanted = getattr(part, key, None)
            if wanted is not None and wanted not in known:
                logger.warning("%s: its config.json asks for %s=%r, which is not used", name, key.strip("_"), wanted)
                setattr(part, key, None)


def _int8_weights() -> TorchAoConfig:
    """Linear layers' weights rounded to 8 bits while they are read; activations stay as they are.

    Raises:
        CopySpecError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise missing_extra("torchao", "quantization")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _resolve_dtype(dtype: str, device: torch.device, quantized: bool) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and not quantized else "auto"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_failure(name: str, path: str, error: Exception) -> str:
    """What to do about a model that could not be loaded, and all that the error said."""
    reason = str(error).strip() or type(error).__name__
    if path and not os.path.exists(os.path.join(path, "config.json")):
        return f"Got model={name!r} but the folder has no config.json: give the folder that holds the model's files"
    where = f" from the folder {path}" if path else ""
    folder = os.path.basename(path)
    damaged = f" (if its converted weights are damaged, `copyspec models rm {folder}` has them made again)"
    remedy = damaged if is_converted(path) else ""
    return f"Could not load model={name!r}{where}{remedy}: {type(error).__name__}: {reason}"


def refuse_unsupported(name: str, hf_config: Any) -> None:  # noqa: ANN401 - each architecture has its own config class
    """Turn away architectures that cannot work before their weights are read.

    Raises:
        UnsupportedModelError: an encoder-decoder, or a decoder with layers of an unknown kind.
    """
    if hf_config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder ({hf_config.model_type}): only decoders are served")
    others = sorted(_layer_kinds(hf_config) - _ATTENTION - _STATEFUL - _NO_MEMORY)
    if others:
        raise UnsupportedModelError(
            f"{name} ({hf_config.model_type}) has {', '.join(others)} layers: only full and sliding-window attention "
            "can be verified and rolled back token by token, and only recurrent layers are served without"
        )


def why_no_rollback(model: PreTrainedModel) -> str | None:
    """Why tokens cannot be taken back from what the model has read; None if they can."""
    kinds = sorted(_layer_kinds(model.config) & _STATEFUL)
    if not kinds and not model._is_stateful:
        return None
    what = f"{' and '.join(kinds)} layers" if kinds else "a recurrent state"
    return f"{type(model).__name__} has {what}, from which a rejected draft could not be taken back"


def _layer_kinds(hf_config: Any) -> set[str]:  # noqa: ANN401
    return {str(kind) for kind in getattr(hf_config.get_text_config(), "layer_types", None) or ()}


def vocab_size(model: PreTrainedModel) -> int:
    """Width of the logits, which may be padded beyond the tokenizer's vocabulary."""
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return int(head.weight.shape[0])  # type: ignore[index]


def refuse_unreadable_tokens(name: str, model: PreTrainedModel) -> None:
    """Turn away a model that could write a token which it cannot read.

    Raises:
        UnsupportedModelError: its logits are wider than its embedding.
    """
    written, read = vocab_size(model), int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if written > read:
        raise UnsupportedModelError(
            f"{name} has logits for {written} tokens but an embedding of {read}: it could write a token that it cannot "
            "read"
        )


def tolerance(model: PreTrainedModel) -> float:
    """Up to which `relative_difference` logits count as equal."""
    return 1e-3 if model.dtype == torch.float32 else 5e-2


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what was expected; NaN if there is a NaN."""
    return float((got - expected).norm() / expected.norm().clamp_min(1e-6))


def longest_context(text_config: Any, name: str) -> int:  # noqa: ANN401
    """Tokens up to which the model reads a text in pieces as it reads it whole.

    Long-context RoPE ("longrope") switches to other factors for a whole pass once its last position is beyond the
    original context: tokens before it would then depend on what is read together with them. We stay below.
    """
    limit = int(getattr(text_config, "max_position_embeddings", None) or 32_768)
    rope = getattr(text_config, "rope_parameters", None) or {}
    for parameters in (rope, *(group for group in rope.values() if isinstance(group, dict))):
        if parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            if original and original < limit:
                logger.warning("%s: context limited to %d tokens, below the switch of its longrope", name, original)
                limit = int(original)
    return limit


def eos_token_ids(model: PreTrainedModel, tokenizer: ChatTokenizer) -> frozenset[int]:
    """End-of-sequence ids as `generate` takes them: generation config, else model config, else tokenizer."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
