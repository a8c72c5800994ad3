"""What an engine says of itself: the model that it has loaded, and the machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import replace

import torch

from copyspec_engine.execution.accelerator import device_name, memory_of
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.loop.step import EngineCore
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.info import EngineInfo
from copyspec_engine.values.progress import LoadPhase

__all__ = ["engine_info"]

_PACKAGES = ("copyspec", "torch", "transformers", "numba", "llguidance", "langchain-core", "llama-index-core")


def engine_info(
    config: EngineConfig, model: LoadedModel, load_seconds: Mapping[LoadPhase, float], core: EngineCore | None = None
) -> EngineInfo:
    """The facts of a loaded model.

    Args:
        config: what was asked for.
        model: what was loaded.
        load_seconds: what the phases of loading took.
        core: what serves it; None for a model that is only looked at.
    """
    device = torch.device(model.info.device)
    free, total = memory_of(device)
    return replace(
        model.info,
        draft_model_error=None if core is None else core.draft_model_error,
        memory_path=config.memory_path if core is not None and core.text_store is not None else None,
        memory_error=None if core is None else core.memory_error,
        load_seconds={str(phase): round(seconds, 3) for phase, seconds in load_seconds.items()},
        device_name=device_name(device),
        device_memory=(free, total),
        cpu_threads=torch.get_num_threads(),
        cpu_features=torch.backends.cpu.get_cpu_capability(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
