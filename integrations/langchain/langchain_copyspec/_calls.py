"""One call to the engine: its chunks, tried again if the engine failed before any text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from dataclasses import dataclass

from copyspec_engine import Engine, GenerationRequest, RequestFailedError, StreamChunk
from copyspec_engine.adapters.conversations import Talk
from langchain_copyspec._options import CallOptions
from langchain_copyspec.errors import RequestTimeoutError, langchain_errors

__all__ = ["PreparedCall", "astream_call", "stream_call"]


@dataclass(frozen=True)
class PreparedCall:
    """A request and how to run it."""

    request: GenerationRequest
    talk: Talk
    options: CallOptions


def _check(call: PreparedCall, chunk: StreamChunk) -> StreamChunk:
    """The chunk, unless it ends the answer because the time was up."""
    if chunk.output is not None and chunk.output.finish_reason == "timeout":
        raise RequestTimeoutError(
            f"The answer was not finished after timeout={call.request.timeout_s} seconds: raise timeout, or lower "
            "max_tokens"
        )
    return chunk


def stream_call(engine: Engine, call: PreparedCall) -> Generator[StreamChunk, None, None]:
    """The call's chunks; closing the generator cancels the request.

    Raises:
        ContextOverflowError: the prompt does not fit.
        RequestTimeoutError: the time was up.
        RequestFailedError: the engine failed more often than `max_retries`, or in the middle of the answer.
    """
    with langchain_errors():
        for attempt in range(call.options.max_retries + 1):
            started = False
            try:
                with engine.stream(call.request) as chunks:
                    for chunk in chunks:
                        yield _check(call, chunk)
                        started = True
                return
            except RequestFailedError:
                if started or attempt == call.options.max_retries:
                    raise


async def astream_call(engine: Engine, call: PreparedCall) -> AsyncGenerator[StreamChunk, None]:
    """`stream_call` for an event loop."""
    with langchain_errors():
        for attempt in range(call.options.max_retries + 1):
            started = False
            try:
                async with aclosing(engine.astream(call.request)) as chunks:
                    async for chunk in chunks:
                        yield _check(call, chunk)
                        started = True
                return
            except RequestFailedError:
                if started or attempt == call.options.max_retries:
                    raise
