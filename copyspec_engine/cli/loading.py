"""The engine options that commands share, and the config that they make."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from copyspec_engine import EngineConfig

__all__ = ["BUNDLED", "DEFAULT", "Device", "Dtype", "DtypeName", "engine_config"]

BUNDLED = "bundled"
DEFAULT = "smollm2"
"""A small real chat model, fetched once: it writes what it likes, not only copies."""
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Device = Annotated[str, typer.Option(help="auto, all (GPUs), cpu, cuda, cuda:N, mps or xpu.")]
Dtype = Annotated[
    DtypeName,
    typer.Option(help="auto is float32 on a CPU and the checkpoint's own type on a GPU."),
]


def engine_config(model: str, device: str, dtype: DtypeName, **options: Any) -> EngineConfig:  # noqa: ANN401
    """The config of a model that a command names.

    What is measured and shown is plain greedy decoding, whatever the checkpoint's generation_config.json asks for.
    """
    return EngineConfig(**{"model": model, "device": device, "dtype": dtype, "generation_config": "ignore", **options})
