"""A front: it knows of each call which conversation it belongs to, and that the replica which answers may be lost.

Before the first byte has gone to the client, a call whose replica is lost is asked once more, of the next slot: nothing
was sent, and the same call gets the same answer. After that the stream ends with an error event, `replica_lost`. A call
that may be what its replica was stuck in is not asked again: it would take the next one along.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from copyspec_engine.scale.routes import Askers, Route, route_of
from copyspec_engine.serve.bodies import json_of, read_bytes
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import ApiError, error_response
from copyspec_engine.serve.events import LINES, NAMED_EVENTS, SSE

__all__ = ["Begun", "Front", "lost_event", "plain_scope"]

logger = logging.getLogger(__name__)

Begun: TypeAlias = tuple[int, list[tuple[bytes, bytes]]]
"""What an answer begins with: status and headers."""
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
_ENDS = ("client", "server")
_ADMISSION_S = 20.0
"""Seconds in which a replica has to take a call, be it only to let it wait."""


class Front:
    """Asks the replicas for its clients.

    Args:
        replicas: a handle of their deployment.
        config: of the server.
        memory_tokens: that one conversation may remember.
        stuck_s: seconds after which a call may be what a replica is stuck in.
    """

    def __init__(self, replicas: DeploymentHandle, config: ServeConfig, memory_tokens: int, stuck_s: float) -> None:
        self._replicas, self._config, self._memory_tokens = replicas.options(stream=True), config, memory_tokens
        self._stuck_s = stuck_s
        self._askers = Askers(config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray's proxies ask."""
        return Router(default=self._answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        try:
            asked = await self._asked(Request(scope, receive))
            if not await asked.begin(self._stuck_s):
                await asked.begin()
        except Exception as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        try:
            await asked.hand_on(send)
        finally:
            asked.end()

    async def _asked(self, request: Request) -> _Asked:
        """A request, read and ready to be asked of a replica."""
        path, config = request.url.path, self._config
        is_import = path.endswith("/import")
        largest = config.largest_import(self._memory_tokens) if is_import else config.max_body_bytes
        body = await read_bytes(request, config, largest)
        told = None if is_import else await _object(body, config)
        route = route_of(self._askers.of(request.headers), path, request.headers, config, told)
        return _Asked(self._replicas, route, plain_scope(request.scope), body)


def plain_scope(scope: Scope) -> dict[str, Any]:
    """What of a request's scope is about the request, and can be sent to another process."""
    kept = {name: scope[name] for name in _SCOPE if name in scope}
    ends = {name: tuple(scope[name]) for name in _ENDS if scope.get(name)}
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    return {**kept, **ends, "headers": headers, "asgi": {"version": "3.0"}}


class _Asked:
    """A call on its way to a replica, and its answer on the way back."""

    def __init__(self, replicas: DeploymentHandle, route: Route, scope: Mapping[str, Any], body: bytes) -> None:
        self._replicas = replicas.options(session_id=str(route))
        self._scope, self._body = scope, body
        self._parts: Any = None
        self._begun: Begun = 0, []
        self._first = b""

    async def begin(self, again_s: float = 0.0) -> bool:
        """Ask, and wait for the first of the answer's body; False: the replica was lost, and another one may be asked.

        Args:
            again_s: for how many seconds that may be.

        Raises:
            ApiError: 503, there is no replica, or this one was lost and no other may be asked.
        """
        began = time.monotonic()
        self._parts = self._replicas.ask.remote(self._scope, self._body)
        try:
            await asyncio.wait_for(anext(self._parts), _ADMISSION_S)  # it has taken the call
            self._begun = await anext(self._parts)
            self._first = await anext(self._parts, b"")
        except asyncio.TimeoutError:
            self.end()
            raise _no_replica(f"No replica has taken the call for {_ADMISSION_S:.0f} seconds: ask again") from None
        except DeploymentUnavailableError:
            raise _no_replica("There is no replica: ask again") from None
        except RayActorError:
            logger.warning("a replica was lost before it answered %s", self._scope["path"])
            if time.monotonic() - began >= again_s:
                raise _lost("before it answered") from None
            return False
        except BaseException:
            self.end()
            raise
        return True

    async def hand_on(self, send: Send) -> None:
        """Give the answer to the client, to its end or with a last event that tells of the loss."""
        status, headers = self._begun
        await send({"type": "http.response.start", "status": status, "headers": headers})
        body, num_events, num_bytes = self._first, 0, 0
        length = Headers(raw=headers).get("content-length")
        more = True
        try:
            while body:
                num_events += body.count(b"\nevent: ") + body.startswith(b"event: ")
                num_bytes += len(body)
                more = str(num_bytes) != length
                await send({"type": "http.response.body", "body": body, "more_body": more})
                body = await anext(self._parts, b"")
        except RayActorError:
            logger.warning("a replica was lost while it answered %s", self._scope["path"])
            last = lost_event(Headers(raw=headers).get("content-type", ""), self._scope["path"], num_events)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        self._parts = None
        if more:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def end(self) -> None:
        """Nobody waits for the answer any more."""
        if self._parts is not None:
            self._parts.cancel()


def lost_event(media_type: str, path: str, num_events: int) -> bytes:
    """The last event of a stream whose replica was lost, in the form of its API; nothing, where it is no stream.

    Args:
        media_type: of the stream.
        path: of the request.
        num_events: that were sent already.
    """
    error = _lost("while it answered")
    if media_type == LINES.media_type:
        return LINES.frame(error.ollama_body())
    if media_type != SSE.media_type:
        return b""
    if path == "/v1/responses":
        told = error.body()["error"]
        return NAMED_EVENTS.frame({**told, "type": "error", "sequence_number": num_events})
    return SSE.frame(error.body())


async def _object(body: bytes, config: ServeConfig) -> Mapping[str, Any] | None:
    """A body as a JSON object; None: it is none, or none that a replica would take."""
    with suppress(ApiError):
        told = await json_of(body, config, config.max_body_bytes)
        return told if isinstance(told, dict) else None
    return None


def _lost(when: str) -> ApiError:
    return ApiError(
        503, "replica_lost", f"The replica was lost {when}: ask again, another one answers", retry_after_s=1.0
    )


def _no_replica(message: str) -> ApiError:
    return ApiError(503, "no_replica", message, retry_after_s=5.0)
