"""What conversations remember of their texts, and whose memory is whose, for how long: sessions, pools, copies on disk.

A prompt adds only those stretches that a memory does not hold yet, wherever they stand, so that a history that is
trimmed, summarised or rearranged loses no source.

A session's texts are its own, unless a call names a pool: that call reads and writes the pool's texts instead. Sessions
and pools are bounded in number; the owner who has most of them gives way first, and of its own the least recently used.
With a store all of them are kept there too, and read back when they are first used after a start. Several engines may
share one. Each then asks for news before it opens or shows anything: what another has saved is read back, what another
has forgotten is let go of, and limits count for all of them together.

A failing store fails no call: what cannot be read or saved is logged, and done without or tried again with the next
calls. Only forgetting raises, since whoever asks for it must know.

Not covered: how texts lie in memory (index.py) and in a store (store.py).
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from copyspec_engine.memory.acceptance import Acceptance
from copyspec_engine.memory.alternatives import AlternativesTable
from copyspec_engine.memory.draft_acceptance import DraftAcceptance
from copyspec_engine.memory.index import OVERLAP, CopyIndex, Span
from copyspec_engine.memory.store import (
    ChangedElsewhereError,
    ForgottenElsewhereError,
    SavedOwner,
    SavedSegment,
    StoreUnreachableError,
    TextStore,
)
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import MemoryFileError
from copyspec_engine.values.fairness import first_to_go
from copyspec_engine.values.info import SessionInfo
from copyspec_engine.values.tokens import TokenArray

__all__ = [
    "ANSWER",
    "DECLARED_TEXT",
    "KINDS",
    "PROMPT",
    "Pool",
    "Session",
    "SessionMemory",
    "SessionStore",
]

logger = logging.getLogger(__name__)

PROMPT, ANSWER, DECLARED_TEXT = 0, 1, 2
"""Kinds of texts."""

KINDS = ("prompt", "answer", "prediction")
"""Their names."""

_PIECE = 1 << 15
"""Tokens that are taken in at a time: about ten milliseconds, in which no call gets a token."""

_STARTS = 4
"""Answers and new texts whose beginnings are kept in mind."""


class SessionMemory:
    """The texts that one conversation has added to an index, and what was learnt about copying them.

    Args:
        max_tokens: tokens of text to keep; see `CopyIndex`.
        index: texts shared with other conversations; default: an index of its own.
        alternatives: shared with them; default: a table of its own.
    """

    def __init__(
        self, max_tokens: int, index: CopyIndex | None = None, alternatives: AlternativesTable | None = None
    ) -> None:
        self.index = CopyIndex(max_tokens) if index is None else index
        self.alternatives = AlternativesTable() if alternatives is None else alternatives
        """What the model held likely in its texts; not kept in a store."""
        self.owner: str | None = None
        """Its name in a store; None: it is not kept there."""
        self.revision = 0
        """Of the store, up to which this holds all that is saved of it."""
        self.acceptance: Acceptance | None = None
        self.draft_acceptance: DraftAcceptance | None = None
        """Set by the first adaptive call."""
        self._spans: list[Span] = []
        self._answers: list[Span] = []
        self._saved: dict[Span, int] = {}
        """Texts that are in the store, and their numbers there."""
        self._next_number = self._num_calls = self._last_number = 0
        self._numbering = 1 if index is None else -1
        """Each numbers its own texts, since numbers that all share would tell how much others say; in a pool downwards
        from -1, so that none is taken for a text of the session's own memory."""
        self._was_used = self._is_let_go = False
        self._noted: list[Span] | None = None

    # ---- for drafters ----------------------------------------------------------------------------------------------

    def add_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """Keep what is new in a prompt; positions where an answer to it may start, the likeliest first."""
        self._forget_what_is_gone()
        new = self._add(self.index.append_unseen(prompt_ids, PROMPT))
        recent = [span for span in reversed(self._answers) if self.index.holds(span)]
        return [span.first_indexed for span in (*recent, *reversed(new[-_STARTS:]))]

    def add_prediction(self, token_ids: Sequence[int]) -> int:
        """Keep a text that an answer is expected to repeat; the position where it begins."""
        for span in reversed(self._spans):
            is_prediction = span.kind == DECLARED_TEXT and self.index.holds(span)
            if is_prediction and np.array_equal(self.index.tokens_of(span), token_ids):
                return span.first_indexed
        return self._add([self.index.append(token_ids, DECLARED_TEXT)])[0].first_indexed

    def open_answer(self, size: int) -> Span:
        """Room for an answer, or a further part of one, that is written bit by bit."""
        return self._add([self.index.open(size, ANSWER)])[0]

    def add_answer(self, span: Span) -> None:
        """An answer is complete."""
        self._answers = [*self._answers, span][-_STARTS:]

    def remember(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Keep what is new in a finished call's prompt, and its answer, which follows it in `token_ids`."""
        self._add(self.index.append_unseen(token_ids[:num_prompt_tokens], PROMPT))
        if len(token_ids) > num_prompt_tokens:
            overlap = min(OVERLAP, num_prompt_tokens)
            span = self.index.append(token_ids[num_prompt_tokens - overlap :], ANSWER, overlap=overlap)
            self.add_answer(self._add([span])[0])

    def _add(self, spans: list[Span]) -> list[Span]:
        for span in spans:
            self._last_number += self._numbering
            span.number = self._last_number
        self._spans += spans
        if self._noted is not None:
            self._noted += spans
        return spans

    @contextmanager
    def noting(self, texts: list[Span]) -> Iterator[None]:
        """What is added meanwhile goes into `texts` too: that of one call among others."""
        self._noted = texts
        try:
            yield
        finally:
            self._noted = None

    @property
    def texts(self) -> list[Span]:
        """The texts that this conversation has added and the index still holds, oldest first."""
        self._forget_what_is_gone()
        return list(self._spans)

    @property
    def num_tokens(self) -> int:
        """Of these texts."""
        return sum(text.stop - text.first_indexed for text in self.texts)

    def has(self, text: Span) -> bool:
        """Whether this conversation has added a text."""
        return text in self._spans

    # ---- for whoever keeps it --------------------------------------------------------------------------------------

    def withdraw(self, texts: Iterable[Span]) -> None:
        """Take texts out again that a failed call has added: nothing of it may fail another one."""
        own = set(self._spans)
        self.index.erase([span for span in texts if span in own])
        self._forget_what_is_gone()
        self._answers = [span for span in self._answers if self.index.holds(span)]

    def begin_call(self) -> None:
        """A call is going to use this memory, until `end_call`."""
        self._num_calls += 1
        self._was_used = True

    def end_call(self) -> None:
        """After a memory's last call in flight nothing stays open, not even what a drafter that failed has left."""
        self._num_calls -= 1
        if not self._num_calls:
            for span in self._spans:
                if span.is_open:
                    self.index.close(span)
            if self._is_let_go:
                self.erase()

    @property
    def is_idle_and_empty(self) -> bool:
        """No call uses this memory, and the index holds nothing of it."""
        return not self._num_calls and not any(map(self.index.holds, self._spans))

    @property
    def was_used(self) -> bool:
        """By some call, of this engine."""
        return self._was_used

    def let_go(self) -> None:
        """Keep nothing of it any more, and erase it as soon as no call uses it."""
        self.owner, self._is_let_go = None, True
        if not self._num_calls:
            self.erase()

    def erase(self) -> None:
        """Take this conversation's texts out of the index, and forget alternatives and what was learnt."""
        self.index.erase(self._spans)
        self.alternatives.erase()  # with those of the others who share it, since nobody knows whose is whose
        self.acceptance = self.draft_acceptance = None
        self._spans, self._answers, self._saved = [], [], {}

    def changes(self) -> tuple[dict[Span, SavedSegment], dict[Span, int]]:
        """What is to be saved: complete texts that are not in the store yet; and the numbers of those forgotten."""
        added = {
            span: SavedSegment(number, span.kind, self.index.tokens_of(span).astype(np.int32))
            for number, span in enumerate(self._unsaved(), self._next_number)
        }
        return added, {span: number for span, number in self._saved.items() if not self.index.holds(span)}

    def mark_saved(self, added: Mapping[Span, SavedSegment], removed: Iterable[Span] = ()) -> None:
        """These `changes` are in the store."""
        for span, segment in added.items():
            self._saved[span] = segment.number
            self._next_number = max(self._next_number, segment.number + 1)
        for span in removed:
            del self._saved[span]

    def restore(self, segments: Sequence[SavedSegment]) -> None:
        """Hold what is saved, oldest first: take in what is not here yet, and erase what was saved and is no more.

        What is here and not saved yet stays. One of these texts that was saved, as it turns out, is not taken in again:
        an answer that was lost on its way from the store would double it.
        """
        numbers = {segment.number for segment in segments}
        gone = [span for span, number in self._saved.items() if number not in numbers]
        self.index.erase([span for span in gone if self.index.holds(span)])
        self._saved = {span: number for span, number in self._saved.items() if number in numbers}
        held, unsaved = set(self._saved.values()), self._unsaved()
        for segment in (segment for segment in segments if segment.number not in held):
            tokens = segment.tokens.astype(np.int64)
            same = [s for s in unsaved if s.kind == segment.kind and np.array_equal(self.index.tokens_of(s), tokens)]
            if same:
                unsaved.remove(same[0])
                self.mark_saved({same[0]: segment})
                continue
            span = self._add([self.index.append(tokens, segment.kind)])[0]
            self.mark_saved({span: segment})
            if segment.kind == ANSWER:
                self.add_answer(span)

    def _unsaved(self) -> list[Span]:
        """Complete texts that are not in the store yet."""
        self._forget_what_is_gone()
        complete = [span for span in self._spans if not span.is_open and span.stop > span.first_indexed]
        return [span for span in complete if span not in self._saved]

    def take_in(self, texts: Iterable[tuple[int, TokenArray]]) -> Iterator[int]:
        """Add (kind, tokens) of complete texts, oldest first, but for those that it holds already.

        It is done in pieces, between which the memory may be used, or erased: then nothing more is added. `begin_call`
        goes before, and `end_call` behind the last of them.

        Gives:
            How many of them were added so far, and are held; behind each piece, the last time when all is done.
        """
        known = {(span.kind, self.index.tokens_of(span).tobytes()) for span in self.texts}
        new, left = list[Span](), _PIECE
        for kind, tokens in texts:
            if (kind, tokens.tobytes()) in known:
                continue
            held = tokens[-self.index.max_tokens :]
            new += self._add([self.index.open(len(held), kind)])
            for at in range(0, len(held), _PIECE):
                piece = held[at : at + _PIECE]
                if not self.index.write(new[-1], piece):
                    return
                left -= len(piece)
                if left <= 0:
                    yield self._count_held(new)
                    left = _PIECE
            if self.index.holds(new[-1]):
                self.index.close(new[-1])
                if kind == ANSWER:
                    self.add_answer(new[-1])
        yield self._count_held(new)

    def _count_held(self, spans: Iterable[Span]) -> int:
        return sum(1 for span in spans if self.index.holds(span))  # a number of Python, not of NumPy

    def _forget_what_is_gone(self) -> None:
        self._spans = [span for span in self._spans if self.index.holds(span)]


_MAX_POOLS = 16
_POOL_SHARE = 4
"""A pool holds as much as so many sessions."""

_MOST_TRIES = 4
"""Saves of a conversation that another engine keeps saving to."""


class Session:
    """One conversation: its own texts."""

    def __init__(self, memory: SessionMemory, *, keeps_kv: bool) -> None:
        self.memory = memory
        self.last_used_s: float | None = None
        """When its last call began, in seconds since 1970; None: before the start."""
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
        on_forget: called with each session that is forgotten.
        store: keeps the texts outside of main memory; None: nothing does.
        vocab_size: of the model; saved texts with other token ids are not used.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_forget: Callable[[str], object],
        store: TextStore | None = None,
        vocab_size: int = 1 << 31,
    ) -> None:
        self._config, self._on_forget, self._store, self._vocab_size = config, on_forget, store, vocab_size
        # None stands for one that is only in the store yet.
        self._sessions: OrderedDict[str, Session | None] = OrderedDict()
        self._pools: OrderedDict[str, Pool | None] = OrderedDict()
        self._session_accounts: dict[str, str | None] = {}
        self._pool_accounts: dict[str, str | None] = {}
        """For whom they count: the owner (`GenerationRequest.owner`) of the call that began each."""
        self._stale: dict[str, _Owner] = {}
        """By name, those whose memory here, if there is one, lacks what another engine has saved."""
        self._unsaved: OrderedDict[str, SessionMemory] = OrderedDict()
        """By name, those that could not be saved after their last call."""
        self._revision = -1
        """Of the store, up to which its news are known."""
        for owner in self._owners_if_readable():
            self._list(owner)
        self.catch_up()

    def _list(self, owner: _Owner) -> None:
        """Note that the store holds texts of an owner, as the last one that was used."""
        if owner.pool is not None:
            self._pool_accounts.setdefault(owner.pool, owner.account)
            self._pools[owner.pool] = self._pools.pop(owner.pool, None)
        elif owner.session_id is not None:
            self._session_accounts.setdefault(owner.session_id, owner.account)
            self._sessions[owner.session_id] = self._sessions.pop(owner.session_id, None)

    def __len__(self) -> int:
        """Sessions that are remembered, those in the store included, as far as they are known."""
        return len(self._sessions)

    # ---- calls -----------------------------------------------------------------------------------------------------

    def open(self, session_id: str | None, *, keep_texts: bool = True, account: str | None = None) -> Session:
        """The session, made when it is new and then counted for an account; None is a session for this one call.

        One that keeps no texts has a memory for this call only, and is not counted, saved or forgotten.
        """
        if session_id is None or not keep_texts:
            return Session(SessionMemory(self._config.memory_tokens), keeps_kv=session_id is not None)
        self.catch_up()
        account = self._session_accounts.setdefault(session_id, account)
        session = self._current(session_id)
        session.last_used_s = time.time()
        self._sessions.move_to_end(session_id)
        own, most = [name for name in self._sessions if self._session_accounts[name] == account], self._config
        if most.max_sessions_per_owner is not None and len(own) > most.max_sessions_per_owner:
            self._make_room(own[0])
        while len(self._sessions) > most.max_sessions:
            self._make_room(first_to_go((name, self._session_accounts[name], 1) for name in self._sessions))
        return session

    def _current(self, session_id: str) -> Session:
        """A session with all that is saved of it."""
        session, account = self._sessions.get(session_id), self._session_accounts[session_id]
        if session is None or not self._refresh(session.memory):
            self._session_accounts[session_id] = account
            memory = self._restored(SessionMemory(self._config.memory_tokens), self._owner_of(session_id))
            session = self._sessions[session_id] = Session(memory, keeps_kv=True)
        return session

    def _owner_of(self, session_id: str) -> _Owner:
        return _Owner(session_id, account=self._session_accounts.get(session_id))

    def _make_room(self, session_id: str) -> None:
        """Forget a session for want of room."""
        owner = self._owner_of(session_id)
        self._drop_session(session_id)
        self._try_to_delete([owner])

    def infos(self, account: str | None) -> list[SessionInfo]:
        """The sessions that count for an account, or all, least recently used first."""
        self.catch_up()
        infos = []
        for session_id, session in self._sessions.items():
            own = self._session_accounts[session_id]
            if account in (None, own):
                size, last = (None, None) if session is None else (session.memory.num_tokens, session.last_used_s)
                infos.append(SessionInfo(session_id, own, size, last))
        return infos

    def peek(self, session_id: str) -> SessionMemory | None:
        """A session's memory, read from the store if it is only there; None if there is none. Does not count as use."""
        self.catch_up()
        return self._current(session_id).memory if session_id in self._sessions else None

    def peek_pool(self, name: str) -> Pool | None:
        """A shared pool, if it was used since the start. Does not count as use."""
        return self._pools.get(name)

    def open_pool(self, name: str, session_id: str | None, account: str | None = None) -> SessionMemory:
        """A session's part of a shared pool, through which it reads all of it; made when it is new.

        A new pool counts for an account.
        """
        self.catch_up()
        account = self._pool_accounts.setdefault(name, account)
        pool = self._pools.pop(name, None)
        if pool is None:
            pool = Pool(_POOL_SHARE * self._config.memory_tokens)
            for owner in self._owners_if_readable():
                if owner.pool == name:
                    self._open_part(pool, owner)
        self._pools[name] = pool
        for owner in [owner for owner in self._stale.values() if owner.pool == name]:
            if owner.session_id in pool.memories:
                self._refresh(pool.memories[owner.session_id])
            else:
                self._open_part(pool, owner)
        while len(self._pools) > _MAX_POOLS:
            last = first_to_go((other, self._pool_accounts[other], 1) for other in self._pools)
            self._drop_pool(last)
            self._try_to_delete([owner for owner in self._owners_if_readable() if owner.pool == last])
        for other in [other for other, memory in pool.memories.items() if memory.is_idle_and_empty]:
            if pool.memories.pop(other).was_used:  # else it may be another engine's, whose first call is in flight
                self._try_to_delete([_Owner(other, name, account)])
        return pool.memories.get(session_id) or self._open_part(pool, _Owner(session_id, name, account))

    def _open_part(self, pool: Pool, owner: _Owner) -> SessionMemory:
        memory = self._restored(
            SessionMemory(_POOL_SHARE * self._config.memory_tokens, pool.index, pool.alternatives), owner
        )
        pool.memories[owner.session_id] = memory
        return memory

    # ---- forgetting ------------------------------------------------------------------------------------------------

    def forget(self, session_id: str) -> bool:
        """Erase a session's texts, in pools and in the store too, and free its KV; False if nothing of it was there.

        Raises:
            MemoryFileError: the texts are still in the store. Forgetting the session again tries again.
        """
        own = self._owner_of(session_id)
        found = self._drop_session(session_id)
        for pool in self._pools.values():
            memory = None if pool is None else pool.memories.pop(session_id, None)
            if memory is not None:
                memory.erase()
                memory.owner, found = None, True
        saved = [owner for owner in self._owners() if owner.session_id == session_id]
        self._delete([own, *saved])  # even of one that is gone bytes may be left
        return found or bool(saved)

    def forget_pool(self, name: str) -> bool:
        """Erase a shared pool, in the store too; False if there is none. Raises as `forget` does."""
        found = self._drop_pool(name)
        saved = [owner for owner in self._owners() if owner.pool == name]
        self._delete([_Owner(None, name), *saved])
        return found or bool(saved)

    def _drop_session(self, session_id: str) -> bool:
        if session_id not in self._sessions:
            return False
        session = self._sessions.pop(session_id)
        del self._session_accounts[session_id]
        if session is not None:
            session.keeps_kv, session.memory.owner = False, None
            self._on_forget(session_id)
        return True

    def _drop_pool(self, name: str) -> bool:
        if name not in self._pools:
            return False
        pool = self._pools.pop(name)
        del self._pool_accounts[name]
        for memory in pool.memories.values() if pool is not None else ():
            memory.owner = None
        return True

    # ---- the store -------------------------------------------------------------------------------------------------

    def save(self, memory: SessionMemory) -> None:
        """Bring a memory's copy in the store up to date, and others that could not be saved before.

        What fails is tried again with the next call, of any conversation.
        """
        if self._store is not None and memory.owner is not None:
            self._unsaved[memory.owner] = memory
            self._unsaved.move_to_end(memory.owner, last=False)
            self.save_all()

    def save_all(self) -> None:
        """Save what is not saved yet, up to the first that fails."""
        for owner, memory in [*self._unsaved.items()]:
            del self._unsaved[owner]
            try:
                self._save(memory)
            except MemoryFileError as error:
                self._unsaved[owner] = memory
                logger.warning("A conversation is not saved yet, one of %d: %s", len(self._unsaved), error)
                return

    def _save(self, memory: SessionMemory) -> None:
        """Save a memory, to what others may have saved of it meanwhile."""
        owner = memory.owner
        if self._store is None or owner is None:
            return
        try:
            for _ in range(_MOST_TRIES):
                added, removed = memory.changes()
                try:
                    memory.revision = self._store.save(
                        owner, list(added.values()), list(removed.values()), memory.revision
                    )
                except ChangedElsewhereError:
                    self._load(memory, owner, memory.revision)
                else:
                    memory.mark_saved(added, removed)
                    return
        except ForgottenElsewhereError:
            logger.info("A conversation was forgotten by another engine, and is not saved")
            self._let_go(memory)
        else:
            raise MemoryFileError(f"Others have saved to it {_MOST_TRIES} times meanwhile")

    def _load(self, memory: SessionMemory, owner: str, revision: int | None) -> None:
        """Bring a memory up to date; a revision is that of the copy which it is."""
        if self._store is not None:
            segments, memory.revision = self._store.load(owner, self._vocab_size, revision)
            memory.restore(segments)
            self._stale.pop(owner, None)

    def _restored(self, memory: SessionMemory, owner: _Owner) -> SessionMemory:
        """A memory with its saved texts, which is kept from now on; one that cannot be trusted starts empty."""
        memory.owner, memory.revision = owner.name, self._revision
        try:
            self._load(memory, owner.name, None)
        except MemoryFileError as error:
            logger.warning("A conversation starts without its saved texts: %s", error)
            if isinstance(error, StoreUnreachableError):
                self._stale[owner.name] = owner
            else:
                self._try_to_delete([owner])
        return memory

    def _refresh(self, memory: SessionMemory) -> bool:
        """Read back what another engine has saved of a memory, if it has; False if it was let go of instead."""
        if memory.owner in self._stale:
            try:
                self._load(memory, memory.owner, memory.revision)
            except MemoryFileError as error:
                logger.warning("A conversation goes on without what was saved of it elsewhere: %s", error)
            except ForgottenElsewhereError:
                self._let_go(memory)
                return False
        return True

    def catch_up(self) -> None:
        """Learn what other engines have saved and forgotten, and save what could not be saved before."""
        if self._store is None:
            return
        try:
            news = self._store.news(self._revision)
        except MemoryFileError as error:
            logger.warning("What other engines have saved or forgotten is not known: %s", error)
            return
        self._revision = news.revision
        if news.is_all:
            self._let_go_of_all_but(news.owners)
        for name, _, revision in news.owners:
            owner = _Owner.parse(name)
            if owner is not None:
                self._list(owner)
                memory, pool = self._memory_of(owner), self._pools.get(owner.pool or "")
                if pool is not None if memory is None else memory.revision < revision:
                    self._stale[name] = owner
        self.save_all()

    def _let_go_of_all_but(self, owners: Sequence[SavedOwner]) -> None:
        """Whoever is in main memory and not among these was forgotten; so was who began after its copy was made.

        What is only in the store is listed anew.
        """
        began = {owner.name: owner.began for owner in owners}
        self._stale = {name: owner for name, owner in self._stale.items() if name in began}
        memories = [session.memory for session in self._sessions.values() if session is not None]
        for pool in self._pools.values():
            memories += pool.memories.values() if pool is not None else ()
        for memory in memories:
            if memory.owner is not None and not began.get(memory.owner, memory.revision + 1) <= memory.revision:
                self._let_go(memory)
        for session_id in [name for name, session in self._sessions.items() if session is None]:
            self._drop_session(session_id)
        for name in [name for name, pool in self._pools.items() if pool is None or not pool.memories]:
            self._drop_pool(name)

    def _memory_of(self, owner: _Owner) -> SessionMemory | None:
        """What is in main memory of an owner."""
        if owner.pool is not None:
            pool = self._pools.get(owner.pool)
            return None if pool is None else pool.memories.get(owner.session_id)
        session = None if owner.session_id is None else self._sessions.get(owner.session_id)
        return None if session is None else session.memory

    def _let_go(self, memory: SessionMemory) -> None:
        """Another engine has forgotten its owner: erase it here too; calls of it in flight go on and keep nothing."""
        owner = None if memory.owner is None else _Owner.parse(memory.owner)
        if owner is not None and self._memory_of(owner) is memory:
            if owner.pool is None and owner.session_id is not None:
                self._drop_session(owner.session_id)
            elif (pool := self._pools.get(owner.pool or "")) is not None:
                del pool.memories[owner.session_id]
        memory.let_go()

    def _owners(self) -> list[_Owner]:
        """Everyone who has texts in the store, least recently used first."""
        names = self._store.owners() if self._store is not None else []
        return [owner for name in names if (owner := _Owner.parse(name)) is not None]

    def _owners_if_readable(self) -> list[_Owner]:
        try:
            return self._owners()
        except MemoryFileError as error:
            logger.warning("Saved conversations stay out of use: %s", error)
            return []

    def _delete(self, owners: Iterable[_Owner]) -> None:
        for owner in owners:
            if self._store is not None:
                self._store.delete(owner.name)

    def _try_to_delete(self, owners: Iterable[_Owner]) -> None:
        try:
            self._delete(owners)
        except MemoryFileError as error:
            logger.warning("A conversation that was forgotten for want of room is still saved: %s", error)


class _Owner(NamedTuple):
    """Whose texts these are: a session's own, or the part of a pool that a session (or calls without one) added."""

    session_id: str | None
    pool: str | None = None
    account: str | None = None
    """For whom the session, or the pool, counts."""

    @property
    def name(self) -> str:
        """In the store."""
        account = [] if self.account is None else [self.account]
        if self.pool is not None:
            return f"pool:{json.dumps([self.pool, self.session_id, *account])}"
        return f"owned:{json.dumps([self.session_id, *account])}" if account else f"session:{self.session_id}"

    @classmethod
    def parse(cls, name: str) -> _Owner | None:
        """The owner of a name; None for one that is not ours."""
        kind, _, rest = name.partition(":")
        if kind == "session":
            return cls(rest)
        try:
            match kind, json.loads(rest):
                case "owned", [str(session_id), str(account)]:
                    return cls(session_id, account=account)
                case "pool", [str(pool), str() | None as session_id, *account] if all(
                    isinstance(part, str) for part in account
                ):
                    return cls(session_id, pool, *account)
        except (ValueError, TypeError):
            return None
        return None
