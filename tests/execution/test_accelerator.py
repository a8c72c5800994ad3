"""Which device is taken and what is known of it, with accelerators of every make standing in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from copyspec_engine import ConfigError, EngineConfig, ModelLoadError
from copyspec_engine.execution.accelerator import best_device, device_name, has_float64, memory_of
from copyspec_engine.execution.checkpoint import resolve_device

GIB = 2**30


def stand_in(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 2) -> None:
    """A machine with `count` accelerators of a kind; None: with none."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _device: (3 * GIB, 8 * GIB))


@pytest.mark.parametrize(
    ("kind", "taken"), [("cuda", "cuda"), ("mps", "mps"), ("xpu", "xpu"), ("hpu", "cpu"), (None, "cpu")]
)
def test_auto_takes_the_accelerator_that_is_there(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, taken: str
) -> None:
    stand_in(monkeypatch, kind)
    assert best_device() == torch.device(taken)
    assert resolve_device(EngineConfig()) == torch.device(taken)
    assert resolve_device(EngineConfig(device="cpu")) == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "xpu")
    assert resolve_device(EngineConfig(device="xpu:1")) == torch.device("xpu:1")
    for device, says in (("xpu:2", "shows 2 XPU devices"), ("mps", "0 MPS devices"), ("cuda", "0 CUDA devices")):
        with pytest.raises(ModelLoadError, match=f"Got device='{device}' but this machine (shows )?.*{says}"):
            resolve_device(EngineConfig(device=device))
    with pytest.raises(ModelLoadError, match="device='all' but this machine shows no CUDA devices"):
        resolve_device(EngineConfig(device="all"))
    with pytest.raises(ConfigError, match="expected auto, all, cpu, cuda, cuda:N, mps, xpu or xpu:N"):
        EngineConfig(device="tpu")


def test_memory_is_what_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "xpu")
    assert memory_of(torch.device("xpu")) == (3 * GIB, 8 * GIB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 400)
    assert memory_of(torch.device("mps")) == (600, 1000)
    free, total = memory_of(torch.device("cpu"))
    assert 2**20 < free <= total


def test_names_and_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(get_device_name=lambda device: f"Arc at {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    assert device_name(torch.device("xpu", 1)) == "Arc at xpu:1"
    assert device_name(torch.device("mps")).startswith("Apple GPU")
    assert device_name(torch.device("cpu"))
    assert not has_float64(torch.device("mps"))
    assert has_float64(torch.device("xpu"))
