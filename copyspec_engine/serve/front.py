"""What lies behind a server's socket: while the engine is loaded a few words that say so, then the application."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from copyspec_engine.serve.errors import ApiError, error_response

__all__ = ["Front"]

_RETRY_AFTER_S = 2.0


class Front:
    """ASGI for HTTP: from its first second on a server lives, and is not ready. That needs no key: nothing is in it."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        """The application, once there is an engine."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _loading(scope["path"]) if self.app is None else self.app
        await answer(scope, receive, send)


def _loading(path: str) -> JSONResponse:
    """What is said while the engine is loaded."""
    if path == "/health":
        return JSONResponse({"status": "ok"})
    error = ApiError(503, "loading", "The model is being loaded: ask again", retry_after_s=_RETRY_AFTER_S)
    return (
        JSONResponse({"status": "loading"}, 503, error.headers()) if path == "/ready" else error_response(error, path)
    )
