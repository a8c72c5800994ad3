"""A smaller model that guesses what the model will write, with KV rows of its own.

It follows each request lazily: what was written since it was last asked is read when it is asked again, so that
stretches which it has no part in cost nothing. What it wrote and was not accepted is written over.

Not covered: when it is worth asking (mix.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.kv.prefix_cache import PrefixCache
from copyspec_engine.kv.slots import KVPool
from copyspec_engine.loop.draft_chain import Guess
from copyspec_engine.loop.request import Request
from copyspec_engine.loop.scheduler import ScheduledBatch, ScheduledRow, session_key, session_keys
from copyspec_engine.values.config import NoDrafter

__all__ = ["DraftModel", "UnknownTokenError"]

_AHEAD = 256
"""Slots that a row takes at a time while many are free."""


class UnknownTokenError(ValueError):
    """A text holds a token that the draft model lacks."""


@dataclass(slots=True)
class _Row:
    """How far the draft model has followed a request."""

    own: Request
    """The request as the draft model sees it: the text with its guesses behind, and its slots."""
    num_known: int = 0
    """Tokens of the text when it was last looked at; what stands behind them is guessed."""
    has_read: bool = False
    """It has computed something, rather than only found it in the cache."""


class DraftModel:
    """Follows requests and guesses their next tokens. Only the engine's loop thread may use it.

    Args:
        model: with the vocabulary of the one it drafts for.
        vocab_size: width of the logits of that one; the rest of the draft model's is padding.
        max_rows: rows of KV that are kept for later calls.
        max_prefill_tokens: tokens that one pass reads, of all requests together, where more than one is missing.
    """

    def __init__(self, model: LoadedModel, vocab_size: int, max_rows: int, max_prefill_tokens: int) -> None:
        self.model = model
        self.pool = KVPool(model.num_slots)
        self.cache = PrefixCache(self.pool, max_rows)
        self._vocab_size = min(vocab_size, model.runner.vocab_size)
        self._max_prefill_tokens = max_prefill_tokens
        self._rows: dict[Request, _Row] = {}
        self.num_passes = self.num_tokens_read = 0

    @property
    def num_rows(self) -> int:
        """Requests that it follows."""
        return len(self._rows)

    def follow(self, sequence: Request) -> int:
        """Look at what a request has written; how many of its tokens are still to be read, at least 1.

        Raises:
            UnknownTokenError: it holds a token that the draft model lacks.
        """
        row = self._rows.get(sequence) or self._begin(sequence)
        own, text = row.own, sequence.token_ids
        at, end = row.num_known, min(len(text), len(own.token_ids))
        while at < end and own.token_ids[at] == text[at]:  # guesses that were right
            at += 1
        known = self.model.runner.vocab_size
        if max(text[at:], default=0) >= known:
            raise UnknownTokenError(f"the text holds a token id from {known} on, which the draft model lacks")
        own.num_computed = min(own.num_computed, at, len(text) - 1)
        own.token_ids[at:] = text[at:]
        row.num_known = len(text)
        return own.num_pending

    def room(self, sequence: Request) -> int:
        """Most tokens that it can guess behind a request's text before its context is full."""
        return max(self.model.max_model_len - len(sequence.token_ids), 0)

    def guess(self, sequences: Sequence[Request]) -> list[Guess | None]:
        """One pass over requests that were looked at: the next token of each, which is read in the next pass.

        None: more than a pass may take is still to be read, a part of it was; or there are no slots for it.
        """
        rows: list[ScheduledRow] = []
        left, readers = self._max_prefill_tokens, sum(self._own(sequence).num_pending > 1 for sequence in sequences)
        for sequence in sequences:
            own = self._own(sequence)
            count = own.num_pending
            if count > 1:
                count = min(count, max(left // readers, 1))
                left, readers = left - count, readers - 1
            if self._secure(own, count, sequences):
                rows.append(ScheduledRow(own, count, samples=count == own.num_pending))
        if not rows:
            return [None] * len(sequences)
        guesses = iter(self._run(rows))
        found = {row.sequence: next(guesses) for row in rows if row.samples}
        for row in rows:
            row.sequence.num_computed += row.num_tokens
        for own, guess in found.items():
            own.token_ids.append(guess.token)
        for sequence in sequences:
            self._rows[sequence].has_read = True
        return [found.get(self._own(sequence)) for sequence in sequences]

    def _run(self, rows: Sequence[ScheduledRow]) -> list[Guess]:
        """Read the rows' tokens; a guess for each row that samples."""
        self.num_passes += 1
        self.num_tokens_read += sum(row.num_tokens for row in rows)
        logits = self.model.runner.forward(ScheduledBatch(tuple(rows)), [DraftTree()] * len(rows))
        if not len(logits):
            return []
        scores = logits[:, : self._vocab_size].float()
        best = scores.argmax(dim=-1)
        likely = scores.softmax(dim=-1).gather(-1, best[:, None]).squeeze(-1)
        return [Guess(token, chance) for token, chance in zip(best.tolist(), likely.tolist(), strict=True)]

    def release(self, sequence: Request) -> None:
        """A request is over, or goes on without: keep what was computed for its session's next call, free the rest."""
        row = self._rows.pop(sequence, None)
        if row is None:
            return
        own, owner = row.own, _owner(sequence)
        computed = min(own.num_computed, row.num_known)
        if owner is None or not row.has_read or not computed:
            self.pool.release(own.slots)
            return
        self.pool.release(own.slots[computed:])
        tokens = np.array(own.token_ids[:computed], dtype=np.int64)
        self.cache.keep(owner, tokens, own.slots[:computed], sequence.cache_salt)

    def drop(self, sequence: Request) -> None:
        """Forget all of a request."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self.pool.release(row.own.slots)

    def forget(self, session_id: str) -> None:
        """Let go of the KV that is kept for a session."""
        self.cache.drop(session_key(session_id))

    def _begin(self, sequence: Request) -> _Row:
        tokens = np.array(sequence.token_ids[:-1], dtype=np.int64)
        owners = session_keys(sequence.request)
        prefix = self.cache.match(tokens, owners, sequence.cache_salt)
        self.pool.share(prefix)
        own = Request(
            request=sequence.request,
            token_ids=sequence.token_ids[: len(prefix)],
            num_prompt_tokens=sequence.num_prompt_tokens,
            max_total_tokens=sequence.max_total_tokens,
            eos_token_ids=sequence.eos_token_ids,
            drafting=NoDrafter(),
            seed=sequence.seed,
            text=sequence.text,
            slots=prefix.copy(),
            num_computed=len(prefix),
        )
        self._rows[sequence] = row = _Row(own)
        return row

    def _own(self, sequence: Request) -> Request:
        return self._rows[sequence].own

    def _secure(self, own: Request, count: int, asking: Sequence[Request]) -> bool:
        """Slots for the next `count` tokens; rows that nobody asks for now give way."""
        missing = own.num_computed + count - len(own.slots)
        if missing <= 0:
            return True
        wanted = max(missing, min(_AHEAD, (self.pool.num_free + self.cache.num_idle_slots) // 4))
        self.cache.evict(wanted)
        if self.pool.num_free < missing:
            for other in [sequence for sequence in self._rows if sequence not in asking]:
                self.drop(other)
            self.cache.evict(missing)
        if self.pool.num_free < missing:
            return False
        after = int(own.slots[-1]) if len(own.slots) else None
        taken = self.pool.allocate(min(wanted, self.pool.num_free), after=after)
        own.slots = np.concatenate((own.slots, taken))
        return True


def _owner(sequence: Request) -> str | None:
    """Under which the KV of a finished request is kept, if it is."""
    session_id = sequence.request.session_id
    if session_id is None:
        return None if sequence.cache_salt is None else f"call:{sequence.number}"
    return session_key(session_id) if sequence.session is not None and sequence.session.is_kept else None
