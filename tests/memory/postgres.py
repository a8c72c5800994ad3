"""A PostgreSQL server for tests, in a folder of its own, on a socket there."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

__all__ = ["Server", "a_server"]

_SETTINGS = ("listen_addresses=", "fsync=off", "shared_buffers=16MB", "max_connections=40")


class Server:
    """Runs until `stop`, and again after `start`, with the same data."""

    def __init__(self, folder: Path, user: dict[str, Any]) -> None:
        self.data = folder / "data"
        self._folder, self._user, self._numbers = folder, user, itertools.count()
        command = ["initdb", "-D", str(self.data), "-U", "copyspec", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment(), cwd=folder, **user)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = [part for setting in _SETTINGS for part in ("-c", setting)]
        command = ["postgres", "-D", str(self.data), "-k", str(self._folder), *settings]
        with (self._folder / "log").open("a") as log:
            process = subprocess.Popen(command, stderr=log, env=_environment(), cwd=self._folder, **self._user)
        self._process = process
        while not self._answers():
            assert process.poll() is None, (self._folder / "log").read_text(encoding="utf-8")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            self.sql("SELECT 1", self.url("postgres"))
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Every connection is lost."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        """Stop, and leave the data as it is."""
        self.stop(signal.SIGQUIT)

    def url(self, database: str) -> str:
        return f"postgresql://copyspec@/{database}?host={self._folder}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"test{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name}", self.url("postgres"))
        return self.url(name)

    def sql(self, query: str, url: str, *params: object) -> list[tuple[Any, ...]]:
        """What a statement gives that nobody of ours has written."""
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(query.encode(), params)
            return cursor.fetchall() if cursor.description else []


def _environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LC_ALL": "C"}


@contextmanager
def a_server() -> Iterator[Server]:
    """One that is stopped in the end; skips where there is none."""
    missing = [program for program in ("initdb", "postgres") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs PostgreSQL's programs, of which {missing[0]} is not on the PATH")
    user: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short, as the names of sockets must be
    try:
        if os.geteuid() == 0:  # the server refuses to run as root
            account = pwd.getpwnam("nobody")
            user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(folder, account.pw_uid, account.pw_gid)
        with closing(Server(folder, user)) as server:
            server.start()
            yield server
    finally:
        shutil.rmtree(folder)
