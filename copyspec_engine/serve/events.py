"""Streams on the wire: server-sent events or lines of JSON, signs of life in between, and readers that read no more."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from copyspec_engine.serve.calls import Call
from copyspec_engine.serve.config import ServeConfig, is_loopback
from copyspec_engine.serve.errors import ApiError, api_error
from copyspec_engine.values.outputs import StreamChunk

__all__ = [
    "LINES",
    "NAMED_EVENTS",
    "SSE",
    "AnswerWriter",
    "EventResponse",
    "EventWriter",
    "Framing",
    "answer_of",
    "obfuscated",
]

logger = logging.getLogger(__name__)

Event = Mapping[str, Any]
"""A JSON object on its way to a client."""


class EventWriter(Protocol):
    """What an endpoint makes of the chunks of a call."""

    def events(self, index: int, chunk: StreamChunk) -> Iterable[Event]:
        """What a chunk of answer `index` adds; may be nothing."""
        ...

    def keep_alive(self) -> Event | None:
        """An event that says nothing; None: there is no such thing."""
        ...

    def end(self) -> Iterable[Event]:
        """What comes when all answers are whole."""
        ...

    def failed(self, error: ApiError) -> Iterable[Event]:
        """What tells of an error in the middle of the stream, as the last thing."""
        ...


class AnswerWriter(EventWriter, Protocol):
    """The same for answers that may also come as a whole."""

    obfuscate: bool
    """Events are to be `obfuscated`."""

    def whole(self) -> Mapping[str, Any]:
        """All that was written, once it is over."""
        ...


@dataclass(frozen=True, slots=True)
class Framing:
    """How events lie in the body of an answer."""

    media_type: str
    before: str = ""
    after: str = "\n"
    named: bool = False
    """Each event has a line with its `type`."""
    ping: bytes = b""
    """A sign of life that is no event, if there is one."""
    done: bytes = b""
    """Behind the last event of an answer that came to its end."""

    def join(self, events: Iterable[Event]) -> bytes:
        """Events, one behind the other."""
        return b"".join(map(self.frame, events))

    def frame(self, event: Event) -> bytes:
        name = f"event: {event['type']}\n" if self.named else ""
        return f"{name}{self.before}{json.dumps(event, ensure_ascii=False)}{self.after}".encode(
            "utf-8", "surrogatepass"
        )


SSE = Framing("text/event-stream; charset=utf-8", "data: ", "\n\n", ping=b": ping\n\n", done=b"data: [DONE]\n\n")
"""As OpenAI's completions have it."""
NAMED_EVENTS = Framing("text/event-stream; charset=utf-8", "data: ", "\n\n", named=True, ping=b": ping\n\n")
"""As OpenAI's responses have it."""
LINES = Framing("application/x-ndjson")
"""As Ollama has it."""


class EventResponse(Response):
    """Streams a call and closes it.

    A reader that takes nothing for `ServeConfig.send_timeout_s` is given up, and so is one that goes away.

    Args:
        call: whose chunks are written.
        writer: makes events of them.
        framing: how they lie in the body.
        config: the times.
        headers: besides those of every stream.
    """

    def __init__(
        self,
        call: Call,
        writer: EventWriter,
        framing: Framing,
        config: ServeConfig,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, 200, {**own, **(headers or {})}, framing.media_type)
        del self.headers["content-length"]
        self._call, self._writer, self._framing, self._config = call, writer, framing, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI has it
        config, task = self._config, asyncio.current_task()
        assert task is not None, "an application runs in a task"
        sending = _Alarm(config.send_timeout_s, task.cancel)
        silence = _Alarm(min(config.ping_s, config.delta_s), self._call.wake)
        try:
            with sending:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for body, more in self._bodies(silence):
                with sending:
                    await send({"type": "http.response.body", "body": body, "more_body": more})
        except asyncio.CancelledError:
            if not sending.has_rung:
                raise
            logger.warning("a reader took nothing for %s seconds: its call is cancelled", config.send_timeout_s)
        except OSError:
            logger.info("a reader went away")
        finally:
            sending.stop()
            silence.stop()
            self._call.close()

    async def _bodies(self, silence: _Alarm) -> AsyncIterator[tuple[bytes, bool]]:
        """Parts of the body, and whether more of it will come. What has come at once is one part."""
        framing, call = self._framing, self._call
        last_event, is_over = time.monotonic(), False
        try:
            while not is_over:
                body, is_woken = b"", False
                with silence:
                    while not (body or is_woken or is_over):
                        taken = await call.take()
                        is_woken, is_over = not taken, call.is_over
                        body = framing.join(event for each in taken for event in self._writer.events(*each))
                if is_woken and not is_over:
                    is_long = time.monotonic() - last_event >= self._config.delta_s
                    event = self._writer.keep_alive() if is_long else None
                    body = b"" if event is None else framing.frame(event)
                if body:
                    last_event = time.monotonic()
                if is_over:
                    yield body + framing.join(self._writer.end()) + framing.done, False
                elif body or framing.ping:
                    yield body or framing.ping, True
        except Exception as error:  # there is no status left to say it with
            yield framing.join(self._writer.failed(api_error(error))), False


class _Alarm:
    """Rings where a `with` block of it lasts too long, and again for as long as it lasts.

    A stream waits many times and hardly ever for long: all of its blocks share one timer.

    Args:
        limit_s: seconds that a block may last.
        ring: called then.
    """

    def __init__(self, limit_s: float, ring: Callable[[], object]) -> None:
        self.has_rung = False
        self._limit_s, self._ring = limit_s, ring
        self._loop = asyncio.get_running_loop()
        self._since_s = math.inf
        """When the block was entered, or it rang last; infinite outside of one."""
        self._timer = self._loop.call_later(limit_s, self._look)

    def __enter__(self) -> None:
        self._since_s = self._loop.time()

    def __exit__(self, *_: object) -> None:
        self._since_s = math.inf

    def stop(self) -> None:
        """It rings no more."""
        self._timer.cancel()

    def _look(self) -> None:
        now_s = self._loop.time()
        if now_s - self._since_s >= self._limit_s:
            self._since_s, self.has_rung = now_s, True
            self._ring()
        self._timer = self._loop.call_at(min(self._since_s, now_s) + self._limit_s, self._look)


async def answer_of(
    request: Request,
    call: Call,
    writer: AnswerWriter,
    framing: Framing | None,
    config: ServeConfig,
    headers: Mapping[str, str],
    obfuscation: bool | None = None,
) -> Response:
    """A call's answer: in events, or as one JSON object, once it is over.

    Args:
        request: whose answer it is.
        call: its call.
        writer: makes events or the object of the call's chunks.
        framing: how events lie in the body; None: the answer is one object.
        config: the times.
        headers: besides those of every answer.
        obfuscation: whether events are to hide their lengths; None: as is best for where the client is.
    """
    if framing is not None:
        writer.obfuscate = _wants_obfuscation(obfuscation, request.scope)
        return EventResponse(call, writer, framing, config, headers)
    try:
        async for index, chunk in call.chunks():
            writer.events(index, chunk)
    finally:
        call.close()
    return JSONResponse(writer.whole(), headers=dict(headers))


_LEAST_BYTES = 256


def _wants_obfuscation(asked: bool | None, scope: Scope) -> bool:
    """Whether the lengths of a stream's events are to say nothing of what is in them.

    How much was copied in a step shows in the length of its event, encrypted or not. Default: on, but for clients on
    this machine that no proxy speaks for.
    """
    if asked is not None:
        return asked
    names = {name for name, _ in scope["headers"]}
    is_near = scope.get("client") is not None and is_loopback(scope["client"][0])
    return not is_near or bool(names & {b"forwarded", b"x-forwarded-for"})


def obfuscated(event: dict[str, Any]) -> dict[str, Any]:
    """An event with random letters that make its length a power of two, 256 bytes or more."""
    length = len(json.dumps({**event, "obfuscation": ""}, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    whole = max(_LEAST_BYTES, 1 << (length - 1).bit_length())
    return {**event, "obfuscation": secrets.token_urlsafe(whole)[: whole - length]}
