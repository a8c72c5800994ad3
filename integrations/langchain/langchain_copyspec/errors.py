"""The engine's errors in a form that code written for LangChain also catches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core.exceptions import ContextOverflowError as LangChainContextOverflowError

import copyspec_engine

__all__ = ["ContextOverflowError", "RequestTimeoutError", "langchain_errors"]


class ContextOverflowError(copyspec_engine.ContextOverflowError, LangChainContextOverflowError):
    """The engine's overflow error, which is also LangChain's: middleware that shortens histories catches it."""


class RequestTimeoutError(copyspec_engine.CopySpecError, TimeoutError):
    """A call took longer than `timeout`; its request has been cancelled in the engine."""


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise the engine's context overflow as `ContextOverflowError`, with the same message and counts."""
    try:
        yield
    except copyspec_engine.ContextOverflowError as error:
        raise ContextOverflowError(error.num_tokens, error.max_tokens, error.what) from error
