"""The engine options that commands share."""

from __future__ import annotations

from typing import Any, Literal

from copyspec_engine import EngineConfig

__all__ = ["BUNDLED", "DEFAULT", "DtypeName", "engine_config"]

BUNDLED = "bundled"
DEFAULT = "smollm2"
"""A small real chat model, fetched once: it writes what it likes, not only copies."""
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def engine_config(model: str, device: str, dtype: DtypeName, **options: Any) -> EngineConfig:  # noqa: ANN401
    """The config of a model that a command names.

    What is measured and shown is plain greedy decoding, whatever the checkpoint's generation_config.json asks for.
    """
    return EngineConfig(**{"model": model, "device": device, "dtype": dtype, "generation_config": "ignore", **options})
