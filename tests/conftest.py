"""Engines over tiny random models and the byte tokenizer, so that stop texts and chats work on them; and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.execution.architectures import ARCHITECTURES, END, build_model

__all__ = ["ARCHITECTURES", "END", "STEP_COST", "Written", "assert_all_slots_free", "build_model"]

STEP_COST = ((1, 1.0), (8, 1.1), (64, 1.6))
"""A fixed curve: drafts must not depend on how busy the test machine is."""


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """make_engine("llama", **options) -> an engine over a tiny random model; closed after the test."""
    engines: list[Engine] = []

    def make(name: str = "llama", *, seed: int = 1, **options: Any) -> Engine:
        config = EngineConfig(**{"model": f"tiny-{name}", "step_cost": STEP_COST, **options})
        model = build_model(name, seed)
        if config.dtype != "auto":
            model = model.to(getattr(torch, config.dtype))
        loaded = prepare(model, ByteTokenizer(), config)
        engines.append(Engine(config, model=loaded))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    made = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: made)
    return made


@pytest.fixture
def spans(provider: TracerProvider) -> Callable[[], list[ReadableSpan]]:
    """spans() -> those of calls that are over, in the order of their ends; children come before their parents."""
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return lambda: list(exporter.get_finished_spans())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without windows. Playwright keeps an event loop in this thread, so it ends with its module."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


def assert_all_slots_free(engine: Engine) -> None:
    """After every request is over, only rows that are kept for later calls use slots, each as often as it says."""
    core = loop_of(engine).core
    users = np.zeros(core.kv.pool.num_slots, dtype=np.int32)
    for row in core.kv.cache.sequences:
        assert len(row.slots) == len(row.token_ids) == len(np.unique(row.slots))
        users[row.slots] += 1
    assert (users == core.kv.pool.users).all()
    assert (users == core.kv.cache.users).all()
    assert core.kv.pool.num_free == (users == 0).sum()
    assert not core.scheduler
    assert not loop_of(engine).requests


class Written:
    """What requests have written before a pass, for a runner that is watched from their first pass on."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}

    def of(self, piece: Piece) -> list[int]:
        prompt = self._prompts.setdefault(piece.key, len(piece.text))
        return list(piece.text[prompt:])
