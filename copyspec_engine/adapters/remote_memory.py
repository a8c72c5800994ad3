"""What a server remembers of a conversation, as `Engine.memory` shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np

from copyspec_engine.memory.view import ConversationMemory, Snapshot
from copyspec_engine.values.errors import ConfigError

__all__ = ["RemoteMemory"]


class RemoteMemory(ConversationMemory):
    """A conversation's texts in a server. Every look asks for all of them.

    Args:
        session_id: the conversation, as its calls name it.
        ask: sends a method, a path and a body, and gives what comes back; None: there is no such conversation.
    """

    def __init__(self, session_id: str, ask: Callable[..., Any]) -> None:
        self._ask, self._path = ask, f"/v1/copyspec/conversations/{quote(session_id, safe='')}"
        self._shown: dict[tuple[int, ...], str] = {}
        super().__init__(
            session_id,
            look=self._snapshot,
            decode=lambda ids: self._shown[tuple(ids)],
            forget=lambda: ask("delete", self._path) is not None,
            take_in=_of_the_server,
            fingerprint=_of_the_server,
            vocab_size=0,
        )

    def export(self) -> str:
        """As `ConversationMemory.export`; of a conversation that the server does not know there are no texts.

        Raises:
            ConfigError: the server knows none of this name.
        """
        told = self._ask("get", f"{self._path}/export")
        if told is None:
            raise ConfigError(f"Got session_id={self.session_id!r} but the server remembers no such conversation")
        return json.dumps({**told, "session_id": self.session_id}, ensure_ascii=False)

    def load(self, exported: str, *, owner: str | None = None) -> int:
        """As `ConversationMemory.load`; whom it counts for is up to the server."""
        if owner is not None:
            raise ConfigError(f"Got owner={owner!r} but a server counts by its keys: leave it out", "owner")
        try:
            body = json.loads(exported)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"Got exported={exported!r:.80} but expected the JSON of `export`: {error}") from None
        return int(self._ask("post", f"{self._path}/import", body)["num_texts"])

    def _snapshot(self) -> Snapshot:
        told = self._ask("get", f"{self._path}/export")
        if told is None:
            return Snapshot((), 0)
        self._shown = {tuple(text["token_ids"]): text["text"] for text in told["texts"]}
        texts = [(text["number"], text["kind"], np.array(text["token_ids"], np.int64)) for text in told["texts"]]
        return Snapshot(texts, told["num_bytes"])


def _of_the_server(*_: object) -> NoReturn:
    raise AssertionError("the server does this itself")
