"""Every error that this package raises on purpose.

CopySpecError
├── ConfigError                     an option, request or message has a value that cannot work
├── ModelLoadError                  weights or tokenizer could not be read, or do not fit in memory
├── UnsupportedModelError           the model loads, but its architecture cannot be served losslessly
├── ContextOverflowError            prompt plus requested output exceed the context or the KV pool
├── MemoryFileError                 the file or database given as memory_path cannot be used, read or written
├── EngineBusyError                 max_waiting requests wait, and there was no room for one more in time
├── EngineStoppedError              the engine was closed, or its loop died (`cause` says of what)
└── RequestFailedError              one request failed in its forward pass; the engine goes on

None of them is a ValueError, TypeError or KeyError: frameworks take those for a malformed answer of the model and go on
without a word (LlamaIndex's response synthesizers say "Empty Response").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "ConfigError",
    "ContextOverflowError",
    "CopySpecError",
    "EngineBusyError",
    "EngineStoppedError",
    "MemoryFileError",
    "ModelLoadError",
    "RequestFailedError",
    "UnsupportedModelError",
    "about",
    "missing_extra",
    "shortened",
]

_LONG = 8000
"""Characters beyond which a message is shortened: eight unknown fields, with all that there are instead, take fewer."""
_SHOWN = 3900
"""Characters of its beginning, and of its end, that are kept. There is room for what is left out to be told, and for
the words of an error that tells of this one: what was shortened is not cut again, and its count stays true."""


def shortened(message: str) -> str:
    """A message as it is told: of a long one the beginning, which names the value, and the end, which names the fix.

    Whoever gives a text of megabytes where it cannot be does not want it back.
    """
    if len(message) <= _LONG:
        return message
    return f"{message[:_SHOWN]}... ({len(message) - 2 * _SHOWN} characters) ...{message[-_SHOWN:]}"


class CopySpecError(Exception):
    """Base class of every error raised by this package.

    Args:
        message: names the value and the fix; see `shortened`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class ConfigError(CopySpecError):
    """A value that cannot work; the message names the value and what was expected.

    Attributes:
        param: the option or field that it is about, with the place in it where that is known ("temperature",
            "messages[2].content"); of several the first. None: none that the caller gave.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelLoadError(CopySpecError):
    """The model folder or hub name could not be loaded."""


class UnsupportedModelError(CopySpecError):
    """The model's architecture cannot be served losslessly by this engine."""


class ContextOverflowError(CopySpecError):
    """The request does not fit, found before any work was done.

    Attributes:
        num_tokens: tokens that the request needs.
        max_tokens: tokens that `what` can hold.
        what: "the model's context" or "the KV pool", in words.
    """

    def __init__(self, num_tokens: int, max_tokens: int, what: str = "the model's context") -> None:
        super().__init__(
            f"Got a request of {num_tokens} tokens but {what} holds {max_tokens}: shorten the messages, lower "
            "max_tokens, or use a model with a longer context"
        )
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.num_tokens, self.max_tokens, self.what)


class MemoryFileError(CopySpecError):
    """The memory file or database cannot be used; the message names it and what to do. It is never overwritten."""


class EngineBusyError(CopySpecError):
    """The queue is full; nothing of the request was done.

    Attributes:
        num_requests: requests that run or wait.
    """

    def __init__(self, num_requests: int) -> None:
        super().__init__(
            f"Got a request while {num_requests} run or wait, as many as max_running and max_waiting allow: try again "
            "later, or raise max_waiting"
        )
        self.num_requests = num_requests

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.num_requests,)


class EngineStoppedError(CopySpecError):
    """The engine takes no more requests.

    Attributes:
        cause: what stopped the loop; None if the engine was closed by its owner.
    """

    def __init__(self, cause: BaseException | None = None) -> None:
        reason = f"its loop failed with {type(cause).__name__}: {cause}" if cause else "it was closed"
        super().__init__(f"The engine has stopped: {reason}. Create a new Engine to go on")
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause,)


class RequestFailedError(CopySpecError):
    """One request failed while the engine was working on it; other requests are not affected."""


@contextmanager
def about(param: str) -> Iterator[None]:
    """What is found wrong meanwhile is wrong with this option, unless the `ConfigError` itself says with which."""
    try:
        yield
    except ConfigError as error:
        error.param = error.param or param
        raise


def missing_extra(package: str, extra: str) -> CopySpecError:
    """The error for an optional package that is not installed, with the exact command that installs it."""
    return CopySpecError(f'{package} is not installed. Run: pip install "copyspec[{extra}]"')
