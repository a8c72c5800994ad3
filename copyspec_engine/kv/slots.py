"""Which slots of the KV pool are taken. A slot holds the keys and values of one token in every layer.

The tensors themselves live with the model (execution/runner.py); this is the bookkeeping, without torch. A slot is
free, or it has users: running sequences, and rows that are kept for later calls (prefix_cache.py). What a slot holds
never changes while it has users, so that sequences with the same beginning can share it.

Slots are handed out as one ascending run wherever a run is free: attention can then read a row in place, where
scattered slots have to be gathered first. New rows start in the middle of the longest free run, so that the rows on
both sides keep room to grow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from copyspec_engine.values.tokens import TokenArray

__all__ = ["KVPool"]


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
