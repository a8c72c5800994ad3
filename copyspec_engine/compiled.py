"""Numba's `njit` with types kept, and with machine code that is kept for later processes.

Numba judges by the file that holds a function whether kept machine code still fits. These functions call each other
across files and contain each other's constants, so here all of those files count.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

__all__ = ["compiled"]

logger = logging.getLogger(__name__)

_SOURCES = ("compiled.py", "copy_index.py", "growth.py", "survival.py")

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Compile a function at its first call with each type of arguments."""
    dispatcher: Any = njit(cache=True, nogil=True)(function)
    try:
        # (time, size) of one file in Numba's own terms
        dispatcher._cache._cache_file._source_stamp = _stamp()
    except AttributeError:
        logger.warning("this version of Numba keeps machine code elsewhere; drafting is compiled anew in each process")
        dispatcher = njit(nogil=True)(function)
    compiled_function: _Function = dispatcher
    return compiled_function


@cache
def _stamp() -> str:
    """Digest of all files with compiled functions."""
    folder = Path(__file__).parent
    return hashlib.blake2b(b"".join((folder / name).read_bytes() for name in _SOURCES)).hexdigest()
