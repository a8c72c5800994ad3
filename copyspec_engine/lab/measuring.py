"""What measurements share: the engine that is measured, and the file of the figures with what they hang on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.markup import escape

from copyspec_engine import ConfigError, Engine, EngineConfig, EngineInfo
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.files import check_writable, write_text
from copyspec_engine.execution.calibration import cpu_name

__all__ = [
    "Measured",
    "drafting_engine",
    "facts_of_engine",
    "machine",
    "memory_of",
    "recorded",
    "version",
    "versions",
    "write_record",
]

Measured = tuple[int, dict[str, Any]]
"""The exit code of a command, and the figures for its file."""


class _WithFile(Protocol):
    @property
    def json(self) -> Path | None: ...


Options = TypeVar("Options", bound=_WithFile)


def recorded(measure: Callable[[Options, Console], Measured], options: Options, command: str, console: Console) -> int:
    """Measures, and writes the figures with the command and the time to the file `options.json`, if there is one.

    Returns:
        The exit code; nothing is written of a measurement without figures.

    Raises:
        ConfigError: the file cannot be written; found before anything is measured.
        CopySpecError: see `measure`.
    """
    check_writable(options.json, "--json")
    code, record = measure(options, console)
    if options.json and record:
        write_record(options.json, record, command)
        console.print(f"Wrote {escape(str(options.json))}", soft_wrap=True)
    return code


def write_record(path: Path, record: Mapping[str, Any], command: str) -> None:
    """Writes figures with the command and the time.

    Raises:
        ConfigError: the file cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_text(path, json.dumps({**record, "command": command, "date": now}, indent=1) + "\n", "--json")


@contextmanager
def drafting_engine(config: EngineConfig, name: str | None = None) -> Iterator[Engine]:
    """The engine of a measurement that compares drafting with plain decoding.

    Args:
        config: of the engine.
        name: of the model, while it loads; default: as the config names it.

    Raises:
        ConfigError: the model runs without drafting.
        CopySpecError: it cannot be loaded.
    """
    with loading(name or config.model) as shown:
        engine = Engine(config, on_progress=shown)
    with engine:
        if engine.info.drafting_error is not None:
            raise ConfigError(f"There is nothing to compare: {engine.info.model} runs without drafting")
        yield engine


def facts_of_engine(info: EngineInfo) -> dict[str, Any]:
    """What figures of an engine hang on."""
    return {
        "model": info.model,
        "device": info.device,
        "dtype": info.dtype,
        "step_cost": info.step_cost,
        "versions": dict(info.versions),
        "machine": machine(info.device),
    }


def versions() -> dict[str, str]:
    """The versions that figures without a model depend on."""
    packages = ("copyspec", "tokenizers", "numpy", "numba", "arctic-inference")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def version(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the times were measured on.

    Args:
        device: where the model ran; of a CUDA device the name is there too.
    """
    found: dict[str, Any] = {"system": platform.platform(), "cpu": cpu_name(), "cpu_cores": os.cpu_count() or 0}
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def memory_of(pid: int) -> dict[str, int] | None:
    """Bytes of main memory that a process holds, and the most that it held; None where the system has no /proc.

    Pages of a mapped file count as soon as they are read.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {key: int(found[name].split()[0]) * 1024 for key, name in (("bytes", "VmRSS"), ("peak_bytes", "VmHWM"))}
