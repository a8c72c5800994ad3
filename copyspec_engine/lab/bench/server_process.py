"""The process of `copyspec bench serve`: an engine, and a server over it, in which both ways ask.

Whoever asks in process does it in the server's own event loop, while no client asks: what differs is HTTP alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from copyspec_engine import EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.cli.demo.frameworks import Message

__all__ = ["Asked", "CpuTimes", "ServerSide", "Written"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A call, for either way."""

    session_id: str
    """No other one has this name."""
    messages: tuple[Message, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Written:
    """An answer."""

    text: str
    tokens: int
    ttft_s: float
    """From the call to the first piece of text."""
    seconds: float
    """From the call to the answer's end."""
    num_chunks: int
    """With text, in which it came."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of the processor."""

    loop_s: float
    """Of the thread of the event loop."""
    process_s: float
    """Of all threads, those that compute included."""

    def __sub__(self, other: CpuTimes) -> CpuTimes:
        return CpuTimes(self.loop_s - other.loop_s, self.process_s - other.process_s)


class ServerSide:
    """An engine and a server over it. To be made in a process of its own, whose environment it changes.

    Args:
        config: of the engine.

    Raises:
        CopySpecError: the model cannot be loaded, or runs without drafting.
    """

    def __init__(self, config: EngineConfig) -> None:
        from copyspec_engine.lab.measuring import drafting_engine

        with ExitStack() as stack:
            self._engine = stack.enter_context(drafting_engine(config))
            self._loop, self._port, self._model = stack.enter_context(_serving(self._engine))
            self._close = stack.pop_all().close

    def facts(self) -> dict[str, Any]:
        """What figures of the engine hang on, and whether its answers may differ."""
        from copyspec_engine.lab.measuring import facts_of_engine

        return {**facts_of_engine(self._engine.info), "is_lossless": self._engine.info.is_lossless}

    def address(self) -> tuple[int, str]:
        """The server's port, and what it calls the model."""
        return self._port, self._model

    def cpu_times(self) -> CpuTimes:
        """Since the process began."""
        return asyncio.run_coroutine_threadsafe(_cpu_times(), self._loop).result()

    def write(self, calls: Sequence[Asked]) -> tuple[float, CpuTimes, list[Written]]:
        """The answers to calls at once in process, as `stream_all` has them over HTTP."""
        return asyncio.run_coroutine_threadsafe(self._write(calls), self._loop).result()

    def forget(self) -> None:
        """Erase what was said in process and over HTTP."""
        for session in self._engine.sessions():
            self._engine.forget(session.session_id)

    def close(self) -> None:
        self._close()

    async def _write(self, calls: Sequence[Asked]) -> tuple[float, CpuTimes, list[Written]]:
        before, began_s = await _cpu_times(), time.perf_counter()
        written = await asyncio.gather(*map(self._answer, calls))
        seconds, after = time.perf_counter() - began_s, await _cpu_times()
        return seconds, after - before, written

    async def _answer(self, asked: Asked) -> Written:
        request = GenerationRequest(
            messages=[dict(message) for message in asked.messages],
            session_id=asked.session_id,
            sampling=SamplingParams(temperature=0, max_tokens=asked.max_tokens, ignore_eos=True),
        )
        began_s = time.perf_counter()
        came, output = list[float](), None
        async with aclosing(self._engine.astream(request)) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    came.append(time.perf_counter() - began_s)
                output = chunk.output
        assert output is not None, "the last chunk has it"
        seconds = time.perf_counter() - began_s
        return Written(output.text, output.usage.completion_tokens, came[0] if came else seconds, seconds, len(came))


async def _cpu_times() -> CpuTimes:
    return CpuTimes(time.thread_time(), time.process_time())


@contextmanager
def _serving(engine: Any) -> Iterator[tuple[asyncio.AbstractEventLoop, int, str]]:  # noqa: ANN401 - an Engine
    """Serves within the `with` block, as `copyspec serve` does: its event loop, its port, and the model's name."""
    from copyspec_engine.serve.app import app_of
    from copyspec_engine.serve.config import ServeConfig
    from copyspec_engine.serve.lifecycle import LOG_FORMAT, listen, server_of
    from copyspec_engine.serve.service import Service
    from copyspec_engine.serve.tenants import KEY_VARIABLE

    os.environ.pop(KEY_VARIABLE, None)  # the clients have no key
    config = ServeConfig(port=0)
    listener, started = listen(config), Future[asyncio.AbstractEventLoop]()
    service = Service(engine, config)
    server = server_of(app_of(service))

    async def serve() -> None:
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        started.set_result(asyncio.get_running_loop())
        await serving

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="server")
    logging.basicConfig(filename=os.devnull, level=logging.INFO, format=LOG_FORMAT)
    thread.start()
    try:
        yield started.result(), listener.getsockname()[1], service.model
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
