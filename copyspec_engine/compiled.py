"""Numba's `njit` with types kept, and with machine code that is kept for later processes.

Compiling everything takes about twenty seconds. The code is kept in the cache folder, never beside the sources, where
an uninstallation would leave it; where the folder cannot be written, every process compiles anew.

Numba judges by the file that holds a function whether kept machine code still fits. These functions call each other
across files and contain each other's constants, so here all of those files count: each state of them has a folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit, typeof
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc
from numba.core.event import Event, Listener, install_listener, trigger_event
from numba.core.sigutils import normalize_signature

from copyspec_engine.values.folders import cache_dir, compiled_folder

__all__ = ["compile_for", "compiled", "compiled_address", "counting_compilations", "inlined", "sources"]

logger = logging.getLogger(__name__)

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""A division by zero gives infinity: loops that must look for one cannot be made into vector code."""
_PACKAGE = Path(__file__).parent
_UNUSED_S = 30 * 24 * 3600.0
"""After so long code that no process has asked for is removed."""
_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Compile a function at its first call with each type of arguments."""
    dispatcher: Any = njit(**_OPTIONS)(function)
    _keep_code_of(dispatcher, function)
    return cast(_Function, dispatcher)


def compile_for(function: Callable[..., object], *arguments: object) -> None:
    """Compile a function of `compiled` for arguments of these types, or load it, without calling it."""
    dispatcher: Any = function
    type_of: Any = typeof
    dispatcher.compile(tuple(type_of(argument) for argument in arguments))


def compiled_address(function: Callable[..., int], signature: object) -> int:
    """The address of a function, compiled now for one signature in Numba's types, for compiled code to call."""
    arguments, result = normalize_signature(signature)  # type: ignore[no-untyped-call]
    callback: Any = _Callback(function, (arguments, result), locals={}, options=dict(_OPTIONS))
    _keep_code_of(callback, function)
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


def _keep_code_of(compiling: Any, function: Callable[..., object]) -> None:  # noqa: ANN401 - of Numba
    """Have what Numba compiles of a function of this package kept, where there is a folder for it."""
    if Path(function.__code__.co_filename).is_relative_to(_PACKAGE) and _folder() is not None:
        keep: Any = _Kept
        kept = keep(function)
        if isinstance(kept._impl.locator, _Locator):  # else NUMBA_CACHE_LOCATOR_CLASSES names others, which know less
            compiling._cache = kept


class _Locator(_CacheLocator):
    """Tells Numba where the code of a function is kept."""

    def __init__(self, function: Any, file: str) -> None:  # noqa: ANN401 - of Python
        self._line = function.__code__.co_firstlineno
        self._room = ".".join(Path(file).relative_to(_PACKAGE).parent.parts)

    @classmethod
    def from_function(cls, py_func: object, py_file: str) -> _Locator:
        return cls(py_func, py_file)

    def get_cache_path(self) -> str:
        folder = _folder()
        assert folder is not None  # else nothing is kept
        return str(folder / self._room)

    def get_source_stamp(self) -> str:
        return _stamp()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Files(CompileResultCacheImpl):
    _locator_classes: list[type[object]] = [_Locator]  # noqa: RUF012 - as Numba declares it


class _Kept(FunctionCache):
    _impl_class = _Files

    def save_overload(self, sig: object, data: object) -> None:
        whole: Any = super()
        try:
            whole.save_overload(sig, data)
        except OSError as error:
            logger.warning("Compiled code is not kept: %s", error)


@cache
def _folder() -> Path | None:
    """Where the code of these very sources is kept; None, with a warning, if nothing can be."""
    root = compiled_folder()
    folder = root / _stamp()[:16]
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (cache_dir(), root):
            if not _is_ours(path):
                raise PermissionError(f"{path} is another user's, or others may write into it")
        folder.mkdir(exist_ok=True)
        os.utime(folder)
    except OSError as error:
        logger.warning(
            "Compiled code is not kept, so that each process takes a minute to compile it: %s. Set COPYSPEC_CACHE_DIR "
            "to a folder of your own that can be written",
            error,
        )
        return None
    for other in root.iterdir():
        if other.stat().st_mtime < time.time() - _UNUSED_S:
            shutil.rmtree(other, ignore_errors=True)  # of another version; whoever still needs it compiles anew
    return folder


def _is_ours(path: Path) -> bool:
    """Code that is kept is run as it is read: it must not be what another user has put there."""
    state = path.stat()
    return os.name == "nt" or (state.st_uid == os.getuid() and not state.st_mode & stat.S_IWOTH)


def inlined(function: _Function) -> _Function:
    """Write a function out wherever compiled code calls it, which costs compilation but no time to hand on tuples."""
    return cast(_Function, njit(inline="always", **_OPTIONS)(function))


def sources() -> list[Path]:
    """The files with compiled functions, and this one."""
    files = ((path, path.read_bytes()) for path in sorted(_PACKAGE.rglob("*.py")))
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
