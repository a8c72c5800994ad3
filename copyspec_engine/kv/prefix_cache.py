"""Rows of KV that are kept after their call, so that a later prompt with the same beginning need not compute it again.

A row is found by whoever it belongs to: the session that computed it, calls that continue that session, and, where
calls name a `cache_salt`, every call with the same salt. Nobody else: from the time of a first token one could tell
what others have asked.

Kept rows only fill slots that nobody needs. When slots run short, the row that was not used for longest gives up its
last tokens first, since a beginning is what prompts have in common.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from copyspec_engine.kv.slots import KVPool
from copyspec_engine.values.tokens import TokenArray, common_prefix_length

__all__ = ["Owner", "PrefixCache"]

Owner: TypeAlias = str | int
"""Whose a kept row is: a conversation's, by its id, or a single request's, by its number."""

_MOST_SHARED = 4
"""Slots of all rows together, as a multiple of those there are."""
_NO_SLOTS: TokenArray = np.empty(0, dtype=np.int64)


class _Row(NamedTuple):
    token_ids: TokenArray
    slots: TokenArray
    salt: str | None


class PrefixCache:
    """The rows that are kept, least recently used first; each is a user of its slots.

    Args:
        pool: whose slots they are.
        max_rows: the least recently used row goes when there are more, or when they are too long together: rows may
            share what they begin with.
    """

    def __init__(self, pool: KVPool, max_rows: int) -> None:
        self._pool, self._max_rows = pool, max_rows
        self._rows: OrderedDict[Owner, _Row] = OrderedDict()
        self._kept = np.zeros(pool.num_slots, dtype=np.int32)
        """See `users`."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[_Row]:
        """Those that are kept, the least recently used one first."""
        return list(self._rows.values())

    @property
    def users(self) -> npt.NDArray[np.int32]:
        """How many kept rows use each slot, shape (num_slots,); not to be changed."""
        return self._kept

    @property
    def num_idle_slots(self) -> int:
        """Slots that would be free if no row were kept."""
        return int(((self._kept > 0) & (self._kept == self._pool.users)).sum())

    def match(self, token_ids: TokenArray, owners: Sequence[Owner], salt: str | None) -> TokenArray:
        """The slots of the longest kept beginning of a text, shape (n,), in the rows that its caller may use."""
        best, best_key = _NO_SLOTS, None
        for key, row in self._rows.items():
            if key in owners or (salt is not None and salt == row.salt):
                length = common_prefix_length(token_ids, row.token_ids)
                if length > len(best):
                    best, best_key = row.slots[:length], key
        if best_key is not None:
            self._rows.move_to_end(best_key)
        return best

    def keep(self, owner: Owner, token_ids: TokenArray, slots: TokenArray, salt: str | None) -> None:
        """Keep a row instead of the one that its owner had; the caller's part in the slots passes to the cache."""
        self.drop(owner)
        self._rows[owner] = _Row(token_ids, slots, salt)
        self._kept[slots] += 1
        most = _MOST_SHARED * self._pool.num_slots
        while len(self._rows) > self._max_rows or int(self._kept.sum()) > most:
            self.drop(next(iter(self._rows)))

    def drop(self, owner: Owner) -> bool:
        """Let go of an owner's row; False if there is none."""
        row = self._rows.pop(owner, None)
        if row is not None:
            self._kept[row.slots] -= 1
            self._pool.release(row.slots)
        return row is not None

    def evict(self, count: int) -> None:
        """Free slots until `count` are free, or all that are kept are in use."""
        if self._pool.num_free >= count:
            return
        for owner, row in list(self._rows.items()):
            idle = np.flatnonzero(self._kept[row.slots] == self._pool.users[row.slots])
            missing = count - self._pool.num_free
            if missing <= 0:
                return
            if not len(idle):
                continue
            length = int(idle[-min(missing, len(idle))])
            self._kept[row.slots[length:]] -= 1
            self._pool.release(row.slots[length:])
            if length:
                self._rows[owner] = _Row(row.token_ids[:length], row.slots[:length], row.salt)
            else:
                del self._rows[owner]
