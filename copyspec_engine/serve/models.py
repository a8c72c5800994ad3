"""GET /v1/models: what calls may name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from copyspec_engine.serve.schemas import ModelInfo, ModelList, answers
from copyspec_engine.serve.service import Service

__all__ = ["models_router"]


def models_router(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    def entry(name: str) -> dict[str, Any]:
        limit = service.info.max_model_len
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "copyspec",
            "max_model_len": limit,
            "copyspec": {
                "max_model_len": limit,
                "chat_format": service.engine.chat_format.model_dump(mode="json"),
                "sampling_defaults": service.info.sampling_defaults,
            },
        }

    @router.get("/v1/models", responses=answers(ModelList))
    async def list_models() -> JSONResponse:
        """The model, under each of its names."""
        return JSONResponse({"object": "list", "data": [entry(name) for name in service.models]})

    @router.get("/v1/models/{name:path}", responses=answers(ModelInfo))
    async def get_model(name: str) -> JSONResponse:
        """The model, if this is a name of it."""
        service.check_model(name)
        return JSONResponse(entry(name))

    return router
