"""GET / and /page/...: the page, a chat and an editor that show what was copied. Plain files without a build step."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from copyspec_engine.serve.service import Service
from copyspec_engine.values.html import look

__all__ = ["PAGE_PATHS", "page_router"]

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FOLDER = files("copyspec_engine.serve") / "page"
_FILES = {file.name: file.read_bytes() for file in _FOLDER.iterdir() if file.name.endswith(tuple(_KINDS))}
_FILES["look.css"] = look().encode()
PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in _FILES if name != "index.html")})
"""What a browser fetches before anybody could have told it a key; there is nothing in it."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_router(_service: Service) -> APIRouter:
    """The page's files."""
    router = APIRouter(include_in_schema=False)

    def put(path: str, name: str) -> None:
        kind = _KINDS[name[name.rindex(".") :]]

        async def file() -> Response:
            return Response(_FILES[name], headers=_HEADERS, media_type=f"{kind}; charset=utf-8")

        router.add_api_route(path, file, methods=["GET"])

    put("/", "index.html")
    for name in sorted(_FILES):
        if name != "index.html":
            put(f"/page/{name}", name)
    return router
