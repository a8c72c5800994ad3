"""Whose memory is whose, and for how long: sessions, shared pools, and their copies on disk.

A session's texts are its own, unless a call names a pool: that call reads and writes the pool's texts instead. Sessions
and pools are bounded in number, and the least recently used one is forgotten first. With a memory file all of them are
kept there too, and read back when they are first used after a start.

A failing disk fails no call: what cannot be read or saved is logged, and done without or tried again. Only forgetting
raises, since whoever asks for it must know.

Not covered: which texts are stored (conversation.py), and how they lie on disk (file.py).
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from copyspec_engine.memory.alternatives import AlternativesTable
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.memory.file import MemoryFile
from copyspec_engine.memory.index import CopyIndex
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import MemoryFileError

__all__ = ["Pool", "Session", "SessionStore"]

logger = logging.getLogger(__name__)

_MAX_POOLS = 16
_POOL_SHARE = 4
"""A pool holds as much as so many sessions."""


class Session:
    """One conversation: its own texts."""

    def __init__(self, memory: SessionMemory, *, keeps_kv: bool) -> None:
        self.memory = memory
        self.keeps_kv = keeps_kv
        """It outlives the call; no longer so once it is forgotten."""


class Pool:
    """Texts that conversations share; each has a memory of its own, which knows what it has added."""

    def __init__(self, max_tokens: int) -> None:
        self.index = CopyIndex(max_tokens)
        self.alternatives = AlternativesTable()
        self.memories: dict[str | None, SessionMemory] = {}
        """By session; None: of calls without one."""


class SessionStore:
    """The sessions and pools that are remembered, least recently used first. One thread at a time may use it.

    Args:
        config: how many there may be, and how much text in each.
        drop_kv: called with each session that is forgotten.
        file: keeps the texts on disk; None: nothing does.
        vocab_size: of the model; saved texts with other token ids are not used.
    """

    def __init__(
        self,
        config: EngineConfig,
        drop_kv: Callable[[str], object],
        file: MemoryFile | None = None,
        vocab_size: int = 1 << 31,
    ) -> None:
        self._config, self._drop_kv, self._file, self._vocab_size = config, drop_kv, file, vocab_size
        # None stands for one that is only on disk yet.
        self._sessions: OrderedDict[str, Session | None] = OrderedDict()
        self._pools: OrderedDict[str, Pool | None] = OrderedDict()
        for owner in self._owners_if_readable():
            if owner.pool is not None:
                self._pools.pop(owner.pool, None)
                self._pools[owner.pool] = None
            elif owner.session_id is not None:
                self._sessions[owner.session_id] = None

    def __len__(self) -> int:
        """Sessions that are remembered, those on disk included."""
        return len(self._sessions)

    # ---- calls -----------------------------------------------------------------------------------------------------

    def open(self, session_id: str | None, *, keep_texts: bool = True) -> Session:
        """The session, made when it is new; None is a session for this one call.

        One that keeps no texts has a memory for this call only, and is not counted, saved or forgotten.
        """
        if session_id is None or not keep_texts:
            return Session(SessionMemory(self._config.memory_tokens), keeps_kv=session_id is not None)
        session = self._sessions.pop(session_id, None)
        if session is None:
            memory = SessionMemory(self._config.memory_tokens)
            session = Session(self._restored(memory, _Owner(session_id)), keeps_kv=True)
        self._sessions[session_id] = session
        while len(self._sessions) > self._config.max_sessions:
            oldest = next(iter(self._sessions))
            self._drop_session(oldest)
            self._try_to_delete([_Owner(oldest)])
        return session

    def peek(self, session_id: str) -> SessionMemory | None:
        """A session's memory, read from disk if it is only there; None if there is none. Does not count as use."""
        if session_id not in self._sessions:
            return None
        session = self._sessions[session_id]
        if session is None:
            memory = SessionMemory(self._config.memory_tokens)
            session = Session(self._restored(memory, _Owner(session_id)), keeps_kv=True)
            self._sessions[session_id] = session
        return session.memory

    def peek_pool(self, name: str) -> Pool | None:
        """A shared pool, if it was used since the start. Does not count as use."""
        return self._pools.get(name)

    def open_pool(self, name: str, session_id: str | None) -> SessionMemory:
        """A session's part of a shared pool, through which it reads all of it; made when it is new."""
        pool = self._pools.pop(name, None)
        if pool is None:
            pool = Pool(_POOL_SHARE * self._config.memory_tokens)
            for owner in self._owners_if_readable():
                if owner.pool == name:
                    self._open_part(pool, owner)
        self._pools[name] = pool
        while len(self._pools) > _MAX_POOLS:
            oldest = next(iter(self._pools))
            self._drop_pool(oldest)
            self._try_to_delete([owner for owner in self._owners_if_readable() if owner.pool == oldest])
        for other in [other for other, memory in pool.memories.items() if memory.is_idle_and_empty]:
            del pool.memories[other]
            self._try_to_delete([_Owner(other, name)])
        return pool.memories.get(session_id) or self._open_part(pool, _Owner(session_id, name))

    def _open_part(self, pool: Pool, owner: _Owner) -> SessionMemory:
        memory = self._restored(
            SessionMemory(_POOL_SHARE * self._config.memory_tokens, pool.index, pool.alternatives), owner
        )
        pool.memories[owner.session_id] = memory
        return memory

    # ---- forgetting ------------------------------------------------------------------------------------------------

    def forget(self, session_id: str) -> bool:
        """Erase a session's texts, in pools and on disk too, and free its KV; False if nothing of it was there.

        Raises:
            MemoryFileError: the texts are still on disk. Forgetting the session again tries again.
        """
        found = self._drop_session(session_id)
        for pool in self._pools.values():
            memory = None if pool is None else pool.memories.pop(session_id, None)
            if memory is not None:
                memory.erase()
                memory.owner, found = None, True
        saved = [owner for owner in self._owners() if owner.session_id == session_id]
        self._delete([_Owner(session_id), *saved])
        return found or bool(saved)

    def forget_pool(self, name: str) -> bool:
        """Erase a shared pool, on disk too; False if there is none. Raises as `forget` does."""
        found = self._drop_pool(name)
        saved = [owner for owner in self._owners() if owner.pool == name]
        self._delete([_Owner(None, name), *saved])
        return found or bool(saved)

    def _drop_session(self, session_id: str) -> bool:
        if session_id not in self._sessions:
            return False
        session = self._sessions.pop(session_id)
        if session is not None:
            session.keeps_kv, session.memory.owner = False, None
            self._drop_kv(session_id)
        return True

    def _drop_pool(self, name: str) -> bool:
        if name not in self._pools:
            return False
        pool = self._pools.pop(name)
        for memory in pool.memories.values() if pool is not None else ():
            memory.owner = None
        return True

    # ---- disk ------------------------------------------------------------------------------------------------------

    def save(self, memory: SessionMemory) -> None:
        """Bring a memory's copy on disk up to date; what fails is tried again after its next call."""
        if self._file is None or memory.owner is None:
            return
        added, removed = memory.changes()
        try:
            self._file.save(memory.owner, list(added.values()), list(removed.values()))
        except MemoryFileError as error:
            logger.warning("A conversation is not saved yet: %s", error)
        else:
            memory.mark_saved(added, removed)

    def _restored(self, memory: SessionMemory, owner: _Owner) -> SessionMemory:
        """A memory with its texts on disk, where it is kept from now on; one that cannot be trusted starts empty."""
        memory.owner = owner.name
        try:
            memory.restore(self._file.load(owner.name, self._vocab_size) if self._file is not None else ())
        except MemoryFileError as error:
            logger.warning("A conversation starts without its saved texts: %s", error)
            self._try_to_delete([owner])
        return memory

    def _owners(self) -> list[_Owner]:
        """Everyone who has texts on disk, least recently used first."""
        names = self._file.owners() if self._file is not None else []
        return [owner for name in names if (owner := _Owner.parse(name)) is not None]

    def _owners_if_readable(self) -> list[_Owner]:
        try:
            return self._owners()
        except MemoryFileError as error:
            logger.warning("Saved conversations stay out of use: %s", error)
            return []

    def _delete(self, owners: Iterable[_Owner]) -> None:
        for owner in owners:
            if self._file is not None:
                self._file.delete(owner.name)

    def _try_to_delete(self, owners: Iterable[_Owner]) -> None:
        try:
            self._delete(owners)
        except MemoryFileError as error:
            logger.warning("A conversation that was forgotten for want of room is still on disk: %s", error)


class _Owner(NamedTuple):
    """Whose texts these are: a session's own, or the part of a pool that a session (or calls without one) added."""

    session_id: str | None
    pool: str | None = None

    @property
    def name(self) -> str:
        """In the memory file."""
        return f"session:{self.session_id}" if self.pool is None else f"pool:{json.dumps([self.pool, self.session_id])}"

    @classmethod
    def parse(cls, name: str) -> _Owner | None:
        """The owner of a name; None for one that is not ours."""
        kind, _, rest = name.partition(":")
        if kind == "session":
            return cls(rest)
        try:
            pool, session_id = json.loads(rest)
        except (ValueError, TypeError):
            return None
        is_ours = kind == "pool" and isinstance(pool, str) and isinstance(session_id, str | None)
        return cls(session_id, pool) if is_ours else None
