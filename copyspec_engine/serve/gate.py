"""The gate that every request comes through: who it is for, where it comes from, whose key it has; and what it was.

A HEAD is answered as the GET of its path is, without the body: monitors and balancers ask that way.
Denies by default: a path needs a key unless it is in `OPEN`, or is the page's. Neither keys nor bodies are logged.
"""

from __future__ import annotations

import logging
import secrets
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from copyspec_engine.serve.config import is_loopback
from copyspec_engine.serve.errors import ApiError, error_response
from copyspec_engine.serve.service import Service
from copyspec_engine.serve.site import PAGE_PATHS
from copyspec_engine.serve.tenants import DEFAULT_TENANT, Tenant, given_key

__all__ = ["OPEN", "Gate"]

logger = logging.getLogger(__name__)

OPEN = frozenset({"/health", "/ready", "/version", "/docs", "/openapi.json"})
"""Paths that need no key: nothing that anybody has asked is told there, and a browser could send none."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MOST_ID_LETTERS = 128


class Gate:
    """ASGI around the application.

    Args:
        app: what lies behind.
        service: whose keys and hosts count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(scope, send)
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            scope["copyspec.tenant"] = self._tenant(scope["path"], headers)
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}
            await self._app(scope, receive, passage.send)
        except Exception as error:  # one request that fails harms no other
            if passage.status is None:
                await error_response(error, scope["path"])(scope, receive, passage.send)
        finally:
            self._log(scope, passage)

    def _check_host(self, headers: Headers) -> None:
        """Refuse pages of other sites, whether they come under a name of their own or not."""
        config, host = self._service.config, headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        known = name in config.allowed_hosts or host in config.allowed_hosts or "*" in config.allowed_hosts
        if not known and (config.allowed_hosts or config.is_local) and not (config.is_local and is_loopback(name)):
            raise ApiError(
                403, "host_not_allowed", f"Got a request for the host {host!r}: name it in allowed_hosts to allow it"
            )
        origin = headers.get("origin")
        if (
            origin is not None
            and origin.lower() not in config.cors_origins
            and origin.partition("://")[2].lower() != host
        ):
            raise ApiError(
                403,
                "origin_not_allowed",
                f"Got a request of a page from {origin!r}: name it in cors_origins to allow it",
            )

    def _tenant(self, path: str, headers: Headers) -> Tenant:
        """Whoever asks.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        tenants = self._service.tenants
        key = given_key(headers)
        tenant = tenants.of_key(key)
        if tenant is not None:
            return tenant
        if path in OPEN or (self._service.config.page and path in PAGE_PATHS):
            return tenants.named(DEFAULT_TENANT)
        said = "a wrong API key" if key else "no API key"
        raise ApiError(
            401,
            "invalid_api_key",
            f"Got {said} but this server needs one: send it as Authorization: Bearer KEY",
            kind="authentication_error",
        )

    def _log(self, scope: Scope, passage: _Passage) -> None:
        tenant: Tenant | None = scope.get("copyspec.tenant")
        endpoint = getattr(scope.get("route"), "path", "other")
        method = passage.method if passage.method in _METHODS else "other"
        self._service.metrics.requests.labels(endpoint, method, passage.status or 0).inc()
        logger.info(
            "%s %s %s tenant=%s request=%s %.0f ms",
            passage.method,
            quote(scope["path"]),
            passage.status,
            "-" if tenant is None else tenant.name,
            passage.request_id,
            1000 * (time.perf_counter() - passage.began_s),
        )


class _Passage:
    """One request on its way back: its status, and the id by which client and log speak of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.status: int | None = None
        self.method: str = scope["method"]
        """As it was asked by."""
        self.began_s = time.perf_counter()
        headers = Headers(scope=scope)
        self._closes = "content-length" in headers and "transfer-encoding" in headers
        """What comes behind a body whose length was told twice may be taken for another request (RFC 9112, 6.1)."""
        given = headers.get("x-request-id", "")
        is_id = 0 < len(given) <= _MOST_ID_LETTERS and given.isascii() and given.isprintable()
        self.request_id = given if is_id else f"req_{secrets.token_hex(12)}"
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-ID"] = self.request_id
            if self._closes:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif self.method == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)
