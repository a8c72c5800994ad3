"""Where narrow weights come from: a GGUF file's own blocks, a checkpoint in half precision, or one that was upcast."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from copyspec_engine.execution.narrow_linear import NarrowEmbedding, NarrowLinear
from copyspec_engine.execution.narrow_weights import NarrowWeight, from_gguf, narrow_weight
from copyspec_engine.models.gguf_weights import AS_STORED
from copyspec_engine.models.tensor_file import StoredTensor, read_header
from copyspec_engine.values.errors import ModelLoadError

__all__ = ["NarrowLayers", "count_weights", "fill_narrow", "narrow_weights", "weight_bytes"]

_METHOD = "copyspec-narrow"
_MOST_WIDE = 1 / 16
"""Of a model's weights: what may stay in float32 where all is to be narrow. Norms and biases are far less."""
_DOWNLOAD = "is the download complete?"
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def narrow_weights(model: nn.Module, folder: Path | None) -> dict[str, NarrowWeight]:
    """The weights of a model's linear layers in the precision that they came in, by the layers' names.

    A layer is left out whose weight needs float32, that is no plain linear layer on a CPU, or that has been packed. An
    embedding is there if it shares its weight with a linear layer, or is narrow itself.

    Args:
        model: in memory, as it was read.
        folder: where it was read from; None: its weights have changed since, or came from elsewhere.
    """
    stored = _Stored.of(folder, values=False) if folder is not None else None
    layers = {name: module for name, module in model.named_modules() if _is_plain(module)}
    names: dict[int, list[str]] = {}
    for name, module in layers.items():
        names.setdefault(id(module.weight), []).append(name)
    found: dict[str, NarrowWeight] = {}
    for those in names.values():
        if any(isinstance(layers[name], nn.Linear) for name in those):
            weights = tuple(f"{name}.weight" for name in those)
            values: Any = layers[those[0]].weight.detach()
            narrow = (None if stored is None else stored.blocks_of(weights)) or narrow_weight(values)
            if narrow is not None:
                found.update(dict.fromkeys(those, narrow))
    own = {name: module for name, module in model.named_modules() if isinstance(module, NarrowLinear | NarrowEmbedding)}
    return found | {name: module.narrow for name, module in own.items()}


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer computes what its weight says, in float32 on a CPU."""
    if not (type(module) is nn.Linear or isinstance(module, nn.Embedding)):
        return False
    weight = module.weight
    return (
        type(weight.data) is torch.Tensor
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
    )


def count_weights(model: PreTrainedModel) -> int:
    """How many weights a model has; narrow and shared ones once."""
    narrow = sum(weight.out_features * weight.in_features for weight in set(_narrow_in(model)))
    return model.num_parameters() + narrow


def weight_bytes(model: nn.Module, beside: Iterable[NarrowWeight] = ()) -> tuple[int, int]:
    """Bytes of a model's weights as (wide, narrow): those of its parameters, and narrow ones in it and beside it."""
    wide = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return wide, sum(
        weight.nbytes for weight in {id(weight): weight for weight in (*_narrow_in(model), *beside)}.values()
    )


def _narrow_in(model: nn.Module) -> list[NarrowWeight]:
    return [module.narrow for module in model.modules() if isinstance(module, NarrowLinear | NarrowEmbedding)]


# ---- a model that has no others --------------------------------------------------------------------------------------


@register_quantization_config(_METHOD)
class NarrowLayers(QuantizationConfigMixin):
    """Has transformers build a model with narrow layers, for whose weights no memory is taken (see `fill_narrow`)."""

    def __init__(self) -> None:
        method: Any = _METHOD  # an enum names those that come with transformers
        self.quant_method = method


@register_quantizer(_METHOD)
class _NarrowQuantizer(HfQuantizer):
    """Puts the layers into a model before its other weights are read."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:  # noqa: ANN401
        tied, read_apart = dict(model.all_tied_weights_keys), set()
        for name, module in list(model.named_modules()):
            if not (type(module) is nn.Linear or isinstance(module, nn.Embedding)):
                continue
            weight = f"{name}.weight"
            source = tied.get(weight, weight)
            equal = [source, *(target for target, its_source in tied.items() if its_source == source)]
            names = (weight, *(other for other in equal if other != weight))
            if isinstance(module, nn.Linear):
                model.set_submodule(name, NarrowLinear(module, names))
            else:
                model.set_submodule(name, NarrowEmbedding(module, names))
            model.all_tied_weights_keys.pop(weight, None)
            read_apart.add(rf"^(.*\.)?{re.escape(weight)}$")
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *read_apart}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:  # noqa: ANN401
        forget: Any = self.remove_quantization_config
        forget(model)  # what it computes is the float32 model's own function


def fill_narrow(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Read the weights of a model's narrow layers (see `NarrowLayers`), one tensor at a time.

    Args:
        model: whose other weights have been read.
        folder: where they were read from.
        name: the model's, for errors.

    Raises:
        ModelLoadError: a weight is missing or of another shape, or needs float32.
    """
    layers = [module for module in model.modules() if isinstance(module, NarrowLinear | NarrowEmbedding)]
    _refuse_wide(model, layers, name)
    stored = _Stored.of(folder, values=True, prefix=f"{model.base_model_prefix}.")
    read: dict[str, NarrowWeight] = {}
    for layer in transformers_logging.tqdm(layers, desc="Loading weights"):
        names = stored.names_of(layer.weight_names)
        if not names:
            raise ModelLoadError(f"{name} lacks {layer.weight_names[0]}, which its config asks for: {_DOWNLOAD}")
        shared = next((other for other in names if other in read and stored.are_equal(names[0], other)), None)
        layer.narrow = read[shared or names[0]] = read[shared] if shared else _read(stored, names[0], name)
        shape = (layer.narrow.out_features, layer.narrow.in_features)
        if shape != tuple(layer.weight.shape):
            raise ModelLoadError(
                f"{name} has {names[0]} in the shape {shape}, but its config asks for {tuple(layer.weight.shape)}: "
                f"{_DOWNLOAD}"
            )


def _read(stored: _Stored, weight: str, name: str) -> NarrowWeight:
    narrow = stored.blocks_of((weight,)) or stored.halves_of(weight)
    if narrow is None:
        raise ModelLoadError(
            f"Got memory='narrow' but {name} stores {weight} as {stored.type_of(weight)}, which has no narrow form: "
            "leave it out, or use a checkpoint in bfloat16 or float16, or a GGUF file of type Q4_0, Q4_1, Q4_K, Q5_0, "
            "Q5_1, Q5_K, Q6_K or Q8_0"
        )
    return narrow


def _refuse_wide(model: PreTrainedModel, layers: list[NarrowLinear | NarrowEmbedding], name: str) -> None:
    narrow = sum(layer.weight.numel() for layer in layers)
    wide = {key: parameter.numel() for key, parameter in model.named_parameters()}
    if sum(wide.values()) > _MOST_WIDE * (narrow + sum(wide.values())):
        largest = max(wide, key=lambda key: wide[key])
        raise ModelLoadError(
            f"Got memory='narrow' but {sum(wide.values()):,} weights of {name} are in no linear layer (the largest: "
            f"{largest}): leave it out"
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a folder has of a model's weights."""

    blocks: dict[str, StoredTensor]
    types: dict[str, str]
    """Of blocks, as GGUF calls them."""
    values: dict[str, StoredTensor]
    prefix: str
    """Of names that a checkpoint may leave out."""

    @classmethod
    def of(cls, folder: Path, *, values: bool, prefix: str = "") -> _Stored:
        """Read the headers; those of the values only where they are wanted."""
        blocks, types = read_header(folder / AS_STORED) if (folder / AS_STORED).is_file() else ({}, {})
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(folder) if values else ():
            tensors |= read_header(file)[0]
        return cls(blocks, types, tensors, prefix)

    def blocks_of(self, names: tuple[str, ...]) -> NarrowWeight | None:
        """A weight from a GGUF file's blocks; None: there are none of a kind that can be read."""
        name = next((name for name in names if name in self.blocks), None)
        if name is None:
            return None
        raw = self.blocks[name].read()
        kind = GGMLQuantizationType[self.types[name]]
        return from_gguf(raw, kind, _width(raw.shape[1], kind))

    def halves_of(self, name: str) -> NarrowWeight | None:
        """A weight whose values half precision holds."""
        tensor = self.values[name]
        if tensor.dtype not in _TORCH_TYPES or len(tensor.shape) != 2:
            return None
        return narrow_weight(torch.from_numpy(tensor.read()).view(_TORCH_TYPES[tensor.dtype]))

    def names_of(self, names: tuple[str, ...]) -> list[str]:
        """Under which of these names there are weights, without the prefix where the checkpoint has none."""
        tried = (other for name in names for other in (name, name.removeprefix(self.prefix)))
        return [name for name in dict.fromkeys(tried) if name in self.values]

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two names have the same bytes."""
        return name == other or np.array_equal(self.values[name].read(), self.values[other].read())

    def type_of(self, name: str) -> str:
        """What a weight is stored as."""
        return self.types.get(name, self.values[name].dtype)


def _width(row_bytes: int, kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(row_bytes // size * block)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / str(name) for name in sorted(names)]
    if not (folder / "model.safetensors").is_file():
        raise ModelLoadError(
            f"Got memory='narrow' but {folder} has no model.safetensors: leave it out, or save the checkpoint so"
        )
    return [folder / "model.safetensors"]
