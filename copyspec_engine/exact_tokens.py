"""The token ids that a conversation was written with, so that its next prompt begins with the same ones.

A model may spell a text otherwise than the tokenizer would. Its next prompt holds that text again; read from the text
it would have other ids there, and nothing behind them could be reused. So the ids of the last calls are kept for each
session, and taken wherever a prompt holds exactly their text, whole stretches between control tokens at a time.

The text decides; ids only say how it is spelled. Not covered: how stretches are decoded and compared (tokenizer.py).
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["ExactTokens", "Spelling"]

_PER_SESSION = 8
_MAX_TOKENS = 1 << 23
"""Ids that are kept in all, of four bytes each; a session's texts need about as much again once they are used."""


class Spelling:
    """One call's token ids, prompt and answer. The tokenizer adds their texts when it first needs them."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = array("i", token_ids)
        self.stretches: tuple[tuple[int, str], ...] | None = None
        """(index behind the last id, text) of each control token and of what stands between two."""
        self.begun: tuple[tuple[int, str], ...] = ()
        """Those of an earlier call that this one begins with."""


class ExactTokens:
    """The last calls of each session. Thread-safe.

    Args:
        max_tokens: kept in all; the least recently used session goes first.
    """

    def __init__(self, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, tuple[Spelling, ...]] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def keep(self, session_id: str, token_ids: Sequence[int]) -> None:
        """Keep a call's ids; earlier calls that they begin with are not needed any more."""
        spelling = Spelling(token_ids)
        ids = spelling.token_ids
        with self._lock:
            others: list[Spelling] = []
            for other in self._pop(session_id):
                if other.token_ids != ids[: len(other.token_ids)]:
                    others.append(other)
                elif len(other.stretches or ()) > len(spelling.begun):
                    spelling.begun = other.stretches or ()
            kept = (spelling, *others)[:_PER_SESSION]
            self._sessions[session_id] = kept
            self._num_tokens += _size(kept)
            while self._num_tokens > self._max_tokens:
                self._pop(next(iter(self._sessions)))

    def of(self, session_id: str | None) -> tuple[Spelling, ...]:
        """A session's calls, the last one first."""
        with self._lock:
            if session_id is None or session_id not in self._sessions:
                return ()
            self._sessions.move_to_end(session_id)
            return self._sessions[session_id]

    def drop(self, session_id: str) -> None:
        """Forget a session."""
        with self._lock:
            self._pop(session_id)

    def _pop(self, session_id: str) -> tuple[Spelling, ...]:
        spellings = self._sessions.pop(session_id, ())
        self._num_tokens -= _size(spellings)
        return spellings


def _size(spellings: Sequence[Spelling]) -> int:
    return sum(len(spelling.token_ids) for spelling in spellings)
