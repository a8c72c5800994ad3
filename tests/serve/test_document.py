"""The OpenAPI document: what it says of answers holds of each endpoint's, and what it says of fields too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from copyspec_engine import Engine
from copyspec_engine.serve import schemas
from tests.serve.conftest import CHAT, Client, body

MakeEngine = Callable[..., Engine]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS = 'On it.\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
ALL = {"segments": True, "explain": True, "stats": True}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
USER = [{"role": "user", "content": "hi"}]


def replies(prompt: str) -> str:
    return "<think>hm</think>yes" if "think" in prompt else CALLS if "add" in prompt else prompt[-40:].upper()


async def test_every_answer_is_as_the_document_says(client: Client, make_engine: MakeEngine) -> None:
    http = client(make_engine(replies))
    document = (await http.get("/openapi.json")).json()
    seen: set[tuple[str, str]] = set()

    async def held(method: str, path: str, at: str = "", status: int = 200, **given: Any) -> dict[str, Any]:
        response = await http.request(method, path.replace("{name}", at).replace("{call_id}", at), **given)
        assert response.status_code == status, response.text
        said = document["paths"][path][method.lower()]["responses"]
        of_status = said["200"] if status == 200 else said[f"{status // 100}XX"]
        name = of_status["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        getattr(schemas, name).model_validate_json(response.content)
        if status == 200:
            seen.add((method, path))
        told: dict[str, Any] = response.json()
        return told

    chat = await held("POST", CHAT, json=body(copyspec=ALL, n=2, **LOGPROBS), headers={"X-Session-ID": "s"})
    await held("POST", CHAT, json=body("think"))
    await held("POST", CHAT, json=body(tools=[TOOL]))
    await held("POST", CHAT, json=body(temperature=-1), status=400)
    asked = {"model": "scripted", "prompt": "ab", "logprobs": 2, "copyspec": ALL}
    await held("POST", "/v1/completions", json=asked)
    options = {"tools": [{"type": "function", "name": "add", "parameters": {}}], "top_logprobs": 1, "copyspec": ALL}
    await held("POST", "/v1/responses", json={"model": "scripted", "input": "hi", "max_output_tokens": 3, **options})
    talk = (await held("POST", "/v1/conversations", content=b""))["id"]
    made = await held("POST", "/v1/responses", json={"model": "scripted", "input": "think", "conversation": talk})
    for path, at in (("/v1/responses", made["id"]), ("/v1/conversations", talk)):
        await held("GET", path + "/{name}", at)
        await held("GET", path + "/{name}" + ("/items" if at == talk else "/input_items"), at, params={"limit": 1})
        await held("DELETE", path + "/{name}", at)
        await held("DELETE", path + "/{name}", at, status=404)
    place = "/v1/copyspec/conversations"
    await held("GET", place)
    await held("GET", place + "/{name}", "s")
    exported = await held("GET", place + "/{name}/export", "s")
    await held("POST", place + "/{name}/import", "t", json=exported)
    await held("DELETE", place + "/{name}", "t")
    await held("POST", "/v1/copyspec/explain/{call_id}", chat["id"])
    await held("GET", "/v1/models")
    await held("GET", "/v1/models/{name}", "scripted")
    await held("POST", "/tokenize", json={"prompt": "ab", "return_token_strs": True})
    await held("POST", "/detokenize", json={"tokens": [97.0]})
    for path, said in (("/api/chat", {"messages": USER, "tools": [TOOL]}), ("/api/generate", {"prompt": "think"})):
        await held("POST", path, json={"model": "scripted", "stream": False, **LOGPROBS, **said})
        await held("POST", path, json={"model": "scripted", "keep_alive": 1})
        await held("POST", path, json={"model": "other"}, status=404)
    await held("POST", "/api/show", json={"model": "scripted"})
    for path in ("/api/tags", "/api/ps", "/api/version", "/health", "/ready", "/version"):
        await held("GET", path)
    every = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert every - seen == {("GET", "/metrics")}
    operations = [said["operationId"] for methods in document["paths"].values() for said in methods.values()]
    assert len(operations) == len(set(operations))


async def test_what_is_refused_is_documented_as_refused(echo: Engine, client: Client) -> None:
    http = client(echo)
    fields = (await http.get("/openapi.json")).json()["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["audio"] == {"enum": [None, False], "description": "Refused: the model writes text only."}
    for value, status in ((None, 200), (False, 200), ({}, 400)):
        assert (await http.post(CHAT, json=body(audio=value))).status_code == status


async def test_keys_are_documented_where_they_are_needed(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def needs(http: httpx.AsyncClient) -> dict[str, Any]:
        paths = (await http.get("/openapi.json")).json()["paths"]
        return {path: paths[path]["get"]["security"] for path in ("/v1/models", "/health")}

    assert await needs(client(echo)) == {"/v1/models": [], "/health": []}
    monkeypatch.setenv("COPYSPEC_API_KEY", "k")
    http = client(echo, headers={"Authorization": "Bearer k"})
    assert await needs(http) == {"/v1/models": [{"key": []}], "/health": []}


async def test_a_path_tells_its_methods(echo: Engine, client: Client) -> None:
    http = client(echo)
    for path, allowed in (("/v1/responses/x", "GET, HEAD, DELETE"), (CHAT, "POST"), ("/", "GET, HEAD")):
        response = await http.request("PATCH", path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)


async def test_json_has_one_kind_of_number(echo: Engine, client: Client) -> None:
    content = json.dumps(body("hello", max_tokens=2.0, n=1.0, stop_token_ids=[3.0], seed=1e3))
    response = await client(echo).post(CHAT, content=content)
    assert response.json()["choices"][0]["message"]["content"] == "HE"
    wrong = await client(echo).post(CHAT, json=body(max_tokens=2.5))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")


async def test_the_header_of_ignored_fields_holds_any_name_and_not_too_many(echo: Engine, client: Client) -> None:
    names = {"ä\r\nX-Evil: 1": 1, "\U00087ac5": 1, **{f"field_{number}": 1 for number in range(200)}}
    messages = [{"role": "user", "content": "hi", **names}]
    response = await client(echo).post(CHAT, json=body(messages=messages))
    told = response.headers["x-copyspec-ignored"]
    assert response.status_code == 200
    assert told.startswith("messages[].%C3%A4%0D%0AX-Evil: 1, messages[].%F2%87%AB%85, messages[].field_0")
    assert told.endswith(", ...")
    assert len(told) < 1100
