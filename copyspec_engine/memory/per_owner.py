"""What the calls of one owner have taught, apart from what those of others have.

How much is drafted shows in an answer's counts and in the sizes of its chunks. What was learnt of one owner's texts
would so be seen by all others; it is kept for each by itself, and a new owner starts from what everybody knows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerOwner"]

_Known = TypeVar("_Known")
_MOST_OWNERS = 1024


class PerOwner(Generic[_Known]):
    """What is known of each owner (`GenerationRequest.owner`); that of the least recently used one goes first.

    Args:
        fresh: makes what is known before there was a call.
    """

    def __init__(self, fresh: Callable[[], _Known]) -> None:
        self._fresh = fresh
        self._known: OrderedDict[str | None, _Known] = OrderedDict()

    def of(self, owner: str | None) -> _Known:
        """What is known of an owner, to be changed in place; calls without an owner have one together."""
        if owner not in self._known:
            self._known[owner] = self._fresh()
        self._known.move_to_end(owner)
        while len(self._known) > _MOST_OWNERS:
            self._known.popitem(last=False)
        return self._known[owner]
