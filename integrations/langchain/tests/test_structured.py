"""Answers as objects: three methods, four kinds of schema, whole and while they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from copyspec_engine import ConfigError, Engine
from langchain_copyspec import ChatCopySpec, RequestTimeoutError

MakeEngine = Callable[..., Engine]


class Joke(BaseModel):
    """A joke."""

    setup: str = Field(description="how it begins")
    rating: int | None = None


class JokeDict(TypedDict):
    """A joke."""

    setup: str
    rating: int


JOKE = {"setup": "A cat walks in.", "rating": 7}
SCHEMAS = [Joke, JokeDict, Joke.model_json_schema(), {"name": "Joke", "parameters": Joke.model_json_schema()}]
METHODS = ["json_schema", "function_calling", "json_mode"]


def reply(prompt: str) -> str:
    if "<tool_call>" in prompt or '"function"' in prompt:
        return f"<tool_call>{json.dumps({'name': 'Joke', 'arguments': JOKE})}</tool_call>"
    return json.dumps(JOKE)


@pytest.fixture
def llm(make_engine: MakeEngine) -> ChatCopySpec:
    return ChatCopySpec(engine=make_engine(reply))


def plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", SCHEMAS, ids=["pydantic", "typeddict", "json_schema", "function"])
async def test_every_method_gives_an_object_of_every_schema(make_engine: MakeEngine, method: Any, schema: Any) -> None:
    name = schema["title"] if isinstance(schema, dict) and "title" in schema else getattr(schema, "__name__", "Joke")

    def named(prompt: str) -> str:
        return reply(prompt).replace('"Joke"', f'"{name}"')

    chain = ChatCopySpec(engine=make_engine(named)).with_structured_output(schema, method=method)
    for value in (chain.invoke("go"), await chain.ainvoke("go")):
        assert plain(value) == JOKE
        assert isinstance(value, Joke) == (schema is Joke)
    *_, last = chain.stream("go")
    assert plain(last) == JOKE


@pytest.mark.parametrize("method", METHODS)
def test_objects_stream_as_far_as_they_are_written(llm: ChatCopySpec, method: Any) -> None:
    chain = llm.with_structured_output(JokeDict if method != "function_calling" else SCHEMAS[2], method=method)
    seen = list(chain.stream("go", drafter="none"))  # type: ignore[call-arg]
    assert len(seen) > 3
    assert seen[-1] == JOKE
    setups = [part["setup"] for part in seen if isinstance(part, dict) and "setup" in part]
    assert all(JOKE["setup"].startswith(setup) for setup in setups)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_the_message_can_be_had_too(llm: ChatCopySpec, method: Any) -> None:
    result: Any = llm.with_structured_output(Joke, method=method, include_raw=True).invoke("go")
    assert result["parsed"] == Joke(**JOKE)
    assert result["parsing_error"] is None
    assert result["raw"].usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("is_cut_off", [False, True])
@pytest.mark.parametrize("schema", [SCHEMAS[2], Joke], ids=["json_schema", "pydantic"])
@pytest.mark.parametrize("method", METHODS)
async def test_the_message_streams_beside_the_object(
    llm: ChatCopySpec, method: Any, schema: Any, is_cut_off: bool
) -> None:
    chain: Any = llm.with_structured_output(schema, method=method, include_raw=True)
    cut = 60 if method == "function_calling" else 20
    options = {"max_tokens": cut if is_cut_off else 200, "drafter": "none"}
    whole = chain.invoke("go", **options)
    parts = list(chain.stream("go", **options))
    aparts = [part async for part in chain.astream("go", **options)]
    awhole = await chain.ainvoke("go", **options)
    assert len([part for part in parts if "raw" in part]) > 10
    assert [part.get("parsed") for part in parts] == [part.get("parsed") for part in aparts]
    grown = [part["parsed"] for part in parts[:-1] if "parsed" in part]
    assert len(grown) > 3 or schema is Joke
    for first, *others in (parts, aparts):
        total = first
        for part in others:
            total += part
        for result in (total, awhole):
            assert result["parsed"] == whole["parsed"]
            assert type(result["parsing_error"]) is type(whole["parsing_error"])
            assert result["raw"].text == whole["raw"].text
            assert result["raw"].usage_metadata["output_tokens"] == whole["raw"].usage_metadata["output_tokens"]
    assert plain(whole["parsed"]) == (None if is_cut_off else JOKE)
    assert isinstance(whole["parsing_error"], OutputParserException if is_cut_off else type(None))


@pytest.mark.parametrize("method", METHODS)
async def test_half_an_object_is_no_object(make_engine: MakeEngine, method: Any) -> None:
    llm = ChatCopySpec(engine=make_engine(reply), max_tokens=60 if method == "function_calling" else 20)
    wanted = rf"cut off after {llm.max_tokens} tokens .*'length'.* expected a whole object: raise max_tokens"
    for schema in SCHEMAS[:3]:
        chain = llm.with_structured_output(schema, method=method)
        with pytest.raises(OutputParserException, match=wanted):
            chain.invoke("go")
        with pytest.raises(OutputParserException, match=wanted):
            await chain.ainvoke("go")
        with pytest.raises(OutputParserException, match=wanted):
            list(chain.stream("go"))
        with pytest.raises(OutputParserException, match=wanted):
            [part async for part in chain.astream("go")]
        raw: Any = llm.with_structured_output(schema, method=method, include_raw=True)
        *_, last = raw.stream("go")
        for result in (raw.invoke("go"), await raw.ainvoke("go"), last):
            assert result["parsed"] is None
            assert isinstance(result["parsing_error"], OutputParserException)
            assert re.search(wanted, str(result["parsing_error"]))


@pytest.mark.parametrize("method", METHODS)
def test_an_object_that_a_stop_text_ended_is_no_object(make_engine: MakeEngine, method: Any) -> None:
    llm = ChatCopySpec(engine=make_engine(reply), stop=["walks"])
    for schema in (Joke, Joke.model_json_schema()):
        chain = llm.with_structured_output(schema, method=method)
        with pytest.raises(
            OutputParserException, match=r"stop or stop_token_ids ended after \d+ tokens.*leave them out"
        ):
            chain.invoke("go")
        with pytest.raises(OutputParserException, match="leave them out"):
            list(chain.stream("go"))


def test_an_object_may_take_all_of_max_tokens(llm: ChatCopySpec) -> None:
    size = len(llm.get_token_ids(json.dumps(JOKE)))
    result: Any = llm.with_structured_output(Joke, include_raw=True).invoke("go", max_tokens=size)
    assert result["parsed"] == Joke(**JOKE)


def test_a_call_that_is_asked_for_and_cut_off_says_so(llm: ChatCopySpec) -> None:
    answer = llm.bind_tools([Joke], tool_choice="Joke").invoke("go", max_tokens=60)
    (call,) = answer.invalid_tool_calls
    assert re.search(r"cut off after 60 tokens .* expected a whole call: raise max_tokens", str(call["error"]))
    with pytest.raises(RequestTimeoutError, match="raise timeout"):
        llm.with_structured_output(Joke).invoke("go", timeout=1e-6)


def test_a_grammar_holds_the_answer_to_the_schema(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: 'Sure! {"setup": "A cat"}'), max_tokens=15)
    for form in ({"type": "json_object"}, Joke):
        assert not llm.invoke("go", response_format=form).text.startswith("Sure")
    assert llm.invoke("go", response_format={"type": "text"}).text == 'Sure! {"setup":'


def test_strict_refuses_what_a_grammar_cannot_express(llm: ChatCopySpec) -> None:
    schema = {"title": "Joke", "type": "object", "properties": {"setup": {"type": "string"}, "rating": {
        "type": "integer"}}, "dependentRequired": {"setup": ["rating"]}}  # fmt: skip
    assert llm.with_structured_output(schema).invoke("go") == JOKE
    with pytest.raises(ConfigError, match="dependentRequired"):
        llm.with_structured_output(schema, strict=True).invoke("go")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"method": "xml"}, "method='xml'"), ({"method": "json_mode", "strict": True}, "strict=True")],
)
def test_an_unknown_method_raises(llm: ChatCopySpec, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        llm.with_structured_output(Joke, **options)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [5, "Joke", None, {}])
def test_what_is_no_schema_raises(method: Any, schema: Any) -> None:
    if (method, schema) == ("json_schema", {}):
        return
    with pytest.raises(ConfigError, match="expected a"):
        ChatCopySpec().with_structured_output(schema, method=method)


def test_an_unknown_option_raises_when_called(llm: ChatCopySpec) -> None:
    with pytest.raises(ConfigError, match="unknown option hue='red'"):
        llm.with_structured_output(Joke, hue="red").invoke("go")


@pytest.mark.parametrize("form", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}])
def test_a_malformed_response_format_raises(llm: ChatCopySpec, form: Any) -> None:
    with pytest.raises(ConfigError, match="json_schema"):
        llm.invoke("go", response_format=form)
