"""The weights of a GGUF file, dequantised, under transformers' names; and beside them as they are in the file.

Every tensor of the file is used and every weight of the model filled, or the file is refused. A tensor is kept in the
narrowest type that holds its values exactly: float16 and bfloat16 as they are, all others in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, LlamaFileType, get_tensor_name_map
from gguf.quants import dequantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from copyspec_engine.models.gguf_config import FACTORS
from copyspec_engine.models.gguf_file import GgufFile, GgufTensor
from copyspec_engine.models.tensor_file import TensorWriter
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError

__all__ = ["AS_STORED", "check_tensors", "num_bytes", "quantization", "read_factors", "resolve_config", "write_weights"]

AS_STORED = "narrow.safetensors"
"""Beside a model's weights: the blocks of its matrices as a GGUF file has them, under transformers' names, and their
types in the metadata. Rows stand where transformers has them."""
_AT_ONCE = 2**22
"""Weights that are dequantised at a time; progress is told between them."""
_HALVES = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
Array = np.ndarray[Any, Any]
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


def read_factors(file: GgufFile) -> dict[str, Array]:
    """The tensors that say how positions are scaled."""
    return {tensor.name: next(_values(_stored(tensor), tensor))[0] for tensor in file.tensors if tensor.name in FACTORS}


def resolve_config(values: dict[str, Any], file: GgufFile) -> PreTrainedConfig:
    """The config, with the type of weights that a GPU computes in: float16 if the file is of it, else bfloat16."""
    types = {_type_of(tensor) for tensor in file.tensors if len(tensor.shape) > 1}
    dtype = "float16" if types == {GGMLQuantizationType.F16} else "bfloat16"
    values = dict(values)
    config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values, dtype=dtype)
    return config


def num_bytes(file: GgufFile) -> int:
    """Bytes of the weights as they are written: with their values, and those of matrices as they were stored too."""
    wide = sum(prod(tensor.shape) * _ITEM_BYTES[_wide_type(tensor)] for tensor in file.tensors)
    return wide + sum(_stored_bytes(tensor) for tensor in file.tensors if _is_kept_as_stored(tensor))


def write_weights(file: GgufFile, config: PreTrainedConfig, folder: Path, tell: Callable[[int, int], None]) -> None:
    """Write model.safetensors, and `AS_STORED`: the file's own blocks of its quantised matrices, if it has some.

    No more than the blocks of one tensor and the values of some of its rows are in memory at a time.

    Args:
        file: the model.
        config: its config.
        folder: where to.
        tell: told of (tensors done, tensors in all), several times for a large one.

    Raises:
        UnsupportedModelError: the file has a tensor that the model has no place for.
        ModelLoadError: a weight is missing or of another shape.
    """
    plan = sorted(_plan(file, config), key=lambda planned: -_ITEM_BYTES[_wide_type(planned[1])])
    wide = [(name, _wide_type(tensor), tensor.shape) for name, tensor in plan]
    kept = [
        (name, "U8", (tensor.shape[0], _stored_bytes(tensor) // tensor.shape[0]))
        for name, tensor in plan
        if _is_kept_as_stored(tensor)
    ]
    types = {name: _type_of(tensor).name for name, tensor in plan}
    with contextlib.ExitStack() as stack:
        values_file = stack.enter_context(TensorWriter(folder / "model.safetensors", wide, {"format": "pt"}))
        if kept:
            named = {name: types[name] for name, _, _ in kept}
            blocks_file = stack.enter_context(TensorWriter(folder / AS_STORED, kept, named))
        for done, (_, tensor) in enumerate(plan):
            stored = _stored(tensor)
            if len(tensor.shape) > 1:  # what is done to a matrix moves its rows alone, in whatever form they are
                stored = _as_transformers_has_it(stored, tensor.name, file, config)
            if _is_kept_as_stored(tensor):
                blocks_file.write(stored)
            for values in _values(stored, tensor):
                moved = values if len(tensor.shape) > 1 else _as_transformers_has_it(values, tensor.name, file, config)
                values_file.write(moved)
                tell(done, len(plan))
            tell(done + 1, len(plan))


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


def _wide_type(tensor: GgufTensor) -> str:
    """The narrowest type that holds the values of a matrix exactly, as safetensors calls it; vectors are float32."""
    kind = _type_of(tensor)
    return kind.name if kind in _HALVES and len(tensor.shape) > 1 else "F32"


def _is_kept_as_stored(tensor: GgufTensor) -> bool:
    return len(tensor.shape) == 2 and _type_of(tensor) not in (*_HALVES, GGMLQuantizationType.F32)


def _stored(tensor: GgufTensor) -> Array:
    """A tensor's bytes, shape (rows, bytes of a row); of a vector one row."""
    stored = np.fromfile(tensor.path, np.uint8, _stored_bytes(tensor), offset=tensor.offset)
    return stored.reshape(prod(tensor.shape[:-1]), -1)


def _values(stored: Array, tensor: GgufTensor) -> Iterator[Array]:
    """The values of rows, exactly, shape (rows, width), some of them at a time; a matrix of halves by their bits."""
    kind, width = _type_of(tensor), tensor.shape[-1]
    step = max(_AT_ONCE // width, 1)
    for rows in (stored[i : i + step] for i in range(0, len(stored), step)):
        if _wide_type(tensor) != "F32":
            yield rows.view(np.uint16)
        else:
            try:
                yield dequantize(rows, kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{tensor.path} stores {tensor.name} as {kind.name}, which the installed gguf package cannot "
                    "dequantise: try pip install -U gguf"
                ) from error


def _as_transformers_has_it(weight: Array, name: str, file: GgufFile, config: PreTrainedConfig) -> Array:
    """Undo what the way into GGUF did to a tensor.

    Args:
        weight: a matrix of which only the rows matter, in bytes or in values; or the values of a vector, shape (1, n).
        name: the tensor's.
        file: the model.
        config: its config.
    """
    if file.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        rows = weight if name.endswith("weight") else weight.T
        pairs = rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2)
        moved: Array = pairs.reshape(weight.shape)
        return moved
    if file.architecture == "gemma3" and name.endswith("norm.weight"):
        plain: Array = weight - np.float32(1)
        return plain
    return weight
