"""The loop: one thread that loads a model and steps it, and the requests on their way to it and back.

Only this thread touches requests, memory, the KV pool and the model; others leave commands. It knows nothing of the
engine in front of it, so that an engine that everybody has let go of can end it.

Requests that run or wait have a place each, and the callers of others wait for one, first come, first served. A caller
waits in its own thread or task and holds nobody up. Whoever waits or holds a place goes by a number, so that giving a
place back twice, or one that was never had, is no error.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from copyspec_engine.engine.reports import Reports
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ConfigError, EngineBusyError, EngineStoppedError, MemoryFileError
from copyspec_engine.values.info import Held
from copyspec_engine.values.outputs import StreamChunk

if TYPE_CHECKING:
    from copyspec_engine.execution.runner import LoadedModel
    from copyspec_engine.loop.request import Request

__all__ = [
    "FORKED",
    "Admission",
    "LoopThread",
    "Sink",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


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


FORKED = "the process was forked; create engines after the fork"
"""Why nothing can be asked of an engine in a forked child: its thread is not there."""

Sink = Callable[[StreamChunk | Exception], None]
"""Takes a request's chunks, or the error that ended it; called on the loop thread, must not block."""


class LoopThread:
    """A running loop, with its model loaded. Thread-safe.

    Args:
        config: what to load, and how many requests may run and wait.
        load: gives the model; called in the loop's thread.
        reports: of the load, which are delivered while it is waited for.
        on_stop: called there at the end.

    Raises:
        Whatever `load` raises, and whoever is told of it.
    """

    def __init__(
        self,
        config: EngineConfig,
        load: Callable[[], LoadedModel],
        reports: Reports,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        # Reentrant: a forgotten handle is closed by the garbage collector, at any moment in any thread.
        self.lock = threading.RLock()
        self.requests: dict[str, tuple[Request, Sink]] = {}
        """Those that run or wait, by their ids, with who reads them."""
        self.places = Admission(config.max_running + config.max_waiting)
        """Of requests that run or wait, by `Request.number`."""
        self._at_the_door: dict[str, int] = {}
        """Numbers of requests whose callers wait for a place, by their ids."""
        self._called_off: set[int] = set()
        """Of these, the ones that are to be cancelled when they come in."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._on_stop, self._pid = on_stop, os.getpid()
        self._closing = self._stopped = False
        self._cause: BaseException | None = None
        self._busy_since_s: float | None = None
        """When the loop took up what it does now, on the clock `time.monotonic`; None: it waits for something to do."""
        # The thread loads the model too: with OpenMP each thread that calls it keeps workers of its own, and two such
        # teams on the same cores disturb each other, the measured step costs above all.
        loaded: Future[LoadedModel] = Future()
        self.thread = threading.Thread(target=self._run, args=(load, loaded), name="copyspec-engine", daemon=True)
        self.thread.start()
        try:
            self.model = reports.wait_for(loaded, self.thread)
            from copyspec_engine.loop.step import EngineCore

            self.core = EngineCore(self.model, config)
        except BaseException:
            self._commands.put(lambda: None)  # a thread that has loaded a model nobody waits for ends
            raise
        self._commands.put(self._loop)

    # ---- any thread --------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """It takes no more requests."""
        return self._stopped or self._closing

    @property
    def heartbeat_age_s(self) -> float:
        """See `Engine.heartbeat_age_s`."""
        since = self._busy_since_s
        if not self.thread.is_alive():
            return math.inf
        return 0.0 if since is None else max(time.monotonic() - since, 0.0)

    def check_running(self) -> None:
        """Raises EngineStoppedError if the loop takes no more requests."""
        if self._pid != os.getpid():
            raise EngineStoppedError(RuntimeError(FORKED))
        if self.is_over:
            raise EngineStoppedError(self._cause)

    def wait(self, request: Request) -> None:
        """Wait for a place. Raises as `Admission.wait` does."""
        with self._waiting_at_the_door(request):
            self.places.wait(request.number, request.asked.deadline_s)

    async def wait_async(self, request: Request) -> None:
        """As `wait`, for a task."""
        with self._waiting_at_the_door(request):
            await self.places.wait_async(request.number, request.asked.deadline_s)

    @contextmanager
    def _waiting_at_the_door(self, request: Request) -> Iterator[None]:
        request_id = request.id
        self._at_the_door[request_id] = request.number
        try:
            yield
        except BaseException:
            self._called_off.discard(request.number)
            raise
        finally:
            self._at_the_door.pop(request_id, None)

    def enqueue(self, request: Request, sink: Sink) -> None:
        """Hand over a request that has a place; one that is refused has none any more.

        Raises:
            ConfigError: its request_id is in use.
            EngineStoppedError: the loop takes no more requests.
        """
        request_id = request.id
        try:
            with self.lock:
                self.check_running()
                if request_id in self.requests:
                    raise ConfigError(
                        f"Got request_id={request_id!r} but a request with this id is running", "request_id"
                    )
                self.requests[request_id] = (request, sink)
                self._commands.put(partial(self.core.add, request))
                if request.number in self._called_off:
                    self._commands.put(partial(self._cancel, request))
        except BaseException:
            self.places.release(request.number)
            raise
        finally:
            self._called_off.discard(request.number)

    def abandon(self, request: Request) -> None:
        """Nobody will read this request any more: free its id and place now, and its slots at the next step."""
        with self.lock:  # another request with its id must come in behind its end
            if self._take_off(request) is not None:
                self._commands.put(partial(self._cancel, request))

    def cancel(self, request_id: str) -> bool:
        """Stop a request at the next step; its reader gets what was written. False if it is not running (any more)."""
        with self.lock:
            entry, number = self.requests.get(request_id), self._at_the_door.get(request_id)
        if entry is not None:
            self._commands.put(partial(self._cancel, entry[0]))
            return True
        if number is None:
            return False
        self._called_off.add(number)  # before it can come in
        found = self.places.admit(number)
        if not found:
            self._called_off.discard(number)
        return found

    def call(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, done by the loop's thread between two steps."""
        if threading.current_thread() is self.thread:
            return work()
        done: Future[_T] = Future()
        with self.lock:
            self.check_running()
            self._commands.put(partial(_fulfil, done, work))
        return done.result()

    def last_of(self, pieces: Generator[_T, None, None], default: _T) -> _T:
        """What a generator gives last, or the default. The loop's thread runs it, with a step between its pieces."""
        last = default
        try:
            while (told := self.call(partial(next, pieces, None))) is not None:
                last = told
        except BaseException:
            with suppress(EngineStoppedError):
                self.call(pieces.close)
            raise
        return last

    def held(self) -> Held:
        """What requests hold; in this thread, between two steps."""
        return self.core.held()._replace(places=max(len(self.requests), len(self.places)))

    def end(self) -> None:
        """Stop after the step that runs; unfinished requests raise EngineStoppedError. Does not wait for that."""
        self._closing = True
        self._commands.put(lambda: None)

    def close(self) -> None:
        """As `end`, and wait until it is done."""
        self.end()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def abandon_in_child(self) -> None:
        """After a fork there is no thread here: say so instead of waiting for ever, and let locks start afresh."""
        self.lock = threading.RLock()
        self.places.renew_lock()
        self._closing = self._stopped = True
        self._cause = RuntimeError(FORKED)

    def _take_off(self, request: Request) -> Sink | None:
        """Free a request's id and place; who reads it, None if nobody does."""
        with self.lock:
            entry = self.requests.get(request.id)
            if entry is None or entry[0] is not request:
                return None
            del self.requests[request.id]
        self.places.release(request.number)
        return entry[1]

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self, load: Callable[[], LoadedModel], loaded: Future[LoadedModel]) -> None:
        """The thread's whole life: load, wait until all is put together, loop."""
        try:
            loaded.set_result(load())
        except BaseException as error:
            loaded.set_exception(error)
        else:
            self._commands.get()()

    def _loop(self) -> None:
        try:
            while not self._closing:
                self._run_commands()
                self._busy_since_s = time.monotonic()
                if self.core:
                    for request, item in self.core.step():
                        self._deliver(request, item)
        except BaseException as error:  # whatever it was, callers must not wait for ever
            logger.exception("the engine's loop failed")
            self._cause = error
        self._stop()

    def _run_commands(self) -> None:
        """Carry out what callers asked for; waits for something to do while nothing runs."""
        if not self.core:
            self._busy_since_s = None
            command = self._commands.get()
            self._busy_since_s = time.monotonic()
            command()
        while not self._commands.empty():
            self._commands.get()()

    def _cancel(self, request: Request) -> None:
        item = self.core.cancel(request)
        if item is not None:
            self._deliver(request, item)

    def _deliver(self, request: Request, item: StreamChunk | Exception) -> None:
        """Give a request's reader an item, if it still has one."""
        last = isinstance(item, Exception) or item.is_last
        if last:
            sink = self._take_off(request)
            _tell_end(request, item)
        else:
            with self.lock:
                entry = self.requests.get(request.id)
            sink = entry[1] if entry is not None and entry[0] is request else None
        if sink is not None and not _hand(sink, request, item) and not last:
            self.abandon(request)

    def _stop(self) -> None:
        with self.lock:
            self._stopped = True
            waiting = list(self.requests.values())
            self.requests.clear()
        self._on_stop()
        self.places.close(EngineStoppedError(self._cause))
        while not self._commands.empty():  # a `forget` may be waiting for its answer
            self._commands.get()()
        try:
            self.core.close()
        except MemoryFileError:
            logger.exception("the memory file was not closed well")
        for request, sink in waiting:
            error = EngineStoppedError(self._cause)
            _tell_end(request, error)
            _hand(sink, request, error)


def _tell_end(request: Request, item: StreamChunk | Exception) -> None:
    """A request is over: whoever wanted to know hears of it, before its reader does."""
    on_end, request.on_end = request.on_end, None
    if on_end is not None:
        on_end(item)


def _hand(sink: Sink, request: Request, item: StreamChunk | Exception) -> bool:
    """Give a request's reader an item; False if the reader is gone (its event loop was closed, say)."""
    try:
        sink(item)
    except Exception:
        logger.warning("nobody reads request %s any more", request.id, exc_info=True)
        return False
    return True


def _fulfil(done: Future[_T], work: Callable[[], _T]) -> None:
    """Run `work` and hand its result or error to who waits for it."""
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)
