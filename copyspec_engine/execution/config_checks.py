"""Whether a checkpoint's config.json can be true, before anything is built from it.

A damaged or made-up one may ask for all of the machine's memory, or fail much later and say nothing of the reason.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from copyspec_engine.values.errors import ModelLoadError

__all__ = ["refuse_impossible", "refuse_unreadable"]

_LAYERS, _SIZE, _LENGTH = 10_000, 10_000_000, 2**31
"""Far above what any model has."""
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size"), _SIZE),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _LENGTH),
}
"""Whole numbers from 1, and the most that is believed."""
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rope_theta")
_PARTS = ("text_config", "language_config", "llm_config")
_LEAST_BYTES = 0.5
"""Of a weight: 4 bits are the fewest in use."""


def refuse_unreadable(name: str, file: Path) -> None:
    """Turn away a file, if it is there, that is no JSON object.

    Raises:
        ModelLoadError: it is none; the error says why.
    """
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"Got a {file.name} of {name} that cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"Got a {file.name} of {name} that holds a {type(content).__name__}, not an object")


def refuse_impossible(name: str, config: dict[str, Any], *, on_cpu: bool = True) -> None:
    """Turn away a config.json that no model can have.

    Args:
        name: the model's, for the error.
        config: what the file holds.
        on_cpu: the weights are to lie in the machine's own memory.

    Raises:
        ModelLoadError: a value is none that it can be, or more than this machine can hold; the error names it.
    """
    for where, value in _not_numbers(config):
        raise _impossible(name, where, value, "a number")
    for part, values in (("", config), *((f"{part}.", config.get(part)) for part in _PARTS)):
        if isinstance(values, dict):
            _check(name, part, values)
            if on_cpu:
                _check_memory(name, values)


def _check(name: str, part: str, config: dict[str, Any]) -> None:
    for key, most in _COUNTS.items():
        given = config.get(key)
        for value in given if isinstance(given, list) else [given]:  # some have one for each layer
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise _impossible(name, part + key, value, f"a whole number from 1 to {most:,}")
    for key in _POSITIVE:
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise _impossible(name, part + key, value, "a number above 0")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise _impossible(name, f"{part}num_key_value_heads", shared, f"a divisor of num_attention_heads={heads}")


def _check_memory(name: str, config: dict[str, Any]) -> None:
    """A bound from below: one embedding, and one matrix in each layer."""
    width, inner, layers, tokens = (
        value if isinstance(value := config.get(key), int) else 0
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    least, there = _LEAST_BYTES * width * (tokens + layers * inner), _machine_bytes()
    if there is not None and least > there:
        raise ModelLoadError(
            f"Got a config.json of {name} with hidden_size={width}, intermediate_size={inner}, num_hidden_layers="
            f"{layers} and vocab_size={tokens}: its weights take {least / 1e9:,.0f} GB at least, and this machine "
            f"has {there / 1e9:,.0f} GB. Use a smaller model, or correct the file"
        )


def _machine_bytes() -> int | None:
    """All memory of this machine; None if it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _not_numbers(value: object, where: str = "") -> Iterator[tuple[str, float]]:
    """Every NaN, wherever it stands."""
    if isinstance(value, float) and math.isnan(value):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_numbers(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _not_numbers(item, f"{where}[{i}]")


def _impossible(name: str, where: str, value: object, expected: str) -> ModelLoadError:
    return ModelLoadError(
        f"Got {where}={value!r} in the config.json of {name} but expected {expected}: is the file damaged?"
    )
