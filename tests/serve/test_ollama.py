"""Ollama's API: what each field does, that none of them is ignored without a word, and the form of what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from copyspec_engine import Engine, GenerationRequest, RequestFailedError, SamplingParams
from copyspec_engine.serve.app import app_of
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.ollama_bodies import OllamaOptions
from copyspec_engine.serve.service import Service
from copyspec_engine.values.outputs import ReplyDelta, StreamChunk
from tests.serve.conftest import Client

MakeEngine = Callable[..., Engine]

CHAT, GENERATE = "/api/chat", "/api/generate"
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Kraków"}}\n</tool_call>'
THOUGHT = "<think>\nhm, so\n</think>\n\nIt is four."


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": list(messages or (USER,)), **fields}


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[GenerationRequest]:
    """All that is asked of engines from now on."""
    requests: list[GenerationRequest] = []
    astream = Engine.astream

    def recorded(engine: Engine, request: GenerationRequest, **options: Any) -> AsyncIterator[StreamChunk]:
        requests.append(request)
        return astream(engine, request, **options)

    monkeypatch.setattr(Engine, "astream", recorded)
    return requests


# ---- answers


async def test_a_whole_answer_and_a_streamed_one_are_the_engines_own(echo: Engine, client: Client) -> None:
    http, message = client(echo), {"role": "user", "content": "füße"}
    expected = echo.generate(GenerationRequest(messages=[message]))
    whole = (await http.post(CHAT, json=chat(message, stream=False))).json()
    *stream, last = lines(await http.post(CHAT, json=chat(message, model="scripted:latest")))
    assert whole["message"] == {"role": "assistant", "content": expected.text}
    assert "".join(line["message"]["content"] for line in stream) == expected.text
    assert not any(line["done"] for line in stream)
    assert all(line["message"]["content"] for line in stream)
    assert (whole["model"], last["model"]) == ("scripted", "scripted:latest")
    for end in (whole, last):
        assert (end["done"], end["done_reason"]) == (True, "stop")
        assert (end["prompt_eval_count"], end["eval_count"]) == (
            expected.usage.prompt_tokens,
            expected.usage.completion_tokens,
        )
        parts = [end[name] for name in ("load_duration", "prompt_eval_duration", "eval_duration")]
        assert all(type(part) is int and part > 0 for part in parts)
        assert end["total_duration"] >= sum(parts)
    generated = (await http.post(GENERATE, json={"model": "scripted", "prompt": "füße", "stream": False})).json()
    *pieces, _ = lines(await http.post(GENERATE, json={"model": "scripted", "prompt": "füße"}))
    assert generated["response"] == "".join(line["response"] for line in pieces) == expected.text
    assert generated["context"] == [*expected.prompt_token_ids, *expected.token_ids]


@pytest.mark.real_model
async def test_a_real_model_samples_by_ollamas_defaults(smollm2: Engine, client: Client) -> None:
    asked = GenerationRequest(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three fruits."}],
        sampling=SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=7, max_tokens=24),
    )
    expected = smollm2.generate(asked).text
    http = client(smollm2, model_name="m")
    fields = {"model": "m", "options": {"seed": 7, "num_predict": 24}, "stream": False}
    answer = await http.post(CHAT, json={**fields, "messages": asked.messages})
    prompt = {"system": "Be brief.", "prompt": "Name three fruits."}
    generated = await http.post(GENERATE, json={**fields, **prompt})
    assert answer.json()["message"]["content"] == generated.json()["response"] == expected != ""


async def test_reasoning_is_apart_and_can_be_switched_off(
    make_engine: MakeEngine, client: Client, asked: list[GenerationRequest]
) -> None:
    http = client(make_engine(lambda prompt: THOUGHT))
    whole = (await http.post(CHAT, json=chat(stream=False, think="high"))).json()
    *stream, _ = lines(await http.post(GENERATE, json={"model": "scripted", "prompt": "2+2", "think": False}))
    assert whole["message"] == {"role": "assistant", "content": "It is four.", "thinking": "hm, so"}
    assert "".join(line.get("thinking", "") for line in stream) == "hm, so"
    assert "".join(line["response"] for line in stream) == "It is four."
    assert [request.chat_template_kwargs for request in asked] == [
        {"enable_thinking": True, "reasoning_effort": "high"},
        {"enable_thinking": False},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_comes_as_a_whole_and_its_result_finds_it(
    make_engine: MakeEngine, client: Client, asked: list[GenerationRequest], stream: bool
) -> None:
    engine = make_engine(["Let me look." + CALL + CALL, "12 degrees"])
    http = client(engine)
    response = await http.post(CHAT, json=chat(tools=[WEATHER], stream=stream))
    said = lines(response) if stream else [response.json()]
    calls = [call for line in said for call in line["message"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"index": index, "name": "weather", "arguments": {"city": "Kraków"}} for index in (0, 1)
    ]
    assert "".join(line["message"]["content"] for line in said) == "Let me look."
    assert said[-1]["done_reason"] == "stop"
    shown = [{"function": {"name": "weather", "arguments": {"city": "Kraków"}}}] * 2
    back = [
        USER,
        {"role": "assistant", "content": "Let me look.", "tool_calls": shown},
        {"role": "tool", "content": "12", "tool_name": "weather"},
        {"role": "tool", "content": "13"},
    ]
    await http.post(CHAT, json=chat(*back, tools=[WEATHER]))
    _, assistant, *results = asked[1].messages or ()
    ids = [call["id"] for call in assistant["tool_calls"]]
    assert len(set(ids)) == 2
    assert [result["tool_call_id"] for result in results] == ids
    assert asked[1].continues == asked[0].session_id, "the conversation goes on, whatever ids its calls had"


@pytest.mark.parametrize("value", ["1e999", '"\\ud800"'])
async def test_a_call_that_json_cannot_give_back_is_shown_as_text(
    make_engine: MakeEngine, client: Client, value: str
) -> None:
    http = client(make_engine(lambda _: CALL.replace('"Kraków"', value)))
    parameters = {"type": "object", "properties": {"city": {}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    whole = await http.post(CHAT, json=chat(stream=False, tools=[tool]))
    assert whole.status_code == 200, whole.text
    said = whole.json()["message"]
    assert said["content"] == f'{{"city": {value}}}'
    stream = lines(await http.post(CHAT, json=chat(tools=[tool])))
    assert "".join(line["message"]["content"] for line in stream) == said["content"]
    assert not any("tool_calls" in line["message"] for line in (whole.json(), *stream))


async def test_a_call_that_was_cut_off_is_shown_as_text(make_engine: MakeEngine, client: Client) -> None:
    http = client(make_engine(lambda prompt: CALL))
    options = {"num_predict": len('<tool_call>\n{"name": "weather", "arguments": {"city"')}
    message = await http.post(CHAT, json=chat(tools=[WEATHER], options=options, stream=False))
    assert message.json()["done_reason"] == "length"
    assert "tool_calls" not in message.json()["message"]
    assert '{"city"' in message.json()["message"]["content"]


async def test_a_chat_goes_on_where_it_is_shown_whole(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    http = client(echo)
    first = await http.post(CHAT, json=chat(stream=False))
    await http.post(CHAT, json=chat(USER, first.json()["message"], {"role": "user", "content": "and?"}))
    await http.post(CHAT, json=chat({"role": "user", "content": "and?"}))
    named = await http.post(CHAT, json=chat(), headers={"X-Session-ID": "mine"})
    assert [request.continues for request in asked] == [None, asked[0].session_id, None, None]
    assert (asked[3].session_id, named.headers["x-session-id"]) == ("default/mine", "mine")


@pytest.mark.parametrize(
    "form", ["json", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}]
)
async def test_an_answer_has_the_form_that_is_asked_for(make_engine: MakeEngine, client: Client, form: Any) -> None:
    http = client(make_engine(lambda prompt: '{"a":1}' + " " * 50))
    answer = await http.post(CHAT, json=chat(format=form, stream=False))
    generated = await http.post(
        GENERATE, json={"model": "scripted", "prompt": "x", "format": form, "stream": False, "raw": True}
    )
    assert answer.json()["message"]["content"] == generated.json()["response"] == '{"a":1}'


async def test_log_probabilities_are_those_of_the_text(echo: Engine, client: Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = await client(echo).post(CHAT, json=chat(stream=False, **fields))
    stream = lines(await client(echo).post(CHAT, json=chat(**fields)))
    told = [entry for line in stream for entry in line.get("logprobs", ())]
    assert told == whole.json()["logprobs"]
    assert [(entry["token"], entry["bytes"], entry["logprob"]) for entry in told] == [
        ("H", [72], 0.0),
        ("I", [73], 0.0),
    ]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in told)


# ---- generate


async def test_a_prompt_goes_on_from_what_was_said_before(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    http = client(echo)
    first = (await http.post(GENERATE, json={"model": "scripted", "prompt": "one", "stream": False})).json()
    more = {"model": "scripted", "prompt": "two", "context": first["context"], "stream": False}
    second = (await http.post(GENERATE, json=more)).json()
    messages = [{"role": "user", "content": "two"}]
    expected = [*first["context"], *echo.tokenize(GenerationRequest(messages=messages))]
    assert asked[1].prompt_token_ids == expected
    assert (second["response"], second["prompt_eval_count"]) == ("TWO", len(expected))
    assert second["context"][: len(expected)] == expected


async def test_a_raw_prompt_is_the_models_as_it_is(
    make_engine: MakeEngine, client: Client, asked: list[GenerationRequest]
) -> None:
    http = client(make_engine(lambda prompt: THOUGHT + prompt))
    answer = (
        await http.post(GENERATE, json={"model": "scripted", "prompt": "[x]", "raw": True, "stream": False})
    ).json()
    assert (answer["response"], "context" in answer, asked[0].prompt) == (THOUGHT + "[x]", False, "[x]")


@pytest.mark.parametrize(("path", "empty"), [(CHAT, {"messages": []}), (GENERATE, {"prompt": ""}), (GENERATE, {})])
async def test_where_nothing_is_asked_the_model_is_there(
    echo: Engine, client: Client, path: str, empty: dict[str, Any]
) -> None:
    http = client(echo)
    loaded = (await http.post(path, json={"model": "scripted", "keep_alive": "5m", **empty})).json()
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    for never in (0, "0s", "0h0m"):
        refused = await http.post(path, json={"model": "scripted", "keep_alive": never, **empty})
        assert refused.status_code == 400
        assert "stop the server" in refused.json()["error"]


# ---- options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}),
        (
            {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0.1, "seed": -1, "num_predict": -1},
            {"temperature": 0, "top_k": None, "top_p": 1, "min_p": 0.1, "max_tokens": None},
        ),
        (
            {"repeat_penalty": 1.1, "repeat_last_n": -1, "presence_penalty": 1, "stop": ["a", "b"], "seed": 3},
            {"repetition_penalty": 1.1, "presence_penalty": 1, "stop": ("a", "b"), "seed": 3},
        ),
        (
            {"frequency_penalty": 2, "repeat_last_n": 0, "num_predict": 9, "stop": "a"},
            {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 9, "stop": ("a",)},
        ),
        ({"typical_p": 1.0, "tfs_z": 1.0, "mirostat": 0, "repeat_last_n": 64, "num_ctx": 8192}, {}),
    ],
)
async def test_options_are_the_engines(
    echo: Engine, client: Client, asked: list[GenerationRequest], options: dict[str, Any], expected: dict[str, Any]
) -> None:
    response = await client(echo).post(CHAT, json=chat(options=options))
    assert response.status_code == 200
    assert "x-copyspec-ignored" not in response.headers
    sampling = asked[0].sampling
    said = {name: getattr(sampling, name) for name in sampling.model_fields_set}
    unsaid = {"logprobs": False, "top_logprobs": 0}
    assert said == {"temperature": 0.8, "top_k": 40, "top_p": 0.9, **unsaid, **expected}


def test_what_the_checkpoint_says_goes_before_ollamas_defaults(echo: Engine) -> None:
    service = Service(echo, ServeConfig())
    service.info = replace(service.info, sampling_defaults={"temperature": 0.6, "repetition_penalty": 1.2})
    said = OllamaOptions().sampling(service, logprobs=None, top_logprobs=None)
    assert "temperature" not in said.model_fields_set
    assert (said.top_k, said.top_p) == (40, 0.9)
    assert OllamaOptions(repeat_last_n=0).sampling(service, logprobs=None, top_logprobs=None).repetition_penalty == 1


async def test_what_changes_nothing_is_named(echo: Engine, client: Client) -> None:
    options = {"num_gpu": 0, "num_thread": 8, "use_mmap": False, "num_ctx": 99999, "mirostat_tau": 5.0}
    fields = {"keep_alive": -1, "truncate": True, "shift": False, "options": options}
    response = await client(echo).post(CHAT, json=chat({**USER, "colour": "red"}, **fields))
    assert response.status_code == 200
    assert set(response.headers["x-copyspec-ignored"].split(", ")) == {
        *(f"options.{name}" for name in options),
        *("keep_alive", "truncate", "messages[].colour"),
    }
    raw = await client(echo).post(GENERATE, json={"model": "scripted", "prompt": "x", "raw": True, "think": True})
    assert raw.headers["x-copyspec-ignored"] == "think"


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (CHAT, {"model": "other"}, "model 'other' not found"),
        (CHAT, {"model": 3}, "model=3"),
        (CHAT, {"colour": 1}, "colour=1"),
        (CHAT, {"format": "yaml"}, "format='yaml'"),
        (CHAT, {"keep_alive": "soon"}, "keep_alive='soon'"),
        (CHAT, {"think": "a bit"}, "think"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs=3"),
        (CHAT, {"options": {"warmth": 1}}, "warmth=1"),
        (CHAT, {"options": {"temperature": -1}}, "temperature=-1"),
        (CHAT, {"options": {"temperature": "hot"}}, "temperature='hot'"),
        (CHAT, {"options": {"num_predict": 0}}, "options.num_predict=0"),
        (CHAT, {"options": {"typical_p": 0.5}}, "options.typical_p=0.5"),
        (CHAT, {"options": {"mirostat": 2}}, "options.mirostat=2"),
        (CHAT, {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}}, "options.repeat_last_n=64"),
        (CHAT, {"options": {"stop": ["x"] * 65}}, "65 stop texts"),
        (CHAT, {"messages": [{**USER, "images": ["aGk="]}]}, "messages[0].images"),
        (CHAT, {"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role='judge'"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls[0]"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages[0].tool_calls="),
        (CHAT, {"tools": [{"type": "search"}]}, "tools[0]"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 9000}]}, "8192"),
        (GENERATE, {"images": ["aGk="]}, "Got images"),
        (GENERATE, {"suffix": "end"}, "Got suffix"),
        (GENERATE, {"template": "{{ .Prompt }}"}, "Got template"),
        (GENERATE, {"raw": True, "system": "x"}, "Got system with raw"),
        (GENERATE, {"raw": True, "context": [1]}, "Got context with raw"),
        (GENERATE, {"context": [999]}, "999"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    echo: Engine, client: Client, path: str, fields: dict[str, Any], named: str
) -> None:
    whole = chat() if path == CHAT else {"model": "scripted", "prompt": "x"}
    response = await client(echo).post(path, json=whole | fields)
    assert response.status_code == (404 if "not found" in named else 400)
    assert response.json().keys() == {"error"}
    assert named in response.json()["error"]


async def test_a_model_that_does_not_reason_cannot_be_told_to(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "chat_format", echo.chat_format.model_copy(update={"reasoning": None}))
    http = client(echo)
    assert "does not support thinking" in (await http.post(CHAT, json=chat(think=True))).json()["error"]
    assert (await http.post(CHAT, json=chat(think=False))).status_code == 200


# ---- errors


async def test_every_error_has_ollamas_form(slow: Engine, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    http = client(slow, max_body_bytes=1024, max_in_flight=1)
    over = await http.post(CHAT, json=chat({"role": "user", "content": "x" * 2000}))
    nowhere, wrong = await http.post("/api/none", json={}), await http.get(CHAT)
    broken = await http.post(CHAT, content=b"{")
    service = Service(slow, ServeConfig(max_in_flight=1))
    limited = httpx.AsyncClient(transport=httpx.ASGITransport(app=app_of(service)), base_url="http://127.0.0.1")
    service.tenants.named("default").in_flight = 1
    busy = await limited.post(CHAT, json=chat())
    service.calls.is_draining = True
    draining = await limited.post(CHAT, json=chat())
    await limited.aclose()
    monkeypatch.setenv("COPYSPEC_API_KEY", "secret")
    keyless = await client(slow).post(CHAT, json=chat())
    answers = [over, nowhere, wrong, broken, busy, draining, keyless]
    assert [answer.status_code for answer in answers] == [413, 404, 405, 400, 429, 503, 401]
    assert all(list(answer.json()) == ["error"] and isinstance(answer.json()["error"], str) for answer in answers)
    assert busy.headers["retry-after"] == "1"
    assert wrong.headers["allow"] == "POST"


async def test_an_error_in_the_middle_is_the_last_line(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: Engine, request: GenerationRequest, **__: Any) -> AsyncIterator[StreamChunk]:
        yield StreamChunk(request.request_id, "Hel", deltas=(ReplyDelta("text", "Hel"),))
        raise RequestFailedError("The pass failed")

    monkeypatch.setattr(Engine, "astream", fails)
    first, last = lines(await client(echo).post(CHAT, json=chat()))
    whole = await client(echo).post(CHAT, json=chat(stream=False))
    assert (first["message"]["content"], last) == ("Hel", {"error": "The pass failed"})
    assert (whole.status_code, whole.json()) == (500, {"error": "The pass failed"})


async def test_lengths_of_lines_say_nothing_to_those_far_away(make_engine: MakeEngine, client: Client) -> None:
    http = client(make_engine(lambda prompt: "one two three"))
    response = await http.post(CHAT, json=chat(), headers={"x-forwarded-for": "203.0.113.5"})
    assert {len(line.encode()).bit_count() for line in response.text.splitlines()} == {1}
    assert "obfuscation" not in (await http.post(CHAT, json=chat())).text


# ---- models


async def test_the_model_is_told_of(echo: Engine, client: Client) -> None:
    http = client(echo, model_name="org/small", model_aliases=("small:1b",))
    tags, loaded = (await http.get("/api/tags")).json()["models"], (await http.get("/api/ps")).json()["models"]
    assert [entry["model"] for entry in tags] == ["org/small:latest", "small:1b"]
    assert [entry["digest"] for entry in tags] == [entry["digest"] for entry in loaded]
    assert loaded[0]["context_length"] == 8192
    for name in ("org/small", "org/small:latest", "small:1b"):
        shown = (await http.post("/api/show", json={"model": name})).json()
        assert shown["model_info"]["scripted.context_length"] == 8192
        assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert (await http.post("/api/show", json={"name": "small"})).status_code == 404
    assert (await http.post("/api/show", json={})).status_code == 400
    verbose = await http.post("/api/show", json={"name": "org/small", "verbose": True})
    assert verbose.headers["x-copyspec-ignored"] == "verbose"
    assert (await http.get("/api/version")).json()["version"]
    for path in ("/api/tags", "/api/version"):
        assert (await http.head(path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("POST", "/api/pull", "copyspec serve MODEL"),
        ("POST", "/api/push", "upload"),
        ("POST", "/api/create", "chat_template"),
        ("POST", "/api/copy", "model_aliases"),
        ("DELETE", "/api/delete", "stop the server"),
        ("POST", "/api/embed", "embedding model"),
        ("POST", "/api/embeddings", "embedding model"),
        ("POST", "/api/blobs/sha256:1", "copyspec serve MODEL"),
    ],
)
async def test_what_only_ollama_does_is_refused_with_what_to_do(
    echo: Engine, client: Client, method: str, path: str, instead: str
) -> None:
    response = await client(echo).request(method, path, json={"model": "scripted"})
    assert response.status_code == 404
    assert instead in response.json()["error"]
