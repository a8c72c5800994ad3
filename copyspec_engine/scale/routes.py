"""Routes: where a call is to go, by what names its conversation or shows what was said in it.

Two calls of one conversation have the same route whatever is new in the second one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.conversations import Caller
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.serve.tenants import DEFAULT_TENANT, Tenant, Tenants, given_key
from copyspec_engine.values.errors import ConfigError

__all__ = ["Askers", "Route", "route_of"]

logger = logging.getLogger(__name__)

_NAMED = re.compile(r"/v1/copyspec/conversations/(?P<name>.+?)(/export|/import)?")
_MADE = re.compile(r"/v1/(responses|conversations|copyspec/explain)/(?P<id>[^/]+)(/.*)?")
_ID = re.compile(r"(?:[a-z]+[_-])(?P<tag>[0-9a-f]{8})[0-9a-f]{16,}(?:-\d+)?")
_FOUND = "found-"
"""What ids begin with of conversations that a replica has found, rather than its client named."""
_SHOWN = ("messages", "input")
"""Fields that hold what was said so far."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call is to go: to the replica whose ids have the tag, if there is one, else to the key's slot.

    Without either, to whichever replica has least to do.
    """

    key: str = ""
    """Same for all calls of a conversation; it tells nothing of what was said."""
    tag: str = ""
    """Of the replica that has made what the call asks for."""

    def __str__(self) -> str:
        return f"{self.tag}:{self.key}"

    @classmethod
    def of(cls, text: str) -> Route:
        """The route that was written as a text."""
        tag, _, key = text.partition(":")
        return cls(key, tag)


class Askers:
    """Whose calls they are, for routes alone: whether he may ask is for the replica to say.

    Args:
        config: of the server.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._tenants: Tenants | None = None
        try:
            self._tenants = Tenants(config)
        except ConfigError as error:
            logger.error("conversations go by keys, not by whose keys they are, until these can be read: %s", error)

    def of(self, headers: Headers) -> Tenant:
        """Whoever makes a request."""
        key = given_key(headers)
        if self._tenants is None:
            return Tenant(_hash(key), self._config)
        found = self._tenants.of_key(key)
        if found is None and key and self._reread(self._tenants):
            found = self._tenants.of_key(key)
        return found or self._tenants.named(DEFAULT_TENANT)

    def _reread(self, tenants: Tenants) -> bool:
        try:
            return tenants.reread_if_changed()
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return False


def route_of(
    tenant: Tenant, path: str, headers: Headers, config: ServeConfig, body: Mapping[str, Any] | None = None
) -> Route:
    """The route of a call.

    Args:
        tenant: who asks.
        path: of the request.
        headers: of the request.
        config: which headers name a conversation.
        body: its JSON object; None: it is not known, or is none.
    """
    body = body or {}
    made, session = _MADE.fullmatch(path), _session(tenant, path, headers, config, body)
    named = made["id"] if made else body.get("previous_response_id") or _conversation_id(body)
    tag = _tag(named) or (_tag(session) if session is not None and session.startswith(_FOUND) else "")
    for kind, value in (
        ("session", session),
        ("conversation", _conversation_id(body)),
        ("cache", body.get("prompt_cache_key")),
        ("shown", _beginning(body)),
    ):
        if value:
            return Route(_hash(tenant.name, kind, value), tag)
    return Route(tag=tag)


def _tag(made_id: object) -> str:
    found = _ID.fullmatch(made_id) if isinstance(made_id, str) else None
    return found["tag"] if found else ""


def _conversation_id(body: Mapping[str, Any]) -> object:
    given = body.get("conversation")
    return given.get("id") if isinstance(given, Mapping) else given


def _session(tenant: Tenant, path: str, headers: Headers, config: ServeConfig, body: Mapping[str, Any]) -> str | None:
    """The conversation that a call names."""
    if (named := _NAMED.fullmatch(path)) is not None:
        return named["name"]
    try:
        return Caller(tenant, headers, config).named({**body, "metadata": _mapping(body.get("metadata"))})
    except ApiError:
        return None  # whichever replica is asked refuses it


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _beginning(body: Mapping[str, Any]) -> list[Any]:
    """What a chat begins with, up to the first words of its user: all later calls of it show that too."""
    said = next((body[name] for name in _SHOWN if body.get(name)), None)
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    begun = []
    for message in map(_mapping, said if isinstance(said, list) else ()):
        begun.append([message.get("role"), message.get("content")])
        if message.get("role") == "user":
            break
    return begun


def _hash(*parts: object) -> str:
    said = json.dumps(parts, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(said, digest_size=12).hexdigest()
