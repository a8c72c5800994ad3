"""Tools: what may be bound, what the grammar holds an answer to, which forms a choice may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from copyspec_engine import ConfigError, CopySpecError, Engine
from langchain_copyspec import ChatCopySpec
from langchain_copyspec._options import ToolOptions

MakeEngine = Callable[..., Engine]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def now() -> str:
    """Tell the time."""
    return "noon"


class Point(BaseModel):
    """A point."""

    x: int
    y: int


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def calls(answer: AIMessage) -> list[tuple[str, dict[str, Any]]]:
    return [(made["name"], made["args"]) for made in answer.tool_calls]


def scripted(make_engine: MakeEngine, reply: str) -> ChatCopySpec:
    return ChatCopySpec(engine=make_engine(lambda prompt: reply), max_tokens=200)


async def test_the_model_may_call_or_not(make_engine: MakeEngine) -> None:
    both = f"Well. {call('add', a=1, b=2)}{call('now')}"
    for text, expected in (("No tool needed.", []), (both, [("add", {"a": 1, "b": 2}), ("now", {})])):
        llm = scripted(make_engine, text).bind_tools([add, now])
        for answer in (llm.invoke("go"), await llm.ainvoke("go")):
            assert calls(answer) == expected


@pytest.mark.parametrize("choice", ["any", "required", True, {"type": "any"}])
def test_a_call_can_be_asked_for(make_engine: MakeEngine, choice: Any) -> None:
    llm = scripted(make_engine, call("now"))
    assert calls(llm.bind_tools([add, now], tool_choice=choice).invoke("go")) == [("now", {})]


@pytest.mark.parametrize(
    "choice", ["now", {"type": "function", "function": {"name": "now"}}, {"type": "tool", "name": "now"}]
)
def test_a_tool_can_be_asked_for_by_name(make_engine: MakeEngine, choice: Any) -> None:
    # The script wants another tool: the grammar leaves nothing but the name, then nothing that the script knows.
    llm = scripted(make_engine, call("add", a=1, b=2)).bind_tools([add, now], tool_choice=choice)
    answer = llm.invoke("go", max_tokens=60)
    assert next(made["name"] for made in [*answer.tool_calls, *answer.invalid_tool_calls]) == "now"


@pytest.mark.parametrize("choice", ["none", False, {"type": "none"}])
def test_with_none_the_prompt_tells_of_no_tool(make_engine: MakeEngine, choice: Any) -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "I can only talk."

    llm = ChatCopySpec(engine=make_engine(reply))
    llm.bind_tools([add], tool_choice=choice).invoke("go")
    llm.bind_tools([add]).invoke("go")
    assert ["Add two numbers" in prompt for prompt in prompts] == [False, True]


@pytest.mark.parametrize("tools", [5, "add", {"name": "add"}])
def test_tools_that_are_no_list_raise(tools: Any) -> None:
    for use in (lambda: ChatCopySpec().bind_tools(tools), lambda: ChatCopySpec().invoke("go", tools=tools)):
        with pytest.raises(ConfigError, match=r"tools=.*expected a list"):
            use()


def test_calls_that_the_model_begins_keep_to_their_schemas(make_engine: MakeEngine) -> None:
    wrong = '<tool_call>{"name": "add", "arguments": {"a": "one", "b": 2}}</tool_call>'
    llm = scripted(make_engine, wrong)
    free = llm.bind_tools([add], strict=False).invoke("go")
    assert calls(free) == [("add", {"a": "one", "b": 2})]
    held = llm.bind_tools([add]).invoke("go", max_tokens=90)
    assert "one" not in str([*held.tool_calls, *held.invalid_tool_calls])


def test_one_call_at_most(make_engine: MakeEngine) -> None:
    llm = scripted(make_engine, call("now") + call("now"))
    assert len(llm.bind_tools([now]).invoke("go").tool_calls) == 2
    for strict in (None, False, True):
        assert len(llm.bind_tools([now], parallel_tool_calls=False, strict=strict).invoke("go").tool_calls) == 1


def test_strict_refuses_what_a_grammar_cannot_express(make_engine: MakeEngine) -> None:
    schema = {"title": "f", "description": "", "type": "object", "properties": {
        "x": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    }}  # fmt: skip
    llm = scripted(make_engine, call("f", x=[1]))
    assert calls(llm.bind_tools([schema], tool_choice="f").invoke("go")) == [("f", {"x": [1]})]
    with pytest.raises(ConfigError, match="uniqueItems"):
        llm.bind_tools([schema], strict=True).invoke("go")


@pytest.mark.parametrize(
    "kind", [add, Point, Point.model_json_schema(), {"type": "function", "function": {"name": "f"}}]
)
def test_tools_come_in_many_forms(make_engine: MakeEngine, kind: Any) -> None:
    assert scripted(make_engine, "fine").bind_tools([kind]).invoke("go").text == "fine"


@pytest.mark.parametrize(
    ("tools", "options", "named"),
    [
        ([{"type": "web_search"}], {}, "web_search"),
        ([3], {}, "tool 3"),
        ([add], {"tool_choice": "sub"}, "'sub' but expected auto, none, any, required or one of add"),
        ([], {"tool_choice": "any"}, "expected tools to choose from"),
        ([add], {"tool_choice": 7}, "tool_choice=7"),
        ([add], {"strict": "very"}, "strict='very'"),
        ([add], {"parallel_tool_calls": "some"}, "parallel_tool_calls='some'"),
    ],
)
def test_what_cannot_be_bound_raises_by_name(tools: list[Any], options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ChatCopySpec().bind_tools(tools, **options)


def test_a_form_needs_a_choice(make_engine: MakeEngine) -> None:
    llm = scripted(make_engine, "").bind_tools([add], tool_choice="any")
    with pytest.raises(ConfigError, match="response_format with tool_choice='required'"):
        llm.invoke("go", response_format={"type": "json_object"})


@pytest.mark.parametrize("reply", [call("add", a=1, b=2), '{"x": 1, "y": 2}'])
def test_with_tools_and_a_form_the_answer_is_either(make_engine: MakeEngine, reply: str) -> None:
    llm = scripted(make_engine, reply).bind_tools([add], response_format=Point)
    answer = llm.invoke("go")
    if reply.startswith("{"):
        assert json.loads(answer.text) == {"x": 1, "y": 2}
    else:
        assert calls(answer) == [("add", {"a": 1, "b": 2})]
    chatty = scripted(make_engine, "Well, " + reply).bind_tools([add], response_format=Point)
    assert not chatty.invoke("go", max_tokens=20).text.startswith("Well")


def test_without_the_extra_free_calls_work_and_forced_ones_say_what_to_install(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = scripted(make_engine, call("now"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    assert calls(llm.bind_tools([now]).invoke("go")) == [("now", {})]
    with pytest.raises(CopySpecError, match=r'pip install "copyspec\[grammar\]"'):
        llm.bind_tools([now], tool_choice="any").invoke("go")


def test_drafting_never_changes_a_call(make_engine: MakeEngine) -> None:
    text = " ".join(f"{number * 7919 % 9973:04d}" for number in range(40))
    llm = ChatCopySpec(engine=make_engine(lambda prompt: f"So: {call('add', a=1, b=2)}" + call("note", text=text)))
    note = {"title": "note", "description": "", "type": "object", "properties": {"text": {"type": "string"}}}
    bound = llm.bind_tools([add, note])
    drafted, plain = bound.invoke(f"Note {text}"), bound.invoke(f"Note {text}", drafter="none")
    assert calls(drafted) == calls(plain) == [("add", {"a": 1, "b": 2}), ("note", {"text": text})]
    passes = [answer.response_metadata["copyspec"]["num_forward_passes"] for answer in (drafted, plain)]
    assert passes[0] < passes[1] / 2


def test_the_options_of_tools_are_checked_together() -> None:
    assert ToolOptions(tools=[add], tool_choice="any").offered is not None
    assert ToolOptions(tools=[add], tool_choice="none").offered is None
    assert ToolOptions().offered is None


def test_tokens_of_tools_are_counted_as_the_template_writes_them(make_engine: MakeEngine) -> None:
    llm = scripted(make_engine, "fine")
    answer = llm.bind_tools([add, now]).invoke("go")
    assert answer.usage_metadata is not None
    assert llm.get_num_tokens_from_messages([HumanMessage("go")], [add, now]) == answer.usage_metadata["input_tokens"]
