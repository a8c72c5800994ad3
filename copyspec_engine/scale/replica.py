"""A replica: one engine in one process of Ray's, with the application of `copyspec serve` over it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from copyspec_engine.scale.config import ScaleConfig
from copyspec_engine.scale.front import Begun, plain_scope
from copyspec_engine.scale.options import engine_maker
from copyspec_engine.scale.router import said_to_routers
from copyspec_engine.scale.slots import Slot, tag_of
from copyspec_engine.scale.together import Together, Told, told_by
from copyspec_engine.serve.app import app_of
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import DIED, LAST_EVENTS_S, LOG_FORMAT, idle
from copyspec_engine.serve.service import Service
from copyspec_engine.values.config import EngineConfig, is_database
from copyspec_engine.values.errors import ConfigError

__all__ = ["Replica", "slot_of"]

logger = logging.getLogger(__name__)

_SLOT_WAIT_S = 30.0
"""Seconds for which one that is on its way out may still hold the slot that is to be taken over."""
_TELL_S = 10.0
_BROADCASTS, _BROADCAST_PAUSE_S = 10, 0.1
_STOPPING = "STOPPING"


class Replica:
    """An engine and its application; Ray makes it, asks it, and looks after it.

    Args:
        scale: of the application.
        config: of the server.
        engine_config: of the engine.

    Raises:
        ConfigError: there is no slot to be had, or what the engine is to remember in cannot be used.
    """

    def __init__(self, scale: ScaleConfig, config: ServeConfig, engine_config: EngineConfig) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
        self._scale = scale
        self._slot = slot_of(scale)
        self._said = said_to_routers(self._slot.name, scale, config, engine_config)
        if engine_config.memory_path is not None and not is_database(engine_config.memory_path):
            folder = Path(engine_config.memory_path)
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"Got memory_path={engine_config.memory_path!r}, of which no folder can be made for the files of "
                    f"the replicas: {error}"
                ) from None
            path = str(folder / f"{self._slot.name}.memory")
            engine_config = engine_config.model_copy(update={"memory_path": path})
        self._engine = engine_maker(scale)(engine_config)
        self._service = Service(self._engine, config, tag_of(self._slot.name))
        if self._service.info.memory_error is not None:
            raise ConfigError(
                f"Got memory_path={engine_config.memory_path!r} but it cannot be used: "
                f"{self._service.info.memory_error}"
            )
        self._alone = app_of(self._service)
        self._app = Together(self._alone, self._slot.name, self._ask_all)
        self._peers: DeploymentHandle | None = None
        gc.collect()
        gc.freeze()  # as in `copyspec serve`

    def record_replica_metadata(self) -> dict[str, Any]:
        """What routers know a replica by."""
        return self._said

    async def check_health(self) -> None:
        """Ends this process if its engine has died or is stuck: then Ray starts another one, which takes its slot."""
        age_s = self._engine.heartbeat_age_s
        if self._service.is_dead:
            await asyncio.wait((asyncio.create_task(idle(self._service.calls)),), timeout=LAST_EVENTS_S)
        if self._service.is_dead or age_s > self._scale.stuck_s:
            logger.critical("the engine's loop has died, or is stuck for %.0f seconds: this replica ends", age_s)
            os._exit(DIED)
        try:
            self._service.tenants.reread_if_changed()
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)

    async def ask(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Begun | bytes]:
        """Answer a request that has come to a front.

        Gives an empty piece at once, then what the answer begins with, then all that there is of its body.

        Args:
            scope: of the request, as ASGI has it.
            body: of the request.
        """
        answer = _Answer(body)
        task = asyncio.ensure_future(self._app(scope, answer.receive, answer.send))
        task.add_done_callback(lambda _: answer.sent.put_nowait(None))
        try:
            yield b""  # it is taken
            async for part in answer.parts():
                yield part
        finally:
            answer.gone.set()  # a call that nobody reads to its end is cancelled by that
            await asyncio.wait((task,))
        task.result()

    async def tell(self, scope: dict[str, Any]) -> Told:
        """The whole answer of this replica alone to a request without a body."""
        return await told_by(self._alone, self._slot.name, scope)

    async def _ask_all(self, scope: Scope) -> tuple[Sequence[Told], bool]:
        """Have all replicas `tell`: what they say, and whether none is missing."""
        context = serve.get_replica_context()
        if self._peers is None:
            self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        application = (await asyncio.to_thread(serve.status)).applications[context.app_name]
        states = application.deployments[context.deployment].replica_states
        number = sum(states.values()) - states.get(_STOPPING, 0)
        asked, answers = plain_scope(scope), list[Told]()
        for _ in range(_BROADCASTS):
            with suppress(DeploymentUnavailableError):
                told = self._peers.broadcast("tell", asked).results_async(timeout_s=_TELL_S, return_exceptions=True)
                answers = [one for one in await told if isinstance(one, Told)]
            if len(answers) == number:
                return answers, True
            await asyncio.sleep(_BROADCAST_PAUSE_S)  # a handle that is new has not heard of all of them yet
        return answers, False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray's proxies ask, where there is no front."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def put(message: Message) -> None:
                await send({**message, "headers": _own_headers(message)} if "headers" in message else message)

            await self._app(scope, receive, put)

        return app

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


class _Answer:
    """One request and its answer, between a front and the application."""

    def __init__(self, body: bytes) -> None:
        self.sent: asyncio.Queue[Message | None] = asyncio.Queue()
        self.gone = asyncio.Event()
        """Nobody waits for the answer any more."""
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """The whole body; then nothing until the client has gone."""
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.put_nowait(message)

    async def parts(self) -> AsyncIterator[Begun | bytes]:
        """What it begins with, then its body, as much at a time as has come together meanwhile."""
        while (message := await self.sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield message["status"], _own_headers(message)
                continue
            body, is_over = message.get("body", b""), False
            while not self.sent.empty():
                more = self.sent.get_nowait()
                is_over = is_over or more is None
                body += b"" if more is None else more.get("body", b"")
            if body:
                yield body
            if is_over:
                return


def _own_headers(message: Message) -> list[tuple[bytes, bytes]]:
    """Headers of an answer without the id of its request, which Ray's proxy adds."""
    return [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]


def slot_of(scale: ScaleConfig) -> Slot:
    """The slot that this replica takes, of those that its machine, or all that share the folder of slots, have."""
    context = serve.get_replica_context()
    if scale.slots is not None:
        folder, prefix = Path(scale.slots).expanduser() / context.app_name, ""
    else:
        session = ray.get_runtime_context().get_session_name()
        own = Path(tempfile.gettempdir(), f"copyspec-{os.getuid()}")  # nobody else could make a folder in that
        folder, prefix = own / session / context.app_name, f"{socket.gethostname()}-"
    return Slot(folder, context.world_size or 1, _SLOT_WAIT_S, prefix)
