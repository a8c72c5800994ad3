"""Servers as processes: `copyspec serve` on a free port of this machine, with keys and a memory file."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

__all__ = ["TENANTS", "Server", "key_of", "wait_until", "write_keys"]

TENANTS = ("ann", "bob", "cleo", "dave")
_START_S = 180.0
"""Seconds that a start may take, the first compilation included."""


def key_of(tenant: str) -> dict[str, str]:
    """The header by which a tenant is let in."""
    return {"Authorization": f"Bearer key-of-{tenant}"}


def write_keys(path: Path, tenants: Sequence[str]) -> None:
    """Let these tenants in, and nobody else."""
    lines = [f"{name} {hashlib.sha256(f'key-of-{name}'.encode()).hexdigest()}\n" for name in tenants]
    path.touch(mode=0o600)
    path.write_text("".join(lines), encoding="utf-8")


def wait_until(text: str, holds: object, within_s: float = 30.0) -> None:
    """Wait until `holds()` is true.

    Raises:
        TimeoutError: it is not within so many seconds; `text` says what was waited for.
    """
    assert callable(holds)
    end = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {within_s:.0f} s in vain until {text}")
        time.sleep(0.02)


class Server:
    """One process of `copyspec serve`; a context manager that kills it at the end if it still runs.

    Args:
        model: that it serves.
        folder: for its memory file, its keys and its log.
        options: of the command, by their names in Python.
    """

    def __init__(self, model: str, folder: Path, options: Mapping[str, object] | None = None) -> None:
        self.model, self.folder, self.url = model, folder, ""
        self.keys, self.memory = folder / "keys", folder / "memory.db"
        folder.mkdir(parents=True, exist_ok=True)
        write_keys(self.keys, TENANTS)
        given = {"port": 0, "api_keys": self.keys, "memory_path": self.memory, **(options or {})}
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self.log = folder / f"log-{sum(1 for _ in folder.glob('log-*'))}.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "copyspec_engine", "serve", model, *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COPYSPEC_API_KEY": ""},
            )

    def __enter__(self) -> Server:
        """Wait until it serves."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"http://[^/\s]+", line)
            if found:
                self.url = found[0]
                return self
        raise RuntimeError(f"the server ended with {self.process.wait()} before it served: see {self.log}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    @property
    def said(self) -> list[str]:
        """The lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, within_s: float = 90.0) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(within_s)

    def client(self, tenant: str = TENANTS[0]) -> httpx.Client:
        """A client of a tenant."""
        return httpx.Client(base_url=self.url, headers=key_of(tenant), timeout=120)
