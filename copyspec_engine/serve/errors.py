"""Every error as its clients know it: one table from what is raised to status, type, code and whether to retry."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from copyspec_engine.values.errors import (
    ConfigError,
    ContextOverflowError,
    CopySpecError,
    EngineBusyError,
    EngineStoppedError,
    MemoryFileError,
    RequestFailedError,
    UnsupportedModelError,
    shortened,
)

__all__ = ["ApiError", "api_error", "by_names", "error_response", "invalid", "not_found"]

logger = logging.getLogger(__name__)

_INVALID, _SERVER, _RATE = "invalid_request_error", "server_error", "rate_limit_error"


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of the answer.
        code: for programs, in snake_case.
        message: for people; names the value and the fix.
        param: the field of the body that is to blame, as "messages[0].content"; shortened as the message is.
        kind: OpenAI's `type`; default: by the status.
        retry_after_s: seconds after which the same call may succeed; None: it never will.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        *,
        kind: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status, self.code, self.message = status, code, shortened(message)
        super().__init__(self.message)
        self.param = None if param is None else shortened(param)
        self.kind = kind or (_RATE if status == 429 else _SERVER if status >= 500 else _INVALID)
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def ollama_body(self) -> dict[str, Any]:
        """Ollama's form."""
        return {"error": self.message}

    def headers(self) -> dict[str, str]:
        """When to try again, or that it is no use."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        return {"retry-after": str(max(1, round(self.retry_after_s)))}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field of the body that cannot be as it is."""
    return ApiError(400, code, message, param)


def not_found(message: str, code: str = "not_found", param: str | None = None) -> ApiError:
    """There is no such thing, or it is somebody else's."""
    return ApiError(404, code, message, param)


_TABLE: tuple[tuple[type[CopySpecError], int, str, float | None], ...] = (
    (ContextOverflowError, 400, "context_length_exceeded", None),
    (ConfigError, 400, "invalid_value", None),
    (UnsupportedModelError, 400, "unsupported_content", None),
    (EngineBusyError, 429, "engine_busy", 1.0),
    (EngineStoppedError, 503, "engine_stopped", 5.0),
    (RequestFailedError, 500, "request_failed", 1.0),
    (MemoryFileError, 500, "memory_file_error", 1.0),
)
"""Errors of the engine: status, code, and seconds after which a retry may help."""


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error; one that nobody expects is logged and told as such."""
    if isinstance(error, ApiError):
        return error
    for kind, status, code, retry in _TABLE:
        if isinstance(error, kind):
            param, message = getattr(error, "param", None), str(error)
            if isinstance(error, ContextOverflowError):
                param = param or "messages"
                # agents and gateways find the limit by these words, and then shorten the chat
                message = f"{message}. This model's maximum context length is {error.max_tokens} tokens"
            if isinstance(error, MemoryFileError):  # names folders, or host and user of a database: for no tenant
                logger.error("%s", error)
                message = "What is kept of conversations could not be read or changed: ask again; the log says why"
            return ApiError(status, code, message, param, retry_after_s=retry)
    if isinstance(error, CopySpecError):  # an extra that is not installed
        return ApiError(501, "not_installed", str(error))
    logger.error("an unexpected error", exc_info=error)
    return ApiError(500, "internal_error", "The server failed in a way that it did not expect; its log says more")


@contextmanager
def by_names(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the engine inside are told of by the fields of a body.

    Args:
        names: our names of fields that the body calls otherwise, and what it calls them.
    """
    try:
        yield
    except CopySpecError as error:
        told = api_error(error)
        ours = re.match(r"\w+", told.param or "")
        if ours is not None and ours[0] in names:
            told.param = names[ours[0]]
        raise told from error


def error_response(error: Exception, path: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The whole answer of a call that failed before its first byte, in the form of the API that its path belongs to."""
    told = api_error(error)
    body = told.ollama_body() if path.startswith("/api/") else told.body()
    return JSONResponse(body, told.status, {**told.headers(), **(headers or {})})


def http_error(status: int, detail: object) -> ApiError:
    """What routing refuses: a path or a method that is none."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(status, codes.get(status, "http_error"), str(detail or HTTPStatus(status).phrase))
