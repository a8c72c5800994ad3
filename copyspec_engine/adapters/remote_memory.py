"""What a server remembers of a conversation, as `Engine.memory` shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np

from copyspec_engine.memory.view import ConversationMemory, Snapshot
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.tokens import Fingerprint

__all__ = ["RemoteMemory"]


class RemoteMemory(ConversationMemory):
    """A conversation's texts in a server. Every look asks for all of them.

    Args:
        session_id: the conversation, as its calls name it.
        ask: sends a method, a path and a body, and gives what comes back; None: there is no such conversation.
    """

    def __init__(self, session_id: str, ask: Callable[..., Any]) -> None:
        self._ask, self._path = ask, f"/v1/copyspec/conversations/{quote(session_id, safe='')}"
        self._told: Mapping[str, Any] | None = None
        """The last export; None: the server remembers no such conversation."""
        self._shown: dict[tuple[int, ...], str] = {}
        """Its texts by their tokens."""
        super().__init__(
            session_id,
            look=self._snapshot,
            decode=lambda ids: self._shown[tuple(ids)],
            forget=lambda: ask("delete", self._path) is not None,
            load=self._imported,
            fingerprint=self._fingerprint_there,
        )

    def _snapshot(self) -> Snapshot:
        told = self._told = self._ask("get", f"{self._path}/export")
        if told is None:
            return Snapshot((), 0)
        self._shown = {tuple(text["token_ids"]): text["text"] for text in told["texts"]}
        texts = [(text["number"], text["kind"], np.array(text["token_ids"], np.int64)) for text in told["texts"]]
        return Snapshot(texts, told["num_bytes"])

    def _fingerprint_there(self) -> Fingerprint:
        if self._told is None:
            raise ConfigError(f"Got session_id={self.session_id!r} but the server remembers no such conversation")
        return Fingerprint(**self._told["fingerprint"])

    def _imported(self, exported: str | Mapping[str, Any], owner: str | None) -> int:
        if owner is not None:
            raise ConfigError(f"Got owner={owner!r} but a server counts by its keys: leave it out", "owner")
        try:
            body = exported if isinstance(exported, Mapping) else json.loads(exported)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"Got exported={exported!r:.80} but expected the JSON of `export`: {error}") from None
        return int(self._ask("post", f"{self._path}/import", body)["num_texts"])
