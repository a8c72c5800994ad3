"""What the models of both frameworks have in common: construction, bad options, copies, pickles, and loading."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    CopySpecDrafter,
    DraftModelDrafter,
    Engine,
    EngineConfig,
    LoadProgress,
    NoDrafter,
)
from copyspec_engine.adapters.model import LocalModel
from copyspec_engine.testing import scripted_engine
from langchain_copyspec import ChatCopySpec
from llama_index.llms.copyspec import CopySpec

Kind = type[ChatCopySpec] | type[CopySpec]


@pytest.fixture(params=[ChatCopySpec, CopySpec])
def kind(request: pytest.FixtureRequest) -> Kind:
    assert issubclass(request.param, LocalModel)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine([], EngineConfig(model="scripted", device="cpu", max_model_len=512)) as made:
        yield made


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_constructor_loads_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: EngineConfig, _on_progress: object) -> Engine:
        raise AssertionError(f"loaded {config.model}")

    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", load)
    assert kind().model == "smollm2"
    assert kind(model="/no/such/folder").model == "/no/such/folder"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": "many"}, "max_tokens='many'"),
        ({"stop": [""]}, "stop"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"model": ""}, "model=''"),
        ({"drafter": "fast"}, "drafter='fast'"),
        ({"session_id": ""}, "session_id=''"),
        ({"memory_pool": ""}, "memory_pool=''"),
        ({"prediction": {"type": "image"}}, "prediction=.* but expected a text, or"),
        ({"timeout": 0}, "timeout=0"),
        ({"min_p": 2}, "min_p=2"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs=2 without logprobs"),
        ({"cache_salt": ""}, "cache_salt=''"),
        ({"temprature": 1}, "unknown option temprature=1 for (ChatCopySpec|CopySpec): use temperature"),
        ({"max_new_tokens": 5}, "use max_tokens"),
        ({"combine": "tree"}, r"use drafter=AdaptiveDrafter\(draft_model_use=...\)"),
        ({"num_ctx": 5}, r"use engine=EngineConfig\(max_model_len=...\)"),
        ({"context_window": 5}, r"use engine=EngineConfig\(max_model_len=...\)"),
        ({"model_name": "m"}, "use model"),
        ({"api_key": "x"}, "api_key without base_url: it is a server's key"),
        ({"api_base": "http://here"}, "base_url"),
        ({"organization": "x"}, "leave it out, the model runs in this process, or behind base_url"),
    ],
)
def test_a_bad_option_raises_by_name_and_value(kind: Kind, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kind(**options)


@pytest.mark.parametrize(
    ("drafter", "expected"),
    [
        ("adaptive", AdaptiveDrafter()),
        ("copyspec", CopySpecDrafter()),
        ("draft-model", DraftModelDrafter()),
        ("none", NoDrafter()),
        (CopySpecDrafter(block=5), CopySpecDrafter(block=5)),
        ({"name": "copyspec", "block": 5}, CopySpecDrafter(block=5)),
    ],
)
def test_a_drafter_may_be_a_name_or_an_object(kind: Kind, drafter: object, expected: object) -> None:
    assert kind(drafter=drafter).drafter == expected


def test_an_engine_decides_model_device_and_dtype(kind: Kind, engine: Engine) -> None:
    llm = kind(engine=engine)
    assert (llm.model, llm.device, llm.dtype) == ("scripted", "cpu", "auto")
    with pytest.raises(ConfigError, match="model='other' but the engine has model='scripted'"):
        kind(engine=engine, model="other")


def test_an_engine_config_gives_every_engine_option(kind: Kind) -> None:
    config = EngineConfig(model="some/model", kv_cache_tokens=1000)
    llm = kind(engine=config)
    assert llm.model == "some/model"
    assert llm._engine_config() == config


def test_pickling_keeps_options_and_the_engines_config(kind: Kind, engine: Engine) -> None:
    llm = kind(engine=engine, temperature=0.5, stop=["x"], drafter="copyspec", session_id="s")
    loaded = pickle.loads(pickle.dumps(llm))
    assert loaded._engine_config() == engine.config
    assert loaded.engine == engine.config
    assert (loaded.temperature, loaded.stop, loaded.drafter, loaded.session_id) == (0.5, ["x"], CopySpecDrafter(), "s")
    assert len(loaded._conversations) == 0
    assert llm.engine is engine


def test_a_copy_shares_the_engine(kind: Kind, engine: Engine) -> None:
    llm = kind(engine=engine)
    assert copy.copy(llm).engine is engine
    assert copy.deepcopy(llm).engine is engine
    assert llm.model_copy(deep=True).engine is engine


# ---- loading -------------------------------------------------------------------------------------------------------


def fresh(kind: Kind, said: list[LoadProgress]) -> ChatCopySpec | CopySpec:
    """A model with an engine of its own."""
    config = EngineConfig(model="bundled", step_cost=((1, 1.0), (2, 1.1)), max_model_len=512, max_waiting=id(said))
    return kind(engine=config, on_progress=said.append)


def test_load_loads_once_and_tells_of_it(kind: Kind) -> None:
    said: list[LoadProgress] = []
    llm = fresh(kind, said)
    assert said == [], "the constructor loads nothing"
    assert llm.load() is llm
    assert {"read", "check", "compile"} <= {progress.phase for progress in said}
    count, engine = len(said), llm._get_engine()
    with ThreadPoolExecutor(4) as pool:
        assert set(map(id, pool.map(lambda _: llm.load(), range(8)))) == {id(llm)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", None)  # what is there needs no thread
        assert asyncio.run(llm.aload()) is llm
    assert llm._get_engine() is engine
    assert len(said) == count
    engine.close()


def test_what_the_listener_raises_ends_the_load_and_another_call_loads(kind: Kind) -> None:
    def explode(_progress: LoadProgress) -> None:
        raise RuntimeError("stop here")

    said: list[LoadProgress] = []
    llm = fresh(kind, said)
    with pytest.raises(RuntimeError, match="stop here"):
        llm.model_copy(update={"on_progress": explode}).load()
    engine = llm.load()._get_engine()
    assert isinstance(engine, Engine)
    engine.close()


def test_a_listener_stays_with_copies_and_out_of_whatever_is_written(kind: Kind) -> None:
    said: list[LoadProgress] = []
    llm = fresh(kind, said)
    told, untold = llm, llm.model_copy(update={"on_progress": None})
    assert told.model_dump() == untold.model_dump()
    assert repr(told) == repr(untold)
    assert pickle.loads(pickle.dumps(llm)).on_progress is None
    assert copy.deepcopy(llm).on_progress == llm.on_progress
    assert llm.model_copy().on_progress == llm.on_progress
