"""Which slots of the KV pool are taken. A slot holds the keys and values of one token in every layer.

The tensors themselves live with the model (model_runner.py); this is the bookkeeping, without torch. Every taken slot
has exactly one owner: a running sequence, or the session whose last call it served.

Slots are handed out as one ascending run wherever a run is free: attention can then read a row in place, where
scattered slots have to be gathered first. New rows start in the middle of the longest free run, so that the rows on
both sides keep room to grow in later calls of their sessions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from copyspec_engine.copy_index import TokenArray

__all__ = ["KVPool"]


class KVPool:
    """Free and taken slots, numbered from 0."""

    def __init__(self, num_slots: int) -> None:
        self._free: npt.NDArray[np.bool_] = np.ones(num_slots, dtype=np.bool_)
        self._num_free = num_slots

    @property
    def num_slots(self) -> int:
        return len(self._free)

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, count: int, after: int | None = None) -> TokenArray:
        """Take `count` slots: the run right behind slot `after` if it is free, else any run, else scattered ones.

        Returns:
            The slots in the order in which tokens should fill them, shape (count,).

        Raises:
            ValueError: fewer than `count` slots are free; nothing is taken then.
        """
        if count > self._num_free:
            raise ValueError(f"Got count={count} but only {self._num_free} KV slots are free")
        start = after + 1 if after is not None and self._is_free_run(after + 1, count) else self._find_run(count)
        slots = np.flatnonzero(self._free)[:count] if start is None else np.arange(start, start + count)
        self._free[slots] = False
        self._num_free -= count
        return slots.astype(np.int64)

    def _is_free_run(self, start: int, count: int) -> bool:
        return start + count <= self.num_slots and bool(self._free[start : start + count].all())

    def _find_run(self, count: int) -> int | None:
        """Where `count` slots fit best: in the longest free run, at its middle unless the pool begins there."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self._free, [False])).astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax()) if len(lengths) else -1
        if longest < 0 or lengths[longest] < count:
            return None
        start, spare = int(starts[longest]), int(lengths[longest]) - count
        return start if start == 0 else start + spare // 2

    def release(self, slots: TokenArray) -> None:
        """Give slots back.

        Raises:
            ValueError: one of them was free already; nothing is changed then.
        """
        if self._free[slots].any() or len(np.unique(slots)) != len(slots):
            raise ValueError(f"Got slots {slots.tolist()[:8]}... to release but some of them are free already")
        self._free[slots] = True
        self._num_free += len(slots)
