"""Construction, bad input, pickling, and what LlamaIndex asks about a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM

from copyspec_engine import AdaptiveDrafter, ConfigError, CopySpecDrafter, Engine, EngineConfig, NoDrafter
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

MakeEngine = Callable[..., Engine]


@pytest.fixture
def _no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: EngineConfig, _on_progress: object) -> Engine:
        raise AssertionError(f"loaded {config.model}")

    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", load)


@pytest.mark.usefixtures("_no_loading")
def test_the_constructor_and_traces_load_nothing() -> None:
    assert isinstance(CopySpec(), FunctionCallingLLM)
    assert CopySpec().model == "smollm2"
    assert CopySpec(temperature=0.5).to_payload()["temperature"] == 0.5
    assert CopySpecCompletion().to_payload()["class_name"] == "CopySpecCompletion"
    assert CopySpec.class_name() == "CopySpec"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": -3}, "seed=-3"),
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
        ({"temprature": 1}, "unknown option temprature=1 for CopySpec: use temperature"),
        ({"max_new_tokens": 5}, "use max_tokens"),
        ({"context_window": 5}, r"use engine=EngineConfig\(max_model_len=...\)"),
        ({"model_name": "m"}, "use model"),
    ],
)
def test_a_bad_option_raises_by_name_and_value(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CopySpec(**options)


@pytest.mark.parametrize(
    ("drafter", "expected"),
    [
        ("adaptive", AdaptiveDrafter()),
        ("copyspec", CopySpecDrafter()),
        ("none", NoDrafter()),
        (CopySpecDrafter(block=5), CopySpecDrafter(block=5)),
    ],
)
def test_a_drafter_may_be_a_name_or_an_object(drafter: object, expected: object) -> None:
    assert CopySpec(drafter=drafter).drafter == expected


def test_an_engine_decides_model_device_and_dtype(make_engine: MakeEngine) -> None:
    engine = make_engine([], device="cpu")
    llm = CopySpec(engine=engine)
    assert (llm.model, llm.device, llm.dtype) == ("scripted", "cpu", "auto")
    with pytest.raises(ConfigError, match="model='other' but the engine has model='scripted'"):
        CopySpec(engine=engine, model="other")


def test_an_engine_config_gives_every_engine_option() -> None:
    config = EngineConfig(model="some/model", kv_cache_tokens=1000)
    llm = CopySpec(engine=config)
    assert llm.model == "some/model"
    assert llm._engine_config() == config


def test_metadata_is_the_engines(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine([], max_model_len=512), max_tokens=7)
    metadata = llm.metadata
    assert (metadata.context_window, metadata.model_name) == (512, "scripted")
    assert metadata.num_output >= 7 + llm.count_tokens([ChatMessage(role="system", content=""), ChatMessage("")])
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (True, True)


def test_the_default_num_output_leaves_room_for_a_prompt(make_engine: MakeEngine) -> None:
    metadata = CopySpec(engine=make_engine([], max_model_len=128)).metadata
    assert 0 < metadata.num_output < metadata.context_window


def test_pickling_keeps_options_and_the_engines_config(make_engine: MakeEngine) -> None:
    engine = make_engine([], max_model_len=512)
    llm = CopySpec(engine=engine, temperature=0.5, stop=["x"], drafter="copyspec", session_id="s")
    loaded = pickle.loads(pickle.dumps(llm))
    assert loaded._engine_config() == engine.config
    assert loaded.engine == engine.config
    assert (loaded.temperature, loaded.stop, loaded.drafter, loaded.session_id) == (0.5, ["x"], CopySpecDrafter(), "s")
    assert llm.engine is engine


def test_a_copy_shares_the_engine(make_engine: MakeEngine) -> None:
    engine = make_engine([])
    assert copy.deepcopy(CopySpec(engine=engine)).engine is engine
    assert CopySpec(engine=engine).model_copy(deep=True).engine is engine


def test_options_survive_a_dict_also_inside_of_a_completion_model() -> None:
    llm = CopySpec(temperature=0.5, stop="x", drafter="copyspec", session_id="s")
    assert CopySpec.from_dict(llm.to_dict()).to_dict() == llm.to_dict()
    completion = CopySpecCompletion(llm=llm, system_prompt="be brief")
    loaded = CopySpecCompletion.from_dict(completion.to_dict())
    assert loaded.to_dict() == completion.to_dict()
    assert isinstance(loaded.llm, CopySpec)
    assert (loaded.llm.temperature, loaded.llm.session_id) == (0.5, "s")
    with pytest.raises(ConfigError, match="unknown option klass"):
        CopySpec.from_dict({**llm.to_dict(), "klass": "CopySpec"})


def test_options_survive_json(make_engine: MakeEngine) -> None:
    llm = CopySpec(temperature=0.5, stop="x", drafter="copyspec", system_prompt="be brief")
    loaded = CopySpec.from_json(llm.to_json())
    assert loaded.to_dict() == llm.to_dict()
    assert loaded.drafter == CopySpecDrafter()
    assert "engine" not in CopySpec(engine=make_engine([])).to_dict()
