"""What Ray is told and asked, without a cluster: routers, fronts and replicas, each by itself."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    pytest.importorskip("ray.serve", reason="needs ray: pip install 'copyspec[scale]'")

from ray.exceptions import ActorDiedError
from ray.serve import Application
from starlette.datastructures import Headers

from copyspec_engine import ConfigError, Engine, EngineConfig
from copyspec_engine.scale import build, front, replica
from copyspec_engine.scale.application import replica_options
from copyspec_engine.scale.config import ScaleConfig
from copyspec_engine.scale.front import Front
from copyspec_engine.scale.options import split_options
from copyspec_engine.scale.replica import Replica
from copyspec_engine.scale.router import SlotRouter, order, said_to_routers
from copyspec_engine.scale.routes import Askers, Route, route_of
from copyspec_engine.scale.slots import tag_of
from copyspec_engine.scale.up import APPLICATION, UpOptions, run_up
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import DIED
from copyspec_engine.testing import held_by
from scripts.scale_drill.models import STICK, scripted, story

CHAT = "/v1/chat/completions"


def question(words: int, name: str, **more: Any) -> bytes:
    messages = [{"role": "user", "content": f"{words} words of story {name}."}]
    return json.dumps({"model": "scripted", "messages": messages, **more}).encode()


@pytest.mark.parametrize("direct", [False, True])
def test_the_application_leaves_it_to_the_engines_to_refuse_calls(direct: bool) -> None:
    args = {"model": "scripted", "replicas": 3, "num_gpus": 0.5, "kv_cache_tokens": 4096, "direct": direct}
    assert isinstance(build(args), Application)
    options = replica_options(*split_options(args))
    assert options["max_ongoing_requests"] > EngineConfig().max_running + 64
    assert options["max_queued_requests"] == -1
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5}
    assert options["max_surge_percent"] == 0


def test_a_call_goes_to_its_slot_and_what_a_replica_has_made_leads_back_to_it() -> None:
    slots = ["0", "1", "2"]
    by_key = order(Route("key"), slots)
    assert sorted(by_key) == slots
    assert order(Route("key", tag_of(by_key[2])), slots)[0] == by_key[2]
    assert order(Route("key", tag_of("9")), slots) == by_key
    assert order(Route("key"), [slot for slot in slots if slot != by_key[0]]) == by_key[1:]
    assert order(Route(), slots) == []


def say(config: ServeConfig | None = None, **scale: Any) -> list[Any]:
    """Three replicas, as a router knows them."""
    options = ScaleConfig(**scale), config or ServeConfig(), EngineConfig(max_running=2)
    return [
        SimpleNamespace(replica_id=slot, replica_metadata=said_to_routers(slot, *options)) for slot in ("0", "1", "2")
    ]


async def test_a_router_reads_what_a_proxy_was_asked_by_the_options_that_the_replicas_have_now() -> None:
    router = SlotRouter.__new__(SlotRouter)
    replicas = say()

    async def chosen(**headers: str) -> str:
        lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": CHAT, "headers": lines}
        pending: Any = SimpleNamespace(
            metadata=SimpleNamespace(session_id="", is_http_request=True),
            created_at=time.time(),
            routing_context=SimpleNamespace(),
            args=[pickle.dumps(SimpleNamespace(asgi_scope=scope))],
        )
        ((replica,),) = await router.choose_replicas(replicas, pending)
        return str(replica.replica_metadata["slot"])

    def expected(name: str, config: ServeConfig) -> str:
        headers = Headers({"x-session-id": name})
        return order(route_of(Askers(config).of(headers), CHAT, headers, config), ["0", "1", "2"])[0]

    names = [f"letter-{number}" for number in range(8)]
    found = [await chosen(x_session_id=name) for name in names]
    assert found == [expected(name, ServeConfig()) for name in names]
    assert len(set(found)) > 1
    replicas[:] = say(ServeConfig(session_headers=("X-Chat",)))
    assert [await chosen(x_chat=name) for name in names] == found


async def test_the_router_names_one_replica_and_the_next_only_when_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = SlotRouter.__new__(SlotRouter)
    replicas = say()
    first, second, third = order(Route("key"), ["0", "1", "2"])

    async def chosen(session: str, age_s: float = 0.0) -> list[list[str]]:
        pending: Any = SimpleNamespace(
            metadata=SimpleNamespace(session_id=session, is_http_request=False),
            created_at=100.0,
            routing_context=SimpleNamespace(),
        )
        monkeypatch.setattr("time.time", lambda: 100.0 + age_s)
        ranks = await router.choose_replicas(replicas, pending)
        return [[replica.replica_metadata["slot"] for replica in rank] for rank in ranks]

    assert await chosen(":key") == [[first]]
    assert await chosen(":key", age_s=60.0) == [[first], [second]]
    assert await chosen(":") == [["0", "1", "2"]]
    in_flight = {first: 9, second: 2, third: 1}
    monkeypatch.setattr(SlotRouter, "replica_queue_len_cache", in_flight)
    assert await chosen(":key") == [[first]]
    replicas[:] = say(load_factor=1.5)  # the application was deployed anew, and the router is the old one
    assert await chosen(":key") == [[second]]
    assert await chosen(f"{tag_of(first)}:key") == [[first]]
    in_flight[first] = 3
    assert await chosen(":key") == [[first]]


class Handle:
    """Replicas as a front knows them: each call takes the next of some answers, whose parts may be errors."""

    def __init__(self, answers: Sequence[Sequence[Any]]) -> None:
        self._answers = iter(answers)
        self.sessions: list[str] = []
        self.cancelled = 0
        self.ask = SimpleNamespace(remote=self._remote)

    def options(self, *, stream: bool = True, session_id: str | None = None) -> Handle:
        if session_id is not None:
            self.sessions.append(session_id)
        return self

    def _remote(self, _scope: Any, _body: bytes) -> Any:
        return _Parts(self, next(self._answers))


class _Parts:
    def __init__(self, handle: Handle, parts: Sequence[Any]) -> None:
        self._handle, self._parts = handle, iter(parts)

    async def __anext__(self) -> Any:
        part = next(self._parts, StopAsyncIteration())
        if isinstance(part, asyncio.Future):
            return await part
        if isinstance(part, Exception):
            raise part
        return part

    def __aiter__(self) -> _Parts:
        return self

    def cancel(self) -> None:
        self._handle.cancelled += 1


LOST = ActorDiedError()
SSE = (200, [(b"content-type", b"text/event-stream; charset=utf-8")])
LINES = (200, [(b"content-type", b"application/x-ndjson")])


async def asked(handle: Any, path: str = CHAT, stuck_s: float = 60.0, **headers: str) -> httpx.Response:
    app = Front(handle, ServeConfig(), 1000, stuck_s).__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        return await client.post(path, content=question(3, "a"), headers=headers)


async def test_a_call_whose_replica_is_lost_before_its_first_byte_is_asked_once_more() -> None:
    handle = Handle([[b"", LOST], [b"", SSE, b"data: whole\n\n"]])
    response = await asked(handle, **{"x-session-id": "notes"})
    assert (response.status_code, response.text) == (200, "data: whole\n\n")
    assert len(set(handle.sessions)) == 1
    handle = Handle([[b"", SSE, LOST], [LOST]])
    response = await asked(handle)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert response.headers["retry-after"] == "1"


async def test_a_call_that_may_be_what_its_replica_was_stuck_in_takes_no_other_along() -> None:
    response = await asked(Handle([[b"", LOST]]), stuck_s=0.0)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")


@pytest.mark.parametrize(
    ("path", "begun", "body", "last"),
    [
        (CHAT, SSE, b"data: {}\n\n", 'data: {"error": {"message": '),
        ("/v1/responses", SSE, b'event: a\ndata: {}\n\nevent: b\ndata: {"x": "event: "}\n\n', "event: error\ndata: {"),
        ("/api/chat", LINES, b"{}\n", '{"error": "The replica was lost'),
    ],
)
async def test_a_stream_whose_replica_is_lost_ends_with_an_error_in_the_form_of_its_api(
    path: str, begun: Any, body: bytes, last: str
) -> None:
    response = await asked(Handle([[b"", begun, body, LOST]]), path)
    assert response.text.startswith(body.decode() + last)
    assert "[DONE]" not in response.text
    if path == "/v1/responses":
        told = json.loads(response.text.rpartition("data: ")[2])
        assert (told["code"], told["sequence_number"]) == ("replica_lost", 2)


async def test_a_call_that_no_replica_takes_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_ADMISSION_S", 0.01)
    handle = Handle([[asyncio.get_running_loop().create_future()]])
    response = await asked(handle)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_replica")
    assert handle.cancelled == 1


async def test_a_front_refuses_a_body_that_is_too_large_and_hands_on_what_is_no_json() -> None:
    app = Front(
        Handle([[b"", (400, []), b"no"]]), ServeConfig(max_body_bytes=1024), 1000, 60.0
    ).__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        assert (await client.post(CHAT, content=b"x" * 2000)).status_code == 413
        assert (await client.post(CHAT, content=b"[" * 1000)).status_code == 400


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted(EngineConfig(model="scripted", drafter="none")) as engine:
        yield engine


@pytest.fixture
def made(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Replica:
    """A replica over a scripted model, in slot 0."""
    monkeypatch.setattr(replica, "slot_of", lambda _scale: SimpleNamespace(name="0"))
    monkeypatch.setattr(replica, "engine_maker", lambda _scale: lambda _config: engine)
    return Replica(ScaleConfig(stuck_s=0.05), ServeConfig(), engine.config)


def scope() -> dict[str, Any]:
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"x-session-id", b"notes")]
    return {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        "asgi": {"version": "3.0"},
        "client": ("127.0.0.1", 1),
    }


def test_a_replica_that_can_make_no_folder_for_its_memory_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replica, "slot_of", lambda _scale: SimpleNamespace(name="0"))
    (tmp_path / "memory").write_text("a file")
    config = engine.config.model_copy(update={"memory_path": str(tmp_path / "memory")})
    with pytest.raises(ConfigError, match=r"memory_path='.*memory', of which no folder can be made"):
        Replica(ScaleConfig(), ServeConfig(), config)


async def test_a_replica_answers_as_a_server_does_and_its_ids_name_its_slot(made: Replica) -> None:
    assert made.record_replica_metadata()["slot"] == "0"
    taken, (status, headers), *bodies = [part async for part in made.ask(scope(), question(3, "a"))]
    told = json.loads(b"".join(bodies))
    assert (taken, status, told["choices"][0]["message"]["content"]) == (b"", 200, story("a", 3))
    assert told["id"].startswith(f"chatcmpl-{tag_of('0')}")
    assert b"x-request-id" not in dict(headers)


async def test_a_call_that_nobody_reads_any_more_is_cancelled_in_the_replica(
    made: Replica, engine: Engine, stopped_early: Callable[..., Any]
) -> None:
    parts: AsyncIterator[Any] = made.ask(scope(), question(1000, "a", stream=True))
    async for part in parts:
        if isinstance(part, bytes) and part:
            break
    await parts.aclose()  # type: ignore[attr-defined]
    assert await stopped_early(engine)


async def test_a_replica_whose_engine_is_stuck_or_dead_ends_itself(
    made: Replica, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    await made.check_health()
    assert not exits
    stick = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(
        "scripts.scale_drill.models.stick", lambda: asyncio.run_coroutine_threadsafe(stick.wait(), loop).result()
    )
    call = asyncio.ensure_future(anext(_texts(made.ask(scope(), question(3, f"{STICK}a")))))
    while engine.heartbeat_age_s < 0.1:
        await asyncio.sleep(0.01)
    await made.check_health()
    assert exits == [DIED]
    stick.set()
    await call
    assert not any(held_by(engine))
    engine.close()
    await made.check_health()
    assert exits == [DIED, DIED]


async def _texts(parts: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for part in parts:
        if isinstance(part, bytes) and part:
            yield part


@pytest.fixture
def ray_told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a Ray that does nothing is told."""
    told: list[Any] = []
    monkeypatch.setattr("ray.init", lambda **_how: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2})
    monkeypatch.setattr("ray.shutdown", lambda: told.append("shutdown"))
    monkeypatch.setattr("ray.serve.start", lambda **how: told.append(how["http_options"]))
    monkeypatch.setattr("ray.serve.run", lambda *_what, **_how: None)
    monkeypatch.setattr("ray.serve.delete", told.append)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield told
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_any_free_port_is_told_and_a_signal_ends_the_application(
    ray_told: list[Any], number: signal.Signals, code: int
) -> None:
    urls: list[str] = []

    def started(url: str) -> None:
        urls.append(url)
        os.kill(os.getpid(), number)

    assert run_up(UpOptions({"model": "bundled"}, 0), started) == code
    location, *ends = ray_told
    assert location["port"] > 0
    assert urls == [f"http://127.0.0.1:{location['port']}"]
    assert ends == [APPLICATION, "shutdown"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_does_not_wait_for_replicas_that_still_load(
    ray_told: list[Any], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    loaded: list[str] = []

    def load(*_what: Any, **_how: Any) -> None:
        os.kill(os.getpid(), number)
        loaded.append("all of it")

    monkeypatch.setattr("ray.serve.run", load)
    assert run_up(UpOptions({"model": "bundled"}, 0), loaded.append) == code
    assert not loaded
    assert ray_told[1:] == ["shutdown"]


def test_users_of_one_machine_have_folders_of_their_own_for_their_slots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    context = SimpleNamespace(app_name="copyspec", world_size=1)
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_session_name=lambda: "session"))
    for user in (1000, 1001):
        monkeypatch.setattr("os.getuid", lambda user=user: user)
        replica.slot_of(ScaleConfig()).release()
    assert len(list(tmp_path.iterdir())) == 2
