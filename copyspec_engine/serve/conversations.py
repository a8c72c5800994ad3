"""Which conversation a call belongs to, by its headers, its body, or what it shows; and what KV it may share."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from starlette.datastructures import Headers

from copyspec_engine.adapters.conversations import Talk, first_named
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import invalid
from copyspec_engine.serve.tenants import Tenant

__all__ = ["PRINTABLE", "SESSION_METADATA", "Caller", "checked_session", "engine_session", "salt_of", "told_session"]

SESSION_METADATA = ("session_id", "thread_id", "conversation_id")
"""Keys of a body's `metadata` that name a conversation."""
_MOST_CHARACTERS = 256
PRINTABLE = string.ascii_letters + string.digits + string.punctuation.replace("%", "") + " "
"""Of ids in headers, which have all other characters percent-encoded."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever made a call, and what its headers say.

    Args:
        tenant: whose key it is.
        headers: of the request, their names in lower case.
        config: which headers name a conversation.
    """

    tenant: Tenant
    headers: Headers
    config: ServeConfig

    def named(self, body: Mapping[str, Any]) -> str | None:
        """The conversation that a call names, as its client calls it; None: it names none.

        Args:
            body: its `session_id` and `metadata` are looked at.

        Raises:
            ApiError: it is no id.
        """
        metadata = body.get("metadata") or {}
        for name in ("x-session-id", "x-conversation-id", *self.config.session_headers):
            if given := self._header(name):
                return checked_session(unquote(given), name)
        if body.get("session_id") is not None:
            return checked_session(body["session_id"], "session_id")
        for name in SESSION_METADATA:
            if metadata.get(name) is not None:
                return checked_session(metadata[name], f"metadata.{name}")
        return None

    def _header(self, name: str) -> str:
        """What a header says; empty: nothing. Those that are no ASCII are UTF-8 if they can be.

        Raises:
            ApiError: it says different things.
        """
        given = self.headers.getlist(name)
        if len(set(given)) > 1:  # a proxy may have gone by another one
            raise invalid(name, f"Got {name} {len(given)} times with different values but expected one")
        said = given[0] if given else ""
        with suppress(UnicodeError):
            said = said.encode("latin-1").decode()
        return said

    def talk(
        self,
        named: str | None,
        messages: Sequence[Mapping[str, Any]] | None,
        *,
        partition: str | None = None,
        shown: Mapping[str, Any] | None = None,
    ) -> Talk:
        """The conversation of one answer.

        Args:
            named: what `named` gave, or the id of an object that stands for a conversation.
            messages: all that the call shows; None: a raw prompt.
            partition: whose talk it is among those of the tenant: what one of them has said goes on for none else.
            shown: what else the prompt is made of.
        """
        session = first_named(None if named is None else engine_session(self.tenant, named))
        return self.tenant.conversations.begin(session, messages, {"partition": partition, **(shown or {})})


def engine_session(tenant: Tenant, session_id: str) -> str:
    """The engine's name of a tenant's conversation."""
    return f"{tenant.name}/{session_id}"


def told_session(talk: Talk) -> str | None:
    """The value of X-Session-ID for a call's answer, as it may be sent back; None: it stands alone."""
    session = talk.request_options()["session_id"]
    return None if session is None else quote(session.partition("/")[2], safe=PRINTABLE)


def salt_of(tenant: Tenant, key: str | None) -> str | None:
    """What calls share KV by: never what a client has said, so that no tenant says what another one does."""
    if key is None:
        return None
    return hashlib.sha256(json.dumps([tenant.name, key]).encode()).hexdigest()


def checked_session(value: object, param: str) -> str:
    """The id of a conversation as its client calls it.

    Raises:
        ApiError: it is none.
    """
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_CHARACTERS or not value.isprintable():
        shown = repr(value)[:80]
        raise invalid(
            param, f"Got {param}={shown} but expected the id of a conversation: 1 to {_MOST_CHARACTERS} printable ones"
        )
    return value
