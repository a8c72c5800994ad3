"""The engine: one loop in one thread, with sync and async front doors.

Callers on any thread ask and read chunks; only the loop thread touches requests, memory, the KV pool and
the model. A request that fails takes nobody with it; an error that stops the loop reaches every caller.

Importing this module is quick: torch, transformers and Numba are imported when a model is loaded, by the loop's thread.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.engine.reports import Reports
from copyspec_engine.engine.telemetry import CallTrace, Telemetry
from copyspec_engine.engine.thread import FORKED, LoopThread, Sink
from copyspec_engine.values.config import EngineConfig, GenerationRequest
from copyspec_engine.values.errors import ConfigError, EngineStoppedError, RequestFailedError
from copyspec_engine.values.info import EngineInfo, EngineMetrics, SessionInfo
from copyspec_engine.values.outputs import Explanation, GenerationOutput, StreamChunk
from copyspec_engine.values.progress import LoadProgress, OnProgress

if TYPE_CHECKING:
    from copyspec_engine.execution.runner import LoadedModel
    from copyspec_engine.loop.request import Request
    from copyspec_engine.memory.view import ConversationMemory

__all__ = [
    "Engine",
    "RequestHandle",
    "inspect_model",
    "loaded_engine",
    "shared_engine",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class RequestHandle:
    """A running request: an iterator over its chunks, and its `result`.

    Whoever lets go of a handle, closes it or leaves its `with` block before the last chunk cancels the request.

    Raises, when read:
        RequestFailedError: the request failed in the engine.
        ConfigError: its grammar has turned out to be too large to be followed.
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


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class Engine:
    """Serves one model. Thread-safe; use it as a context manager or call `close` when done.

    Args:
        config: what to load; default: `EngineConfig()`, the model "smollm2".
        model: a model that is loaded already (tests); then `config.model` only names it.
        on_progress: told of loading, in this thread and never less than every second; where it raises, loading ends
            and the error comes out as it is. Default: a bar, see `progress_bar`.

    Raises:
        ModelLoadError, UnsupportedModelError: see `load_model`.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        model: LoadedModel | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        if config is not None and not isinstance(cast(object, config), EngineConfig):
            raise ConfigError(
                f"Got config={config!r} but expected an EngineConfig, such as EngineConfig(model='smollm2')",
                "config",
            )
        self._config = config or EngineConfig()
        with Reports(on_progress) as reports:
            load = partial(_load, self._config, model, reports)
            self._loop = LoopThread(self._config, load, reports, partial(_unshare, self._config, weakref.ref(self)))
        self._load_seconds = reports.seconds
        self._model, self._core = self._loop.model, self._loop.core
        # The loop's thread must not keep us alive: an engine that everybody has let go of ends it.
        weakref.finalize(self, self._loop.end).atexit = False
        from copyspec_engine.engine.preparation import Preparation

        self._preparation = Preparation(self._config, self._model, self._core.known_ids)
        self._taking_in = threading.Lock()
        self._telemetry = Telemetry(self._model.info.model, partial(self._loop.call, self._core.metrics))
        _open_engines.add(self)
        _threads.add(self._loop.thread)

    # ---- front doors, any thread -------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def info(self) -> EngineInfo:
        from copyspec_engine.engine.info import engine_info

        return engine_info(self._config, self._model, self._load_seconds, self._core)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the loop took up what it does now; 0.0 while it has nothing to do, infinite once it has ended.

        For probes of life: reading it never waits, whatever the loop does. One turn is a forward pass of all running
        requests, with at most `EngineConfig.max_prefill_tokens` of prompts, and what callers asked for between two.
        """
        return self._loop.heartbeat_age_s

    @property
    def chat_format(self) -> ChatFormat:
        """How the model's chat template writes tool calls and reasoning."""
        return self._preparation.chat_format

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of raw text, behind those special tokens that the tokenizer begins a text with, but once."""
        return self._model.tokenizer.encode(text, special_tokens=special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without special tokens or with their names in it."""
        return self._model.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize(self, request: GenerationRequest) -> list[int]:
        """The token ids that the model would read for a request.

        Raises:
            ConfigError: the chat template refuses the messages, or a token is not in the model's vocabulary.
        """
        return self._preparation.token_ids(request)

    def stream(self, request: GenerationRequest, *, wait: bool = True) -> RequestHandle:
        """Begin a request: its chunks as they are decoded, or its whole answer; closing or dropping the handle cancels.

        Tokenising and checks happen here, in the caller's thread.

        Args:
            request: what is asked.
            wait: where too many requests wait already this waits too, for as long as the request's `timeout_s` allows;
                if False it never waits for a place.

        Raises:
            ConfigError: the input cannot be tokenised, a token id is not in the vocabulary, its grammar is not one, or
                its request_id is in use.
            CopySpecError: it has a grammar, but the extra "grammar" is not installed.
            ContextOverflowError: it needs more tokens than the context or the KV pool holds.
            EngineBusyError: too many requests wait already.
            EngineStoppedError: the engine takes no more requests.
        """
        handle = RequestHandle(request.request_id)
        with self._telemetry.call(request) as trace:
            prepared = self._prepare(request, trace)
            if wait:
                self._loop.wait(prepared)
            else:
                self._loop.places.take(prepared.number)
            self._loop.enqueue(prepared, handle.sink)
        handle.on_close(partial(self._abandon, prepared))
        if request.explain:
            handle.on_last(partial(self._explained, request))
        return handle

    def generate(self, request: GenerationRequest) -> GenerationOutput:
        """The whole answer. Waits and raises as `stream` does."""
        with self.stream(request) as handle:
            return handle.result()

    async def astream(self, request: GenerationRequest, *, wait: bool = True) -> AsyncGenerator[StreamChunk, None]:
        """Chunks as they are decoded. Closing the iterator or cancelling the task cancels the request.

        Waits, or not, and raises as `stream` does, without blocking the event loop.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[StreamChunk | Exception] = asyncio.Queue()
        with self._telemetry.call(request) as trace:
            prepared = await asyncio.to_thread(self._prepare, request, trace)
            if wait:
                await self._loop.wait_async(prepared)
            else:
                self._loop.places.take(prepared.number)
            self._loop.enqueue(prepared, partial(_put_threadsafe, loop, items))
        try:
            while True:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                if item.is_last and request.explain:
                    item = await asyncio.to_thread(self._explained, request, item)
                yield item
                if item.is_last:
                    return
        finally:
            self._loop.abandon(prepared)

    async def agenerate(self, request: GenerationRequest) -> GenerationOutput:
        """The whole answer, without blocking the event loop."""
        async with contextlib.aclosing(self.astream(request)) as chunks:
            async for chunk in chunks:
                if chunk.output is not None:
                    return chunk.output
        raise RequestFailedError(f"Request {request.request_id} ended without an answer")

    def cancel(self, request_id: str) -> bool:
        """Stop a request at the next step; its reader gets what was written. False if it is not running (any more)."""
        return self._loop.cancel(request_id)

    def forget(self, session_id: str) -> bool:
        """Erase a session's texts, in memory, in shared pools and on disk, and its KV; False if there was nothing.

        A call of the session that is in flight goes on and keeps nothing.

        Raises:
            MemoryFileError: the texts are erased in memory, but not on disk. Call again to try again.
            EngineStoppedError: the engine was closed.
        """
        return self._loop.call(partial(self._core.forget, session_id))

    def explain(self, request: GenerationRequest, output: GenerationOutput) -> Explanation:
        """Where the answer `output` to `request` was copied from, in messages and characters.

        Runs in the caller's thread, and needs nothing of the conversation any more.
        """
        from copyspec_engine.provenance.explain import explain

        return explain(self._model.tokenizer, request, output)

    def _explained(self, request: GenerationRequest, last: StreamChunk) -> StreamChunk:
        """An answer's last chunk with its explanation; without, if that fails: the answer is worth more."""
        assert last.output is not None
        try:
            explanation = self.explain(request, last.output)
        except Exception:
            logger.exception("where the answer to request %s came from could not be resolved", request.request_id)
            return last
        return replace(last, output=replace(last.output, explanation=explanation))

    def memory(self, session_id: str) -> ConversationMemory:
        """What a conversation remembers; it need not exist. Its methods raise EngineStoppedError once we are closed."""
        from copyspec_engine.memory.view import ConversationMemory, read_export

        fingerprint, vocab_size = self._model.tokenizer.fingerprint, self._model.runner.vocab_size

        def load(exported: str | Mapping[str, Any], owner: str | None) -> int:
            texts = read_export(exported, fingerprint(), vocab_size)
            self._loop.check_running()  # in a forked child nobody would give the lock back
            with self._taking_in:  # else two that take in the same would not know of each other
                return self._loop.last_of(self._core.take_in(session_id, texts, owner), 0)

        return ConversationMemory(
            session_id,
            look=partial(self._loop.call, partial(self._core.look, session_id)),
            decode=partial(self._model.tokenizer.decode, skip_special_tokens=False),
            forget=partial(self.forget, session_id),
            load=load,
            fingerprint=fingerprint,
        )

    def sessions(self, owner: str | None = None) -> list[SessionInfo]:
        """The sessions whose texts are remembered, least recently used first; of one owner, or all of them.

        Raises:
            EngineStoppedError: the engine was closed.
        """
        return self._loop.call(partial(self._core.sessions, owner))

    def forget_pool(self, name: str) -> bool:
        """Erase the texts of a shared pool, in memory and on disk; False if there is none. Raises as `forget` does."""
        return self._loop.call(partial(self._core.forget_pool, name))

    def metrics(self) -> EngineMetrics:
        """What runs and waits now, and counts since the engine was made, taken between two steps.

        Raises:
            EngineStoppedError: the engine was closed.
        """
        return self._loop.call(self._core.metrics)

    def close(self) -> None:
        """Stop the loop; unfinished requests raise EngineStoppedError. Safe to call twice.

        The model's memory is free once nobody holds the engine any more.
        """
        self._loop.close()

    def __repr__(self) -> str:
        info = self._model.info
        closed = ", closed" if self._loop.is_over else ""
        return f"Engine({info.model!r}, {info.device}, {info.dtype}, {info.max_model_len:,} tokens{closed})"

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- between the front doors and the loop ------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest, trace: CallTrace | None) -> Request:
        """Tokenise and check a request."""
        self._loop.check_running()
        prepared = self._preparation.request(request)
        if trace is not None:
            trace.handed_over(prepared)
        return prepared

    def _abandon(self, prepared: Request) -> None:
        """Nobody will read this request any more. Whoever holds its handle holds the engine by this."""
        self._loop.abandon(prepared)


def inspect_model(config: EngineConfig | None = None, on_progress: OnProgress | None = None) -> EngineInfo:
    """Load a model, say how it would be served, and let go of it. Nothing is compiled for drafting.

    Args:
        config: as for `Engine`.
        on_progress: as for `Engine`.

    Raises:
        ModelLoadError, UnsupportedModelError: as `Engine`.
    """
    config = config or EngineConfig()

    def inspect() -> EngineInfo:
        model = _read(config, reports)
        from copyspec_engine.engine.info import engine_info

        return engine_info(config, model, reports.seconds)

    with Reports(on_progress) as reports:
        return reports.run(inspect)


def _load(config: EngineConfig, model: LoadedModel | None, reports: Reports) -> LoadedModel:
    """The model and then, as a wrong name should be told at once, the compiled code; in the loop's thread."""
    loaded = model or _read(config, reports)
    from copyspec_engine.loop.warm_up import warm_up

    warm_up(reports)
    reports.end()
    return loaded


def _read(config: EngineConfig, reports: Reports) -> LoadedModel:
    if "copyspec_engine.execution.loading" not in sys.modules:
        reports(LoadProgress("read", "importing PyTorch and transformers"))
    from copyspec_engine.execution.loading import load_model

    return load_model(config, reports)


def _put_threadsafe(
    loop: asyncio.AbstractEventLoop, items: asyncio.Queue[StreamChunk | Exception], item: StreamChunk | Exception
) -> None:
    loop.call_soon_threadsafe(items.put_nowait, item)


def _unshare(config: EngineConfig, engine: weakref.ref[Engine]) -> None:
    """An engine has stopped: the next who asks for its config gets a new one."""
    with _registry_lock:
        if config in _shared and _shared[config] is engine():
            del _shared[config]


_shared: dict[EngineConfig, Engine] = {}
_shared_locks: dict[EngineConfig, threading.Lock] = {}
_registry_lock = threading.Lock()


def shared_engine(config: EngineConfig | None = None, on_progress: OnProgress | None = None) -> Engine:
    """This process's engine for a config, loaded on first use; equal configs share one. Thread-safe, may block.

    Args:
        config: what to load; default: `EngineConfig()`, the model "smollm2".
        on_progress: as for `Engine`; not called if the engine is there already or another thread loads it.
    """
    config = config or EngineConfig()
    with _registry_lock:
        lock = _shared_locks.setdefault(config, threading.Lock())
    with lock:
        engine = loaded_engine(config)
        if engine is None:
            engine = Engine(config, on_progress=on_progress)
            with _registry_lock:
                _shared[config] = engine
        return engine


def loaded_engine(config: EngineConfig) -> Engine | None:
    """What `shared_engine` gives for a config, if it is there already; never waits for a load."""
    with _registry_lock:
        engine = _shared.get(config)
    return None if engine is None or engine._loop.is_over else engine


def close_shared_engines(keep: Callable[[EngineConfig], bool] = lambda _: False) -> None:
    """Close the shared engines of all configs but those to keep; whoever asks for one of them later gets a new one."""
    with _registry_lock:
        ending = [engine for config, engine in _shared.items() if not keep(config)]
    for engine in ending:
        engine.close()


@atexit.register
def _close_all() -> None:
    """Let loop threads end before the interpreter takes their libraries away."""
    for engine in list(_open_engines):
        engine.close()
    for thread in list(_threads):  # those of engines that nobody holds any more, which end just now
        thread.join()


def _after_fork() -> None:
    """A forked child has no loop threads: its engines say so instead of waiting for ever, and locks start afresh."""
    global _registry_lock
    _registry_lock = threading.Lock()
    _shared.clear()
    _shared_locks.clear()
    for engine in list(_open_engines):
        engine._loop.abandon_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
