"""Threads that run one function side by side: one team for a process, so that engines do not fight for cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Team", "team"]


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
