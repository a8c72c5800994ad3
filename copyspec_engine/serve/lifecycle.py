"""From a socket to an exit code: a server's start, its signals, and its end, which cuts no answer without a word.

It listens from the start, and answers while the engine is loaded (`Front`); a signal then ends the load.
SIGTERM refuses new calls (503), lets those in flight come to their ends, cuts the rest short with a last event each,
and exits with 0. SIGINT does the same without notice to balancers, and exits with 130. A second one cuts all short.
SIGHUP reads the keys again. Where the engine's loop has died the exit code is 70: a supervisor starts a new server.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from copyspec_engine.engine.engine import Engine
from copyspec_engine.serve.app import app_of
from copyspec_engine.serve.calls import Calls
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.front import Front
from copyspec_engine.serve.service import Service
from copyspec_engine.serve.tenants import check_reachable
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = [
    "DIED",
    "INTERRUPTED",
    "LAST_EVENTS_S",
    "LOG_FORMAT",
    "TERMINATED",
    "idle",
    "listen",
    "run_server",
    "server_of",
]

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
DIED = 70
"""Exit code: the engine's loop has died."""
INTERRUPTED = 130
"""Exit code: after Ctrl-C."""
TERMINATED = 143
"""Exit code: a second SIGTERM, for which no answer comes to its own end."""
LAST_EVENTS_S = 5.0
"""Seconds at most for calls that are cut to end, and for their last events to reach their readers."""
_LOOK_S = 0.05
_WATCH_S = 0.25


def listen(config: ServeConfig) -> socket.socket:
    """The socket of a server, before its model is loaded: what is wrong with it is told at once.

    Raises:
        ConfigError: others could reach it without a key, the keys cannot be read, or the address cannot be had.
    """
    check_reachable(config)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host.strip("[]"), config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(config, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else the connection of a reader that was given up stays for ever
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * config.send_timeout_s))
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from None
    return listener


def _cannot_listen(config: ServeConfig, error: OSError) -> ConfigError:
    return ConfigError(f"Got host={config.host!r} and port={config.port} but cannot listen there: {error}")


def run_server(
    load: Callable[[OnProgress], Engine],
    config: ServeConfig,
    listener: socket.socket,
    started: Callable[[str], None] = lambda _url: None,
) -> int:
    """Load an engine, serve it until a signal or its death, close it, and return the exit code.

    Args:
        load: makes the engine, in a thread of its own. What it is given is told of the load, and raises where the
            server is to end before it is over.
        config: of the server.
        listener: from `listen`.
        started: told the server's address, once the engine is there.

    Raises:
        ConfigError: the keys cannot be read, or the memory file that the engine was to have is not to be had.
        Exception: what `load` raises.
    """
    life = _Life(load, config, listener, started)
    try:
        return asyncio.run(life.run())
    finally:
        listener.close()
        if life.engine is not None:
            life.engine.close()


class _Server(uvicorn.Server):
    """Leaves signals alone: at SIGTERM uvicorn would cut streams off without a last event."""

    @contextmanager
    def capture_signals(self) -> Any:  # noqa: ANN401 - as in the base class
        yield


def server_of(app: ASGIApp) -> uvicorn.Server:
    """What answers on a socket for an application; whoever runs it ends it, by its `should_exit`."""
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(LAST_EVENTS_S),
        )
    )


class _UnwantedError(Exception):
    """A signal has come before the engine was loaded."""


class _Life:
    """The life of one server."""

    def __init__(
        self,
        load: Callable[[OnProgress], Engine],
        config: ServeConfig,
        listener: socket.socket,
        started: Callable[[str], None],
    ) -> None:
        self.engine: Engine | None = None
        self._load, self._config, self._listener, self._started = load, config, listener, started
        self._service: Service | None = None
        self._front = Front()
        self._signals: list[signal.Signals] = []
        self._signalled = asyncio.Event()
        self._again = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reread)
        server = server_of(self._front)
        serving = asyncio.create_task(server.serve([self._listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(_LOOK_S / 5)
        living = asyncio.create_task(self._live())
        await asyncio.wait({serving, living}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit, server.force_exit = True, self._again.is_set()
        await serving
        return await living

    async def _live(self) -> int:
        """Load the engine, put the application over it, and wait for the end; the exit code."""
        try:
            self.engine = await asyncio.to_thread(self._load, self._check_wanted)
        except _UnwantedError:
            return INTERRUPTED if self._signals[0] == signal.SIGINT else 0
        service = self._service = Service(self.engine, self._config)
        if service.info.memory_error is not None:
            raise ConfigError(
                f"Got memory_path={self.engine.config.memory_path!r} but it cannot be used: {service.info.memory_error}"
            )
        self._front.app = app_of(service)
        gc.collect()
        gc.freeze()  # what was loaded stays: looking through it again took all threads 0.3 s now and then
        host, port = self._listener.getsockname()[:2]
        self._started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        return await self._end(service)

    def _check_wanted(self, _told: LoadProgress) -> None:
        """In the load's thread: raises if nobody wants the engine any more."""
        if self._signals:
            raise _UnwantedError

    def _stop(self, number: signal.Signals) -> None:
        self._signals.append(number)
        (self._again if self._signalled.is_set() else self._signalled).set()

    def _reread(self) -> None:
        if self._service is None:
            return  # they are still to be read
        try:
            self._service.tenants.reread()
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("the keys were read again")

    async def _end(self, service: Service) -> int:
        """Wait for the end and bring it about; the exit code."""
        config, calls = service.config, service.calls
        watcher = asyncio.create_task(_died(service))
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait({watcher, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if watcher.done():
            logger.critical("the engine's loop has died")
            await self._unless_again(idle(calls), LAST_EVENTS_S)
            return DIED
        watcher.cancel()
        calls.is_draining = True
        if self._signals[0] == signal.SIGTERM:
            await self._unless_again(asyncio.sleep(config.drain_notice_s))
        await self._unless_again(idle(calls), config.drain_s)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_end_all(calls), LAST_EVENTS_S)
        if self._signals[0] == signal.SIGINT:
            return INTERRUPTED
        return TERMINATED if self._again.is_set() else 0

    async def _unless_again(self, work: Coroutine[Any, Any, None], timeout_s: float | None = None) -> None:
        """Do `work` for so many seconds at most, and no longer than until a second signal."""
        working, again = asyncio.create_task(work), asyncio.create_task(self._again.wait())
        await asyncio.wait({working, again}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        again.cancel()
        await asyncio.gather(working, again, return_exceptions=True)


async def _died(service: Service) -> None:
    """Wait until the loop of the engine has ended by itself."""
    while not service.is_dead:
        await asyncio.sleep(_WATCH_S)


async def _end_all(calls: Calls) -> None:
    """Cut all calls short, and wait until their clients have been told."""
    await calls.cut_short()
    await idle(calls)


async def idle(calls: Calls) -> None:
    """Wait until no client is being answered any more."""
    while len(calls):
        await asyncio.sleep(_LOOK_S)
