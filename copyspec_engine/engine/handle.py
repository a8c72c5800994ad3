"""A request as its caller sees it."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable

from copyspec_engine.values.errors import EngineStoppedError, RequestFailedError
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk

__all__ = ["FORKED", "RequestHandle", "Sink"]

FORKED = "the process was forked; create engines after the fork"
"""Why nothing can be asked of an engine in a forked child: its thread is not there."""

Sink = Callable[[StreamChunk | Exception], None]
"""Takes a request's chunks, or the error that ended it; called on the loop thread, must not block."""


class RequestHandle:
    """A running request: an iterator over its chunks, and its `result`.

    Whoever lets go of a handle, closes it or leaves its `with` block before the last chunk cancels the request.

    Raises, when read:
        RequestFailedError: the request failed in the engine.
        EngineStoppedError: the engine stopped before it was finished, or this is a forked child of its process.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._items: queue.SimpleQueue[StreamChunk | Exception | None] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._last: StreamChunk | Exception | None = None
        self._abandon: Callable[[], None] | None = None
        self._complete: Callable[[StreamChunk], StreamChunk] | None = None

    @property
    def sink(self) -> Sink:
        """Where the engine puts chunks. It does not hold the handle, so that a forgotten one can be noticed."""
        return self._items.put

    def on_close(self, abandon: Callable[[], None]) -> None:
        """Say how to stop the request when nobody will read on."""
        self._abandon = abandon

    def on_last(self, complete: Callable[[StreamChunk], StreamChunk]) -> None:
        """Say what is to be done with the last chunk, in the thread that reads it."""
        self._complete = complete

    def __iter__(self) -> RequestHandle:
        return self

    def __next__(self) -> StreamChunk:
        if isinstance(self._last, Exception):
            raise self._last
        if self._last is None and self._pid != os.getpid():
            raise EngineStoppedError(RuntimeError(FORKED))
        item = self._items.get() if self._last is None else None
        if item is None:  # closed, or read to the end
            self._items.put(None)
            raise StopIteration
        if isinstance(item, StreamChunk) and item.is_last and self._complete is not None:
            try:
                item = self._complete(item)
            except Exception as error:
                item = error
        if isinstance(item, Exception) or item.is_last:
            self._last, self._abandon = item, None
        if isinstance(item, Exception):
            raise item
        return item

    def result(self) -> GenerationOutput:
        """The whole answer, once it is finished; may be asked for again."""
        for _ in self:
            pass
        if isinstance(self._last, StreamChunk) and self._last.output is not None:
            return self._last.output
        raise RequestFailedError(f"Request {self.request_id} was closed before it was finished")

    def close(self) -> None:
        """Cancel the request unless it is finished; readers see the end of the stream."""
        abandon, self._abandon = self._abandon, None
        if abandon is not None and self._pid == os.getpid():
            abandon()
            self._items.put(None)

    def __enter__(self) -> RequestHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
