"""Who holds which slots of a model's KV: the pool, the sequences that a model reads, and those kept for later calls.

The tensors themselves live with the model (execution/runner.py); this is the bookkeeping, without torch. A slot holds
the keys and values of one token in every layer. It is free, or it has users: sequences that are read, and kept ones.
What a slot holds never changes while it has users, so that sequences with the same beginning can share it.

Slots are handed out as one ascending run wherever a run is free: attention can then read a sequence in place, where
scattered slots have to be gathered first. New ones start in the middle of the longest free run, so that those on both
sides keep room to grow.

A sequence that is kept is found by whoever it belongs to: the session that computed it, calls that continue that
session, and, where calls name a `cache_salt`, every call with the same salt, which may also begin with what another one
in flight has computed. Nobody else: from the time of a first token one could tell what others have asked. Kept
sequences only fill slots that nobody needs. When slots run short, the account that has most of them gives way: its
sequence that was not used for longest gives up its last tokens first, since a beginning is what prompts have in common.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from copyspec_engine.values.fairness import first_to_go
from copyspec_engine.values.tokens import TokenArray

__all__ = [
    "KVPool",
    "KVSequence",
    "KVSlots",
    "Owner",
    "PrefixCache",
    "common_prefix_length",
]


class KVPool:
    """Free and taken slots, numbered from 0."""

    def __init__(self, num_slots: int) -> None:
        self._users = np.zeros(num_slots, dtype=np.int32)
        self._num_free = num_slots

    @property
    def num_slots(self) -> int:
        return len(self._users)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def users(self) -> npt.NDArray[np.int32]:
        """How many use each slot, shape (num_slots,); not to be changed."""
        return self._users

    def allocate(self, count: int, after: int | None = None) -> TokenArray:
        """Take `count` free slots: the run right behind slot `after` if it is free, else any run, else scattered ones.

        Returns:
            The slots in the order in which tokens should fill them, shape (count,), with one user each.

        Raises:
            ValueError: fewer than `count` slots are free; nothing is taken then.
        """
        if count > self._num_free:
            raise ValueError(f"Got count={count} but only {self._num_free} KV slots are free")
        start = after + 1 if after is not None and self._is_free_run(after + 1, count) else self._find_run(count)
        slots = np.flatnonzero(self._users == 0)[:count] if start is None else np.arange(start, start + count)
        self._users[slots] = 1
        self._num_free -= count
        return slots.astype(np.int64)

    def _is_free_run(self, start: int, count: int) -> bool:
        return start + count <= self.num_slots and not self._users[start : start + count].any()

    def _find_run(self, count: int) -> int | None:
        """Where `count` slots fit best: in the longest free run, at its middle unless the pool begins there."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self._users == 0, [False])).astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax()) if len(lengths) else -1
        if longest < 0 or lengths[longest] < count:
            return None
        start, spare = int(starts[longest]), int(lengths[longest]) - count
        return start if start == 0 else start + spare // 2

    def share(self, slots: TokenArray) -> None:
        """Count one more user of each of these slots, which must not be free."""
        self._check(slots)
        self._users[slots] += 1

    def release(self, slots: TokenArray) -> int:
        """Count one user less of each of these slots; returns how many are free now.

        Raises:
            ValueError: one of them was free already; nothing is changed then.
        """
        self._check(slots)
        self._users[slots] -= 1
        freed = int((self._users[slots] == 0).sum())
        self._num_free += freed
        return freed

    def _check(self, slots: TokenArray) -> None:
        if (self._users[slots] == 0).any() or len(np.unique(slots)) != len(slots):
            raise ValueError(f"Got slots {slots.tolist()[:8]}... but some of them are free, or there twice")


Owner: TypeAlias = str | int
"""Whose a kept sequence is: a conversation's, by its id, or a single request's, by its number."""

_MOST_SHARED = 4
"""Slots of all sequences together, as a multiple of those there are."""
_NO_SLOTS: TokenArray = np.empty(0, dtype=np.int64)


def common_prefix_length(a: Sequence[int] | TokenArray, b: Sequence[int] | TokenArray) -> int:
    """How many tokens at the start of `a` and `b` are equal."""
    size = min(len(a), len(b))
    differs = np.asarray(a[:size], dtype=np.int64) != np.asarray(b[:size], dtype=np.int64)
    return int(differs.argmax()) if differs.any() else size


class _KeptSequence(NamedTuple):
    token_ids: TokenArray
    slots: TokenArray
    salt: str | None
    account: str | None
    """For whom it counts, see `GenerationRequest.owner`."""


class PrefixCache:
    """The sequences that are kept, least recently used first; each is a user of its slots.

    Args:
        pool: whose slots they are.
        max_sequences: one goes when there are more, or when they are too long together: those that begin alike share
            slots. It is the least recently used one of the account that has most.
        max_per_account: the least recently used one of an account goes when it has more; None: no such limit.
    """

    def __init__(self, pool: KVPool, max_sequences: int, max_per_account: int | None = None) -> None:
        self._pool, self._max_sequences, self._max_per_account = pool, max_sequences, max_per_account
        self._sequences: OrderedDict[Owner, _KeptSequence] = OrderedDict()
        self._kept = np.zeros(pool.num_slots, dtype=np.int32)
        """See `users`."""

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def sequences(self) -> list[_KeptSequence]:
        """Those that are kept, the least recently used one first."""
        return list(self._sequences.values())

    @property
    def users(self) -> npt.NDArray[np.int32]:
        """How many kept sequences use each slot, shape (num_slots,); not to be changed."""
        return self._kept

    @property
    def num_idle_slots(self) -> int:
        """Slots that would be free if no sequence were kept."""
        return int(((self._kept > 0) & (self._kept == self._pool.users)).sum())

    def match(self, token_ids: TokenArray, owners: Sequence[Owner], salt: str | None) -> TokenArray:
        """The slots of the longest kept beginning of a text, shape (n,), in the sequences that its caller may use."""
        best, best_key = _NO_SLOTS, None
        for key, sequence in self._sequences.items():
            if key in owners or (salt is not None and salt == sequence.salt):
                length = common_prefix_length(token_ids, sequence.token_ids)
                if length > len(best):
                    best, best_key = sequence.slots[:length], key
        if best_key is not None:
            self._sequences.move_to_end(best_key)
        return best

    def keep(
        self, owner: Owner, token_ids: TokenArray, slots: TokenArray, salt: str | None, account: str | None = None
    ) -> None:
        """Keep a sequence instead of the one that its owner had; the caller's part in the slots passes to the cache."""
        self.drop(owner)
        self._sequences[owner] = _KeptSequence(token_ids, slots, salt, account)
        self._kept[slots] += 1
        own = [key for key, sequence in self._sequences.items() if sequence.account == account]
        if self._max_per_account is not None and len(own) > self._max_per_account:
            self.drop(own[0])
        while len(self._sequences) > self._max_sequences:
            self.drop(first_to_go((key, sequence.account, 1) for key, sequence in self._sequences.items()))
        while int(self._kept.sum()) > _MOST_SHARED * self._pool.num_slots:
            self.drop(self._largest(self._sequences))

    def drop(self, owner: Owner) -> bool:
        """Let go of an owner's sequence; False if there is none."""
        sequence = self._sequences.pop(owner, None)
        if sequence is not None:
            self._kept[sequence.slots] -= 1
            self._pool.release(sequence.slots)
        return sequence is not None

    def evict(self, count: int) -> None:
        """Free slots until `count` are free, or all that are kept are in use."""
        asked = set(self._sequences)
        while asked and (missing := count - self._pool.num_free) > 0:
            owner = self._largest(asked)
            asked.remove(owner)
            sequence = self._sequences[owner]
            idle = np.flatnonzero(self._kept[sequence.slots] == self._pool.users[sequence.slots])
            if not len(idle):
                continue
            length = int(idle[-min(missing, len(idle))])
            self._kept[sequence.slots[length:]] -= 1
            self._pool.release(sequence.slots[length:])
            if length:
                self._sequences[owner] = sequence._replace(
                    token_ids=sequence.token_ids[:length], slots=sequence.slots[:length]
                )
            else:
                del self._sequences[owner]

    def _largest(self, among: Container[Owner]) -> Owner:
        """The least recently used of these sequences whose account has most slots in them."""
        sequences = self._sequences.items()
        return first_to_go((key, sequence.account, len(sequence.slots)) for key, sequence in sequences if key in among)


_AHEAD = 256
"""Slots that a sequence takes at a time while many are free, so that it lies in one piece."""


@dataclass(slots=True, eq=False)
class KVSequence:
    """A text that a model reads bit by bit."""

    token_ids: list[int]
    slots: TokenArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Of its tokens and of some more, shape (n,); `num_computed` are filled. Empty while it waits."""
    num_computed: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens at the end that the model has not read yet."""
        return len(self.token_ids) - self.num_computed

    def keep_nodes(self, accepted: Sequence[int]) -> None:
        """Make the slots of accepted draft nodes the next ones of the sequence.

        Draft nodes were written to the slots behind `num_computed` in node order. Listing the accepted ones first keeps
        their KV without moving it; the others are written over by the next pass.
        """
        base, count = self.num_computed, len(accepted)
        if tuple(accepted) != tuple(range(count)):
            window = self.slots[base : base + max(accepted) + 1]
            kept = set(accepted)
            others = [node for node in range(len(window)) if node not in kept]
            self.slots[base : base + len(window)] = window[[*accepted, *others]]
        self.num_computed = base + count


class KVSlots:
    """Hands out the slots of one model's KV.

    Args:
        num_slots: of the pool.
        max_kept: sequences that are kept for later calls; 0 for a model whose state is not in its KV alone.
        max_per_account: of them for one account; None: no such limit.
    """

    def __init__(self, num_slots: int, max_kept: int, max_per_account: int | None = None) -> None:
        self.pool = KVPool(num_slots)
        self.cache = PrefixCache(self.pool, max_kept, max_per_account)
        self.can_share = max_kept > 0
        """Sequences may begin with what was computed of others."""

    @property
    def num_available(self) -> int:
        """Slots that are free, or would be if no sequence were kept."""
        return self.pool.num_free + self.cache.num_idle_slots

    @property
    def num_held(self) -> int:
        """Uses of slots that no kept sequence accounts for: those of sequences that are read, or lost."""
        return int(np.abs(self.pool.users - self.cache.users).sum())

    def begin(
        self,
        token_ids: Sequence[int],
        owners: Sequence[Owner],
        salt: str | None,
        running: Iterable[KVSequence] = (),
    ) -> TokenArray:
        """The slots of the longest computed beginning of a text, of which the caller is one more user now; shape (n,).

        Args:
            token_ids: the text.
            owners: whose kept sequences it may begin with.
            salt: besides all that were kept with this salt, if it is not None.
            running: and these, which are being read.
        """
        ids = np.array(token_ids, dtype=np.int64)
        slots = self.cache.match(ids, owners, salt)
        for other in running:
            length = min(common_prefix_length(ids, other.token_ids), other.num_computed)
            if length > len(slots):
                slots = other.slots[:length]
        begun: TokenArray = slots.copy()
        self.pool.share(begun)
        return begun

    def secure(self, sequence: KVSequence, count: int, make_room: Callable[[], bool], most: int = _AHEAD) -> bool:
        """Slots for the next `count` tokens of a sequence, and for some behind them while many are free.

        Args:
            sequence: which grows.
            count: tokens that a pass is going to read.
            make_room: called as long as there are too few; False: nobody gives way (any more).
            most: slots that it has a use for.

        Returns:
            False if there are too few.
        """
        missing = sequence.num_computed + count - len(sequence.slots)
        if missing <= 0:
            return True
        wanted = max(missing, min(_AHEAD, most, self.num_available // 4))
        self.cache.evict(wanted)
        while self.pool.num_free < missing:
            if not make_room():
                return False
            self.cache.evict(missing)
        self.extend(sequence, min(wanted, self.pool.num_free))
        return True

    def extend(self, sequence: KVSequence, count: int) -> None:
        """Give a sequence `count` free slots more, where it ends if these are free."""
        after = int(sequence.slots[-1]) if len(sequence.slots) else None
        sequence.slots = np.concatenate((sequence.slots, self.pool.allocate(count, after=after)))

    def trim(self, sequence: KVSequence) -> None:
        """Take back what a sequence holds ahead of its tokens, for drafts of earlier passes or to lie in one piece."""
        length = len(sequence.token_ids)
        self.pool.release(sequence.slots[length:])
        sequence.slots = sequence.slots[:length]

    def end(
        self,
        sequence: KVSequence,
        owner: Owner | None = None,
        salt: str | None = None,
        account: str | None = None,
    ) -> None:
        """One is over, or has to wait: keep what is computed of it for `owner`, if there is one; free the rest.

        Args:
            sequence: which ends.
            owner: whose the kept one is.
            salt: with which others find it too.
            account: for whom it counts.
        """
        slots, length = sequence.slots, 0 if owner is None else sequence.num_computed
        sequence.slots, sequence.num_computed = slots[:0], 0
        self.pool.release(slots[length:])
        if owner is not None and length:
            self.cache.keep(owner, np.array(sequence.token_ids[:length], dtype=np.int64), slots[:length], salt, account)
