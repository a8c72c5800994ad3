"""POST /v1/chat/completions: what each field does, and that none of them is ignored without a word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import pytest

from copyspec_engine import Engine, GenerationRequest, SamplingParams
from copyspec_engine.serve import service
from copyspec_engine.values.outputs import StreamChunk
from tests.serve.conftest import CHAT, Client, body, events, texts

MakeEngine = Callable[..., Engine]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


async def test_a_whole_answer_and_a_streamed_one_are_the_engines_own(echo: Engine, client: Client) -> None:
    http = client(echo)
    expected = echo.generate(GenerationRequest(messages=body("füße")["messages"])).text
    whole = (await http.post(CHAT, json=body("füße"))).json()
    stream = await http.post(CHAT, json=body("füße", stream=True))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert texts(events(stream)) == {0: expected}
    assert stream.text.endswith("data: [DONE]\n\n")
    assert [event["choices"][0]["finish_reason"] for event in events(stream)][-1] == "stop"
    assert all(event["choices"][0]["delta"].get("content") for event in events(stream)[:-1]), "no half character"


async def test_every_option_of_sampling_reaches_the_engine(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": -3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"7": 1.5},
        "suppress_tokens": [1],
        "bad_words": ["no"],
        "no_repeat_ngram_size": 9,
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": "end",
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 2,
    }
    response = await client(echo).post(CHAT, json=body(**given))
    assert response.status_code == 200, response.text
    expected = SamplingParams(**{name: value for name, value in given.items() if name != "seed"}, seed=2**63 - 3)
    assert asked[0].sampling == expected
    assert response.json()["choices"][0]["finish_reason"] == "length"


async def test_what_a_call_leaves_out_is_as_openai_has_it(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    http = client(echo, timeout_s=7)
    await http.post(CHAT, json=body())
    await http.post(CHAT, json=body(max_completion_tokens=4, max_tokens=9))
    await http.post(CHAT, json=body(reasoning_effort="none"))
    await http.post(CHAT, json=body(reasoning_effort="low", chat_template_kwargs={"x": 1}))
    assert asked[0].sampling == SamplingParams(temperature=1.0)
    assert asked[0].timeout_s == 7
    assert asked[1].sampling.max_tokens == 4
    assert asked[2].chat_template_kwargs == {"enable_thinking": False}
    assert asked[3].chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "low", "x": 1}


async def test_a_developer_is_the_system_and_parts_are_one_text(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "add", "arguments": "{}"}}], "refusal": None, "audio": None, "function_call": None},
        {"role": "tool", "tool_call_id": "1", "content": "2", "vendor": "x"},
    ]  # fmt: skip
    response = await client(echo).post(CHAT, json=body(messages=messages))
    assert asked[0].messages is not None
    assert [message["role"] for message in asked[0].messages] == ["system", "assistant", "tool"]
    assert asked[0].messages[0]["content"] == "be kind"
    assert "vendor" not in asked[0].messages[2]
    assert response.headers["x-copyspec-ignored"] == "messages[].vendor"


async def test_fields_without_effect_are_named(echo: Engine, client: Client) -> None:
    given = {"service_tier": "auto", "verbosity": "low", "store": True, "metadata": {"a": "b"}}
    response = await client(echo).post(CHAT, json=body(**given))
    assert response.headers["x-copyspec-ignored"] == "service_tier, verbosity, store, metadata"
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "more": 1}, "also": 2}
    inside = await client(echo).post(CHAT, json=body(response_format=form, tools=[{**TOOL, "vendor": 3}]))
    expected = "tools[].vendor, response_format.also, response_format.json_schema.more"
    assert inside.headers["x-copyspec-ignored"] == expected
    named = await client(echo).post(CHAT, json=body(metadata={"thread_id": "t", "a": "b", "c": "d"}))
    assert (named.headers["x-session-id"], named.headers["x-copyspec-ignored"]) == ("t", "metadata.a, metadata.c")
    assert "x-copyspec-ignored" not in (await client(echo).post(CHAT, json=body(store=False, user="u"))).headers


async def test_of_many_fields_without_effect_a_few_are_named(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write all of them out took seconds, in which nobody was answered."""
    written: list[str] = []
    monkeypatch.setattr(service, "quote", lambda name, safe: written.append(name) or quote(name, safe))
    message = {"role": "user", "content": "hi", **{f"field_{number}": 1 for number in range(50_000)}}
    response = await client(echo).post(CHAT, json=body(messages=[message]))
    named = response.headers["x-copyspec-ignored"]
    assert named.startswith("messages[].field_0, ")
    assert named.endswith(", ...")
    assert len(named) <= 1030
    assert len(written) < 2000


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"moderation": {}}, "moderation", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"stop": ["x"] * 65}, "stop", "array_too_long"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [TOOL] * 257}, "tools", "array_too_long"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"prediction": {"type": "x"}}, "prediction", "invalid_value"),
        ({"copyspec": {"drafter": "magic"}}, "drafter", "invalid_value"),
        ({"copyspec": {"segment": True}}, "copyspec.segment", "unknown_parameter"),
        ({"session_id": "a\nb"}, "session_id", "invalid_value"),
        ({"session_id": "x" * 257}, "session_id", "invalid_value"),
        ({"metadata": {"thread_id": ""}}, "metadata.thread_id", "invalid_value"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_parameter"),
        ({"messages": [{"role": "oracle", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0]", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_content",
        ),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", "context_length_exceeded"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    echo: Engine, client: Client, given: dict[str, Any], param: str, code: str
) -> None:
    for stream in (False, True):
        response = await client(echo).post(CHAT, json=body(**{"stream": stream, **given}))
        assert response.status_code == (404 if code == "model_not_found" else 400), response.text
        error = response.json()["error"]
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
        assert response.headers["x-should-retry"] == "false"


async def test_choices_come_interleaved_and_the_prompt_counts_once(client: Client, make_engine: MakeEngine) -> None:
    engine = make_engine(["one " * 20, "two " * 20, "three " * 20], drafter="none")
    http = client(engine)
    stream = events(await http.post(CHAT, json=body(n=3, stream=True, stream_options={"include_usage": True})))
    assert sorted(texts(stream).values()) == ["one " * 20, "three " * 20, "two " * 20]
    order = [event["choices"][0]["index"] for event in stream[:-1]]
    assert order != sorted(order)
    assert [event["usage"] for event in stream[:-1]] == [None] * (len(stream) - 1)
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"]["completion_tokens"] == len(("one " + "two " + "three ") * 20) + 3
    assert stream[-1]["usage"]["prompt_tokens"] == len("_user\nhi_\n_assistant\n")


async def test_choices_have_seeds_of_their_own(echo: Engine, client: Client, asked: list[GenerationRequest]) -> None:
    await client(echo).post(CHAT, json=body(n=3, seed=2**63 - 1))
    assert sorted(str(request.sampling.seed) for request in asked) == sorted(map(str, (2**63 - 1, 0, 1)))
    assert len({request.cache_salt for request in asked}) == 1
    assert asked[0].cache_salt is not None


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls_are_told_in_openais_form(client: Client, make_engine: MakeEngine, stream: bool) -> None:
    http = client(make_engine(lambda _: "On it.\n" + CALL))
    response = await http.post(CHAT, json=body(tools=[TOOL], stream=stream))
    if stream:
        choices = [event["choices"][0] for event in events(response)]
        deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        assert {call["index"] for call in deltas} == {0}
        assert [call["function"].get("name") for call in deltas if "id" in call] == ["add"]
        assert not any("type" in call or "name" in call["function"] for call in deltas[1:])
        arguments = "".join(call["function"]["arguments"] for call in deltas)
        finish, content = choices[-1]["finish_reason"], texts(events(response))[0]
    else:
        choice = response.json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
        arguments, finish = call["function"]["arguments"], choice["finish_reason"]
        content = choice["message"]["content"]
    assert json.loads(arguments) == {"x": 1}
    assert finish == "tool_calls"
    assert content.strip() == "On it."


async def test_content_is_null_only_with_tool_calls(client: Client, make_engine: MakeEngine) -> None:
    http = client(make_engine(["", CALL]))
    empty = (await http.post(CHAT, json=body())).json()["choices"][0]["message"]
    called = (await http.post(CHAT, json=body(tools=[TOOL], tool_choice="required"))).json()["choices"][0]["message"]
    assert empty["content"] == ""
    assert called["content"] is None
    assert called["tool_calls"][0]["function"]["name"] == "add"


async def test_a_form_has_no_endless_white_space_and_goes_with_tools(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    http = client(echo)
    for given in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "required"}):
        response = await http.post(CHAT, json=body('{"a": 1}'.lower(), response_format=form, **given))
        assert response.status_code == 200, response.text
    alone, either, calls = (request.grammar for request in asked)
    assert alone is not None
    assert alone.json_schema is not None
    assert alone.json_schema["x-guidance"] == {"whitespace_flexible": False}
    assert (alone.closed, alone.lenient) == (True, False)
    assert either is not None
    assert either.tools is not None
    assert either.tools.answer_schema is not None
    assert either.tools.answer_schema["x-guidance"] == {"whitespace_flexible": False}
    assert calls is not None
    assert calls.tools is not None
    assert calls.tools.answer_schema is None
    assert response.headers["x-copyspec-ignored"] == "response_format"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_apart(client: Client, make_engine: MakeEngine, stream: bool) -> None:
    http = client(make_engine(lambda _: "<think>hmm</think>yes"))
    response = await http.post(CHAT, json=body(stream=stream))
    if stream:
        deltas = [event["choices"][0]["delta"] for event in events(response)]
        said = ["".join(delta.get(name, "") for delta in deltas) for name in ("reasoning_content", "content")]
    else:
        message = response.json()["choices"][0]["message"]
        said = [message["reasoning_content"], message["content"]]
        assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert said == ["hmm", "yes"]


async def test_logprobs_of_a_stream_are_those_of_the_whole_answer(echo: Engine, client: Client) -> None:
    http, given = client(echo), {"logprobs": True, "top_logprobs": 2}
    whole = (await http.post(CHAT, json=body("äb", **given))).json()["choices"][0]["logprobs"]["content"]
    stream = events(await http.post(CHAT, json=body("äb", stream=True, **given)))
    parts = [event["choices"][0]["logprobs"] for event in stream]
    assert [entry for part in parts if part for entry in part["content"]] == whole
    assert len(whole) == len("ÄB".encode())
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * len(whole)


async def test_what_copyspec_tells_is_told_where_it_is_asked_for(echo: Engine, client: Client) -> None:
    http, text = client(echo), "THE WHOLE LINE IS REPEATED"
    plain = (await http.post(CHAT, json=body(text))).json()
    asked = {"segments": True, "explain": True, "stats": True}
    whole = (await http.post(CHAT, json=body(text, copyspec=asked))).json()["choices"][0]["copyspec"]
    stream = events(await http.post(CHAT, json=body(text, copyspec=asked, stream=True)))
    bare = (await http.post(CHAT, json=body(text, copyspec={**asked, "drafter": "none"}))).json()["choices"][0]
    said = [event["choices"][0].get("copyspec", {}) for event in stream]
    assert "copyspec" not in json.dumps(plain)
    assert whole["explanation"]["spans"][0]["message"] == 0
    assert whole["stats"]["num_accepted_tokens"] > 0
    assert "".join(segment["text"] for segment in whole["segments"]) == text
    assert "".join(segment["text"] for part in said for segment in part.get("segments", ())) == text
    assert said[-1]["explanation"]["text"] == text
    assert bare["message"]["content"] == text
    assert bare["copyspec"]["stats"]["num_draft_tokens"] == 0


async def test_predictions_are_counted(echo: Engine, client: Client) -> None:
    prediction = {"type": "content", "content": "SOME LONG ANSWER and more"}
    usage = (await client(echo).post(CHAT, json=body("some long answer", prediction=prediction))).json()["usage"]
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == len("SOME LONG ANSWER")
    assert details["rejected_prediction_tokens"] == len(" and more")


async def test_lengths_of_events_show_nothing_where_others_could_see_them(echo: Engine, client: Client) -> None:
    async def lengths(http: Any, **given: Any) -> Sequence[int]:
        response = await http.post(CHAT, json=body("AAAABBBBCCCC", stream=True, **given))
        return [len(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]

    near, proxied = client(echo), client(echo, headers={"X-Forwarded-For": "10.0.0.9"})
    off, on = {"include_obfuscation": False}, {"include_obfuscation": True}
    for hidden in (await lengths(proxied), await lengths(near, stream_options=on)):
        assert all(length & (length - 1) == 0 for length in hidden)
    for shown in (await lengths(near), await lengths(proxied, stream_options=off)):
        assert len(set(shown)) > 1


async def test_half_characters_make_no_event(client: Client, make_engine: MakeEngine) -> None:
    http = client(make_engine(lambda _: "😀é", drafter="none"))
    stream = events(await http.post(CHAT, json=body(stream=True)))
    assert [event["choices"][0]["delta"].get("content") for event in stream] == ["😀", "é", None]


async def test_an_empty_answer_has_a_role(client: Client, make_engine: MakeEngine) -> None:
    (event,) = events(await client(make_engine([""])).post(CHAT, json=body(stream=True)))
    assert event["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_a_failure_in_the_middle_is_an_event_and_no_end(
    client: Client, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(lambda _: "abc", drafter="none")
    astream = Engine.astream

    async def breaks(self: Engine, request: GenerationRequest, *, wait: bool = True) -> Any:
        first: StreamChunk | None = None
        async for chunk in astream(self, request, wait=wait):
            if first is not None:
                raise RuntimeError("secret of the machine")
            first = chunk
            yield chunk

    monkeypatch.setattr(Engine, "astream", breaks)
    response = await client(engine).post(CHAT, json=body(stream=True))
    assert events(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    whole = await client(engine).post(CHAT, json=body())
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal_error")


async def test_a_drafter_is_taken_in_the_form_that_its_error_names(echo: Engine, client: Client) -> None:
    http = client(echo)
    refused = await http.post(CHAT, json=body(copyspec={"drafter": {"type": "copyspec"}}))
    form = re.search(r"\{[^{}]*\}$", refused.json()["error"]["message"])
    assert form is not None, refused.text
    assert (await http.post(CHAT, json=body(copyspec={"drafter": json.loads(form[0])}))).status_code == 200


async def test_arguments_that_are_nested_without_end_are_told_as_they_were_written(
    client: Client, make_engine: MakeEngine
) -> None:
    function = {"name": "add", "arguments": "[" * 100_000}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "2"}
    http = client(make_engine(["ok"], max_model_len=200_000))
    response = await http.post(CHAT, json=body(messages=[*body()["messages"], called, result]))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] > 100_000


async def test_a_schema_that_is_too_large_to_be_followed_is_a_400_of_its_field(echo: Engine, client: Client) -> None:
    schema = {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(3000)}}
    later = {"type": "array", "prefixItems": [{"enum": ["x", "y"]}, schema], "minItems": 2}
    http = client(echo)
    for form in (schema, later):
        for stream in (False, True):
            told = {"type": "json_schema", "json_schema": {"name": "n", "schema": form}}
            response = await http.post(CHAT, json=body(response_format=told, stream=stream))
            has_begun = stream and form is later
            error = events(response)[-1]["error"] if has_begun else response.json()["error"]
            assert (error["param"], error["code"]) == ("response_format", "invalid_value")
            assert "give its objects fewer optional properties" in error["message"]
            assert response.status_code == (200 if has_begun else 400)
    texts = {"format": {"type": "json_schema", "name": "n", "schema": later}}
    response = await http.post("/v1/responses", json={"model": "scripted", "input": "hi", "text": texts})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "text.format")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "(a"}}}}}
    response = await http.post(CHAT, json=body(tools=[tool]))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools")
    assert "pattern='(a', which is no regular expression" in error["message"]
    assert error["message"].endswith("in property 'a' of tool 'f'")
