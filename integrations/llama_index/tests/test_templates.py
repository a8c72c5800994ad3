"""Models whose chat template leaves something out, and base models without one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import ChatMessage

from copyspec_engine import ConfigError, EngineConfig, ModelLoadError
from copyspec_engine.bundled import bundled_model_path
from llama_index.llms.copyspec import CopySpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> CopySpec:
    """The bundled model without its chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(bundled_model_path(), folder, ignore=shutil.ignore_patterns("chat_template*"))
    return CopySpec(model=str(folder), max_tokens=5)


def answer_of_engine(llm: CopySpec, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(8))
    index = SummaryIndex.from_documents([Document(text="Ann books a room.")])
    return str(index.as_query_engine(llm=llm).query("Who?"))


def test_a_base_model_completes_and_says_why_it_does_not_chat(
    base_model: CopySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = base_model.metadata
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (False, False)
    assert base_model.complete("the room").text == base_model.complete("the room", formatted=True).text
    assert answer_of_engine(base_model, monkeypatch) != "Empty Response"
    with pytest.raises(ConfigError, match="no chat template, as a base model"):
        base_model.chat([ChatMessage("Hi")])


def test_a_template_makes_a_base_model_a_chat_model(base_model: CopySpec) -> None:
    metadata = CopySpec(model=base_model.model, chat_template=CHATML).metadata
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (True, True)


def test_a_template_without_a_system_role_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = CopySpec(model="bundled", chat_template=NO_SYSTEM, max_tokens=5)
    assert answer_of_engine(llm, monkeypatch) != "Empty Response"
    chat = [ChatMessage("Be kind.", role="system"), ChatMessage("Who?")]
    assert llm.count_tokens(chat) == llm.count_tokens([ChatMessage("Be kind.\n\nWho?")])


def test_a_default_model_that_cannot_be_fetched_is_no_empty_response(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path))
    with pytest.raises(ModelLoadError, match="run `copyspec pull smollm2`"):
        answer_of_engine(CopySpec(engine=EngineConfig(max_model_len=64)), monkeypatch)  # no other test has loaded it so


def test_tools_are_told_by_prompt() -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
    llm = CopySpec(model="bundled", chat_template=CHATML, max_tokens=200)
    response = llm.chat([ChatMessage("Weather in Rome?")], tools=[tool], tool_choice="required")
    assert response.raw["copyspec"]["tool_calling"] == "by prompt"
    calls = llm.get_tool_calls_from_response(response)
    assert {call.tool_name for call in calls} == {"weather"}
    assert calls[0].tool_kwargs["city"] in ("Rome", "Oslo")
    assert llm.metadata.is_function_calling_model
    assert not CopySpec(model="bundled", chat_template=CHATML, tool_prompt=False).metadata.is_function_calling_model
