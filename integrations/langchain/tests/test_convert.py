from __future__ import annotations

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from copyspec_engine import ConfigError
from langchain_copyspec._convert import to_engine_messages


def test_roles_and_order_are_kept() -> None:
    messages = [SystemMessage("a"), HumanMessage("b"), AIMessage("c"), ChatMessage(role="critic", content="d")]
    assert to_engine_messages(messages) == (
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "critic", "content": "d"},
    )


def test_messages_of_one_role_in_a_row_stay_apart() -> None:
    messages = [HumanMessage("document"), HumanMessage("instruction"), HumanMessage("instruction")]
    assert [message["content"] for message in to_engine_messages(messages)] == [
        "document",
        "instruction",
        "instruction",
    ]


def test_text_blocks_are_joined_as_text_does() -> None:
    message = HumanMessage(["one ", {"type": "text", "text": "two"}, {"type": "text", "text": " three"}])
    assert to_engine_messages([message]) == ({"role": "user", "content": str(message.text)},)


def test_a_name_is_handed_to_the_template() -> None:
    assert to_engine_messages([HumanMessage("hi", name="ann")]) == ({"role": "user", "content": "hi", "name": "ann"},)


def test_messages_are_not_changed() -> None:
    message = HumanMessage([{"type": "text", "text": "hi"}])
    before = message.model_copy(deep=True)
    to_engine_messages([message])
    assert message == before


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (HumanMessage([{"type": "image_url", "image_url": {"url": "data:"}}]), "'image_url'"),
        (HumanMessage([{"type": "image", "base64": "", "mime_type": "image/png"}]), "'image'"),
        (HumanMessage([{"type": "text", "text": "see"}, {"type": "audio", "url": "x"}]), "'audio'"),
        (HumanMessage([{"type": "text", "text": None}]), "'text'"),
        (HumanMessage([{"cachePoint": {}}]), "'untyped'"),
        (AIMessage([{"type": "reasoning", "reasoning": "hm"}]), "'reasoning'"),
        (ToolMessage("42", tool_call_id="1"), "tool call"),
        (AIMessage("", tool_calls=[{"name": "add", "args": {}, "id": "1"}]), "tool call"),
        (RemoveMessage(id="1"), "RemoveMessage"),
    ],
)
def test_what_the_model_cannot_read_raises_by_name_and_position(message: BaseMessage, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        to_engine_messages([HumanMessage("hi"), message])
    assert "messages[1]" in str(raised.value)


def test_no_messages_raise() -> None:
    with pytest.raises(ConfigError, match="no messages"):
        to_engine_messages([])
