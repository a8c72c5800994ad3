"""Tools where the chat template knows none: told in a message, called by grammar, shown in profile and metadata."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

from copyspec_engine import ConfigError
from langchain_copyspec import ChatCopySpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "x-guidance": {"whitespace_flexible": False},  # or else this small model writes little but spaces
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def llm() -> ChatCopySpec:
    """The bundled model under a template that knows no tools."""
    return ChatCopySpec(model="bundled", chat_template=CHATML, max_tokens=100)


def test_bound_tools_are_never_dropped(llm: ChatCopySpec) -> None:
    ask = [HumanMessage("Weather in Rome?")]
    told, plain = llm.get_num_tokens_from_messages(ask, tools=[WEATHER]), llm.get_num_tokens_from_messages(ask)
    assert told > plain + 50
    answer = llm.bind_tools([WEATHER]).invoke(ask, max_tokens=1)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == told
    assert answer.response_metadata["copyspec"]["tool_calling"] == "by prompt"
    assert "tool_calling" not in llm.invoke(ask, max_tokens=1).response_metadata["copyspec"]


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_a_call_that_is_asked_for_is_written(llm: ChatCopySpec, choice: str) -> None:
    bound = llm.bind_tools([WEATHER], tool_choice=choice, parallel_tool_calls=False)
    with_drafts = bound.invoke("Weather in Rome?")
    assert [call["name"] for call in with_drafts.tool_calls] == ["weather"]
    assert with_drafts.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")
    assert bound.invoke("Weather in Rome?", drafter="none").tool_calls[0]["args"] == with_drafts.tool_calls[0]["args"]


def test_a_history_with_calls_is_shown(llm: ChatCopySpec) -> None:
    call = {"name": "weather", "args": {"city": "Rome"}, "id": "1"}
    chat = [
        SystemMessage("Hi."),
        HumanMessage("Rome?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("Sun.", tool_call_id="1"),
    ]
    assert llm.get_num_tokens_from_messages(chat) > llm.get_num_tokens_from_messages(chat[:2]) + 20
    assert llm.invoke(chat, max_tokens=1).usage_metadata


def test_the_profile_says_by_prompt(llm: ChatCopySpec) -> None:
    assert llm.profile is not None
    assert llm.profile["tool_calling"] == "by prompt"
    refusing = ChatCopySpec(model="bundled", chat_template=CHATML, tool_prompt=False)
    assert refusing.profile is not None
    assert not refusing.profile["tool_calling"]
    with pytest.raises(ConfigError, match="tool_prompt=False"):
        refusing.bind_tools([WEATHER]).invoke("Weather in Rome?")


def test_a_template_that_is_no_jinja_is_refused_when_the_model_is_loaded() -> None:
    broken = ChatCopySpec(model="bundled", chat_template="{% for %}")
    with pytest.raises(ConfigError, match="not Jinja: line 1"):
        broken.invoke("Hi")
