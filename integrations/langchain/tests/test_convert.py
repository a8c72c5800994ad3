"""Messages as the engine's chat template gets them, whatever form they come in."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from copyspec_engine import ConfigError
from langchain_copyspec._convert import to_engine_messages

ADD = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


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


@pytest.mark.parametrize(
    "content",
    [
        ["one ", {"type": "text", "text": "two"}, {"type": "text", "text": " three"}],
        [{"type": "input_text", "text": "one two three", "cache_control": {"type": "ephemeral"}}],
        [{"type": "text-plain", "text": "one two three", "mime_type": "text/plain"}],
        [{"text": "one two three"}],
    ],
)
def test_text_blocks_are_joined(content: list[Any]) -> None:
    assert to_engine_messages([HumanMessage(content)]) == ({"role": "user", "content": "one two three"},)


def test_a_name_is_handed_to_the_template() -> None:
    assert to_engine_messages([HumanMessage("hi", name="ann")]) == ({"role": "user", "content": "hi", "name": "ann"},)


def test_messages_are_not_changed() -> None:
    message = AIMessage([{"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}])
    before = message.model_copy(deep=True)
    to_engine_messages([message])
    assert message == before


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("so:", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "1"}]),
        AIMessage([{"type": "text", "text": "so:"}, {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]),
        AIMessage(
            [{"type": "text", "text": "so:"}, {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}],
            tool_calls=[{"name": "add", "args": {"a": 1}, "id": "1"}],
        ),
        AIMessage(content_blocks=[
            {"type": "text", "text": "so:"}, {"type": "tool_call", "id": "1", "name": "add", "args": {"a": 1}}
        ]),
        AIMessage("so:", additional_kwargs={"tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        ]}),
        AIMessage([
            {"type": "output_text", "text": "so:"},
            {"type": "function_call", "call_id": "1", "id": "fc_1", "name": "add", "arguments": '{"a": 1}'},
        ]),
    ],
    ids=["v0", "anthropic", "anthropic twice", "v1", "openai", "openai responses"],
)  # fmt: skip
def test_a_call_comes_once_with_its_arguments_as_an_object(message: AIMessage) -> None:
    assert to_engine_messages([message]) == ({"role": "assistant", "content": "so:", "tool_calls": [ADD]},)


@pytest.mark.parametrize(
    "result",
    [
        ToolMessage("3", tool_call_id="1"),
        ToolMessage("3", tool_call_id="1", status="error"),
        ToolMessage([{"type": "text", "text": "3"}], tool_call_id="1", artifact=object()),
        HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "3"}]}]),
        HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": "3", "is_error": True}]),
    ],
)
def test_a_result_carries_the_name_of_its_call(result: BaseMessage) -> None:
    call = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "1"}])
    assert to_engine_messages([call, result])[1:] == (
        {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"},
    )


def test_a_result_without_its_call_keeps_what_is_known() -> None:
    assert to_engine_messages([ToolMessage("", tool_call_id="9", name="sub"), FunctionMessage("5", name="f")]) == (
        {"role": "tool", "content": "", "tool_call_id": "9", "name": "sub"},
        {"role": "tool", "content": "5", "name": "f"},
    )


def test_the_content_of_a_result_may_be_one_block() -> None:
    block = {"type": "tool_result", "tool_use_id": "1", "content": {"type": "text", "text": "12"}}
    (result,) = to_engine_messages([HumanMessage([block])])
    assert result["content"] == "12"


def test_text_beside_a_result_stays_a_message() -> None:
    blocks: list[str | dict[Any, Any]] = [
        {"type": "tool_result", "tool_use_id": "1", "content": "3"},
        {"type": "text", "text": "and?"},
    ]
    assert [message["role"] for message in to_engine_messages([HumanMessage(blocks)])] == ["tool", "user"]


def test_a_malformed_call_stays_as_it_was_written() -> None:
    invalid = {"name": "add", "args": '{"a": 1', "id": "1", "error": "cut off"}
    assert to_engine_messages([AIMessage("so:", invalid_tool_calls=[invalid])]) == (
        {"role": "assistant", "content": 'so:\nadd {"a": 1'},
    )


@pytest.mark.parametrize(
    ("name", "args", "written"),
    [
        ("add", '{"name": "add", "arguments": {"a": 1, ', '{"name": "add", "arguments": {"a": 1, '),
        ("add", 'add {"a": 1', 'add {"a": 1'),
        ("add", "<function=add><parameter=a>", "<function=add><parameter=a>"),
        ("add", '{"adder": 1', 'add {"adder": 1'),
        ("add", '{"a": "add"', 'add {"a": "add"'),
        ("add", None, "add"),
        (None, "garbage", "garbage"),
        (None, None, ""),
    ],
)
def test_a_malformed_call_has_its_name_once(name: str | None, args: str | None, written: str) -> None:
    message = AIMessage("", invalid_tool_calls=[{"name": name, "args": args, "id": None, "error": "x"}])
    assert to_engine_messages([message]) == ({"role": "assistant", "content": written},)


@pytest.mark.parametrize("block", [
    {"type": "function_call", "name": "add", "arguments": '{"a":', "call_id": "1"},
    {"type": "tool_use", "name": "add", "input": '{"a":', "id": "1"},
])  # fmt: skip
def test_a_malformed_call_of_another_provider_can_be_sent(block: dict[str, Any]) -> None:
    invalid = {"name": "add", "args": '{"a":', "id": "1", "error": "cut off"}
    message = AIMessage([block], invalid_tool_calls=[invalid])
    assert to_engine_messages([message]) == ({"role": "assistant", "content": 'add {"a":'},)


def test_a_call_without_an_id_comes_once() -> None:
    call: Any = {"name": "add", "args": {"a": 1}, "id": None}
    message = AIMessage([{"type": "tool_call", **call}], tool_calls=[call])
    assert to_engine_messages([message]) == ({"role": "assistant", "content": "", "tool_calls": [{**ADD, "id": ""}]},)


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("yes", additional_kwargs={"reasoning_content": "hm"}),
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, "yes"]),
        AIMessage([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "yes"}]),
        AIMessage([{"type": "reasoning_content", "reasoning_content": {"text": "hm"}}, "yes"]),
        AIMessage([{"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]}, "yes"]),
    ],
    ids=["v0", "v1", "anthropic", "bedrock", "openai responses"],
)
def test_reasoning_is_handed_to_the_template(message: AIMessage) -> None:
    assert to_engine_messages([message]) == ({"role": "assistant", "content": "yes", "reasoning_content": "hm"},)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (HumanMessage([{"type": "image_url", "image_url": {"url": "data:"}}]), "'image_url'.*reads text only"),
        (HumanMessage([{"type": "image", "base64": "", "mime_type": "image/png"}]), "'image'.*reads text only"),
        (HumanMessage([{"type": "text", "text": "see"}, {"type": "audio", "url": "x"}]), "'audio'.*reads text only"),
        (ToolMessage([{"type": "file", "base64": ""}], tool_call_id="1"), "'file'.*reads text only"),
        (HumanMessage([{"type": "text", "text": None}]), "text=None in a content block of type 'text'.*a string"),
        (HumanMessage([{"type": "new_kind"}]), "'new_kind'"),
        (HumanMessage([{"cachePoint": {}}]), "'untyped'"),
        (HumanMessage([{"type": ["text"], "text": "a"}]), r"\['text'\].*expected a text or"),
        (HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": [5]}]), "Got 5 in .*expected a text or"),
        (HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": 5}]), "Got 5 in .*expected a text or"),
        (AIMessage([{"type": "tool_use", "id": "1", "name": "add", "input": "{"}]), "'add'.*no JSON object"),
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
