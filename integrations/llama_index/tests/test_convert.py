from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import CachePoint, ThinkingBlock, ToolCallBlock
from llama_index.core.llms import (
    AudioBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
)

from copyspec_engine import ConfigError
from llama_index.llms.copyspec._convert import to_engine_messages


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (MessageRole.SYSTEM, "system"),
        (MessageRole.DEVELOPER, "system"),
        (MessageRole.USER, "user"),
        (MessageRole.ASSISTANT, "assistant"),
        (MessageRole.CHATBOT, "assistant"),
        (MessageRole.MODEL, "assistant"),
    ],
)
def test_roles_are_those_of_chat_templates(role: MessageRole, expected: str) -> None:
    assert to_engine_messages([ChatMessage(role=role, content="hi")]) == ({"role": expected, "content": "hi"},)


def test_messages_of_one_role_in_a_row_stay_apart() -> None:
    messages = [ChatMessage("document"), ChatMessage("instruction"), ChatMessage("instruction")]
    assert [message["content"] for message in to_engine_messages(messages)] == [
        "document",
        "instruction",
        "instruction",
    ]


def test_text_blocks_are_joined_as_content_does() -> None:
    message = ChatMessage(
        blocks=[TextBlock(text="one"), CachePoint(cache_control={"type": "x"}), TextBlock(text="two")]
    )
    assert to_engine_messages([message]) == ({"role": "user", "content": message.content},)


def test_a_message_may_be_empty() -> None:
    assert to_engine_messages([ChatMessage("")]) == ({"role": "user", "content": ""},)


def test_the_history_is_not_changed() -> None:
    history = [ChatMessage("hi"), ChatMessage(role="assistant", blocks=[TextBlock(text="a"), TextBlock(text="b")])]
    before = [message.model_copy(deep=True) for message in history]
    to_engine_messages(history)
    assert history == before


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (ChatMessage(blocks=[ImageBlock(url="http://127.0.0.1/x.png")]), "'image'"),
        (ChatMessage(blocks=[AudioBlock(url="http://127.0.0.1/x.wav")]), "'audio'"),
        (ChatMessage(blocks=[DocumentBlock(url="http://127.0.0.1/x.pdf")]), "'document'"),
        (ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm")]), "'thinking'"),
        (ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_name="add")]), "'tool_call'"),
        (ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "1"}]}), "tool call"),
        (ChatMessage(role="tool", content="42"), "tool message"),
        (ChatMessage(role="function", content="42"), "function message"),
    ],
)
def test_what_the_model_cannot_read_raises_by_name_and_position(message: ChatMessage, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        to_engine_messages([ChatMessage("hi"), message])
    assert "messages[1]" in str(raised.value)


def test_no_messages_raise() -> None:
    with pytest.raises(ConfigError, match="no messages"):
        to_engine_messages([])
