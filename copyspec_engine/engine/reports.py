"""How the reports of a load get from its thread to the one that waits for it, and are never far apart.

The load goes on in a thread of its own. Whoever waits for it is told in his own thread, where a notebook or a window
can be drawn in, and where an error or Ctrl-C ends the load: the next report that the load makes raises.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from copyspec_engine.values.progress import LoadPhase, LoadProgress, OnProgress, progress_bar

__all__ = ["LoadAbandoned", "Reports"]

_T = TypeVar("_T")

_BETWEEN_COUNTS_S = 0.2
"""Counts that follow each other faster are left out."""
_LONGEST_SILENCE_S = 1.0
"""After which the last report is told again, with how long it has been true."""
_END_S = 5.0
"""How long a load that nobody wants any more may take to end."""


class LoadAbandoned(BaseException):
    """Raised in a load's thread by the report after which nobody waits for it. No error, so that nothing catches it."""


class Reports:
    """Takes reports in the load's thread and delivers them in the thread that waits; a context manager for the latter.

    Args:
        on_progress: is told; default: `progress_bar`.
    """

    def __init__(self, on_progress: OnProgress | None = None) -> None:
        self.seconds: dict[LoadPhase, float] = defaultdict(float)
        """What the phases took; of `end` whole."""
        self._on_progress = on_progress
        self._stack = ExitStack()
        self._made: queue.SimpleQueue[LoadProgress | None] = queue.SimpleQueue()
        self._last: LoadProgress | None = None
        self._told_at = self._phase_at = time.perf_counter()
        self._is_abandoned = False

    def __enter__(self) -> Reports:
        if self._on_progress is None:
            self._on_progress = self._stack.enter_context(progress_bar())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    # ---- the load's thread ---------------------------------------------------------------------------------------

    def __call__(self, progress: LoadProgress) -> None:
        """Tell of the load. Raises LoadAbandoned if nobody waits for it any more."""
        if self._is_abandoned:
            raise LoadAbandoned
        now, last = time.perf_counter(), self._last
        if last is None or last.phase != progress.phase:
            self.end()
        self._last = progress
        counts_on = last is not None and last.text == progress.text and progress.done != progress.total
        if not counts_on or now - self._told_at >= _BETWEEN_COUNTS_S:
            self._told_at = now
            self._made.put(progress)

    def end(self) -> None:
        """The phase that was told of last is over."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds[self._last.phase] += now - self._phase_at
        self._phase_at, self._last = now, None

    # ---- the thread that waits -----------------------------------------------------------------------------------

    def run(self, work: Callable[[], _T]) -> _T:
        """Do `work` in a thread of its own, and wait for it. Raises what it raises, and as `wait_for`."""
        done: Future[_T] = Future()

        def carry_out() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=carry_out, name="copyspec-load", daemon=True)
        thread.start()
        return self.wait_for(done, thread)

    def wait_for(self, loaded: Future[_T], thread: threading.Thread) -> _T:
        """The result of the load that goes on in `thread`; its reports are delivered meanwhile.

        Raises:
            Whatever the load raises. What `on_progress` raises as it is, and so for Ctrl-C: the load then ends at its
            next report, for which this waits a few seconds.
        """
        loaded.add_done_callback(lambda _: self._made.put(None))
        try:
            self._deliver()
        except BaseException:
            self._is_abandoned = True
            thread.join(_END_S)
            raise
        return loaded.result()

    def _deliver(self) -> None:
        last, since = None, time.perf_counter()
        tell = self._on_progress or (lambda _: None)
        while True:
            try:
                progress = self._made.get(timeout=_LONGEST_SILENCE_S)
            except queue.Empty:
                if last is not None:
                    tell(replace(last, text=f"{last.text} ({time.perf_counter() - since:.0f} s)"))
                continue
            if progress is None:
                return
            if last is None or last.text != progress.text:
                since = time.perf_counter()
            last = progress
            tell(progress)
