"""Places for requests that run or wait in the engine, and the callers that wait for one, first come, first served.

A caller waits in its own thread or task and holds nobody up. Whoever waits or holds a place goes by a number, so that
giving a place back twice, or one that was never had, is no error.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from concurrent.futures import Future

from copyspec_engine.values.errors import EngineBusyError

__all__ = ["Admission"]


class Admission:
    """Hands out places. Thread-safe."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        # Reentrant, and each change one operation: the garbage collector may give a place back at any moment.
        self._lock = threading.RLock()
        self._taken: set[int] = set()
        self._waiting: dict[int, Future[None]] = {}
        self._error: Exception | None = None

    def __len__(self) -> int:
        """Places that are taken."""
        return len(self._taken)

    @property
    def num_waiting(self) -> int:
        """Callers that wait for one."""
        return len(self._waiting)

    def take(self, number: int) -> None:
        """A place at once.

        Raises:
            EngineBusyError: there is none.
        """
        with self._lock:
            self._refuse_if_closed()
            if self._waiting or len(self._taken) >= self._num_places:
                raise EngineBusyError(len(self._taken))
            self._taken.add(number)

    def wait(self, number: int, deadline_s: float) -> None:
        """A place, as soon as there is one.

        Args:
            number: the caller's.
            deadline_s: until when to wait, on the clock `time.perf_counter`.

        Raises:
            EngineBusyError: there was none until then.
        """
        place = self._queue(number)
        try:
            place.result(_seconds_until(deadline_s))
        except concurrent.futures.TimeoutError:
            raise self._given_up(number) from None
        except BaseException:
            self.release(number)
            raise

    async def wait_async(self, number: int, deadline_s: float) -> None:
        """As `wait`, for a task; one that is cancelled gives its place to the next."""
        place = self._queue(number)
        try:
            if place.done():  # a loop takes a turn to see it, and the time may be over by then
                place.result()
            else:
                await asyncio.wait_for(asyncio.wrap_future(place), _seconds_until(deadline_s))
        except asyncio.TimeoutError:
            raise self._given_up(number) from None
        except BaseException:
            self.release(number)
            raise

    def release(self, number: int) -> None:
        """Give back a place, or wait no more; the next who waits gets it."""
        with self._lock:
            self._taken.discard(number)
            self._waiting.pop(number, None)
            self._go_on()

    def admit(self, number: int) -> bool:
        """Give one who waits a place out of turn, and beyond the limit; False if it does not wait (any more)."""
        with self._lock:
            place = self._waiting.pop(number, None)
            if place is None or not place.set_running_or_notify_cancel():
                return False
            self._taken.add(number)
            place.set_result(None)
            return True

    def close(self, error: Exception) -> None:
        """Nobody gets a place any more; who waits for one gets the error."""
        with self._lock:
            self._error = error
            while self._waiting:
                _, place = self._waiting.popitem()
                if place.set_running_or_notify_cancel():
                    place.set_exception(error)

    def renew_lock(self) -> None:
        """In a forked child, where nobody is left to give it back."""
        self._lock = threading.RLock()

    def _queue(self, number: int) -> Future[None]:
        place: Future[None] = Future()
        with self._lock:
            self._refuse_if_closed()
            self._waiting[number] = place
            self._go_on()
        return place

    def _go_on(self) -> None:
        while self._waiting and len(self._taken) < self._num_places:
            self.admit(next(iter(self._waiting)))

    def _refuse_if_closed(self) -> None:
        if self._error is not None:
            raise self._error

    def _given_up(self, number: int) -> EngineBusyError:
        self.release(number)
        return EngineBusyError(len(self._taken))


def _seconds_until(deadline_s: float) -> float | None:
    """What is left; None for ever."""
    left = deadline_s - time.perf_counter()
    return max(left, 0.0) if left < threading.TIMEOUT_MAX else None
