"""Messages on their way to the engine and back lose nothing, and what cannot be read says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from copyspec_engine import ConfigError, Engine
from copyspec_engine.chat.formats import find_chat_format
from copyspec_engine.testing import ByteTokenizer
from langchain_copyspec import ChatCopySpec
from langchain_copyspec._messages import _ending, _reads_as_object, to_engine_messages

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


MakeEngine = Callable[..., Engine]

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x}"}}\n</tool_call>'
NO_ARGUMENTS = '<tool_call>{"name": "now"}</tool_call>'
ANSWER = f"<think>hm, so</think>Let me see.\n{CALL}\n{NO_ARGUMENTS}"
ARGS = {"a": 1, "b": "x}"}
TOOLS = [{"type": "function", "function": {"name": name, "description": name}} for name in ("add", "now")]
OFFERED: dict[str, Any] = {"tools": TOOLS, "strict": False}
"""Tools that are called as the model likes."""


def joined(chunks: list[Any]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert isinstance(total, AIMessageChunk)
    return total


async def everyhow(llm: ChatCopySpec, **options: Any) -> list[AIMessage]:
    streaming = ChatCopySpec(**{**dict(llm), "streaming": True})
    return [
        llm.invoke("go", **options),
        await llm.ainvoke("go", **options),
        joined(list(llm.stream("go", **options))),
        joined([chunk async for chunk in llm.astream("go", **options)]),
        streaming.invoke("go", **options),
        await streaming.ainvoke("go", **options),
    ]


@pytest.mark.parametrize("drafter", ["adaptive", "none"])
async def test_an_answer_comes_apart_on_every_path(make_engine: MakeEngine, drafter: str) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: ANSWER), drafter=drafter)
    for answer in await everyhow(llm, **OFFERED):
        assert answer.text == answer.content == "Let me see."
        assert answer.additional_kwargs == {"reasoning_content": "hm, so"}
        assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("add", ARGS), ("now", {})]
        assert answer.invalid_tool_calls == []
        kinds = [block["type"] for block in answer.content_blocks]
        assert kinds == ["reasoning", "text", "tool_call", "tool_call"]


@pytest.mark.parametrize("drafter", ["adaptive", "none"])
async def test_version_1_gives_content_blocks_on_every_path(make_engine: MakeEngine, drafter: str) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: ANSWER), drafter=drafter, output_version="v1")
    for answer in await everyhow(llm, **OFFERED):
        assert answer.text == "Let me see."
        blocks: list[Any] = [
            {key: value for key, value in block.items() if key not in ("id", "index")}
            for block in answer.content
            if isinstance(block, dict)
        ]
        assert blocks == [
            {"type": "reasoning", "reasoning": "hm, so"},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_call", "name": "add", "args": ARGS},
            {"type": "tool_call", "name": "now", "args": {}},
        ]
        assert answer.content == answer.content_blocks
        assert [call["name"] for call in answer.tool_calls] == ["add", "now"]


def test_arguments_stream_in_pieces(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: ANSWER), drafter="none")
    pieces = [piece for chunk in llm.stream("go", **OFFERED) for piece in chunk.tool_call_chunks if piece["index"] == 0]
    assert len(pieces) > 5
    assert "".join(piece["args"] or "" for piece in pieces) == '{"a": 1, "b": "x}"}'
    assert [(piece["name"], piece["id"] is None) for piece in pieces[:2]] == [("add", False), (None, True)]


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize(
    "written",
    [
        CALL[:-20],
        CALL[: CALL.index("x}") + 1],
        CALL[: CALL.index('"b"')],
        CALL.removesuffix("}\n</tool_call>"),
        '<tool_call>{"name": "add", "argu',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    ],
)
async def test_a_call_that_is_cut_off_or_malformed_is_never_a_valid_one(
    make_engine: MakeEngine, written: str, version: str | None
) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: f"so: {written}"), output_version=version)
    for answer in await everyhow(llm, **OFFERED):
        assert answer.tool_calls == []
        (call,) = answer.invalid_tool_calls
        assert call["name"] == "add"
        assert answer.text == "so:"
        again = llm.invoke([HumanMessage("go"), answer, HumanMessage("again")], **OFFERED)
        assert again.text == "so:"


GARBAGE, NO_CALL = "<tool_call>garbage</tool_call>", "<tool_call>{}</tool_call>"
HALF = '<tool_call>{"name": "add", "arguments": {"a": 1, </tool_call>'
NAMELESS = '<tool_call>{"arguments": {"a": 1}}</tool_call>'
LATE_NAME = '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>'


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize(
    ("written", "valid"),
    [
        (GARBAGE + CALL, ["add"]),
        (GARBAGE + NO_ARGUMENTS, ["now"]),
        (HALF + NO_ARGUMENTS, ["now"]),
        (HALF + CALL, ["add"]),
        (CALL + HALF + NO_ARGUMENTS, ["add", "now"]),
        (HALF + HALF + CALL, ["add"]),
        (NO_ARGUMENTS + '<tool_call>{"name": "add"', ["now"]),
        (GARBAGE + HALF + NO_CALL + CALL + NO_ARGUMENTS, ["add", "now"]),
        (NAMELESS + NO_ARGUMENTS + GARBAGE, ["now"]),
        (GARBAGE + LATE_NAME, ["add"]),
        ("<tool_call>", []),
        (f"First.{HALF}{CALL}", ["add"]),
    ],
)
async def test_malformed_calls_spoil_no_good_ones_nor_pass_for_them(
    make_engine: MakeEngine, written: str, valid: list[str], version: str | None
) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: written), output_version=version)
    answers = await everyhow(llm, **OFFERED)
    for answer in answers:
        assert sorted(call["name"] for call in answer.tool_calls) == sorted(valid)
        assert all(call["args"] in (ARGS, {}, {"a": 1}) for call in answer.tool_calls)
        names = [str(call["name"]) for call in answer.invalid_tool_calls]
        assert sorted(names) == sorted(str(call["name"]) for call in answers[0].invalid_tool_calls)


@pytest.mark.parametrize(
    "text", ["", "{", '{"a', '{"a": "b\\', '{"a": [1, {"b": [2', '{"a": "]}"', "[1]", '{"a": 1}', "x"]
)
def test_an_ending_makes_any_arguments_malformed(text: str) -> None:
    assert not _reads_as_object(text + _ending(text))


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_event_streams_have_a_block_for_each_part(make_engine: MakeEngine, version: str | None) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: ANSWER), output_version=version)
    stream = llm.stream_events("go", version="v3", **OFFERED)
    events = list(stream)
    finished = [event["content"]["type"] for event in events if event["event"] == "content-block-finish"]
    assert finished == ["reasoning", "text", "tool_call", "tool_call"]
    message = stream.output
    assert message.text == "Let me see."
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("add", ARGS), ("now", {})]
    assert message.usage_metadata is not None
    astream = await llm.astream_events("go", version="v3", **OFFERED)
    assert (await astream.output).tool_calls[0]["args"] == ARGS


async def test_log_probabilities_have_openais_form(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "hé"), logprobs=True, top_logprobs=2)
    for answer in await everyhow(llm):
        content = answer.response_metadata["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["h", "\ufffd", "\ufffd", "<|im_end|>"]
        assert [entry["bytes"] for entry in content[:2]] == [[104], None]
        assert all(entry["logprob"] == 0 and len(entry["top_logprobs"]) == 2 for entry in content)
        assert content[0]["top_logprobs"][0] == {"token": "h", "bytes": [104], "logprob": 0}
    assert "logprobs" not in llm.invoke("go", logprobs=False, top_logprobs=0).response_metadata


def test_a_tool_loop_keeps_its_turns_apart(make_engine: MakeEngine) -> None:
    seen: list[str] = []

    def reply(prompt: str) -> str:
        seen.append(prompt)
        return CALL if len(seen) == 1 else "It is 3."

    llm = ChatCopySpec(engine=make_engine(reply)).bind(**OFFERED)
    question = HumanMessage("1 + 2?")
    call = llm.invoke([question])
    result = ToolMessage("3", tool_call_id=call.tool_calls[0]["id"])
    answer = llm.invoke([question, call, result])
    assert answer.text == "It is 3."
    assert "<|im_start|>tool\n3<|im_end|>" in seen[1]
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0


MARKED = [
    f"Write {CALL} like so.",
    f"\n {ANSWER.removeprefix('<think>hm, so</think>')}\n",
    "Wrap <think>thoughts</think> like so. ",
    GARBAGE,
]


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}])
@pytest.mark.parametrize("written", MARKED)
async def test_where_no_tool_was_offered_all_that_is_written_is_text(
    make_engine: MakeEngine, written: str, options: dict[str, Any], version: str | None
) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: written), output_version=version)
    for answer in await everyhow(llm, **options):
        assert answer.text == written
        assert answer.tool_calls == answer.invalid_tool_calls == []
        assert [block["type"] for block in answer.content_blocks] == ["text"]
        assert ChatCopySpec.explain(answer).text == written


@pytest.mark.parametrize("version", [None, "v1"])
async def test_what_has_no_name_is_text_though_tools_were_offered(make_engine: MakeEngine, version: str | None) -> None:
    written = f"Not {NO_CALL}, but {CALL} calls; `<tool_call>` opens it."
    llm = ChatCopySpec(engine=make_engine(lambda prompt: written), output_version=version)
    for answer in await everyhow(llm, **OFFERED):
        assert answer.text == f"Not {NO_CALL}, but  calls; `<tool_call>` opens it."
        assert [call["args"] for call in answer.tool_calls] == [ARGS]
        assert answer.invalid_tool_calls == []


def test_marks_inside_of_an_objects_texts_stay(make_engine: MakeEngine) -> None:
    value = {"thought": "<think>a</think>", "call": CALL}
    llm = ChatCopySpec(engine=make_engine(lambda prompt: json.dumps(value)), max_tokens=400)
    schema = {"title": "Note", "type": "object", "properties": {key: {"type": "string"} for key in value}}
    for method in ("json_schema", "json_mode"):
        assert llm.with_structured_output(schema, method=method).invoke("go") == value
    wrapped = llm.bind_tools(TOOLS, response_format=schema).invoke("go")
    assert json.loads(wrapped.text) == value
    assert wrapped.tool_calls == []


@pytest.mark.parametrize(("template", "reasons"), [("<|im_start|>", False), ("<|im_start|> <think>", True)])
def test_the_profile_says_of_reasoning_what_is_read_as_such(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, template: str, reasons: bool
) -> None:
    monkeypatch.setattr(ByteTokenizer, "chat_format", lambda _: find_chat_format(template))
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "<think>hm</think>So."))
    assert llm.profile is not None
    assert llm.profile["reasoning_output"] is reasons
    answer = llm.invoke("go")
    assert answer.text == ("So." if reasons else "<think>hm</think>So.")
    assert answer.additional_kwargs == ({"reasoning_content": "hm"} if reasons else {})
