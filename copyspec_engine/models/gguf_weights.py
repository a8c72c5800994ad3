"""The weights of a GGUF file, dequantised, under transformers' names.

Every tensor of the file is used and every weight of the model filled, or the file is refused. A tensor is kept in the
narrowest type that holds its values exactly: float16 and bfloat16 as they are, all others in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, LlamaFileType, get_tensor_name_map
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from copyspec_engine.models.gguf_config import FACTORS
from copyspec_engine.models.gguf_file import GgufFile, GgufTensor
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError

__all__ = ["check_tensors", "num_bytes", "quantization", "read_factors", "resolve_config", "write_weights"]

_MOST_BYTES = 2**30
"""Of one file of weights: as much is in memory at a time."""
_AT_ONCE = 2**23
"""Weights that are dequantised at a time, so that progress is told between them."""
_KEPT = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
_Plan = list[tuple[str, GgufTensor]]


def check_tensors(file: GgufFile) -> None:
    """Find tensors of unknown types, and those that reach beyond the end of their file.

    Raises:
        UnsupportedModelError: a type that the gguf package cannot dequantise.
        ModelLoadError: a file is incomplete.
    """
    sizes = {path: path.stat().st_size for path in file.paths}
    for tensor in file.tensors:
        if tensor.offset + _stored_bytes(tensor) > sizes[tensor.path]:
            raise ModelLoadError(
                f"{tensor.path} is incomplete: it has {sizes[tensor.path]:,} bytes, but {tensor.name} ends at "
                f"{tensor.offset + _stored_bytes(tensor):,}. Fetch it again"
            )


def _type_of(tensor: GgufTensor) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(tensor.type_number)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{tensor.path} stores {tensor.name} as type {tensor.type_number}, which the installed gguf package does "
            "not know: try pip install -U gguf"
        ) from error
    if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise ModelLoadError(f"{tensor.path} is broken: {tensor.name} has rows of {tensor.shape[-1]}. Fetch it again")
    return kind


def _stored_bytes(tensor: GgufTensor) -> int:
    block, size = GGML_QUANT_SIZES[_type_of(tensor)]
    return int(prod(tensor.shape) // block * size)


def quantization(file: GgufFile) -> str:
    """What the file calls its types as a whole ("Q4_K_M"), else the type of most weights ("Q4_K")."""
    number = file.metadata.get("general.file_type")
    if number in list(LlamaFileType) and number != LlamaFileType.GUESSED:
        return str(LlamaFileType(number).name.split("_", 1)[1])
    weights: dict[str, int] = {}
    for tensor in file.tensors:
        name = _type_of(tensor).name
        weights[name] = weights.get(name, 0) + prod(tensor.shape)
    return max(weights, key=lambda name: weights[name])


def read_factors(file: GgufFile) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors that say how positions are scaled."""
    return {tensor.name: _read(tensor).numpy() for tensor in file.tensors if tensor.name in FACTORS}


def resolve_config(values: dict[str, Any], file: GgufFile) -> PreTrainedConfig:
    """The config, with the type of weights that a GPU computes in: float16 if the file is of it, else bfloat16."""
    types = {_type_of(tensor) for tensor in file.tensors if len(tensor.shape) > 1}
    dtype = "float16" if types == {GGMLQuantizationType.F16} else "bfloat16"
    values = dict(values)
    config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values, dtype=dtype)
    return config


def num_bytes(file: GgufFile) -> int:
    """Bytes of the weights as they are written."""
    return sum(prod(tensor.shape) * _KEPT.get(_type_of(tensor), torch.float32).itemsize for tensor in file.tensors)


def write_weights(file: GgufFile, config: PreTrainedConfig, folder: Path, tell: Callable[[int, int], None]) -> None:
    """Write model.safetensors, or several files with their index.

    Args:
        file: the model.
        config: its config.
        folder: where to.
        tell: told of (tensors done, tensors in all), several times for a large one.

    Raises:
        UnsupportedModelError: the file has a tensor that the model has no place for.
        ModelLoadError: a weight is missing or of another shape.
    """
    plan = _plan(file, config)
    parts = list(_parts(plan))
    names = [_part_name(i, len(parts)) for i in range(len(parts))]
    done = 0
    places: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        weights: dict[str, torch.Tensor] = {}
        for target, tensor in part:
            read = _read(tensor, partial(tell, done, len(plan)))
            weights[target] = _as_transformers_has_it(read, tensor.name, file, config)
            done += 1
            tell(done, len(plan))
        save_file(weights, str(folder / name), metadata={"format": "pt"})
        tell(done, len(plan))
        places |= dict.fromkeys(weights, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": num_bytes(file)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _plan(file: GgufFile, config: PreTrainedConfig) -> _Plan:
    """The name of each tensor in transformers, and the tensor."""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    layers = config.num_hidden_layers
    names = get_tensor_name_map(arch, layers)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in auto.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    left = {tensor.name: tensor for tensor in file.tensors if tensor.name not in FACTORS}
    plan: _Plan = []
    for target, shape in shapes.items():
        stem, kind = target.rsplit(".", 1)
        name = f"{names.get_name(stem)}.{kind}"
        if name not in left:
            raise ModelLoadError(f"{file.paths[0]} has no tensor {name} ({target}): is the download complete?")
        tensor = left.pop(name)
        if tensor.shape != tuple(shape):
            raise ModelLoadError(
                f"{file.paths[0]} is broken: {name} is of shape {tensor.shape} but its metadata asks for {tuple(shape)}"
            )
        plan.append((target, tensor))
    if left:
        raise UnsupportedModelError(
            f"{file.paths[0]} holds {min(left)}, which {type(config).__name__} has no place for: use the checkpoint "
            "that it was made from"
        )
    return plan


def _parts(plan: _Plan) -> Iterator[_Plan]:
    part: _Plan = []
    size = 0
    for target, tensor in plan:
        more = prod(tensor.shape) * _KEPT.get(_type_of(tensor), torch.float32).itemsize
        if part and size + more > _MOST_BYTES:
            yield part
            part, size = [], 0
        part.append((target, tensor))
        size += more
    yield part


def _part_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"


def _read(tensor: GgufTensor, tell: Callable[[], None] = lambda: None) -> torch.Tensor:
    """A tensor's values, exactly; tells after each part of them."""
    kind = _type_of(tensor)
    block, size = GGML_QUANT_SIZES[kind]
    rows = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
    stored = np.fromfile(tensor.path, np.uint8, prod(rows), offset=tensor.offset)
    if kind in _KEPT:
        return torch.from_numpy(stored).view(_KEPT[kind]).reshape(tensor.shape)
    if kind == GGMLQuantizationType.F32:
        return torch.from_numpy(stored.view(np.float32)).reshape(tensor.shape)
    values = np.empty((prod(tensor.shape[:-1]), tensor.shape[-1]), np.float32)
    stored, step = stored.reshape(len(values), -1), max(_AT_ONCE // tensor.shape[-1], 1)
    try:
        for i in range(0, len(values), step):
            values[i : i + step] = dequantize(stored[i : i + step], kind)
            tell()
        return torch.from_numpy(values).reshape(tensor.shape)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{tensor.path} stores {tensor.name} as {kind.name}, which the installed gguf package cannot dequantise: "
            "try pip install -U gguf"
        ) from error


def _as_transformers_has_it(weight: torch.Tensor, name: str, file: GgufFile, config: PreTrainedConfig) -> torch.Tensor:
    """Undo what the way into GGUF did to a tensor's values."""
    if file.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
    if file.architecture == "gemma3" and name.endswith("norm.weight"):
        return weight - 1
    return weight
