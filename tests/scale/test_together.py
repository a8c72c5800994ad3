"""What several replicas answer together: lists, counts, and that a conversation is to be forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Scope

from copyspec_engine import Engine, EngineConfig, MemoryFileError
from copyspec_engine.scale.together import Together, Told, told_by
from copyspec_engine.serve.app import create_app
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.testing import scripted_engine

PLACE = "/v1/copyspec/conversations"


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made = [scripted_engine(lambda prompt: "a long answer to copy from") for _ in range(2)]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def replicas(engines: list[Engine]) -> list[ASGIApp]:
    """Two of them, which know of each other."""
    return replicas_of(engines)


def replicas_of(engines: list[Engine]) -> list[ASGIApp]:
    alone = [create_app(engine, ServeConfig()) for engine in engines]

    async def ask_all(scope: Scope) -> tuple[Sequence[Told], bool]:
        return [await told_by(app, str(slot), scope) for slot, app in enumerate(alone)], True

    return [Together(app, str(slot), ask_all) for slot, app in enumerate(alone)]


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1")


async def ask(app: ASGIApp, session: str) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
    async with client(app) as http:
        assert (
            await http.post("/v1/chat/completions", json=body, headers={"X-Session-ID": session})
        ).status_code == 200


async def get(app: ASGIApp, path: str, method: str = "GET", **more: Any) -> httpx.Response:
    async with client(app) as http:
        return await http.request(method, path, **more)


async def test_any_replica_lists_and_forgets_the_conversations_of_all(replicas: list[ASGIApp]) -> None:
    await ask(replicas[0], "here")
    await ask(replicas[1], "there")
    await ask(replicas[1], "here")
    for app in replicas:
        assert [info["id"] for info in (await get(app, PLACE)).json()["data"]] == ["there", "here"]
    assert (await get(replicas[0], f"{PLACE}/there", "DELETE")).json()["deleted"]
    assert (await get(replicas[0], f"{PLACE}/here", "DELETE")).status_code == 200
    assert [(await get(app, PLACE)).json()["data"] for app in replicas] == [[], []]
    assert (await get(replicas[1], f"{PLACE}/here", "DELETE")).status_code == 404


async def test_a_conversation_that_was_not_used_since_a_replica_began_is_listed_before_all_others(
    engines: list[Engine], tmp_path: Path
) -> None:
    config = EngineConfig(model="scripted", memory_path=str(tmp_path / "memory"))
    with scripted_engine(lambda prompt: "an answer", config) as engine:
        await ask(create_app(engine, ServeConfig()), "kept")
    with scripted_engine(lambda prompt: "an answer", config) as engine:
        replicas = replicas_of([engine, engines[0]])
        await ask(replicas[1], "new")
        for app in replicas:
            found = [(info["id"], info["last_used_at"] is None) for info in (await get(app, PLACE)).json()["data"]]
            assert found == [("kept", True), ("new", False)]
        await ask(replicas[1], "kept")
        found = [(info["id"], info["last_used_at"] is None) for info in (await get(app, PLACE)).json()["data"]]
        assert found == [("new", False), ("kept", False)]


async def test_a_conversation_of_responses_is_forgotten_by_all(replicas: list[ASGIApp]) -> None:
    name = (await get(replicas[0], "/v1/conversations", "POST", json={})).json()["id"]
    await ask(replicas[1], name)
    assert (await get(replicas[0], f"/v1/conversations/{name}", "DELETE")).json()["deleted"]
    assert (await get(replicas[1], PLACE)).json()["data"] == []


async def test_counts_are_those_of_all_by_their_slots(replicas: list[ASGIApp]) -> None:
    await ask(replicas[0], "here")
    families = {
        family.name: family for family in text_string_to_metric_families((await get(replicas[1], "/metrics")).text)
    }
    spent = {sample.labels["slot"]: sample.value for sample in families["copyspec_completion_tokens"].samples}
    assert spent["0"] > 0
    assert spent["1"] == 0
    buckets = families["copyspec_request_seconds"].samples
    assert {sample.labels["slot"] for sample in buckets} == {"0", "1"}
    assert families["copyspec_request_seconds"].type == "histogram"


async def test_whoever_may_not_ask_is_told_so_and_nobody_else_is_asked(engines: list[Engine]) -> None:
    asked: list[Scope] = []

    async def ask_all(scope: Scope) -> tuple[Sequence[Told], bool]:
        asked.append(scope)
        return [], False

    app = Together(create_app(engines[0], ServeConfig()), "0", ask_all)
    assert (await get(app, PLACE, headers={"host": "elsewhere.example.org"})).status_code == 403
    assert not asked
    missing = await get(app, f"{PLACE}/here", "DELETE")
    assert (missing.status_code, missing.json()["error"]["code"]) == (503, "replica_missing")
    assert asked
    assert (await get(app, PLACE)).json()["data"] == []


async def test_erasing_that_the_store_does_not_take_may_be_asked_again_and_the_log_alone_says_where_it_is(
    engines: list[Engine], replicas: list[ASGIApp], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(replicas[0], "here")
    said = "Could not delete from the memory database postgresql://keeper@inside.example.org/texts"

    def fail(_session: str) -> bool:
        raise MemoryFileError(said)

    with monkeypatch.context() as away:
        away.setattr(engines[0], "forget", fail)
        refused = await get(replicas[0], f"{PLACE}/here", "DELETE")
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "memory_file_error")
    assert refused.headers["retry-after"] == "1"
    assert "keeper" not in refused.text
    assert said in caplog.text
    assert (await get(replicas[0], f"{PLACE}/here", "DELETE")).status_code == 200
