"""A server on a port of this machine, for tests in which the wire matters."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from copyspec_engine import Engine
from copyspec_engine.serve.app import create_app
from copyspec_engine.serve.config import ServeConfig

__all__ = ["serving"]


@contextmanager
def serving(engine: Engine, config: ServeConfig | None = None) -> Iterator[str]:
    """Serves an engine within the `with` block, at the address that it gives."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, config), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
