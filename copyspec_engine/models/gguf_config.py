"""A GGUF file's metadata as a transformers config.

Everything that the file says of the architecture is taken or the file is refused: a key that is passed over could
change the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from copyspec_engine.models.gguf_file import GgufFile
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError

__all__ = ["ARCHITECTURES", "FACTORS", "config_of"]

FACTORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
"""Tensors that belong to the config, not to the weights."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The only values that Llama 3's scaling was published with; a GGUF file holds what follows from them."""
_HARMLESS = {"tensor_data_layout", "vocab_size", "rope.scaling.finetuned"}
_USUAL = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0}
"""Keys that say nothing with these values."""
_GEMMA_PERIOD = 6


class _Keys:
    """The keys of a file's architecture; remembers which of them were asked for."""

    def __init__(self, file: GgufFile, factors: dict[str, np.ndarray[Any, Any]]) -> None:
        self.file, self.factors = file, factors
        prefix = file.architecture + "."
        self._values = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
        self._left = set(self._values)
        self.tensors = {tensor.name: tensor for tensor in file.tensors}

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - numbers, texts and lists
        self._left.discard(key)
        return self._values.get(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that is the same in all layers."""
        return int(self.value(key, default))

    def value(self, key: str, default: float | None = None) -> float:
        """A number that is the same in all layers."""
        value, name = self.get(key, default), f"{self.file.architecture}.{key}"
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModelError(f"{self.file.paths[0]} has layers of several kinds ({name}={value})")
        if not isinstance(value, int | float):
            raise ModelLoadError(f"{self.file.paths[0]} is broken: it has {name}={value!r}. Fetch it again")
        return value

    def refuse_others(self) -> None:
        usual = _USUAL | {"attention.value_length": self.head_dim}
        others = sorted(key for key in self._left - _HARMLESS if key not in usual or self._values[key] != usual[key])
        if others:
            raise UnsupportedModelError(
                f"{self.file.paths[0]} sets {self.file.architecture}.{others[0]}={self._values[others[0]]!r}, which is "
                "not understood here and may change what the model says: use the checkpoint that it was made from"
            )

    @property
    def head_dim(self) -> int:
        return self.count("attention.key_length", self.count("embedding_length") // self.count("attention.head_count"))


def config_of(file: GgufFile, factors: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """The values of a config.json.

    Args:
        file: the model.
        factors: the tensors named in FACTORS that it has, as float32.

    Raises:
        UnsupportedModelError: another architecture, or a part of it that is not known here.
        ModelLoadError: a key is missing.
    """
    build = ARCHITECTURES.get(file.architecture)
    if build is None:
        raise UnsupportedModelError(
            f"{file.paths[0]} is of the architecture {file.architecture!r}, but GGUF files are read of "
            f"{', '.join(sorted(ARCHITECTURES))}: use the checkpoint that it was made from"
        )
    keys = _Keys(file, factors)
    values = _common(keys) | build(keys)
    keys.refuse_others()
    return values


def _common(keys: _Keys) -> dict[str, Any]:
    heads = keys.count("attention.head_count")
    embedding = keys.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{keys.file.paths[0]} has no token_embd.weight: fetch it again")
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        "max_position_embeddings": keys.count("context_length"),
        "hidden_size": keys.count("embedding_length"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": keys.head_dim,
        "rms_norm_eps": keys.value("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in keys.tensors,
        **{f"{key}_token_id": keys.file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in named.items()},
    }


def _rope(keys: _Keys) -> dict[str, Any]:
    """How positions are turned into angles, without what only one architecture has."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.value("rope.freq_base", 10_000.0)}
    turned = keys.count("rope.dimension_count", keys.head_dim)
    if turned != keys.head_dim:
        rope["partial_rotary_factor"] = turned / keys.head_dim
    kind = keys.get("rope.scaling.type", "linear")  # what is not said is linear, by no factor
    factor = keys.value("rope.scaling.factor", keys.value("rope.scale_linear", 1.0)) or 1.0
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        original = keys.count("rope.scaling.original_context_length")
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        rope |= {"beta_fast": keys.value("rope.scaling.yarn_beta_fast", 32.0)}
        rope |= {"beta_slow": keys.value("rope.scaling.yarn_beta_slow", 1.0)}
    elif kind not in ("linear", "none", "longrope"):
        raise UnsupportedModelError(f"{keys.file.paths[0]} scales positions by {kind!r}, which is not known here")
    if "rope_freqs.weight" in keys.factors:
        rope |= _llama3(keys, rope)
    return rope


def _llama3(keys: _Keys, rope: dict[str, Any]) -> dict[str, Any]:
    """The parameters that the factors of Llama 3's scaling follow from."""
    factors = keys.factors["rope_freqs.weight"].astype(np.float64)
    original, low, high = 8192, _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    factor = float(np.float32(factors.max()))
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(len(factors)) * 2 / keys.head_dim)
    smooth = ((original / wavelength) - low) / (high - low)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, expected))
    if rope["rope_type"] != "default" or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{keys.file.paths[0]} scales positions by a rope_freqs.weight that is not that of Llama 3: use the "
            "checkpoint that it was made from"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _whole_rope(keys: _Keys) -> dict[str, Any]:
    rope = _rope(keys)
    if "partial_rotary_factor" in rope:
        raise UnsupportedModelError(f"{keys.file.paths[0]} turns only a part of each head: that is not known here")
    return rope


def _llama(keys: _Keys) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in keys.tensors,
        "rope_parameters": _whole_rope(keys),
    }


def _qwen2(keys: _Keys) -> dict[str, Any]:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_parameters": _whole_rope(keys)}


def _qwen3(keys: _Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        "rope_parameters": _whole_rope(keys),
    }


def _gemma3(keys: _Keys) -> dict[str, Any]:
    layers, width = keys.count("block_count"), keys.count("embedding_length") // keys.count("attention.head_count")
    period = keys.count("attention.sliding_window_pattern", _GEMMA_PERIOD)
    largest = layers == 62  # of the published sizes only this one scales by the width, and the file does not say so
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)],
        "query_pre_attn_scalar": width if largest else keys.head_dim,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": _whole_rope(keys),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": keys.value("rope.freq_base_swa", 10_000.0),
            },
        },
    }


def _phi3(keys: _Keys) -> dict[str, Any]:
    rope, factors = _rope(keys), keys.factors
    original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    attention = keys.value("rope.scaling.attn_factor", 1.0) or 1.0
    if "rope_factors_long.weight" in factors:
        rope |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "attention_factor": attention,
            **{FACTORS[name]: factors[name].astype(float).tolist() for name in factors},
        }
    elif attention != 1.0:
        raise UnsupportedModelError(f"{keys.file.paths[0]} scales attention by {attention}: that is not known here")
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
        "rope_parameters": rope,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }


ARCHITECTURES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "gemma3": _gemma3,
    "llama": _llama,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
"""By GGUF's names of them."""
