"""Threads that run one function side by side: one team for a process, so that engines do not fight for cores.

And how to keep torch from waking its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue

import torch

__all__ = ["Team", "one_torch_thread", "team"]


class Team:
    """The calling thread and `num_threads` - 1 others, which wait for work.

    What they run must come to its end in all threads, or in none; it meets there by itself (narrow_kernels.py). Where
    `run` raises, some may have begun without the caller: whoever called it must let them go on alone.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._process = os.getpid()
        self._work: SimpleQueue[tuple[Callable[[int], None], int]] = SimpleQueue()
        self._lock = threading.Lock()
        for number in range(1, num_threads):
            threading.Thread(target=self._wait, name=f"copyspec-pass-{number}", daemon=True).start()

    def run(self, work: Callable[[int], None]) -> None:
        """Call `work` with 0, 1 .. in as many threads; one caller after another."""
        with self._lock:
            for number in range(1, self.num_threads):
                self._work.put((work, number))
            work(0)

    @property
    def is_alive(self) -> bool:
        """False in a process that was forked: threads stay behind."""
        return self._process == os.getpid()

    def _wait(self) -> None:
        while True:
            work, number = self._work.get()
            work(number)
            del work  # it holds a pass's arrays


_teams: dict[int, Team] = {}
_making = threading.Lock()


def team(num_threads: int) -> Team:
    """The process's team of so many threads."""
    found = _teams.get(num_threads)
    if found is None or not found.is_alive:
        with _making:
            found = _teams.get(num_threads)
            if found is None or not found.is_alive:
                found = _teams[num_threads] = Team(num_threads)
    return found


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """What torch computes on the CPU within the `with` block, it computes in the calling thread alone.

    A worker of OpenMP that was woken spins for some 10 ms before it sleeps again, on a core that a narrow pass then
    lacks: behind every pass a token's choice would wake it, and halve the speed. Sums come out in one order, too,
    however many rows there are. Nothing changes where torch computes with something else than OpenMP.
    """
    set_threads = _openmp_setter()
    if set_threads is None:
        yield
        return
    before = torch.get_num_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@cache
def _openmp_setter() -> Callable[[int], object] | None:
    """OpenMP's `omp_set_num_threads`, if it is the one that torch listens to.

    It holds for the calling thread; `torch.set_num_threads` would hold for threads that begin meanwhile, too.
    """
    if sys.platform == "win32":  # there a process has no table of all functions
        return None
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).omp_set_num_threads
    except AttributeError:
        return None
    before = torch.get_num_threads()
    found(before + 1)
    listens = torch.get_num_threads() == before + 1
    found(before)
    return found if listens else None
