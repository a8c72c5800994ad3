"""What no replica can answer alone: what a tenant's conversations are, that one is to be forgotten, and all counts.

Whichever replica is asked asks all others the same, by Ray's broadcast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from copyspec_engine.serve.errors import ApiError, error_response

__all__ = ["Together", "Told", "told_by"]

_LIST = "/v1/copyspec/conversations"
_NAMED = re.compile(rf"{_LIST}/(?P<name>.+)|/v1/conversations/(?P<id>[^/]+)")


class Told(NamedTuple):
    """A whole answer of one replica."""

    slot: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def response(self) -> Response:
        """The same, to be sent."""
        response = Response(self.body, self.status)
        response.raw_headers = self.headers
        return response


AskAll = Callable[[Scope], Awaitable[tuple[Sequence[Told], bool]]]
"""Asks every replica without a body: what they have answered, and whether those are all that there are to be."""


async def told_by(app: ASGIApp, slot: str, scope: Scope) -> Told:
    """What an application answers to a request without a body."""
    status, headers, body = 500, list[tuple[bytes, bytes]](), bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers, body
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        body += message.get("body", b"")

    await app(scope, receive, send)
    return Told(slot, status, headers, bytes(body))


class Together:
    """ASGI around the application of a replica.

    Args:
        app: of this replica.
        slot: of this replica.
        ask_all: asks every replica's application, this one's too.
    """

    def __init__(self, app: ASGIApp, slot: str, ask_all: AskAll) -> None:
        self._app, self._slot, self._ask_all = app, slot, ask_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(scope) if scope["type"] == "http" else None
        if answer is None:
            await self._app(scope, receive, send)
            return
        own = await told_by(self._app, self._slot, scope)
        response = own.response()
        if own.status in (200, 404):  # else whoever asks may not, or asks for what cannot be
            try:
                response = await answer(scope, own)
            except ApiError as error:
                response = error_response(error, scope["path"])
        await response(scope, receive, send)

    def _answer(self, scope: Scope) -> Callable[[Scope, Told], Awaitable[Response]] | None:
        """What answers a request together; None: this replica does it alone."""
        method, path = scope["method"], scope["path"]
        if method == "GET" and path == "/metrics":
            return self._counts
        if method == "GET" and path == _LIST:
            return self._list
        return self._forget if method == "DELETE" and _NAMED.fullmatch(path) else None

    async def _list(self, scope: Scope, own: Told) -> Response:
        """Conversations of all replicas, those that several know once, the one that was not used for longest first."""
        known: dict[str, dict[str, Any]] = {}
        answers, _ = await self._ask_all(scope)
        for told in answers:
            for info in json.loads(told.body)["data"] if told.status == 200 else ():
                known[info["id"]] = max(known.get(info["id"], info), info, key=_last_used_at)
        listed = sorted(known.values(), key=_last_used_at)
        return JSONResponse({**json.loads(own.body), "data": listed})

    async def _forget(self, scope: Scope, own: Told) -> Response:
        """Erase it wherever it is known: another slot has it, too, if it has ever answered for this one."""
        named = _NAMED.fullmatch(scope["path"])
        assert named is not None, "_answer has matched it"
        erased, are_all = await self._ask_all({**scope, **_path(f"{_LIST}/{named['name'] or named['id']}")})
        if not are_all:
            raise ApiError(
                503, "replica_missing", "One replica is not there, and may remember it: ask again", retry_after_s=5.0
            )
        if own.status == 404 and named["name"]:
            return next((told for told in erased if told.status == 200), own).response()
        return own.response()

    async def _counts(self, scope: Scope, _own: Told) -> Response:
        """All counts, each with the slot whose they are."""
        families: dict[str, Metric] = {}
        answers, _ = await self._ask_all(scope)
        for told in answers:
            for family in text_string_to_metric_families(told.body.decode()):
                for sample in family.samples:
                    known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    labels = {**sample.labels, "slot": told.slot}
                    known.add_sample(sample.name, labels, sample.value)
        return Response(generate_latest(_Families(families)), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _last_used_at(info: Mapping[str, Any]) -> float:
    """When a conversation was used by a replica; one that was not since it began comes before all others."""
    return float(info["last_used_at"] or 0)


def _path(path: str) -> Mapping[str, Any]:
    return {"path": path, "raw_path": path.encode("utf-8", "surrogatepass")}


class _Families:
    """What `generate_latest` takes for a registry."""

    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return tuple(self._families.values())
