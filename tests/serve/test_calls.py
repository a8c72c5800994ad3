"""What every call has, whatever its endpoint: an end when its client goes, a place or a 429, signs of life, limits."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from copyspec_engine import Engine
from copyspec_engine.serve.calls import Calls
from copyspec_engine.testing import held_by
from tests.serve.conftest import CHAT, Client, body, events, texts

MakeEngine = Callable[..., Engine]
Serve = Callable[..., Awaitable[str]]
StoppedEarly = Callable[[Engine], Awaitable[bool]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_call(
    slow: Engine, serve: Serve, stopped_early: StoppedEarly, stream: bool
) -> None:
    url = await serve(slow)
    async with httpx.AsyncClient(base_url=url) as http:
        asking = asyncio.create_task(http.post(CHAT, json=body(n=2, stream=stream)))
        while held_by(slow).running < 2:
            await asyncio.sleep(0.01)
        asking.cancel()
    assert await stopped_early(slow)


async def test_a_reader_that_takes_nothing_is_given_up(slow: Engine, serve: Serve, stopped_early: StoppedEarly) -> None:
    url = await serve(slow, send_timeout_s=0.2)
    host, port = url.removeprefix("http://").split(":")
    said = json.dumps(body(stream=True, logprobs=True, top_logprobs=20, n=4))
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(reader, (host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(said)}\r\n\r\n"
        await loop.sock_sendall(reader, (head + said).encode())
        while not held_by(slow).running:
            await asyncio.sleep(0.01)
        while held_by(slow).running:
            await asyncio.sleep(0.05)
    assert await stopped_early(slow)


@pytest.mark.parametrize("stream", [False, True])
async def test_busy_is_a_429_and_no_stream(make_engine: MakeEngine, client: Client, stream: bool) -> None:
    http = client(make_engine(lambda _: "word " * 300, drafter="none", max_running=1, max_waiting=1))
    refused = await http.post(CHAT, json=body(n=3, stream=stream))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "engine_busy")
    assert refused.headers["retry-after"] == "1"
    whole = await http.post(CHAT, json=body(n=2, max_tokens=5))
    assert whole.status_code == 200, "the choices of the call that was refused hold no place"


async def test_a_stream_that_waits_for_long_says_that_it_lives(make_engine: MakeEngine, client: Client) -> None:
    engine = make_engine(["first " * 100, "second"], drafter="none", max_running=1)
    http = client(engine, first_byte_s=0.05, ping_s=0.02, delta_s=0.1)
    first = asyncio.create_task(http.post(CHAT, json=body(stream=True)))
    while not held_by(engine).running:
        await asyncio.sleep(0.01)
    second = await http.post(CHAT, json=body(stream=True))
    assert texts(events(await first)) == {0: "first " * 100}
    assert texts(events(second)) == {0: "second"}
    assert ": ping\n\n" in second.text
    assert {} in [event["choices"][0]["delta"] for event in events(second)[:-1]]


async def test_each_key_has_so_many_answers_at_a_time(slow: Engine, client: Client) -> None:
    http = client(slow, max_in_flight=2)
    refused = await http.post(CHAT, json=body(n=3))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    for _ in range(3):  # what is over counts no more
        assert (await http.post(CHAT, json=body(n=2, max_tokens=2))).status_code == 200


async def test_each_key_has_so_many_tokens_a_minute(echo: Engine, client: Client) -> None:
    http = client(echo, tokens_per_minute=100)
    codes = [(await http.post(CHAT, json=body("x" * 60))).status_code for _ in range(2)]
    assert codes == [200, 429]
    refused = await http.post(CHAT, json=body())
    assert refused.json()["error"]["type"] == "tokens"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"x" * 2000, 413, "body_too_large"),
        (b"{", 400, "invalid_json"),
        (b"[" * 100_000, 413, "body_too_large"),
        (b'{"model": ' + b"[" * 70 + b"]" * 70 + b"}", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"temperature": 1e999}', 400, "invalid_json"),
        (b'{"input": [{"status": [-1e999]}]}', 400, "invalid_json"),
        (b'{"model": "\\ud800"}', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"{}", 400, "missing_parameter"),
        (b"", 400, "missing_parameter"),
    ],
)
async def test_bodies_that_are_none(echo: Engine, client: Client, content: bytes, status: int, code: str) -> None:
    response = await client(echo, max_body_bytes=1024).post(CHAT, content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_json_that_is_nested_without_end_is_refused(echo: Engine, client: Client) -> None:
    response = await client(echo).post(CHAT, content=b"[" * 1_000_000)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("[]", "lists, objects and fields"),
        ("{}", "lists, objects and fields"),
        ("[" * 60 + "]" * 60, "lists, objects and fields"),
        ('"","\\\\","\\"["', "items in lists and objects"),
    ],
)
async def test_of_many_parts_none_is_made(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch, part: str, said: str
) -> None:
    """Making 8 MB of nested lists took seconds, in which nobody was answered."""
    content = f'{{"messages": [{",".join([part] * (7_500_000 // (len(part) + 1)))}]}}'.encode()
    http = client(echo)
    monkeypatch.setattr("copyspec_engine.serve.bodies._parsed", lambda *_: pytest.fail("it was read"))
    response = await http.post(CHAT, content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert said in response.json()["error"]["message"]


async def test_what_looks_like_parts_in_a_text_is_none(echo: Engine, client: Client) -> None:
    text = '[{:"\\,' * 250_000
    response = await client(echo).post(CHAT, json=body(text))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_of_many_wrong_fields_a_few_are_told(echo: Engine, client: Client) -> None:
    """All of them took minutes, in which nobody was answered."""
    http = client(echo)
    unknown = await http.post(CHAT, json=body(**{f"field_{number}": 1 for number in range(50_000)}))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "unknown_parameter")
    assert unknown.json()["error"]["message"].count("Got unknown option") == 8
    wrong = await http.post(CHAT, json=body(messages=[1] * 500_000, metadata={str(at): 1 for at in range(100_000)}))
    assert wrong.status_code == 400
    assert [wrong.json()["error"]["message"].count(f"Got {name}") for name in ("messages", "metadata")] == [1, 1]
    inside = await http.post(CHAT, json=body(copyspec={f"field_{number}": 1 for number in range(50_000)}))
    assert inside.json()["error"]["message"].count("Got unknown option") == 8


@pytest.mark.parametrize(
    ("given", "param", "end"),
    [
        ({"bad_words": ["x" * 100_000, ""]}, "bad_words", "expected texts or token ids, none of them empty"),
        ({"bad_words": [{"x" * 100_000: 1}]}, "bad_words", None),
        ({"model": "x" * 100_000}, "model", "but this server has scripted"),
        ({"response_format": {"type": "x" * 100_000}}, "response_format", '{"type": "text"}'),
        ({"tool_choice": "x" * 100_000}, "tool_choice", "but expected one of auto, none"),
        ({"messages": [{"role": "x" * 100_000}]}, "messages[0].role", "user, assistant, tool"),
        ({"x" * 100_000: 1}, "xxx", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(" + "x" * 100_000}}}},
            "response_format",
            "in the JSON schema",
        ),
    ],
)
async def test_long_values_are_not_given_back(
    echo: Engine, client: Client, given: dict[str, Any], param: str, end: str | None
) -> None:
    response = await client(echo).post(CHAT, json=body(**given))
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"].startswith(param)
    assert len(response.content) < 20_000
    assert error["message"].startswith("Got ")
    assert end is None or error["message"].endswith(end)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/embeddings", 404, "unsupported_endpoint"),
        ("POST", "/v1/audio/speech", 404, "unsupported_endpoint"),
        ("GET", "/nothing", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_what_is_not_there_is_told_in_openais_form(
    echo: Engine, client: Client, method: str, path: str, status: int, code: str
) -> None:
    response = await client(echo).request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}


async def test_what_nobody_expects_is_a_500_without_a_word_of_the_inside(
    echo: Engine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: Calls, *_: Any) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(Calls, "begin", fails)
    response = await client(echo).post(CHAT, json=body())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "inside" not in response.text


async def test_a_request_keeps_its_id(echo: Engine, client: Client) -> None:
    http = client(echo)
    given = await http.post(CHAT, json=body(), headers={"X-Request-ID": "mine-1"})
    bad = await http.get("/nothing", headers={"X-Request-ID": "mine-2"})
    made = await http.get("/ready")
    assert (given.headers["x-request-id"], bad.headers["x-request-id"]) == ("mine-1", "mine-2")
    assert made.headers["x-request-id"].startswith("req_")


async def test_the_model_goes_by_its_other_names(echo: Engine, client: Client) -> None:
    http = client(echo, model_aliases=("gpt-4o",))
    listed = (await http.get("/v1/models")).json()["data"]
    answer = (await http.post(CHAT, json={**body("hello"), "model": "gpt-4o"})).json()
    assert [model["id"] for model in listed] == ["scripted", "gpt-4o"]
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("gpt-4o", "HELLO")


async def test_a_body_whose_length_is_told_twice_is_the_last_of_its_connection(echo: Engine, serve: Serve) -> None:
    host, _, port = (await serve(echo)).removeprefix("http://").partition(":")
    content = json.dumps(body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    behind = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) + behind)
    told = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    assert told.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in told.lower()
    assert told.count(b"HTTP/1.1") == 1
