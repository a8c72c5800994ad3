"""Construction, bad input, pickling, and what LlamaIndex asks about a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM

from copyspec_engine import ConfigError, CopySpecDrafter, Engine, EngineConfig
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


def test_metadata_is_the_engines(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine([], max_model_len=512), max_tokens=7)
    metadata = llm.metadata
    assert (metadata.context_window, metadata.model_name) == (512, "scripted")
    assert metadata.num_output >= 7 + llm.count_tokens([ChatMessage(role="system", content=""), ChatMessage("")])
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (True, True)


def test_the_default_num_output_leaves_room_for_a_prompt(make_engine: MakeEngine) -> None:
    metadata = CopySpec(engine=make_engine([], max_model_len=128)).metadata
    assert 0 < metadata.num_output < metadata.context_window


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
