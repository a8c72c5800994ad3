"""Numba's `njit` with types kept, and with machine code that is kept for later processes.

Compiling everything takes about twenty seconds. The code is kept beside the sources, or in the user's cache folder
where that one is read-only; where neither can be written, every process compiles anew.

Numba judges by the file that holds a function whether kept machine code still fits. These functions call each other
across files and contain each other's constants, so here all of those files count.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit, typeof
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.event import Event, Listener, install_listener, trigger_event
from numba.core.sigutils import normalize_signature

__all__ = ["compile_for", "compiled", "compiled_address", "counting_compilations", "inlined", "sources"]

logger = logging.getLogger(__name__)

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""A division by zero gives infinity: loops that must look for one cannot be made into vector code."""
_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Compile a function at its first call with each type of arguments."""
    try:
        kept: Any = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder can be written
        return cast(_Function, njit(**_OPTIONS)(function))
    if not _guarded(kept._cache):
        return cast(_Function, njit(**_OPTIONS)(function))
    return cast(_Function, kept)


def compile_for(function: Callable[..., object], *arguments: object) -> None:
    """Compile a function of `compiled` for arguments of these types, or load it, without calling it."""
    dispatcher: Any = function
    type_of: Any = typeof
    dispatcher.compile(tuple(type_of(argument) for argument in arguments))


def compiled_address(function: Callable[..., int], signature: object) -> int:
    """The address of a function, compiled now for one signature in Numba's types, for compiled code to call."""
    arguments, result = normalize_signature(signature)  # type: ignore[no-untyped-call]
    callback: Any = _Callback(function, (arguments, result), locals={}, options=dict(_OPTIONS))
    with suppress(RuntimeError):  # no folder can be written
        callback.enable_caching()
        if not _guarded(callback._cache):
            callback._cache = NullCache()
    callback.compile()
    _callbacks.append(callback)
    return cast(int, callback.address)


class _Callback(CFunc):
    def _compile_uncached(self) -> object:
        whole: Any = super()
        with trigger_event("numba:compile"):  # as for all other functions
            return whole._compile_uncached()


_callbacks: list[object] = []
"""Their machine code lasts as long as they do."""


def _guarded(cache: Any) -> bool:  # noqa: ANN401
    """Let what Numba keeps count only while none of all files with compiled functions has changed."""
    file: Any = getattr(cache, "_cache_file", None)
    if not hasattr(file, "_source_stamp"):
        logger.warning("this version of Numba keeps machine code elsewhere; drafting is compiled anew in each process")
        return False
    file._source_stamp = _stamp()  # in Numba's own terms the digest of one file
    file._load_index = _forgiving(file._load_index)
    return True


def _forgiving(load_index: Callable[[], dict[Any, Any]]) -> Callable[[], dict[Any, Any]]:
    """Numba reads what is kept before it looks whether it is of these files; others' may name types long gone."""

    def load() -> dict[Any, Any]:
        try:
            return load_index()
        except (AttributeError, ImportError):
            return {}

    return load


def inlined(function: _Function) -> _Function:
    """Write a function out wherever compiled code calls it, which costs compilation but no time to hand on tuples."""
    return cast(_Function, njit(inline="always", **_OPTIONS)(function))


def sources() -> list[Path]:
    """The files with compiled functions, and this one."""
    files = ((path, path.read_bytes()) for path in sorted(Path(__file__).parent.rglob("*.py")))
    return [
        path
        for path, text in files
        if re.search(rb"^@(compiled|inlined|intrinsic_of)\b|^def compiled\(", text, re.MULTILINE)
    ]


@cache
def _stamp() -> str:
    """Digest of all files with compiled functions."""
    return hashlib.blake2b(b"".join(path.read_bytes() for path in sources())).hexdigest()


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
