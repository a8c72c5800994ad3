"""Loading before the first call, and being told of it."""

from __future__ import annotations

import asyncio
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from copyspec_engine import Engine, EngineConfig, LoadProgress
from llama_index.llms.copyspec import CopySpec


def fresh(said: list[LoadProgress]) -> CopySpec:
    """A model with an engine of its own."""
    config = EngineConfig(step_cost=((1, 1.0), (2, 1.1)), max_model_len=512, max_waiting=id(said))
    return CopySpec(engine=config, on_progress=said.append)


def test_load_loads_once_and_tells_of_it() -> None:
    said: list[LoadProgress] = []
    llm = fresh(said)
    assert said == [], "the constructor loads nothing"
    assert llm.load() is llm
    assert {"read", "check", "compile"} <= {progress.phase for progress in said}
    count, engine = len(said), llm._get_engine()
    with ThreadPoolExecutor(4) as pool:
        assert set(map(id, pool.map(lambda _: llm.load(), range(8)))) == {id(llm)}
    assert asyncio.run(llm.aload()) is llm
    assert llm._get_engine() is engine
    assert len(said) == count
    engine.close()


def test_what_the_listener_raises_ends_the_load_and_another_call_loads() -> None:
    def explode(_progress: LoadProgress) -> None:
        raise RuntimeError("stop here")

    said: list[LoadProgress] = []
    llm = fresh(said)
    with pytest.raises(RuntimeError, match="stop here"):
        llm.model_copy(update={"on_progress": explode}).load()
    engine = llm.load()._get_engine()
    assert isinstance(engine, Engine)
    engine.close()


def test_a_listener_stays_with_copies_and_out_of_whatever_is_written() -> None:
    said: list[LoadProgress] = []
    llm = fresh(said)
    told, untold = llm, llm.model_copy(update={"on_progress": None})
    assert told.model_dump() == untold.model_dump()
    assert repr(told) == repr(untold)
    assert pickle.loads(pickle.dumps(llm)).on_progress is None
    assert copy.deepcopy(llm).on_progress == llm.on_progress
    assert llm.model_copy().on_progress == llm.on_progress
