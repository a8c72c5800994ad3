"""What a tenant may look at, and that it is only ever his own."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from copyspec_engine import Engine, GenerationRequest
from copyspec_engine.loop.step import EngineCore
from copyspec_engine.serve.app import create_app
from copyspec_engine.serve.config import ServeConfig
from tests.serve.conftest import CHAT, Client, body, events

MakeEngine = Callable[..., Engine]
PLACE = "/v1/copyspec/conversations"
MESSAGES = [{"role": "user", "content": "füße"}]
PATHS = [PLACE + "/s", PLACE + "/s/export"]


@pytest.fixture
async def two(echo: Engine, tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Two tenants of one server."""
    path = tmp_path / "keys"
    path.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("ann", "bob")))
    path.chmod(0o600)
    transport = httpx.ASGITransport(app=create_app(echo, ServeConfig(api_keys=str(path))))
    headers = [{"Authorization": f"Bearer {name}"} for name in ("ann", "bob")]
    ann, bob = (httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=each) for each in headers)
    async with ann, bob:
        yield ann, bob


async def test_tokens_are_those_that_the_model_reads(echo: Engine, client: Client) -> None:
    http, tools = client(echo), [{"type": "function", "function": {"name": "add"}}]
    raw = (await http.post("/tokenize", json={"prompt": "füße", "return_token_strs": True})).json()
    chat = (await http.post("/tokenize", json={"model": "scripted", "messages": MESSAGES, "tools": tools})).json()
    text = (await http.post("/detokenize", json={"tokens": chat["tokens"]})).json()
    bare = (await http.post("/detokenize", json={"tokens": chat["tokens"], "skip_special_tokens": True})).json()
    assert raw["tokens"] == list("füße".encode())
    assert (raw["count"], raw["max_model_len"], raw["token_strs"][0]) == (6, 8192, "f")
    assert chat["tokens"] == echo.tokenize(GenerationRequest(messages=MESSAGES, tools=tools))
    assert text["prompt"].endswith("<|im_start|>user\nfüße<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>" not in bare["prompt"]
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "other": 1}, "other"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
        (PLACE + "/s/import", {}, "texts"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    echo: Engine, client: Client, path: str, given: dict[str, Any], param: str
) -> None:
    response = await client(echo).post(path, json=given)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_a_conversation_is_looked_at_taken_along_and_forgotten(client: Client, make_engine: MakeEngine) -> None:
    http = client(make_engine(["The whole line."] * 9))
    name = "a/b ä"
    path = f"{PLACE}/a%2Fb%20%C3%A4"
    await http.post(CHAT, json=body("Hello.", session_id=name))
    (listed,) = (await http.get(PLACE)).json()["data"]
    told, exported = (await http.get(path)).json(), (await http.get(path + "/export")).json()
    assert listed["id"] == told["id"] == exported["session_id"] == name
    assert listed["num_tokens"] == told["num_tokens"] == sum(len(text["token_ids"]) for text in exported["texts"])
    assert told["num_texts"] == len(exported["texts"]) == 2
    assert exported["texts"][1]["text"].startswith("The whole line.")
    assert told["num_bytes"] == exported["num_bytes"] > 0

    taken = await http.post(PLACE + "/new/import", json=exported)
    again = await http.post(PLACE + "/new/import", json=exported)
    copied = (await http.get(PLACE + "/new/export")).json()
    assert (taken.json()["num_texts"], again.json()["num_texts"]) == (2, 0)
    assert [text["token_ids"] for text in copied["texts"]] == [text["token_ids"] for text in exported["texts"]]

    deleted = await http.delete(path)
    assert deleted.json() == {"id": name, "object": "copyspec.conversation.deleted", "deleted": True}
    assert [item["id"] for item in (await http.get(PLACE)).json()["data"]] == ["new"]
    for response in (await http.get(path), await http.get(path + "/export"), await http.delete(path)):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_an_import_lets_answers_go_on(
    client: Client, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, steps = make_engine(lambda _: "word " * 2000, drafter="none"), list[int]()
    http, take_in = client(engine), EngineCore.take_in

    def counted(core: EngineCore, *given: Any) -> Generator[int, None, None]:
        for told in take_in(core, *given):
            steps.append(core.counts.num_steps)
            yield told

    monkeypatch.setattr(EngineCore, "take_in", counted)
    await http.post(CHAT, json=body(max_tokens=1), headers={"X-Session-ID": "a"})
    exported = (await http.get("/v1/copyspec/conversations/a/export")).json()
    exported["texts"] = [{"kind": "answer", "token_ids": list(range(200)) * 1500}]
    asking = asyncio.create_task(http.post(CHAT, json=body(max_tokens=4000)))
    while not engine.metrics().num_running:
        await asyncio.sleep(0.01)
    told = await http.post("/v1/copyspec/conversations/b/import", json=exported)
    assert (told.status_code, told.json()["num_texts"]) == (200, 1)
    assert len(steps) == 10
    assert steps[-1] > steps[0], "between its pieces others get tokens"
    asking.cancel()
    held = (await http.get("/v1/copyspec/conversations/b")).json()
    assert (held["num_texts"], held["num_tokens"]) == (1, 300_000)


async def test_an_id_comes_back_as_it_was_said(client: Client, echo: Engine) -> None:
    http = client(echo)
    for name in ("ä%41", "50%", "a/b"):
        told = (await http.post(CHAT, json=body(session_id=name))).headers["x-session-id"]
        await http.post(CHAT, json=body(), headers={"X-Session-ID": told})
        assert [item["id"] for item in (await http.get(PLACE)).json()["data"]] == [name]
        await http.delete(f"{PLACE}/{told}")
    await http.post(CHAT, json=body(), headers={"X-Session-ID": "ä".encode()})
    assert [item["id"] for item in (await http.get(PLACE)).json()["data"]] == ["ä"]
    twice = await http.post(CHAT, json=body(), headers=[("X-Session-ID", "a"), ("X-Session-ID", "b")])
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "x-session-id")


async def test_where_an_answer_came_from_can_be_asked_later(echo: Engine, client: Client) -> None:
    http, text = client(echo), "THE WHOLE LINE IS REPEATED"
    whole = (await http.post(CHAT, json=body(text, n=2, copyspec={"explain": True}))).json()
    stream = events(await http.post("/v1/completions", json={"model": "scripted", "prompt": text, "stream": True}))
    told = (await http.post(f"/v1/copyspec/explain/{whole['id']}")).json()
    raw = (await http.post(f"/v1/copyspec/explain/{stream[0]['id']}", json={})).json()
    assert told["id"] == whole["id"]
    for index, choice in enumerate(told["choices"]):
        said = whole["choices"][index]["copyspec"]["explanation"]
        assert {name: choice[name] for name in ("index", "text", "spans")} == {"index": index, **said}
        assert choice["spans"][0]["message"] == 0
        assert 0 < choice["copied_share"] <= 1
    assert raw["choices"][0]["text"] == text[:16]
    assert raw["choices"][0]["spans"][0]["source"] == "prompt"
    assert (await http.post(f"/v1/copyspec/explain/{whole['id']}", json={"a": 1})).status_code == 400


async def test_only_so_many_answers_are_kept_and_none_of_what_is_forgotten(echo: Engine, client: Client) -> None:
    async def kept(http: httpx.AsyncClient, ids: list[str]) -> list[bool]:
        return [(await http.post(f"/v1/copyspec/explain/{one}")).status_code == 200 for one in ids]

    async def ids(http: httpx.AsyncClient) -> list[str]:
        return [(await http.post(CHAT, json=body("hi", session_id=name))).json()["id"] for name in "aab"]

    http = client(echo, max_kept=2)
    assert await kept(http, await ids(http)) == [False, True, True]
    http = client(echo, max_kept_tokens=1)
    assert await kept(http, await ids(http)) == [False, False, False]
    http = client(echo)
    said = await ids(http)
    await http.delete(PLACE + "/a")
    assert await kept(http, said) == [False, False, True]


async def test_a_tenant_sees_only_his_own(two: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    ann, bob = two
    said = (await ann.post(CHAT, json=body("secret", session_id="s"))).json()
    exported = (await ann.get(PLACE + "/s/export")).text
    assert "secret" in exported
    assert (await bob.get(PLACE)).json()["data"] == []
    for response in (
        *[await bob.get(path) for path in PATHS],
        await bob.delete(PLACE + "/s"),
        await bob.get(PLACE + "/ann%2Fs"),
        await bob.get(PLACE + "/..%2Fann%2Fs/export"),
        await bob.delete(PLACE + "/ann%2Fs"),
        await bob.post(f"/v1/copyspec/explain/{said['id']}"),
    ):
        assert (response.status_code, "secret" in response.text) == (404, False)
    assert (await bob.post(PLACE + "/s/import", json=json.loads(exported))).status_code == 200
    await bob.delete(PLACE + "/s")
    assert (await ann.get(PLACE + "/s/export")).text == exported
    assert (await ann.post(f"/v1/copyspec/explain/{said['id']}")).status_code == 200
