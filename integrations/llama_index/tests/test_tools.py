"""Tools: what the model is told of them, which calls it may write, and what LlamaIndex gets to see of a call."""

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage, ChatResponse, TextBlock
from llama_index.core.tools import FunctionTool

from copyspec_engine import ConfigError, CopySpecError, Engine
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

MakeEngine = Callable[..., Engine]

FORMS = ("chat_with_tools", "achat_with_tools", "stream_chat_with_tools", "astream_chat_with_tools")


def switch(lamp: Literal["hall", "yard"], on: bool) -> str:
    """Switches a lamp."""
    return f"{lamp} is {'on' if on else 'off'}"


def look(lamp: Literal["hall", "yard"]) -> str:
    """Looks at a lamp."""
    return f"{lamp} is off"


TOOLS = [FunctionTool.from_defaults(switch), FunctionTool.from_defaults(look)]


@pytest.fixture
def no_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra "grammar" were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llguidance" else find(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "llguidance", None)


async def ask(llm: CopySpec, form: str, **options: Any) -> list[ChatResponse]:
    given = getattr(llm, form)(options.pop("tools", TOOLS), user_msg=options.pop("user_msg", "Light!"), **options)
    if form.startswith("a"):
        given = await given
    if "stream" not in form:
        return [given]
    return [response async for response in given] if form.startswith("a") else list(given)


@pytest.mark.parametrize("form", FORMS)
async def test_calls_come_with_ids_and_whole_arguments(make_engine: MakeEngine, write_call: Any, form: str) -> None:
    answer = f"At once.\n{write_call('switch', lamp='hall', on=True)}\n{write_call('look', lamp='yard')}"
    llm = CopySpec(engine=make_engine(lambda prompt: answer))
    responses = await ask(llm, form, allow_parallel_tool_calls=True)
    calls = llm.get_tool_calls_from_response(responses[-1])
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [
        ("switch", {"lamp": "hall", "on": True}),
        ("look", {"lamp": "yard"}),
    ]
    assert len({call.tool_id for call in calls} - {""}) == 2
    text, *blocks = responses[-1].message.blocks
    assert text == TextBlock(text="At once.")
    assert [block.tool_call_id for block in blocks if isinstance(block, ToolCallBlock)] == [c.tool_id for c in calls]


@pytest.mark.parametrize("form", FORMS)
async def test_a_call_behind_one_that_cannot_be_read_is_made(
    make_engine: MakeEngine, write_call: Any, form: str, no_llguidance: None
) -> None:
    half = '<tool_call>{"name": "look", "arguments": {</tool_call>'
    answer = (
        f"<tool_call>garbage</tool_call>\n{half}\n{write_call('look', lamp='yard')}\n{write_call('look', lamp='hall')}"
    )
    llm = CopySpec(engine=make_engine(lambda prompt: answer), drafter="none")
    for parallel, lamps in ((True, ["yard", "hall"]), (False, ["yard"])):
        responses = await ask(llm, form, allow_parallel_tool_calls=parallel)
        calls = llm.get_tool_calls_from_response(responses[-1])
        assert [call.tool_kwargs["lamp"] for call in calls] == lamps
        assert responses[-1].message.content == "<tool_call>garbage</tool_call>"
        invalid, *others = responses[-1].raw["copyspec"]["invalid_tool_calls"]
        assert invalid["arguments"] == '{"name": "look", "arguments": {'
        assert [json.loads(other["arguments"]) for other in others] == ([] if parallel else [{"lamp": "hall"}])
        shown = [block for r in responses for block in r.message.blocks if isinstance(block, ToolCallBlock)]
        assert {block.tool_call_id for block in shown} >= {call.tool_id for call in calls}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["left out", "not there"])
async def test_where_no_tool_may_be_called_no_call_is_made(
    make_engine: MakeEngine, write_call: Any, form: str, tools: list[FunctionTool]
) -> None:
    answer = f"Well.\n{write_call('look', lamp='hall')}"
    llm = CopySpec(engine=make_engine(lambda prompt: answer), drafter="none")
    responses = await ask(llm, form, tools=tools, tool_choice="none")
    for response in responses:
        assert all(isinstance(block, TextBlock) for block in response.message.blocks)
        assert response.message.additional_kwargs == {}
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        assert response.raw["copyspec"].get("invalid_tool_calls") is None
    assert responses[-1].message.content == answer
    if form.startswith(("stream", "astream")):
        assert "".join(response.delta for response in responses) == answer


@pytest.mark.parametrize("form", FORMS)
async def test_without_the_extra_free_calls_work_and_required_ones_say_what_to_install(
    make_engine: MakeEngine, write_call: Any, form: str, no_llguidance: None
) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: write_call("look", lamp="hall")))
    (call,) = llm.get_tool_calls_from_response((await ask(llm, form))[-1])
    assert (call.tool_name, call.tool_kwargs) == ("look", {"lamp": "hall"})
    with pytest.raises(CopySpecError, match=r'pip install "copyspec\[grammar\]"'):
        await ask(llm, form, tool_required=True)


@pytest.mark.parametrize("form", FORMS[2:])
async def test_a_stream_shows_a_call_grow_but_gives_it_only_whole(
    make_engine: MakeEngine, write_call: Any, form: str
) -> None:
    answer = f"{write_call('switch', lamp='hall', on=True)}\n{write_call('look', lamp='yard')}"
    llm = CopySpec(engine=make_engine(lambda prompt: answer), drafter="none")
    responses = await ask(llm, form, allow_parallel_tool_calls=True)
    selections = [llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) for response in responses]
    assert {len(found) for found in selections} == {0, 1, 2}
    assert all(found[0].tool_kwargs == {"lamp": "hall", "on": True} for found in selections if found)
    growing = {
        block.tool_kwargs
        for response in responses
        for block in response.message.blocks
        if isinstance(block, ToolCallBlock) and isinstance(block.tool_kwargs, str)
    }
    assert '{"lamp": "ha' in growing
    assert len({call.tool_id for found in selections for call in found}) == 2  # an id stays what it was


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tool_required": True}, {"switch", "look"}),
        ({"tool_choice": "required"}, {"switch", "look"}),
        ({"tool_choice": "any"}, {"switch", "look"}),
        ({"tool_choice": "look"}, {"look"}),
        ({"tool_choice": {"type": "function", "function": {"name": "look"}}}, {"look"}),
    ],
    ids=["tool_required", "required", "any", "by name", "as for OpenAI"],
)
async def test_a_required_call_is_made_whatever_the_model_would_say(
    bundled: Engine, form: str, options: dict[str, Any], names: set[str]
) -> None:
    llm = CopySpec(engine=bundled, max_tokens=60)
    response = (await ask(llm, form, **options))[-1]
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name in names
    assert call.tool_kwargs["lamp"] in ("hall", "yard")


async def test_the_bundled_model_makes_the_call_that_is_asked_for(bundled: Engine) -> None:
    llm = CopySpec(engine=bundled, max_tokens=60)
    asked = 'Call this tool:\n{"name": "switch", "arguments": {"lamp": "yard", "on": false}}'
    response = await llm.apredict_and_call(TOOLS, user_msg=asked)
    assert response.response == "yard is off"
    assert llm.predict_and_call(TOOLS, user_msg=asked).response == "yard is off"


@pytest.mark.parametrize("form", FORMS)
async def test_without_parallel_calls_there_is_one(make_engine: MakeEngine, write_call: Any, form: str) -> None:
    answer = f"{write_call('look', lamp='hall')}\n{write_call('look', lamp='yard')}"
    llm = CopySpec(engine=make_engine(lambda prompt: answer))
    (call,) = llm.get_tool_calls_from_response((await ask(llm, form))[-1])
    assert call.tool_kwargs == {"lamp": "hall"}


def test_the_prompt_tells_of_the_tools_unless_none_may_be_called(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: prompt.replace("<|im_start|>", "").replace("<|im_end|>", "")))
    assert '"name": "switch"' in (llm.chat_with_tools(TOOLS, "hi").message.content or "")
    assert "switch" not in (llm.chat_with_tools(TOOLS, "hi", tool_choice="none").message.content or "")
    assert llm.chat_with_tools([], "hi", tool_required=True).message.content == "user\nhi\nassistant\n"


def test_a_call_and_its_result_go_back_with_their_id(make_engine: MakeEngine, write_call: Any) -> None:
    llm = CopySpec(engine=make_engine([write_call("look", lamp="hall"), "It is off."]))
    history = [ChatMessage("Is the light on?")]
    first = llm.chat_with_tools(TOOLS, chat_history=history)
    (call,) = llm.get_tool_calls_from_response(first)
    assert history == [ChatMessage("Is the light on?")]
    result = ChatMessage(role="tool", content="hall is off", additional_kwargs={"tool_call_id": call.tool_id})
    second = llm.chat_with_tools(TOOLS, chat_history=[*history, first.message, result])
    assert second.message.content == "It is off."
    assert llm.get_tool_calls_from_response(second, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match=r"no tool call .* 'It is off.'"):
        llm.get_tool_calls_from_response(second)


def test_chat_takes_tools_as_they_are_or_as_schemas(make_engine: MakeEngine, write_call: Any) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: write_call("look", lamp="hall")))
    schemas = [tool.metadata.to_openai_tool() for tool in TOOLS]
    for tools in (TOOLS, tuple(TOOLS), schemas):
        response = llm.chat([ChatMessage("Look!")], tools=tools)
        (call,) = llm.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs) == ("look", {"lamp": "hall"})
        assert response.raw["usage"]["prompt_tokens"] == llm.count_tokens([ChatMessage("Look!")], TOOLS)


def test_a_tool_is_called_by_its_own_name(make_engine: MakeEngine, write_call: Any) -> None:
    tool = FunctionTool.from_defaults(look, name="lamps.look[int]")
    llm = CopySpec(engine=make_engine(lambda prompt: write_call("lamps.look[int]", lamp="hall")))
    assert llm.predict_and_call([tool], user_msg="Look!").response == "hall is off"


def test_a_call_that_is_cut_off_is_not_made(make_engine: MakeEngine, write_call: Any) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: write_call("look", lamp="hall")), max_tokens=40)
    response = llm.chat_with_tools(TOOLS, "Look!")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    assert response.raw["finish_reason"] == "length"
    (invalid,) = response.raw["copyspec"]["invalid_tool_calls"]
    assert invalid["name"] == "look"
    assert "cut off after 40 tokens" in invalid["error"]
    assert "raise max_tokens" in invalid["error"]
    assert "not JSON" in invalid["error"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tool_choice": "lift"}, "tool_choice='lift'"),
        ({"tool_choice": 3}, "tool_choice=3"),
        ({"response_format": {"type": "json_object"}}, "response_format with tools"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(echo: Engine, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CopySpec(engine=echo).chat_with_tools(TOOLS, "hi", **options)


def test_options_of_tools_without_tools_are_refused(echo: Engine) -> None:
    llm = CopySpec(engine=echo)
    with pytest.raises(ConfigError, match="tool_choice='required' without tools"):
        llm.chat([ChatMessage("hi")], tool_choice="required")
    with pytest.raises(ConfigError, match="unknown option tools"):
        CopySpecCompletion(llm=llm).complete("hi", tools=[{}])


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        (5, "tools=5 but expected a list"),
        (0, "tools=0 but expected a list"),
        ("add", "tools='add' but expected a list"),
        ({"type": "function"}, "tools={'type': 'function'} but expected a list"),
        ([look], r"tools\[0\]=<function look .* FunctionTool.from_defaults"),
        ([TOOLS[0], 5], r"tools\[1\]=5 but expected a tool"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(echo: Engine, tools: Any, named: str) -> None:
    llm = CopySpec(engine=echo)
    for call in (
        lambda: llm.chat([ChatMessage("hi")], tools=tools),
        lambda: llm.chat_with_tools(tools, "hi"),
        lambda: llm.count_tokens([ChatMessage("hi")], tools),
    ):
        with pytest.raises(ConfigError, match=named):
            call()


async def test_calls_are_the_same_with_and_without_drafting(bundled: Engine) -> None:
    asked = 'Call this tool:\n{"name": "switch", "arguments": {"lamp": "yard", "on": true}}'
    llm = CopySpec(engine=bundled, include_token_ids=True)
    found = [
        (await llm.achat_with_tools(TOOLS, asked, drafter=drafter)).raw["copyspec"] for drafter in ("adaptive", "none")
    ]
    assert found[0]["token_ids"] == found[1]["token_ids"]
    assert found[0]["tokens_per_forward"] > 1.5
