from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import CachePoint, CitableBlock, ThinkingBlock, ToolCallBlock, VideoBlock
from llama_index.core.llms import (
    AudioBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
)

from copyspec_engine import ConfigError
from llama_index.llms.copyspec._messages import to_engine_messages


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (MessageRole.SYSTEM, "system"),
        (MessageRole.DEVELOPER, "system"),
        (MessageRole.USER, "user"),
        (MessageRole.ASSISTANT, "assistant"),
        (MessageRole.CHATBOT, "assistant"),
        (MessageRole.MODEL, "assistant"),
        (MessageRole.TOOL, "tool"),
        (MessageRole.FUNCTION, "tool"),
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


def test_reasoning_and_calls_of_an_assistant_go_where_templates_look_for_them() -> None:
    message = ChatMessage(
        role="assistant",
        blocks=[
            ThinkingBlock(content="hm"),
            TextBlock(text="Let me see."),
            ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"a": 1}),
            ToolCallBlock(tool_call_id="c2", tool_name="add", tool_kwargs='{"a": 2}'),
        ],
    )
    (converted,) = to_engine_messages([message])
    assert converted["content"] == "Let me see."
    assert converted["reasoning_content"] == "hm"
    assert [(call["id"], call["function"]) for call in converted["tool_calls"]] == [
        ("c1", {"name": "add", "arguments": {"a": 1}}),
        ("c2", {"name": "add", "arguments": {"a": 2}}),
    ]


def test_calls_of_older_histories_are_read_too() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (converted,) = to_engine_messages([ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]})])
    assert converted["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_a_result_keeps_its_id_and_learns_its_functions_name() -> None:
    call = ToolCallBlock(tool_call_id="c1", tool_name="add")
    result = ChatMessage(role="tool", content="3", additional_kwargs={"tool_call_id": "c1"})
    converted = to_engine_messages([ChatMessage(role="assistant", blocks=[call]), result])
    assert converted[1] == {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    assert to_engine_messages([result])[0] == {"role": "tool", "content": "3", "tool_call_id": "c1"}


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
        (ChatMessage(blocks=[VideoBlock(url="http://127.0.0.1/x.mp4")]), "'video'"),
        (ChatMessage(role="tool", blocks=[ImageBlock(url="http://127.0.0.1/x.png")]), "'image'.*a tool message"),
        (ChatMessage(blocks=[CitableBlock(title="t", source="s", content="text")]), "'citable'"),
        (ChatMessage(role="user", blocks=[ThinkingBlock(content="hm")]), "'thinking'"),
        (ChatMessage(role="system", blocks=[ToolCallBlock(tool_name="add")]), "'tool_call'"),
        (ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_name="add", tool_kwargs='{"a": 1')]), "'{\"a\": 1'"),
        (ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"id": "1"}]}), "tool call .*'id': '1'"),
    ],
)
def test_what_the_model_cannot_read_raises_by_name_and_position(message: ChatMessage, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        to_engine_messages([ChatMessage("hi"), message])
    assert "messages[1]" in str(raised.value)


def test_no_messages_raise() -> None:
    with pytest.raises(ConfigError, match="no messages"):
        to_engine_messages([])
