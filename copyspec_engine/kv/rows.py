"""Rows of KV: the texts that a model reads and the slots they lie on, how a row grows, and what is kept of it.

Each model has its own: the one that decides, and the one that drafts for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from copyspec_engine.kv.prefix_cache import Owner, PrefixCache
from copyspec_engine.kv.slots import KVPool
from copyspec_engine.values.tokens import TokenArray

__all__ = ["KVRows", "Row"]

_AHEAD = 256
"""Slots that a row takes at a time while many are free, so that it lies in one piece."""


@dataclass(slots=True, eq=False)
class Row:
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
        """Make the slots of accepted draft nodes the next ones of the row.

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


class KVRows:
    """Hands out the slots of one model's KV.

    Args:
        num_slots: of the pool.
        max_kept: rows that are kept for later calls.
    """

    def __init__(self, num_slots: int, max_kept: int) -> None:
        self.pool = KVPool(num_slots)
        self.cache = PrefixCache(self.pool, max_kept)

    @property
    def num_available(self) -> int:
        """Slots that are free, or would be if no row were kept."""
        return self.pool.num_free + self.cache.num_idle_slots

    @property
    def num_held(self) -> int:
        """Uses of slots that no kept row accounts for: those of rows that are read, or lost."""
        return int(np.abs(self.pool.users - self.cache.users).sum())

    def begin(self, token_ids: Sequence[int], owners: Sequence[Owner], salt: str | None) -> TokenArray:
        """The slots of the longest kept beginning of a text, of which the caller is one more user now; shape (n,).

        Args:
            token_ids: the text.
            owners: whose kept rows it may begin with.
            salt: besides all that were kept with this salt, if it is not None.
        """
        slots: TokenArray = self.cache.match(np.array(token_ids, dtype=np.int64), owners, salt).copy()
        self.pool.share(slots)
        return slots

    def secure(self, row: Row, count: int, make_room: Callable[[], bool], most: int = _AHEAD) -> bool:
        """Slots for the next `count` tokens of a row, and for some behind them while many are free.

        Args:
            row: which grows.
            count: tokens that a pass is going to read.
            make_room: called as long as there are too few; False: nobody gives way (any more).
            most: slots that it has a use for.

        Returns:
            False if there are too few.
        """
        missing = row.num_computed + count - len(row.slots)
        if missing <= 0:
            return True
        wanted = max(missing, min(_AHEAD, most, self.num_available // 4))
        self.cache.evict(wanted)
        while self.pool.num_free < missing:
            if not make_room():
                return False
            self.cache.evict(missing)
        self.extend(row, min(wanted, self.pool.num_free))
        return True

    def extend(self, row: Row, count: int) -> None:
        """Give a row `count` free slots more, where it ends if these are free."""
        after = int(row.slots[-1]) if len(row.slots) else None
        row.slots = np.concatenate((row.slots, self.pool.allocate(count, after=after)))

    def trim(self, row: Row) -> None:
        """Take back what a row holds ahead of its tokens, for drafts of earlier passes or to lie in one piece."""
        length = len(row.token_ids)
        self.pool.release(row.slots[length:])
        row.slots = row.slots[:length]

    def end(self, row: Row, owner: Owner | None = None, salt: str | None = None) -> None:
        """A row is over, or has to wait: keep what is computed of it for `owner`, if there is one; free the rest."""
        slots, length = row.slots, 0 if owner is None else row.num_computed
        row.slots, row.num_computed = slots[:0], 0
        self.pool.release(slots[length:])
        if owner is not None and length:
            self.cache.keep(owner, np.array(row.token_ids[:length], dtype=np.int64), slots[:length], salt)
