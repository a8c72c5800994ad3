from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
import uvicorn

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.serve.app import create_app
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.testing import scripted_engine

CHAT = "/v1/chat/completions"


def body(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """A call with one message of a user."""
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **fields}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, without [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def texts(stream: list[dict[str, Any]]) -> dict[int, str]:
    """What the deltas of a stream add up to, by the indices of choices."""
    joined: dict[int, str] = {}
    for choice in (choice for event in stream for choice in event["choices"]):
        joined[choice["index"]] = joined.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return joined


Client = Callable[..., httpx.AsyncClient]


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """make_engine(replies, **options) -> a scripted engine; closed after the test."""
    engines: list[Engine] = []

    def make(replies: Sequence[str] | Callable[[str], str], **options: Any) -> Engine:
        engines.append(scripted_engine(replies, EngineConfig(**{"model": "scripted", **options})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that engines get, in order."""
    requests: list[Any] = []
    astream = Engine.astream

    def noted(engine: Engine, request: Any, *, wait: bool = True) -> Any:
        requests.append(request)
        return astream(engine, request, wait=wait)

    monkeypatch.setattr(Engine, "astream", noted)
    return requests


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """client(engine, **options) -> an HTTP client of a server over the engine."""
    clients: list[httpx.AsyncClient] = []

    def make(engine: Engine, *, headers: dict[str, str] | None = None, **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=create_app(engine, ServeConfig(**options)))
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers))
        return clients[-1]

    yield make
    for made in clients:
        await made.aclose()


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """await serve(engine, **options) -> the address of a real server over the engine, on a socket of this machine."""
    servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    async def start(engine: Engine, **options: Any) -> str:
        app = create_app(engine, ServeConfig(**options))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        servers.append((server, asyncio.create_task(server.serve([listener]))))
        while not server.started:
            await asyncio.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, task in servers:
        server.should_exit = server.force_exit = True
        await task
