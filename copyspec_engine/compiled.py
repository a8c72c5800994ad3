"""Numba's `njit` with types kept, and with machine code that is kept for later processes.

Compiling everything takes about twenty seconds. The code is kept beside the sources, or in the user's cache folder
where that one is read-only; where neither can be written, every process compiles anew.

Numba judges by the file that holds a function whether kept machine code still fits. These functions call each other
across files and contain each other's constants, so here all of those files count.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.event import Event, Listener, install_listener

__all__ = ["SOURCES", "compiled", "counting_compilations"]

logger = logging.getLogger(__name__)

SOURCES = (
    "compiled.py",
    "drafting/kernels/branch_points.py",
    "drafting/kernels/candidates.py",
    "drafting/kernels/growth.py",
    "drafting/live_cost.py",
    "drafting/tree.py",
    "memory/acceptance.py",
    "memory/alternatives.py",
    "memory/index.py",
    "provenance/trail.py",
    "sampling/gumbel.py",
)
"""Files with compiled functions."""

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Compile a function at its first call with each type of arguments."""
    try:
        kept: Any = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder can be written
        return cast(_Function, njit(nogil=True)(function))
    file = getattr(kept._cache, "_cache_file", object())
    if not hasattr(file, "_source_stamp"):
        logger.warning("this version of Numba keeps machine code elsewhere; drafting is compiled anew in each process")
        return cast(_Function, njit(nogil=True)(function))
    file._source_stamp = _stamp()  # in Numba's own terms the digest of one file
    return cast(_Function, kept)


@cache
def _stamp() -> str:
    """Digest of all files with compiled functions."""
    folder = Path(__file__).parent
    return hashlib.blake2b(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()


@contextmanager
def counting_compilations(on_compile: Callable[[int], None]) -> Iterator[None]:
    """Tell how many functions this thread has begun to compile, at each of them; kept code is not compiled."""
    with install_listener("numba:compile", _Counting(on_compile)):
        yield


class _Counting(Listener):
    def __init__(self, on_compile: Callable[[int], None]) -> None:
        self._on_compile, self._count, self._thread = on_compile, 0, threading.get_ident()

    def on_start(self, event: Event) -> None:  # noqa: ARG002 - as Numba calls it
        """A function is compiled; Numba tells of those of all threads."""
        if threading.get_ident() == self._thread:
            self._count += 1
            self._on_compile(self._count)

    def on_end(self, event: Event) -> None:
        """Numba asks for this too."""
