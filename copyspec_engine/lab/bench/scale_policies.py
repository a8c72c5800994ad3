"""Which replica is asked, as the simulation of many replicas compares it: by the conversation, by load, by chance.

Replicas are slots 0 to `num_slots` - 1, of which some are up at a time. Who starts in a slot has an incarnation of its
own: a number that no other start has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from copyspec_engine.scale.routing import most_calls, number_of, scores

__all__ = ["Bounded", "LeastLoaded", "Policy", "Random", "Rendezvous", "Ring", "Slots"]

Ints = npt.NDArray[np.int64]
_CACHED = 1 << 16
"""Scores that are reckoned at a time: they stay in a processor's cache."""
_LEFT_OUT = np.uint64(0)
"""A score that no other is lower than."""


@dataclass
class Slots:
    """Which slots are up, and who is in them."""

    up: npt.NDArray[np.bool_]
    """(num_slots,)"""
    incarnation: Ints
    """(num_slots,) of whoever is in each slot, or was the last one there."""
    died: npt.NDArray[np.float64]
    """Seconds at which each incarnation was lost; infinite: it was not."""
    slot_of: Ints
    """Of each incarnation."""

    @classmethod
    def of(cls, num_up: int, num_slots: int) -> Slots:
        """The first `num_up` slots are up. The first incarnation of each was lost before, the second one is there."""
        numbers = np.arange(num_slots)
        died = np.concatenate([np.full(num_slots, -np.inf), np.full(num_slots, np.inf)])
        return cls(numbers < num_up, numbers + num_slots, died, np.concatenate([numbers, numbers]))

    @property
    def numbers(self) -> Ints:
        """Those that are up."""
        return np.flatnonzero(self.up)

    def begin(self, slots: Ints) -> None:
        """New ones start in slots that are not up."""
        self.up[slots] = True
        self.incarnation[slots] = np.arange(len(self.died), len(self.died) + len(slots))
        self.died = np.append(self.died, np.full(len(slots), np.inf))
        self.slot_of = np.append(self.slot_of, slots)

    def end(self, slots: Ints, now_s: float) -> None:
        """Whoever is in these slots is gone, and all that it held."""
        self.up[slots] = False
        self.died[self.incarnation[slots]] = now_s


class Policy(ABC):
    """A way to choose a replica for each call."""

    has_files = True
    """Whether a slot is the same to it after a restart, so that a file may belong to it."""
    num_second = 0
    """Calls of the last choice that did not go to their conversations' own slots."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    @abstractmethod
    def choose(self, conversations: Ints, in_flight: Ints, rng: np.random.Generator) -> Ints:
        """A slot that is up for each call.

        Args:
            conversations: whose calls they are.
            in_flight: (num_slots,) calls that each slot has already.
            rng: for what is left to chance.
        """

    @abstractmethod
    def changed(self, come: Ints, gone: Ints) -> None:
        """Slots have come up, or gone; `slots` says so already."""

    @abstractmethod
    def homes(self, conversations: Ints) -> Ints | None:
        """The slot of each of these conversations; None: they have none."""


class _Anywhere(Policy):
    """A conversation has no slot of its own."""

    @override
    def changed(self, come: Ints, gone: Ints) -> None:
        pass

    @override
    def homes(self, conversations: Ints) -> None:
        return None


class Random(_Anywhere):
    """Any replica."""

    @override
    def choose(self, conversations: Ints, in_flight: Ints, rng: np.random.Generator) -> Ints:
        numbers = self.slots.numbers
        return numbers[rng.integers(len(numbers), size=len(conversations))]


class LeastLoaded(_Anywhere):
    """The replica with the fewest calls in flight."""

    @override
    def choose(self, conversations: Ints, in_flight: Ints, rng: np.random.Generator) -> Ints:
        numbers = rng.permutation(self.slots.numbers)
        loads = in_flight[numbers]
        level = int(loads.min())
        while np.maximum(level + 1 - loads, 0).sum() < len(conversations):
            level += 1
        filled = np.maximum(level - loads, 0)
        rest = np.flatnonzero(np.maximum(level + 1 - loads, 0) > filled)[: len(conversations) - int(filled.sum())]
        filled[rest] += 1
        return rng.permutation(np.repeat(numbers, filled))


class Ring(Policy):
    """Consistent hashing on a ring of points (D. Karger et al., Consistent hashing and random trees, STOC 1997).

    With 160 points for each of lasting names it is what nginx has (`hash ... consistent`); with 100 for each of names
    that are others after every start, what Ray Serve's ConsistentHashRouter has.
    """

    def __init__(self, slots: Slots, keys: npt.NDArray[np.uint64], num_points: int, *, lasting: bool) -> None:
        super().__init__(slots)
        self.has_files = lasting
        self._keys, self._num_points = keys, num_points
        empty = np.array([], dtype=np.int64)
        self.changed(empty, empty)

    @override
    def changed(self, come: Ints, gone: Ints) -> None:
        numbers = self.slots.numbers
        names = numbers if self.has_files else self.slots.incarnation[numbers]
        places = np.array([number_of(f"point {point}") for point in range(self._num_points)], dtype=np.uint64)
        points = scores(_numbers(names)[:, None], places).ravel()
        order = np.argsort(points)
        self._points, self._owners = points[order], np.repeat(numbers, self._num_points)[order]

    @override
    def choose(self, conversations: Ints, in_flight: Ints, rng: np.random.Generator) -> Ints:
        return self.homes(conversations)

    @override
    def homes(self, conversations: Ints) -> Ints:
        places = np.searchsorted(self._points, self._keys[conversations])
        places[places == len(self._points)] = 0
        return self._owners[places]


class Rendezvous(Policy):
    """The slot with the highest score, as the router of `copyspec scale` finds it."""

    def __init__(self, slots: Slots, keys: npt.NDArray[np.uint64]) -> None:
        super().__init__(slots)
        self.keys = keys
        self.numbers = _numbers(np.arange(len(slots.up)))
        self._home = np.zeros(len(keys), dtype=np.int16)
        self._find(np.arange(len(keys)))

    @override
    def choose(self, conversations: Ints, in_flight: Ints, rng: np.random.Generator) -> Ints:
        return self.homes(conversations)

    @override
    def homes(self, conversations: Ints) -> Ints:
        return self._home[conversations].astype(np.int64)

    @override
    def changed(self, come: Ints, gone: Ints) -> None:
        left = np.isin(np.arange(len(self.numbers)), gone)
        self._find(np.flatnonzero(left[self._home]))
        size = _CACHED // max(len(come), 1)
        for first in range(0, len(self.keys) if len(come) else 0, size):
            keys, home = self.keys[first : first + size], self._home[first : first + size]
            found = scores(keys[:, None], self.numbers[come])
            better = found.max(axis=1) > scores(keys, self.numbers[home])
            home[better] = come[found[better].argmax(axis=1)]

    def _find(self, conversations: Ints) -> None:
        there = self.slots.numbers
        size = _CACHED // len(there)
        for first in range(0, len(conversations), size):
            block = conversations[first : first + size]
            best = scores(self.keys[block, None], self.numbers[there]).argmax(axis=1)
            self._home[block] = there[best]


class Bounded(Policy):
    """The same, but where a slot has too many calls in flight the next one goes to its conversation's second slot.

    Args:
        rendezvous: whose slots it takes; it is told of changes itself.
        factor: see `most_calls`.
        least: see `most_calls`.
    """

    def __init__(self, rendezvous: Rendezvous, factor: float, least: int) -> None:
        super().__init__(rendezvous.slots)
        self._rendezvous, self._factor, self._least = rendezvous, factor, least

    @override
    def choose(self, conversations: Ints, in_flight: Ints, rng: np.random.Generator) -> Ints:
        there = self.slots.numbers
        loads = in_flight.copy()
        most = most_calls(int(loads[there].sum()) + len(conversations) - 1, len(there), self._factor, self._least)
        chosen = self._rendezvous.homes(conversations)
        waiting = _beyond(chosen, loads, most)
        self.num_second = len(waiting)
        loads += np.bincount(np.delete(chosen, waiting), minlength=len(loads))
        numbers = self._rendezvous.numbers[there]
        left = scores(self._rendezvous.keys[conversations[waiting], None], numbers) if len(waiting) else None
        while left is not None and len(waiting):
            left[np.arange(len(waiting)), np.searchsorted(there, chosen[waiting])] = _LEFT_OUT
            chosen[waiting] = there[left.argmax(axis=1)]
            beyond = _beyond(chosen[waiting], loads, most)
            loads += np.bincount(np.delete(chosen[waiting], beyond), minlength=len(loads))
            waiting, left = waiting[beyond], left[beyond]
        return chosen

    @override
    def changed(self, come: Ints, gone: Ints) -> None:
        pass

    @override
    def homes(self, conversations: Ints) -> Ints:
        return self._rendezvous.homes(conversations)


def _beyond(chosen: Ints, loads: Ints, most: int) -> Ints:
    """Places of the calls for which their slots have no room any more, the first come being served first."""
    order = np.argsort(chosen, kind="stable")
    slots = chosen[order]
    position = np.arange(len(slots)) - np.searchsorted(slots, slots)
    return np.sort(order[loads[slots] + position >= most])


def _numbers(names: Ints) -> npt.NDArray[np.uint64]:
    return np.array([number_of(f"slot-{name}") for name in names], dtype=np.uint64)
