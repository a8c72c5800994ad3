"""One call to the engine: its chunks, cut off at the timeout, tried again if the engine failed before any text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from copyspec_engine import Engine, GenerationRequest, RequestFailedError, StreamChunk
from langchain_copyspec.errors import RequestTimeoutError, langchain_errors

__all__ = ["Call", "astream_call", "stream_call"]

_RETRY_S = 0.05


@dataclass(frozen=True)
class Call:
    """A request and how to run it."""

    request: GenerationRequest
    timeout_s: float | None
    max_retries: int
    include_segments: bool


class _Deadline:
    """Cancels a request when its time is up, from a thread of its own, so that it holds while nobody reads chunks."""

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call
        self._ended = Event()
        self._seen = False
        self._cancelled = False

    def watch(self, timeout_s: float) -> None:
        """Wait for the end of the call or of its time; runs in the thread."""
        if self._ended.wait(timeout_s):
            return
        # A request that the engine does not know has finished, or has not been submitted yet if no chunk was seen.
        while not self._engine.cancel(self._call.request.request_id):
            if self._seen or self._ended.wait(_RETRY_S):
                return
        self._cancelled = True

    def check(self, chunk: StreamChunk) -> None:
        """Raise `RequestTimeoutError` if `chunk` ends the answer because the time was up."""
        self._seen = True
        if self._cancelled and chunk.output is not None and chunk.output.finish_reason == "cancelled":
            raise RequestTimeoutError(
                f"The answer was not finished after timeout={self._call.timeout_s} seconds and was cancelled: raise "
                "timeout, or lower max_tokens"
            )

    def end(self) -> None:
        self._ended.set()


@contextmanager
def _deadline(engine: Engine, call: Call) -> Iterator[_Deadline]:
    deadline = _Deadline(engine, call)
    if call.timeout_s is not None:
        Thread(target=deadline.watch, args=(call.timeout_s,), name="copyspec-timeout", daemon=True).start()
    try:
        yield deadline
    finally:
        deadline.end()


def stream_call(engine: Engine, call: Call) -> Generator[StreamChunk, None, None]:
    """The call's chunks; closing the generator cancels the request.

    Raises:
        ContextOverflowError: the prompt does not fit.
        RequestTimeoutError: the time was up.
        RequestFailedError: the engine failed more often than `max_retries`, or in the middle of the answer.
    """
    request = call.request
    with langchain_errors(), _deadline(engine, call) as deadline:
        for attempt in range(call.max_retries + 1):
            started = False
            try:
                with engine.stream(request) as chunks:
                    for chunk in chunks:
                        deadline.check(chunk)
                        started = True
                        yield chunk
                return
            except RequestFailedError:
                if started or attempt == call.max_retries:
                    raise


async def astream_call(engine: Engine, call: Call) -> AsyncGenerator[StreamChunk, None]:
    """`stream_call` for an event loop."""
    request = call.request
    with langchain_errors(), _deadline(engine, call) as deadline:
        for attempt in range(call.max_retries + 1):
            started = False
            try:
                async with aclosing(engine.astream(request)) as chunks:
                    async for chunk in chunks:
                        deadline.check(chunk)
                        started = True
                        yield chunk
                return
            except RequestFailedError:
                if started or attempt == call.max_retries:
                    raise
