"""The machine's accelerator, of whatever make: CUDA (ROCm too), Apple's MPS or Intel's XPU, by `torch.accelerator`.

What only CUDA has (paged attention, graphs, compiled layers) is in `cuda_graphs` and `paged_attention`; everything else
asks here. MPS, XPU and ROCm were not run yet: what a model computes there is compared with its own logits as it loads,
like everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from copyspec_engine.execution.calibration import cpu_name

__all__ = ["best_device", "device_count", "device_name", "has_float64", "memory_of"]

_CHOSEN = ("cuda", "mps", "xpu")
"""What device="auto" takes; a build of torch has one of them."""


def best_device() -> torch.device:
    """The accelerator that can be used here, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu" if found is None or found.type not in _CHOSEN else found.type)


def device_count(kind: str) -> int:
    """How many devices of a kind ("cuda", "mps", "xpu") can be used here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return 0 if found is None or found.type != kind else torch.accelerator.device_count()


def has_float64(device: torch.device) -> bool:
    """Whether it computes in double precision; Apple's does not."""
    return device.type != "mps"


def device_name(device: torch.device) -> str:
    """What its maker calls it."""
    if device.type == "cpu":
        return cpu_name()
    if device.type == "mps":
        return f"Apple GPU of {cpu_name()}"
    return str(torch.get_device_module(device).get_device_name(device))


def memory_of(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes; on a CPU those that the kernel calls available, else half of the machine's."""
    if device.type == "cpu":
        return _machine_memory()
    if device.type == "mps":  # it shares the machine's memory, up to a limit
        limit = int(torch.mps.recommended_max_memory())
        return max(min(limit - int(torch.mps.driver_allocated_memory()), _machine_memory()[0]), 0), limit
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def _machine_memory() -> tuple[int, int]:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
        return free, total
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // 2, total
