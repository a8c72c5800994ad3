"""What is kept between the calls of a conversation, and who may erase it: all of it goes by the conversation's id.

That is its texts with what was learnt of copying them, its KV in the model and in the draft model, and the token ids
that it was written with. A call opens its conversation, and keeps what it adds to it when it is over.

Not covered: how texts lie in memory and on disk (memory/), slots (kv/), and how ids spell a prompt (chat/known_ids.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from functools import partial

from copyspec_engine.chat.known_ids import KnownIds
from copyspec_engine.drafting.drafter import answer_texts
from copyspec_engine.kv.slots import KVSlots
from copyspec_engine.loop.request import Request
from copyspec_engine.memory.conversation import SessionMemory, SessionStore
from copyspec_engine.memory.store import TextStore
from copyspec_engine.memory.view import Snapshot, snapshot
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.info import SessionInfo
from copyspec_engine.values.tokens import TokenArray

__all__ = ["Conversations"]

logger = logging.getLogger(__name__)


class Conversations:
    """The conversations of one engine. Only the loop's thread may use it, but for `known_ids`.

    Args:
        config: how many there may be, and what is kept of them.
        kv: of the model that decides.
        draft_kv: of the one that drafts for it, if there is one.
        text_store: keeps texts outside of main memory; None: nothing does.
        vocab_size: of the model.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv: KVSlots,
        draft_kv: KVSlots | None,
        text_store: TextStore | None,
        vocab_size: int,
    ) -> None:
        self._kv, self._draft_kv, self._keeps_token_ids = kv, draft_kv, config.keep_token_ids
        self.known_ids = KnownIds()
        """What they were written with; for any thread."""
        self.store = SessionStore(config, self._drop, text_store, vocab_size)

    def __len__(self) -> int:
        """Those that are remembered, in the text store included."""
        return len(self.store)

    # ---- calls -----------------------------------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """Bind a request to its conversation and the memory that it copies from, unless it is already."""
        if request.drafting.memory is not None:
            return
        call = request.asked.call
        request.drafting.session = self.store.open(call.session_id, keep_texts=call.keep_texts, account=call.owner)
        if call.memory_pool is None:
            _use(request, request.drafting.session.memory)
        else:
            _use(request, self.store.open_pool(call.memory_pool, request.texts_owner, call.owner))

    def keep(self, request: Request) -> None:
        """A request is over: keep its texts, KV and ids for later calls, in place of those of its conversation's last.

        Of one that failed (it has no finish_reason) nothing is kept, since that may be what failed it. What its drafter
        raises comes out when all else is done.
        """
        has_failed = request.answer.finish_reason is None
        try:
            self._keep_texts(request, keep=not has_failed)
        finally:
            owner = None if has_failed else request.kept_as
            if self._keeps_token_ids and isinstance(owner, str) and request.asked.call.messages is not None:
                self.known_ids.keep(owner, request.sequence.token_ids, request.account)
            self._kv.end(request.sequence, owner, request.asked.cache_salt, request.account)

    def detach(self, request: Request) -> None:
        """Take a request out of its memory, which is erased; it gets another one that ends with it."""
        memory = request.drafting.memory
        if memory is None:  # it waits, and has none yet
            request.drafting.session = self.store.open(None)
            _use(request, request.drafting.session.memory)
            return
        memory.owner = None  # nothing of it is saved any more
        try:
            self._keep_texts(request, keep=True)
        except Exception:  # of a drafter that is gone now; the request gets a new one
            logger.exception("the drafter of request %s did not end well", request.id)
        finally:
            request.answer.trail.withdraw()
            memory.erase()
            _use(request, self.store.open(None).memory)

    def _keep_texts(self, request: Request, *, keep: bool) -> None:
        """Finish a request's drafter and save its texts, or take them out of the memory again.

        Whatever happens, nothing stays open there.
        """
        drafting = request.drafting
        drafter, memory = drafting.drafter, drafting.memory
        drafting.drafter = drafting.memory = None
        if memory is None:
            return
        try:
            with memory.noting(drafting.texts):
                request.answer.trail.resolve(
                    request.sequence.token_ids,
                    request.asked.num_prompt_tokens,
                    memory,
                    answer_texts(drafter),
                    request.asked.prediction_ids,
                    is_others=partial(request.is_others, memory=memory),
                )
                if drafter is not None:
                    drafter.finish()
        except Exception:
            keep = False
            raise
        finally:
            if not keep:
                memory.withdraw(drafting.texts)
            memory.end_call()
            self.store.save(memory)

    # ---- their owners ----------------------------------------------------------------------------------------------

    def sessions(self, account: str | None) -> list[SessionInfo]:
        """See `Engine.sessions`."""
        return self.store.infos(account)

    def look(self, session_id: str) -> Snapshot:
        """What a conversation remembers."""
        return snapshot(self.store.peek(session_id))

    def take_in(
        self, session_id: str, texts: Iterable[tuple[int, TokenArray]], account: str | None
    ) -> Generator[int, None, None]:
        """Add texts to a conversation, which is made and counted for an account if it is new.

        In pieces; see `SessionMemory.take_in`.
        """
        memory = self.store.open(session_id, account=account).memory
        memory.begin_call()
        try:
            yield from memory.take_in(texts)
        finally:
            memory.end_call()
        self.store.save(memory)

    def forget(self, session_id: str, in_flight: Iterable[Request]) -> bool:
        """Erase all of a conversation; calls of it in flight go on and keep nothing. See `SessionStore.forget`.

        Returns:
            False if nothing of it was there.
        """
        self.store.catch_up()  # what another engine has forgotten is not here any more
        for request in in_flight:
            if request.session_id != session_id:
                continue
            if request.drafting.session is None or request.asked.call.keep_texts:
                self.detach(request)
            else:  # what it copies from is not the conversation's
                request.drafting.session.keeps_kv = False
        had_kv = self._drop(session_id)  # also that of one that keeps no texts
        return self.store.forget(session_id) or had_kv

    def forget_pool(self, name: str, in_flight: Iterable[Request]) -> bool:
        """Erase a shared pool, as `forget` does a conversation."""
        for request in in_flight:
            if request.asked.call.memory_pool == name:
                self.detach(request)
        return self.store.forget_pool(name)

    def _drop(self, session_id: str) -> bool:
        """Let go of a conversation's KV and ids; False if there was no KV."""
        if self._draft_kv is not None:
            self._draft_kv.cache.drop(session_id)
        self.known_ids.drop(session_id)
        return self._kv.cache.drop(session_id)


def _use(request: Request, memory: SessionMemory) -> None:
    memory.begin_call()
    request.drafting.memory = memory
