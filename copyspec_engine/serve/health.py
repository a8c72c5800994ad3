"""GET /health, /ready and /version: whether to restart the server, whether to send it calls, and what it is."""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter
from starlette.responses import JSONResponse

from copyspec_engine.serve.schemas import HealthStatus, ReadyStatus, ServerVersion, answers
from copyspec_engine.serve.service import Service

__all__ = ["health_router"]


def health_router(service: Service) -> APIRouter:
    """The endpoints. They ask nothing of the engine's loop, which may be busy, and need no key."""
    router = APIRouter()

    @router.get("/health", responses={**answers(HealthStatus), 503: {"model": HealthStatus}})
    async def health() -> JSONResponse:
        """503: the engine has died, and only a restart helps."""
        return JSONResponse({"status": "dead"}, 503) if service.is_dead else JSONResponse({"status": "ok"})

    @router.get("/ready", responses={**answers(ReadyStatus), 503: {"model": ReadyStatus}})
    async def ready() -> JSONResponse:
        """503: new calls are refused, because the server is on its way out or has died."""
        if service.is_dead or service.calls.is_draining:
            status = "dead" if service.is_dead else "draining"
            return JSONResponse({"status": status}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ready", "in_flight": len(service.calls)})

    @router.get("/version", responses=answers(ServerVersion))
    async def version() -> JSONResponse:
        """The version of copyspec."""
        return JSONResponse({"version": importlib.metadata.version("copyspec"), "model": service.model})

    return router
