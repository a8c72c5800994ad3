"""What every endpoint has: the engine under its names, the calls in flight, and who is asking."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import PurePath
from types import MappingProxyType
from urllib.parse import quote

from starlette.requests import Request

from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.engine.engine import Engine
from copyspec_engine.engine.telemetry import continued_trace
from copyspec_engine.serve.bodies import NUM_BYTES
from copyspec_engine.serve.calls import Call, Calls
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.conversations import PRINTABLE, Caller, engine_session, told_session
from copyspec_engine.serve.errors import not_found
from copyspec_engine.serve.metrics import Metrics
from copyspec_engine.serve.tenants import Tenant, Tenants
from copyspec_engine.values.config import GenerationRequest

__all__ = ["Service", "answer_headers", "body_tokens", "ignored_header"]

_BYTES_PER_TOKEN = 40
"""Of what is kept."""
_MOST_NAMED = 1024
"""Characters of a header."""


class Service:
    """One engine, served. For one event loop.

    Args:
        engine: that answers; whoever made it closes it.
        config: of the server.
        tag: what ids that are made here begin with, in hex: where there are several servers, which of them it was.

    Raises:
        ConfigError: the keys cannot be read.
    """

    def __init__(self, engine: Engine, config: ServeConfig, tag: str = "") -> None:
        self.engine, self.config, self.info = engine, config, engine.info
        self.tenants = Tenants(config, tag=tag)
        self.created = int(time.time())
        """When the model was loaded, in seconds since 1970."""
        name = self.info.model
        self.model = config.model_name or (PurePath(name).name if PurePath(name).is_absolute() else name)
        """What answers call the model."""
        self.metrics = Metrics(engine, self.model, vllm_names=config.vllm_metric_names)
        self.calls = Calls(engine, config, self.metrics)
        self.models = tuple(dict.fromkeys((self.model, *config.model_aliases)))
        """What calls may call it."""
        facts = [self.info.model, self.info.model_source, self.info.dtype, self.info.exact, self.info.versions]
        self.fingerprint = f"fp_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}"
        """Changes where the same call may get another answer."""
        self._tag = tag

    @property
    def is_dead(self) -> bool:
        """The engine's loop has ended, and all that helps is a new server. Never waits."""
        return math.isinf(self.engine.heartbeat_age_s)

    def new_id(self, kind: str, num_digits: int) -> str:
        """An id that nobody can guess.

        Args:
            kind: what it begins with, as "resp_".
            num_digits: hexadecimal ones behind that, 32 or more.
        """
        return kind + self._tag + secrets.token_hex(num_digits // 2)[len(self._tag) :]

    def caller(self, request: Request) -> Caller:
        """Who makes a request; the gate has seen to it that he may."""
        tenant: Tenant = request.scope["copyspec.tenant"]
        return Caller(tenant, request.headers, self.config)

    def time_limit(self, asked_s: float | None) -> float:
        """Seconds after which an answer is ended: what a call asks for, but no more than the server allows."""
        return self.config.timeout_s if asked_s is None else min(asked_s, self.config.timeout_s)

    def check_model(self, name: str) -> None:
        """Refuse calls of other models.

        Raises:
            ApiError: 404, it is none of ours.
        """
        if name not in self.models:
            raise not_found(
                f"Got model={name!r} but this server has {', '.join(self.models)}", "model_not_found", "model"
            )

    async def forget(self, tenant: Tenant, session_id: str) -> bool:
        """Erase a conversation of a tenant, with what is kept of its answers; False if there was nothing.

        Calls in flight of it go on and keep nothing.

        Raises:
            MemoryFileError: it is erased in memory, but not on disk.
        """
        session = engine_session(tenant, session_id)
        self.calls.keep_nothing_of(session)
        dropped = tenant.forget(session_id, session)
        return await asyncio.to_thread(self.engine.forget, session) or dropped

    async def begin(
        self, request: Request, requests: Sequence[GenerationRequest], names: Mapping[str, str] = MappingProxyType({})
    ) -> Call:
        """A call of the client of `request`; see `Calls.begin`, and `by_names` for the names."""
        with continued_trace(request.headers):
            tenant: Tenant = request.scope["copyspec.tenant"]
            return await self.calls.begin(tenant, requests, request.receive, body_tokens(request), names)


def body_tokens(request: Request) -> int:
    """What the body of a request counts for in what is kept of it, as tokens: not all of it is in the prompt."""
    num_bytes: int = request.scope[NUM_BYTES]
    return num_bytes // _BYTES_PER_TOKEN


def answer_headers(talk: Talk, ignored: Iterable[str]) -> dict[str, str]:
    """What every answer says of its conversation, and of fields that changed nothing."""
    session = told_session(talk)
    return ({"X-Session-ID": session} if session is not None else {}) | ignored_header(ignored)


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names fields which changed nothing, as many as fit; a client's names may be any text."""
    some = islice(dict.fromkeys(names), _MOST_NAMED)  # a name has a character at least
    told = ", ".join(quote(name, safe=PRINTABLE) for name in some)
    shown = told if len(told) <= _MOST_NAMED else f"{told[:_MOST_NAMED].rpartition(', ')[0]}, ..."
    return {"X-Copyspec-Ignored": shown} if told else {}
