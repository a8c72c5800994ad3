"""`copyspec bench scale-sim`: a thousand replicas and millions of conversations, of which there are only the numbers.

Time goes in steps of a second. In each, conversations call at random, some far more often than others; replicas are
lost and come back; halfway more replicas begin, and later end again. All policies see the same calls and the same
losses. All that is kept of a conversation is who took its last call, and when that call ended.

It begins in the middle of things: each conversation has had its last call at its own slot, and has lost it since with
the probability that it has at any time, f / (f + rate) for f losses of its slot an hour.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from copyspec_engine import ConfigError
from copyspec_engine.lab.bench.command import ScaleSimOptions
from copyspec_engine.lab.bench.scale_policies import Bounded, LeastLoaded, Policy, Random, Rendezvous, Ring, Slots
from copyspec_engine.lab.display.tables import on_terminal
from copyspec_engine.lab.measuring import Measured, machine, versions
from copyspec_engine.lab.results.scale_sim import scale_sim_tables_of

__all__ = ["Activity", "measure_scale_sim", "simulate"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NGINX_POINTS, RAY_POINTS = 160, 100
_LOOK_STEPS = 10
"""Steps between two looks at who has most calls in flight."""
_HALVINGS = 60
_SOME = 1_000_000
"""Conversations that are handled at a time, and of which moves are counted."""


class Activity:
    """How often conversations call: by Zipf's law, but none more often than can be.

    The weight of conversation i (from 1 on) is the integral of x to the power of -`exponent` from i to i + 1, which
    begins flat so that `most` is kept. Its inverse is known, so that nothing is kept of a conversation to draw one.

    Args:
        conversations: at least 1.
        mean: calls an hour of a conversation, on average; at most `most`.
        exponent: from 0, all alike, on.
        most: calls an hour of the busiest conversation.
    """

    def __init__(self, conversations: int, mean: float, exponent: float, most: float) -> None:
        self.conversations, self.an_hour, self._exponent = conversations, conversations * mean, exponent
        self._flat = 1.0
        """The rate is the highest one up to here."""
        low, high = 1.0, conversations + 1.0
        for _ in range(_HALVINGS if self._highest() > most else 0):
            self._flat = (low + high) / 2
            low, high = (self._flat, high) if self._highest() > most else (low, self._flat)

    def rates(self, first: int, last: int) -> Floats:
        """Calls an hour of conversations `first` to `last` - 1, counted from 0."""
        found: Floats = np.diff(self._mass(np.arange(first + 1.0, last + 2.0))) * (self.an_hour / self._whole())
        return found

    def draw(self, number: int, rng: np.random.Generator) -> Ints:
        """Conversations that call, counted from 0; (number,)."""
        mass = rng.random(number) * self._whole()
        flat_mass = (self._flat - 1) * self._top()
        places = 1 + mass / self._top()
        behind = mass > flat_mass
        integral = mass[behind] - flat_mass + self._integral(np.array(self._flat))
        s = self._exponent
        places[behind] = np.exp(integral) if s == 1 else (integral * (1 - s)) ** (1 / (1 - s))
        found: Ints = np.clip(places.astype(np.int64) - 1, 0, self.conversations - 1)
        return found

    def _top(self) -> float:
        """The highest weight of a conversation."""
        return math.pow(self._flat, -self._exponent)

    def _highest(self) -> float:
        return self.an_hour * self._top() / self._whole()

    def _whole(self) -> float:
        return float(self._mass(np.array(self.conversations + 1.0)))

    def _mass(self, places: Floats) -> Floats:
        flat = (np.minimum(places, self._flat) - 1) * self._top()
        found: Floats = flat + self._integral(np.maximum(places, self._flat)) - self._integral(np.array(self._flat))
        return found

    def _integral(self, places: Floats) -> Floats:
        s = self._exponent
        found: Floats = np.log(places) if s == 1 else places ** (1 - s) / (1 - s)
        return found


@dataclass
class _Counts:
    """Calls of one policy, and how many of them found what."""

    calls: int = 0
    kv: int = 0
    """The replica had answered the call before, and still has its KV."""
    file: int = 0
    """The slot is that of the call before: its file has all texts."""
    store: int = 0
    """All texts are in a store that all share, which takes them at the end of a call, or are at the replica."""
    second: int = 0
    """They went to another slot than their conversation's own, which was up."""
    cut_off: int = 0
    """They were in flight when their replica was lost."""


class _Tally:
    """What one policy makes of the calls."""

    def __init__(self, name: str, policy: Policy, where: npt.NDArray[np.int32]) -> None:
        self.name, self.policy, self.where = name, policy, where
        self.counts: dict[str, _Counts] = defaultdict(_Counts)
        self.in_flight = np.zeros(len(policy.slots.up), dtype=np.int64)
        self.taken = np.zeros(len(policy.slots.up), dtype=np.int64)
        """Calls of each slot in the steady half."""
        self.waited = np.zeros(len(policy.slots.up), dtype=np.int64)
        """Seconds that calls of each slot had to wait in the steady half."""
        self.busiest_at_once: list[float] = []
        self.moved: dict[str, float | None] = {}

    def take(self, conversations: Ints, ended: npt.NDArray[np.float32], now_s: float, phase: str, rng: _Rng) -> None:
        """Calls of these conversations, each once; `ended` says when the call before was over."""
        slots, counts = self.policy.slots, self.counts[phase]
        chosen = self.policy.choose(conversations, self.in_flight, rng)
        last = self.where[conversations]
        kv = slots.incarnation[chosen] == last
        kept = (ended <= now_s) & (slots.died[last] >= ended)
        counts.calls += len(chosen)
        counts.kv += int(kv.sum())
        counts.file += int((slots.slot_of[last] == chosen).sum())
        counts.store += int((kv | kept).sum())
        counts.second += self.policy.num_second
        by_slot = np.bincount(chosen, minlength=len(slots.up))
        self.in_flight += by_slot
        if phase == STEADY:
            self.taken += by_slot
        self.where[conversations] = slots.incarnation[chosen]

    def pass_time(self, running: int, over: float, phase: str, rng: _Rng) -> None:
        """A step: of the calls in flight so many run in each slot, each of which ends with this probability."""
        served = np.minimum(self.in_flight, running)
        if phase == STEADY:
            self.waited += self.in_flight - served
        self.in_flight -= rng.binomial(served, over)

    def look(self) -> None:
        """Who has most to do, by the mean."""
        loads = self.in_flight[self.policy.slots.numbers]
        if loads.any():
            self.busiest_at_once.append(float(loads.max() / loads.mean()))

    def lose(self, gone: Ints, phase: str) -> None:
        """These slots are lost, with the calls that they were answering."""
        self.counts[phase].cut_off += int(self.in_flight[gone].sum())
        self.in_flight[gone] = 0

    def row(self, replicas: int) -> dict[str, Any]:
        """The figures of the policy."""
        taken = self.taken[:replicas]
        found: dict[str, Any] = {
            "policy": self.name,
            "busiest": float(taken.max() / taken.mean()),
            "spread": float(taken.std() / taken.mean()),
            "busiest_at_once": float(np.mean(self.busiest_at_once)),
            "wait_s": float(self.waited.sum() / self.taken.sum()),
            "longest_wait_s": float((self.waited[:replicas] / np.maximum(taken, 1)).max()),
            "moved": self.moved,
        }
        for phase in (STEADY, SCALING):
            counts = self.counts[phase]
            shares = {name: number / counts.calls for name, number in asdict(counts).items() if name != "calls"}
            if not self.policy.has_files:
                shares["file"] = None
            found[phase] = {"calls": counts.calls, **shares}
        return found


STEADY, SCALING = "steady", "scaling"
"""The half in which nobody changes the number of replicas, and the other one."""
_Rng = np.random.Generator


def simulate(options: ScaleSimOptions, progress: Callable[[str], None] = lambda _text: None) -> list[dict[str, Any]]:
    """The figures of every policy.

    Args:
        options: of the simulation.
        progress: told what is done.

    Raises:
        ConfigError: there are too few calls to say anything.
    """
    rng = np.random.default_rng(options.seed)
    activity = Activity(options.conversations, options.calls, options.exponent, options.most_calls)
    slots = Slots.of(options.replicas, options.most_replicas)
    progress("Finding every conversation's slot ...")
    tallies = _tallies(options, activity, slots, rng)
    ended = np.full(options.conversations, -np.inf, dtype=np.float32)
    steps = max(4, round(options.hours * 3600))
    changes = _Changes(options, slots, tallies, rng)
    over = -math.expm1(-1 / options.call_s)
    for step in range(steps):
        phase = STEADY if step < steps // 2 else SCALING
        if step % 60 == 0:
            progress(f"{step // 60} of {steps // 60} minutes ...")
        if step == steps // 2:
            changes.scale(options.most_replicas, step, "out")
        if step == 3 * steps // 4:
            changes.scale(options.replicas, step, "in")
        changes.lose_and_return(step, phase)
        calling = np.unique(activity.draw(rng.poisson(activity.an_hour / 3600), rng))
        for tally in tallies:
            tally.pass_time(options.running, over, phase, rng)
            tally.take(calling, ended[calling], step, phase, rng)
            if phase == STEADY and step % _LOOK_STEPS == 0 and step > 5 * options.call_s:
                tally.look()
        ended[calling] = step + rng.exponential(options.call_s, len(calling))
    if not all(tallies[0].counts[phase].calls for phase in (STEADY, SCALING)):
        raise ConfigError(f"Got --hours {options.hours:g}, in which nobody calls: let it be longer, or raise --calls")
    return [tally.row(options.replicas) for tally in tallies]


class _Changes:
    """Losses, returns and scale events, told to everyone."""

    def __init__(self, options: ScaleSimOptions, slots: Slots, tallies: Sequence[_Tally], rng: _Rng) -> None:
        self._options, self._slots, self._tallies, self._rng = options, slots, tallies, rng
        self._number = options.replicas
        self._back: dict[int, list[int]] = defaultdict(list)
        self._some = np.arange(0, options.conversations, max(1, options.conversations // _SOME))

    def lose_and_return(self, step: int, phase: str) -> None:
        """Some are lost by chance, and those begin for which others were lost a while ago."""
        back = np.array([slot for slot in self._back.pop(step, []) if slot < self._number], dtype=np.int64)
        there = self._slots.numbers
        lost = there[self._rng.random(len(there)) < -math.expm1(-self._options.lost / 3600)][: len(there) - 1]
        self._slots.begin(back)
        self._slots.end(lost, step)
        self._back[step + max(1, round(self._options.back_s))] += lost.tolist()
        for tally in self._tallies:
            tally.lose(lost, phase)
        self._tell(back, lost)

    def scale(self, number: int, step: int, name: str) -> None:
        """There are to be so many replicas; those that end do so when their calls are over."""
        old = {tally.name: tally.policy.homes(self._some) for tally in self._tallies}
        come = np.arange(self._number, number)
        gone = np.arange(number, self._number)
        gone = gone[self._slots.up[gone]]
        self._number = number
        self._slots.begin(come)
        self._slots.end(gone, step)
        self._tell(come, gone)
        for tally in self._tallies:
            before, after = old[tally.name], tally.policy.homes(self._some)
            tally.in_flight[gone] = 0
            tally.moved[name] = None if before is None or after is None else float(np.mean(before != after))

    def _tell(self, come: Ints, gone: Ints) -> None:
        if len(come) or len(gone):
            for tally in self._tallies:
                tally.policy.changed(come, gone)


def _tallies(options: ScaleSimOptions, activity: Activity, slots: Slots, rng: _Rng) -> list[_Tally]:
    """Each policy, with who has taken the last call of every conversation."""
    keys = rng.integers(0, 2**64, options.conversations, dtype=np.uint64)
    own = Rendezvous(slots, keys)
    policies: dict[str, tuple[Policy, float]] = {"rendezvous": (own, 1)}
    for factor in options.factor:
        for least in options.least:
            policies[f"rendezvous, bound {factor:g}, {least}"] = (Bounded(own, factor, least), 1)
    policies["ring of names, as nginx"] = (Ring(slots, keys, NGINX_POINTS, lasting=True), 1)
    policies["ring of random ids, as Ray"] = (Ring(slots, keys, RAY_POINTS, lasting=False), 2)
    policies["least loaded"] = (LeastLoaded(slots), 1)
    policies["random"] = (Random(slots), 1)
    return [
        _Tally(name, policy, np.concatenate(list(_last_calls(options, activity, policy, times * options.lost, rng))))
        for name, (policy, times) in policies.items()
    ]


def _last_calls(
    options: ScaleSimOptions, activity: Activity, policy: Policy, lost: float, rng: _Rng
) -> Iterator[npt.NDArray[np.int32]]:
    """Who took the last calls before the begin, for some conversations at a time.

    Args:
        options: of the simulation.
        activity: of the conversations.
        policy: whose slots they are.
        lost: losses of a conversation an hour; a new name on a ring takes as many from others as the one before had.
        rng: for chance.
    """
    for first in range(0, options.conversations, _SOME):
        number = min(_SOME, options.conversations - first)
        homes = policy.homes(np.arange(first, first + number))
        if homes is None:
            homes = rng.integers(options.replicas, size=number)
        is_lost = rng.random(number) < lost / (lost + activity.rates(first, first + number)) if lost else np.array(0)
        yield np.where(is_lost, homes, policy.slots.incarnation[homes]).astype(np.int32)


def measure_scale_sim(options: ScaleSimOptions, console: Console) -> Measured:
    """Simulates, and prints the tables.

    Returns:
        Exit code 0, and the figures of every policy.

    Raises:
        ConfigError: see `simulate`.
    """
    with console.status("") as status:
        rows = simulate(options, status.update)
    record = {
        "results": rows,
        **{key: value for key, value in asdict(options).items() if key != "json"},
        "versions": versions(),
        "machine": machine(),
    }
    for table in scale_sim_tables_of(record):
        console.print(on_terminal(table))
    return 0, record
