"""What a conversation remembers between calls: its texts as copy sources, and the KV of its last call.

A `SessionMemory` outlives the call. Its texts are those of every prompt and answer of the session, each stored once:
a call adds only what is new behind the longest common prefix with the call before it. One session never sees another.

Not covered: persistence and shared pools.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from copyspec_engine.copy_index import ORDERS, CopyIndex, TokenArray

__all__ = ["SessionMemory", "SessionStore", "common_prefix_length"]

_OVERLAP = ORDERS[0]
"""Tokens repeated before a new text, so that runs across its beginning can match."""


def common_prefix_length(a: Sequence[int] | TokenArray, b: Sequence[int] | TokenArray) -> int:
    """How many tokens at the start of `a` and `b` are equal."""
    size = min(len(a), len(b))
    differs = np.asarray(a[:size], dtype=np.int64) != np.asarray(b[:size], dtype=np.int64)
    return int(differs.argmax()) if differs.any() else size


class SessionMemory:
    """The texts of one conversation, and the KV slots of its last finished call."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._last_call: TokenArray = np.empty(0, dtype=np.int64)
        self.texts = CopyIndex()
        """Prompts and answers of finished calls."""
        self.cached_tokens: TokenArray = np.empty(0, dtype=np.int64)
        """The tokens whose KV is in `cached_slots`, in order."""
        self.cached_slots: TokenArray = np.empty(0, dtype=np.int64)

    def begin_call(self, prompt_ids: Sequence[int]) -> CopyIndex:
        """A fresh index for one call, holding the part of its prompt that the session has not seen yet."""
        seen = common_prefix_length(prompt_ids, self._last_call)
        live = CopyIndex()
        live.extend(prompt_ids[max(seen - _OVERLAP, 0) :])
        return live

    def end_call(self, live: CopyIndex, token_ids: Sequence[int]) -> None:
        """Keep the texts of a call; its index `live` becomes part of the session's, the oldest texts make room."""
        new = live.tokens
        # A call that goes on where the last one ended repeats its last tokens: they stand there already.
        overlap = min(_OVERLAP, len(new), len(self.texts))
        if overlap and np.array_equal(self.texts.tokens[-overlap:], new[:overlap]):
            new = new[overlap:]
        self.texts.extend(new)
        self._last_call = np.asarray(token_ids, dtype=np.int64)
        if len(self.texts) > self._max_tokens:
            recent = self.texts.tokens[-self._max_tokens // 2 :].copy()
            self.texts = CopyIndex()
            self.texts.extend(recent)

    def take_slots(self, prefix: int) -> tuple[TokenArray, TokenArray]:
        """Hand over the cached KV: the slots of the first `prefix` tokens, and the rest, which nobody needs now."""
        slots = self.cached_slots
        self.keep_slots(slots[:0], slots[:0])
        return slots[:prefix], slots[prefix:]

    def keep_slots(self, token_ids: Sequence[int] | TokenArray, slots: TokenArray) -> None:
        """Become the owner of a finished call's KV."""
        self.cached_tokens, self.cached_slots = np.asarray(token_ids, dtype=np.int64), slots


class SessionStore:
    """The sessions that are remembered, least recently used first.

    Args:
        max_sessions: the least recently used session is forgotten beyond this number.
        max_tokens: tokens of text that one session keeps.
        release: called with KV slots that a forgotten session owned.
    """

    def __init__(self, max_sessions: int, max_tokens: int, release: Callable[[TokenArray], None]) -> None:
        self._max_sessions, self._max_tokens, self._release = max_sessions, max_tokens, release
        self._sessions: OrderedDict[str, SessionMemory] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def cached_tokens(self, session_id: str | None) -> TokenArray:
        """The tokens whose KV a session holds; none if there is no such session. Does not count as use."""
        session = self._sessions.get(session_id) if session_id is not None else None
        return np.empty(0, dtype=np.int64) if session is None else session.cached_tokens

    def open(self, session_id: str | None) -> SessionMemory:
        """The session's memory, made when it is new; None is a memory for this one call."""
        if session_id is None:
            return SessionMemory(self._max_tokens)
        session = self._sessions.pop(session_id, None) or SessionMemory(self._max_tokens)
        self._sessions[session_id] = session
        if len(self._sessions) > self._max_sessions:
            self.forget(next(iter(self._sessions)))
        return session

    def holds(self, session_id: str | None, session: SessionMemory) -> bool:
        """Whether `session` is still the memory of `session_id` (it may have been forgotten during a call)."""
        return session_id is not None and self._sessions.get(session_id) is session

    def forget(self, session_id: str) -> bool:
        """Drop a session's texts and KV; False if there is none."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._release(session.take_slots(0)[1])
        return session is not None

    @property
    def num_cached_slots(self) -> int:
        """KV slots that sessions hold for their next call."""
        return sum(len(session.cached_slots) for session in self._sessions.values())

    def evict_slots(self) -> None:
        """Free the KV (not the texts) of the least recently used session that has any."""
        for session in self._sessions.values():
            if len(session.cached_slots):
                self._release(session.take_slots(0)[1])
                return
