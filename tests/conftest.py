"""Engines over tiny random models and the byte tokenizer, so that stop texts and chats work on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.model_runner import prepare
from copyspec_engine.testing import ByteTokenizer
from tests.architectures import ARCHITECTURES, END, build_model

__all__ = ["ARCHITECTURES", "END", "STEP_COST", "assert_all_slots_free", "build_model"]

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
        loaded = prepare(build_model(name, seed), ByteTokenizer(), config)
        engines.append(Engine(config, model=loaded))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def assert_all_slots_free(engine: Engine) -> None:
    """After every request is over, only the sessions hold KV."""
    assert engine._core.pool.num_free + engine._core.sessions.num_cached_slots == engine._core.pool.num_slots
    held = [slot for session in engine._core.sessions._sessions.values() for slot in session.cached_slots.tolist()]
    assert len(held) == len(set(held))
    assert not engine._requests
