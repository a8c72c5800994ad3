from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.testing import scripted_engine

Replies = Sequence[str] | Callable[[str], str]
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Makes scripted engines and closes them after the test."""
    engines: list[Engine] = []

    def make(replies: Replies, **config: object) -> Engine:
        engines.append(scripted_engine(replies, EngineConfig(**{"model": "scripted", **config})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def echo(make_engine: MakeEngine) -> Engine:
    """Answers with the last user message, upper-cased."""
    return make_engine(lambda prompt: prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].upper())
