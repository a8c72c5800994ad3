"""Who gives way where a limit is reached that several owners share: whoever has most of it.

So the traffic of one owner takes nothing from another who has less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["first_to_go"]

_K = TypeVar("_K")


def first_to_go(things: Iterable[tuple[_K, str | None, int]]) -> _K:
    """The least recently used thing of the owner who has most; of owners with as much, of the one whose is older.

    Args:
        things: (its name, its owner, its size), at least one, least recently used first. None is an owner too.
    """
    listed = list(things)
    sizes: Counter[str | None] = Counter()
    for _, owner, size in listed:
        sizes[owner] += size
    most = max(sizes, key=sizes.__getitem__)
    return next(name for name, owner, _ in listed if owner == most)
