"""POST /v1/responses: its events and items, what is kept, and that no field is ignored without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from copyspec_engine import Engine, GenerationRequest
from copyspec_engine.serve.kept import Kept
from tests.serve.conftest import Client, events

MakeEngine = Callable[..., Engine]
RESPONSES, CONVERSATIONS = "/v1/responses", "/v1/conversations"
TOOL = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    "strict": False,
}
LONG = "long " * 5000
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
CHAT_TOOL = {"type": "function", "function": {k: TOOL[k] for k in ("name", "description", "parameters")}}


def body(given: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "input": given, **fields}


async def ask(http: httpx.AsyncClient, given: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A whole response, which must be the one that its stream tells of."""
    whole = await http.post(RESPONSES, json=body(given, store=False, **fields))
    assert whole.status_code == 200, whole.text
    stream = await http.post(RESPONSES, json=body(given, stream=True, store=False, **fields))
    told = events(stream)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    names = [line.removeprefix("event: ") for line in stream.text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in told]
    assert "[DONE]" not in stream.text
    assert plain(added_up(told)) == plain(told[-1]["response"]["output"]) == plain(whole.json()["output"])
    said: dict[str, Any] = whole.json()
    return said


def added_up(stream: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events of a stream build."""
    items: list[dict[str, Any]] = []
    for event in stream:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "response.content_part.added":
            items[event["output_index"]]["content"].append(event["part"])
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            assert event["delta"]
            part = items[event["output_index"]]["content"][event["content_index"]]
            part["text"] += event["delta"]
            if "logprobs" in event:
                part["logprobs"] += event["logprobs"]
        elif kind == "response.function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind.endswith(("text.done", "arguments.done")):
            item = items[event["output_index"]]
            told = item["arguments"] if "arguments" in item else item["content"][event["content_index"]]["text"]
            assert told == event.get("text", event.get("arguments"))
        elif kind == "response.output_item.done":
            item = items[event["output_index"]]
            assert item["id"] == event["item"]["id"]
            assert item["status"] == "in_progress"
            item["status"] = event["item"]["status"]
            assert item == event["item"]
    return items


def plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


async def test_a_response_is_the_engines_own_answer(echo: Engine, client: Client) -> None:
    http = client(echo)
    expected = echo.generate(GenerationRequest(messages=[{"role": "user", "content": "füße"}]))
    told = await ask(http, "füße")
    stream = events(await http.post(RESPONSES, json=body("füße", stream=True)))
    assert text_of(told) == expected.text
    assert (told["object"], told["status"], told["error"]) == ("response", "completed", None)
    assert told["usage"]["input_tokens"] == expected.usage.prompt_tokens
    assert told["usage"]["output_tokens"] == expected.usage.completion_tokens
    kinds = [event["type"] for event in stream]
    assert [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert stream[0]["response"]["status"] == "in_progress"
    assert [part["text"] for item in stream[-2:-1] for part in item["item"]["content"]] == [expected.text]


async def test_reasoning_texts_and_calls_are_items_of_their_own(client: Client, make_engine: MakeEngine) -> None:
    http = client(make_engine(lambda _: "<think>hmm</think>On it.\n" + CALL))
    told = await ask(http, tools=[TOOL])
    reasoning, message, call = told["output"]
    assert [item["type"] for item in told["output"]] == ["reasoning", "message", "function_call"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert message["content"][0]["text"].strip() == "On it."
    assert (call["name"], json.loads(call["arguments"]), call["status"]) == ("add", {"x": 1}, "completed")
    assert told["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


async def test_an_answer_that_is_cut_or_empty_says_so(client: Client, make_engine: MakeEngine) -> None:
    cut = await ask(client(make_engine(lambda _: "abcdef")), max_output_tokens=3)
    empty = await ask(client(make_engine(lambda _: "")))
    assert (text_of(cut), cut["status"]) == ("abc", "incomplete")
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["output"][0]["status"] == "incomplete"
    assert cut["completed_at"] is None
    assert (text_of(empty), empty["status"], len(empty["output"])) == ("", "completed", 1)


async def test_items_are_the_messages_that_they_stand_for(
    echo: Engine, client: Client, asked: list[GenerationRequest]
) -> None:
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one and "}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I add.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"x": 1}', "caller": "me"},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "0"}]},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "thanks"},
    ]
    response = await client(echo).post(RESPONSES, json=body(items, instructions="In English.", tools=[TOOL]))
    assert response.status_code == 200, response.text
    calls = [
        {"id": name, "type": "function", "function": {"name": "add", "arguments": arguments}}
        for name, arguments in (("c1", '{"x": 1}'), ("c2", "{}"))
    ]
    assert asked[0].messages == [
        {"role": "system", "content": "In English."},
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one and "},
        {"role": "assistant", "content": "I add.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "0"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "thanks"},
    ]
    assert asked[0].tools == [CHAT_TOOL]
    assert response.headers["x-copyspec-ignored"] == "input[].caller"


async def test_options_reach_the_engine(echo: Engine, client: Client, asked: list[GenerationRequest]) -> None:
    given = {
        "max_output_tokens": 5,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_logprobs": 2,
        "seed": 3,
        "reasoning": {"effort": "none"},
        "metadata": {"a": "b"},
        "user": "u",
        "session_id": "s",
        "store": False,
        "tool_choice": {"type": "function", "name": "add"},
        "tools": [TOOL],
        "parallel_tool_calls": False,
        "copyspec": {"drafter": "none", "stats": True},
        "prompt_cache_key": "k",
        "prediction": "old",
    }
    response = await client(echo).post(RESPONSES, json=body(**given))
    told = response.json()
    (request,) = asked
    assert response.status_code == 200, response.text
    assert response.headers["x-session-id"] == "s"
    assert (request.session_id, request.owner, request.prediction) == ("default/s", "default", "old")
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.5, 0.9, 3)
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 2)
    assert request.chat_template_kwargs == {"enable_thinking": False}
    assert request.grammar is not None
    assert request.grammar.tools is not None
    assert (request.grammar.tools.tool_choice, request.grammar.tools.parallel) == ("add", False)
    assert {name: told[name] for name in given if name in ("temperature", "top_p", "metadata", "user", "store")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "metadata": {"a": "b"},
        "user": "u",
        "store": False,
    }
    assert told["max_output_tokens"] == 5
    assert told["copyspec"]["stats"]["num_draft_tokens"] == 0


async def test_a_form_holds_for_the_text(client: Client, make_engine: MakeEngine, asked: list[Any]) -> None:
    http = client(make_engine(lambda _: '{"a":1}'))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert text_of(await ask(http, text={"format": form})) == '{"a":1}'
    assert asked[0].grammar.json_schema["x-guidance"] == {"whitespace_flexible": False}
    assert asked[0].grammar.lenient is False


async def test_logprobs_are_those_of_the_chat(echo: Engine, client: Client) -> None:
    http = client(echo)
    message = {"model": "scripted", "messages": [{"role": "user", "content": "ab ä"}], "logprobs": True}
    chat = (await http.post("/v1/chat/completions", json={**message, "top_logprobs": 1})).json()
    told = await ask(http, "ab ä", include=["message.output_text.logprobs"], top_logprobs=1)
    expected = json.dumps(chat["choices"][0]["logprobs"]["content"]).replace('"bytes": null', '"bytes": []')
    assert told["output"][0]["content"][0]["logprobs"] == json.loads(expected)


@pytest.mark.parametrize("drafter", ["none", "adaptive"])
async def test_logprobs_are_told_of_text_alone(client: Client, make_engine: MakeEngine, drafter: str) -> None:
    engine = make_engine(lambda _: "<think>said aä</think>said aä\n" + CALL, drafter=drafter)
    told = await ask(client(engine), "said aä </think>", include=["message.output_text.logprobs"], tools=[TOOL])
    part = told["output"][1]["content"][0]
    assert part["text"].strip() == "said aä"
    assert [entry["token"] for entry in part["logprobs"]][:8] == [*"said a", "\ufffd", "\ufffd"]
    assert len(part["logprobs"]) == len(part["text"].encode())


async def test_a_response_goes_on_from_another(
    client: Client, make_engine: MakeEngine, asked: list[GenerationRequest]
) -> None:
    http = client(make_engine(["<think>hm</think>One.", "Two.", "Three.", "Four."]))
    first = (await http.post(RESPONSES, json=body("1", instructions="Count."))).json()
    second = (await http.post(RESPONSES, json=body("2", previous_response_id=first["id"]))).json()
    branch = (await http.post(RESPONSES, json=body("3", previous_response_id=first["id"]))).json()
    items = [{"id": item["id"]} for item in first["output"]]
    again = await http.post(RESPONSES, json=body([{"role": "user", "content": "1"}, *items, *body("2")["input"]]))
    assert again.status_code == 400, "a text is no item"
    one = {"role": "assistant", "content": "One.", "reasoning_content": "hm"}
    assert asked[1].messages == [{"role": "user", "content": "1"}, one, {"role": "user", "content": "2"}]
    assert asked[2].messages == [*asked[1].messages[:2], {"role": "user", "content": "3"}]
    assert (second["previous_response_id"], text_of(branch)) == (first["id"], "Three.")

    listed = (await http.get(f"{RESPONSES}/{second['id']}/input_items", params={"order": "asc"})).json()
    assert [item["type"] for item in listed["data"]] == ["message", "reasoning", "message", "message"]
    assert (listed["first_id"], listed["has_more"]) == (listed["data"][0]["id"], False)
    page = (await http.get(f"{RESPONSES}/{second['id']}/input_items?limit=1&after={listed['last_id']}")).json()
    assert page["data"] == [listed["data"][2]]
    assert page["has_more"]

    replayed = [*listed["data"][:1], *({"type": "item_reference", "id": item["id"]} for item in first["output"])]
    await http.post(RESPONSES, json=body([*replayed, {"role": "user", "content": "2"}]))
    assert asked[3].messages == asked[1].messages


async def test_what_is_kept_can_be_asked_for_and_deleted(echo: Engine, client: Client) -> None:
    http = client(echo)
    made = (await http.post(RESPONSES, json=body())).json()
    stream = events(await http.post(RESPONSES, json=body(stream=True)))
    unkept = (await http.post(RESPONSES, json=body(store=False))).json()
    path = f"{RESPONSES}/{made['id']}"
    assert (await http.get(path)).json() == made
    assert (await http.get(f"{RESPONSES}/{stream[-1]['response']['id']}")).json() == stream[-1]["response"]
    assert (await http.get(path, params={"stream": "true"})).json()["error"]["param"] == "stream"
    for limit in ("0", "101", "9" * 5000, "\u0663"):
        refused = await http.get(f"{path}/input_items", params={"limit": limit})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")
    assert (await http.delete(path)).json() == {"id": made["id"], "object": "response", "deleted": True}
    for response in (await http.get(path), await http.delete(path), await http.get(f"{RESPONSES}/{unkept['id']}")):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")
    gone = await http.post(RESPONSES, json=body(previous_response_id=made["id"]))
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "previous_response_not_found")


async def test_a_conversation_that_is_forgotten_takes_its_responses_along(echo: Engine, client: Client) -> None:
    http = client(echo)
    kept, gone = [(await http.post(RESPONSES, json=body(session_id=name))).json()["id"] for name in "ab"]
    await http.delete("/v1/copyspec/conversations/b")
    assert (await http.get(f"{RESPONSES}/{kept}")).status_code == 200
    assert (await http.get(f"{RESPONSES}/{gone}")).status_code == 404


async def test_a_named_conversation_grows_with_its_responses(
    client: Client, make_engine: MakeEngine, asked: list[GenerationRequest]
) -> None:
    http = client(make_engine(["One.", "Two."]))
    begun = {"items": [{"role": "system", "content": "Count."}], "metadata": {"a": "b"}}
    made = (await http.post(CONVERSATIONS, json=begun)).json()
    path = f"{CONVERSATIONS}/{made['id']}"
    await http.post(RESPONSES, json=body("1", conversation=made["id"]))
    second = await http.post(RESPONSES, json=body("2", conversation={"id": made["id"]}, store=False))
    said = [("system", "Count."), ("user", "1"), ("assistant", "One."), ("user", "2")]
    assert [(message["role"], message["content"]) for message in asked[1].messages or ()] == said
    assert asked[1].session_id == f"default/{made['id']}"
    assert second.json()["conversation"] == {"id": second.headers["x-session-id"]} == {"id": made["id"]}
    items = (await http.get(path + "/items", params={"order": "asc"})).json()["data"]
    assert [item["role"] for item in items] == ["system", "user", "assistant", "user", "assistant"]
    assert (await http.get(path)).json() == made
    assert (await http.delete(path)).json() == {"id": made["id"], "object": "conversation.deleted", "deleted": True}
    for response in (await http.get(path), await http.post(RESPONSES, json=body(conversation=made["id"]))):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "conversation_not_found")


async def test_a_conversation_that_is_too_long_takes_no_others_place(echo: Engine, client: Client) -> None:
    http = client(echo, max_kept_tokens=100)
    path = f"{CONVERSATIONS}/{(await http.post(CONVERSATIONS, json={})).json()['id']}"
    items = [{"role": "user", "content": "x" * 9000}]
    refused = await http.post(CONVERSATIONS, json={"items": items})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert (await http.get(path)).status_code == 200


@pytest.mark.parametrize(
    "long", [{"prediction": LONG}, {"metadata": {"a": LONG}}, {"chat_template_kwargs": {"a": LONG}}]
)
async def test_what_is_in_no_prompt_counts_where_it_is_kept(echo: Engine, client: Client, long: dict[str, Any]) -> None:
    """Else 256 bodies of 8 MB each could be kept of every tenant, three times over."""
    http = client(echo, max_kept_tokens=1000)
    first, second = [(await http.post(RESPONSES, json=body(**long))).json()["id"] for _ in "ab"]
    kept = [(await http.get(f"{RESPONSES}/{one}")).status_code for one in (first, second)]
    assert kept == [404, 200]
    explained = [(await http.post(f"/v1/copyspec/explain/{one}")).status_code for one in (first, second)]
    assert explained == [404, 200]


async def test_what_a_conversation_was_made_with_counts_as_it_grows(echo: Engine, client: Client) -> None:
    http = client(echo, max_kept_tokens=1000)
    first, second = [(await http.post(CONVERSATIONS, json={"metadata": {"a": LONG}})).json()["id"] for _ in "ab"]
    assert (await http.get(f"{CONVERSATIONS}/{first}")).status_code == 404
    for _ in "ab":
        assert (await http.post(RESPONSES, json=body(conversation=second))).status_code == 200
    third = (await http.post(CONVERSATIONS, json={"metadata": {"a": LONG}})).json()["id"]
    kept = [(await http.get(f"{CONVERSATIONS}/{one}")).status_code for one in (second, third)]
    assert kept == [404, 200]


async def test_many_items_that_are_known_are_found_in_one_look(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look for each of them took minutes, in which nobody was answered."""
    http, looks = client(echo), []
    made = [{"role": "user", "content": "a", "id": f"msg_{number}"} for number in range(50)]
    await http.post(CONVERSATIONS, json={"items": made})
    through = Kept.__iter__
    monkeypatch.setattr(Kept, "__iter__", lambda kept: looks.append(kept) or through(kept))
    told = [{"type": "item_reference", "id": item["id"]} for item in made]
    assert (await http.post(RESPONSES, json=body(told, max_output_tokens=1))).status_code == 200
    assert len(looks) == 2, "through responses and conversations"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"context_management": []}, "context_management"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"truncation": "middle"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["hi"]}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "a", "id": 5}]}, "input[0].id"),
        ({"input": [{"role": "assistant", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "a"}, {"type": "function_call_output", "output": "b"}]},
         "input[1].tool_call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": "x" * 9000}, "input"),
        ({"conversation": "c", "previous_response_id": "r"}, "previous_response_id"),
        ({"stream_options": {}}, "stream_options"),
        ({"n": 2}, "n"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused_by_name(
    echo: Engine, client: Client, given: dict[str, Any], param: str
) -> None:
    response = await client(echo).post(RESPONSES, json=body(**given))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_fields_without_effect_are_named(echo: Engine, client: Client) -> None:
    given = {
        "service_tier": "auto",
        "truncation": "auto",
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"},
        "max_tool_calls": 3,
    }
    response = await client(echo).post(RESPONSES, json=body(**given))
    assert response.headers["x-copyspec-ignored"] == (
        "service_tier, max_tool_calls, text.verbosity, reasoning.summary, include, truncation"
    )


async def test_a_failure_in_the_middle_ends_the_response(
    client: Client, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    astream = Engine.astream

    async def breaks(self: Engine, request: GenerationRequest, *, wait: bool = True) -> Any:
        async for chunk in astream(self, request, wait=wait):
            yield chunk
            raise RuntimeError("secret of the machine")

    monkeypatch.setattr(Engine, "astream", breaks)
    response = await client(make_engine(lambda _: "abc", drafter="none")).post(RESPONSES, json=body(stream=True))
    last = events(response)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert (text_of(last["response"]), last["response"]["output"][0]["status"]) == ("a", "incomplete")
    assert "secret" not in response.text


@pytest.mark.real_model
async def test_a_real_model_says_the_same_at_every_endpoint(smollm2: Engine, client: Client) -> None:
    """Greedy and with a seed, whole and in events, drafted and not; a response goes on in its very words."""
    http, text = client(smollm2, model_name="m"), "Repeat after me: the ferry leaves at nine, says Ann, at nine sharp."
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 7}):
        asked = {"messages": [{"role": "user", "content": text}], "sampling": {**options, "max_tokens": 24}}
        expected = smollm2.generate(GenerationRequest(**asked)).text
        sent = {"model": "m", "max_tokens": 24, **options}
        chat = (await http.post("/v1/chat/completions", json={**sent, "messages": asked["messages"]})).json()
        assert chat["choices"][0]["message"]["content"] == expected
        for drafter in ("adaptive", "none"):
            own = {"copyspec": {"drafter": drafter}}
            whole = (await http.post(RESPONSES, json={**sent, **own, "input": text})).json()
            stream = events(await http.post(RESPONSES, json={**sent, **own, "input": text, "stream": True}))
            assert text_of(whole) == text_of(stream[-1]["response"]) == expected
        raw = (await http.post("/v1/completions", json={**sent, "prompt": text})).json()["choices"][0]["text"]
        assert raw == smollm2.generate(GenerationRequest(prompt=text, sampling=asked["sampling"])).text
    tokens = (await http.post("/tokenize", json={"messages": asked["messages"]})).json()["tokens"]
    assert tokens == smollm2.tokenize(GenerationRequest(messages=asked["messages"]))
    following = (
        await http.post(RESPONSES, json={**sent, "input": "Again.", "previous_response_id": whole["id"]})
    ).json()
    assert following["usage"]["input_tokens_details"]["cached_tokens"] > len(tokens)
