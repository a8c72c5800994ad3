"""Which slot a conversation belongs to: rendezvous hashing, with a bound on what a slot has to do.

Each pair of a key and a slot has a score, and a key belongs to the slot of its highest one (D. G. Thaler and
C. V. Ravishankar, Using name-based mappings to increase hit rates, IEEE/ACM Transactions on Networking 6(1), 1998). The
score does not depend on what other slots there are: where one of n goes, its keys alone go elsewhere, each to its
second one; where one comes back, they come back; where one is new, it takes 1/n of the keys from all others alike.

All who route agree without a word between them: nothing is kept, and all is a function of names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["free_slot", "most_calls", "number_of", "ranked", "scores"]

Numbers = npt.NDArray[np.uint64]

_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def number_of(name: str) -> int:
    """What stands for a key or a slot in `scores`: 64 bits, the same in every process."""
    said = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


def scores(keys: Numbers, slots: Numbers) -> Numbers:
    """The score of every key in every slot, 64 bits; arrays of shapes that broadcast.

    Bits are mixed as in SplitMix64 (G. L. Steele, D. Lea and C. H. Flood, Fast splittable pseudorandom number
    generators, OOPSLA 2014): one bit of either number changes each bit of the score in about half of all cases.
    """
    mixed: Numbers = np.bitwise_xor(keys, slots)
    shifted = np.empty_like(mixed)
    for shift, factor in _SHIFTS_AND_FACTORS:
        np.right_shift(mixed, np.uint64(shift), out=shifted)
        np.bitwise_xor(mixed, shifted, out=mixed)
        np.multiply(mixed, np.uint64(factor), out=mixed)
    np.right_shift(mixed, np.uint64(_LAST_SHIFT), out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    return mixed


def ranked(key: str, slots: Iterable[str]) -> list[str]:
    """Slots in the order in which they are to answer a key, each of them once.

    Args:
        key: the same for all calls of a conversation.
        slots: names, in any order.
    """
    names = tuple(sorted(set(slots)))
    found = scores(np.array([number_of(key)], dtype=np.uint64), _numbers_of(names))
    return [names[place] for place in np.argsort(found, kind="stable")[::-1]]


@lru_cache(maxsize=8)
def _numbers_of(names: tuple[str, ...]) -> Numbers:
    return np.array([number_of(name) for name in names], dtype=np.uint64)


def most_calls(in_flight: int, num_slots: int, factor: float, least: int) -> int:
    """How many calls a slot may have in flight before the next one goes on to another slot.

    V. Mirrokni, M. Thorup and M. Zadimoghaddam, Consistent hashing with bounded loads, SODA 2018: no slot has more than
    `factor` times the mean. A replica that runs a few calls at once is none the slower for having more of them than
    others, so that up to `least` of them stay.

    Args:
        in_flight: calls in flight in all slots, without the one that is to go somewhere.
        num_slots: at least 1.
        factor: over the mean, above 1; infinite: no bound.
        least: calls that a slot may have however few the others have.
    """
    if math.isinf(factor):
        return in_flight + 1
    return max(least, math.ceil(factor * (in_flight + 1) / num_slots))


def free_slot(slots: Sequence[str], in_flight: Mapping[str, int], factor: float, least: int) -> str:
    """The first of ranked slots that may have one more call; the first of all where none may.

    Args:
        slots: all that there are, in the order of `ranked`; at least one.
        in_flight: calls of each slot; one that is not there has none.
        factor: see `most_calls`.
        least: see `most_calls`.
    """
    most = most_calls(sum(in_flight.get(slot, 0) for slot in slots), len(slots), factor, least)
    return next((slot for slot in slots if in_flight.get(slot, 0) < most), slots[0])
