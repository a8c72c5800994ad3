"""Tiny GGUF files, written from transformers models with the gguf package, and the models that they must be read as."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["BYTES", "END", "TOKENS", "build", "metadata_of", "split", "write", "write_model"]

BYTES = list(bytes_to_unicode().values())
TOKENS = [*BYTES, "<|start|>", "<|im_end|>"]
END = 257
_WITHOUT_QUANTIZE = {Kind.Q3_K: (slice(108, 110),), Kind.Q5_K: (slice(0, 4),), Kind.Q6_K: (slice(208, 210),)}
"""Types that gguf cannot write, and where their blocks have half-precision scales."""
_ARCHITECTURES = {"gemma3_text": "gemma3"}


def build(model_type: str, **options: Any) -> PreTrainedModel:
    """Random weights; wide enough for blocks of 256."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": len(TOKENS),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": END,
            "pad_token_id": None,
            **options,
        },
    )
    torch.manual_seed(1)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases that do nothing would hide a mistake
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(3.0)
    return model


def metadata_of(model: PreTrainedModel) -> dict[str, Any]:
    """What converters write of a model, with a tokenizer of bytes."""
    config = model.config
    arch = _ARCHITECTURES.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    values: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * len(BYTES) + [3, 3],
        "tokenizer.ggml.eos_token_id": END,
    }
    if getattr(config, "head_dim", None):
        values[f"{arch}.attention.key_length"] = config.head_dim
        values[f"{arch}.attention.value_length"] = config.head_dim
    if getattr(config, "sliding_window", None):
        values[f"{arch}.attention.sliding_window"] = config.sliding_window
    return values


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray[Any, Any], Kind]]) -> None:
    """A file of these keys and of tensors, stored as they are."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture" or value == []:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    model: PreTrainedModel,
    kind: Kind = Kind.F32,
    metadata: dict[str, Any] | None = None,
    factors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> PreTrainedModel:
    """Write a model with its matrices rounded to `kind`; the model that the file says, with the rounded weights.

    Args:
        path: where to.
        model: what to write.
        kind: the type of matrices; vectors are float32.
        metadata: keys besides those of `metadata_of`, which they replace.
        factors: tensors that say how positions are scaled.
    """
    values = metadata_of(model) | (metadata or {})
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == values["general.architecture"])
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    expected = copy.deepcopy(model)
    state = expected.state_dict()
    tensors: dict[str, tuple[np.ndarray[Any, Any], Kind]] = {}
    rng = np.random.default_rng(0)
    for name, weight in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        order = _order(name, model)
        inside = weight.numpy()[order] + _offset(name, model)
        stored, read = _rounded(inside, kind if weight.dim() > 1 else Kind.F32, rng)
        tensors[f"{names.get_name(stem)}.{suffix}"] = stored
        outside = np.empty_like(read)
        outside[order] = read - _offset(name, model)
        weight.copy_(torch.from_numpy(outside))
    for name, factor in (factors or {}).items():
        tensors[name] = factor.astype(np.float32), Kind.F32
    write(path, values, tensors)
    return expected


def _order(name: str, model: PreTrainedModel) -> np.ndarray[Any, Any]:
    """Which row of transformers' tensor stands at each place of GGUF's."""
    rows = np.arange(model.state_dict()[name].shape[0])
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = name.split(".")[-2]
    if model.config.model_type != "llama" or part not in heads:
        return rows
    halves = rows.reshape(getattr(model.config, heads[part]), 2, -1)  # both numbers of a pair, which GGUF has together
    return halves.swapaxes(1, 2).reshape(-1)


def _offset(name: str, model: PreTrainedModel) -> np.float32:
    """What GGUF adds to a tensor."""
    return np.float32(model.config.model_type == "gemma3_text" and name.endswith("norm.weight"))


def _rounded(
    values: np.ndarray[Any, Any], kind: Kind, rng: np.random.Generator
) -> tuple[tuple[np.ndarray[Any, Any], Kind], np.ndarray[Any, Any]]:
    """A tensor as it is stored, with its type, and the values that this means."""
    if kind in _WITHOUT_QUANTIZE:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
        for place in _WITHOUT_QUANTIZE[kind]:
            scales = (place.stop - place.start) // 2
            halves = rng.uniform(1e-5, 1e-4, (len(blocks), scales)).astype(np.float16)
            blocks[:, place] = halves.view(np.uint8)
        stored = blocks.reshape(*values.shape[:-1], -1)
    else:
        stored = quantize(values, kind)
    return (stored, kind), dequantize(stored, kind).astype(np.float32)


def split(path: Path, count: int) -> list[Path]:
    """The same model in several files, all of its keys in the first."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    parts = [path.with_name(f"{path.stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for i, part in enumerate(parts):
        keys = values if i == 0 else {"general.architecture": values["general.architecture"]}
        tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors[i::count]}
        write(part, {**keys, "split.no": i, "split.count": count}, tensors)
    return parts
