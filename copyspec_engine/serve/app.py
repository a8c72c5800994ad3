"""The application: every endpoint of a server, behind its gate."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp

from copyspec_engine.engine.engine import Engine
from copyspec_engine.serve.bodies import body_schemas
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.docs import POLICY, docs_page
from copyspec_engine.serve.errors import ApiError, error_response, http_error, not_found
from copyspec_engine.serve.gate import OPEN, Gate
from copyspec_engine.serve.health import health_router
from copyspec_engine.serve.inspection import conversations_router, explain_router, tokens_router
from copyspec_engine.serve.metrics import metrics_router
from copyspec_engine.serve.models import models_router
from copyspec_engine.serve.ollama import ollama_router
from copyspec_engine.serve.ollama_bodies import LATEST
from copyspec_engine.serve.ollama_models import ollama_models_router
from copyspec_engine.serve.openai_chat import chat_router
from copyspec_engine.serve.openai_completions import completions_router
from copyspec_engine.serve.openai_conversations import named_conversations_router
from copyspec_engine.serve.openai_responses import responses_router
from copyspec_engine.serve.schemas import ERRORS
from copyspec_engine.serve.service import Service
from copyspec_engine.serve.site import page_router
from copyspec_engine.values.errors import CopySpecError

__all__ = ["app_of", "create_app"]

_ROUTERS = (
    *(chat_router, completions_router, responses_router, named_conversations_router, models_router),
    *(tokens_router, conversations_router, explain_router, ollama_router, ollama_models_router, health_router),
)


def create_app(engine: Engine, config: ServeConfig | None = None) -> ASGIApp:
    """An engine as an ASGI application.

    Args:
        engine: that answers; whoever made it closes it, behind the application's end.
        config: default: `ServeConfig()`.

    Raises:
        ConfigError: the keys cannot be read.
    """
    return app_of(Service(engine, config or ServeConfig()))


def app_of(service: Service) -> ASGIApp:
    """A service as an ASGI application."""
    app = FastAPI(
        title="copyspec",
        version=importlib.metadata.version("copyspec"),
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        generate_unique_id_function=lambda route: route.name,
    )
    for router in (*_ROUTERS, page_router) if service.config.page else _ROUTERS:
        app.include_router(router(service))
    app.include_router(metrics_router(service.metrics))
    app.openapi = lambda: _openapi(app, service)  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(RequestValidationError, _routing_error)
    for kind in (ApiError, CopySpecError, Exception):
        app.add_exception_handler(kind, _error)
    gate: ASGIApp = Gate(app, service)
    if service.config.cors_origins:
        gate = CORSMiddleware(
            gate,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Session-ID", "X-Request-ID", "X-Copyspec-Ignored", "Retry-After"],
        )
    return gate


_ELSEWHERE = (
    "embeddings",
    "audio",
    "images",
    "files",
    "batches",
    "fine_tuning",
    "moderations",
    "assistants",
    "threads",
)


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


async def _routing_error(request: Request, error: Exception) -> Response:
    status, path = error.status_code if isinstance(error, HTTPException) else 400, request.url.path
    if status == 404 and path.startswith(tuple(f"/v1/{name}" for name in _ELSEWHERE)):
        return error_response(
            not_found(f"This server has no {path}: it writes text only", "unsupported_endpoint"), path
        )
    if status == 404:
        return error_response(not_found(f"There is no {request.method} {path} here: see /docs"), path)
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if status == 405:  # each route knows of its own methods alone
        headers["Allow"] = ", ".join(method for method in _METHODS if _has(request, method))
    return error_response(http_error(status, detail), path, headers)


def _has(request: Request, method: str) -> bool:
    """Whether the path of a request takes a method; HEAD wherever GET, see `Gate`."""
    scope = {**request.scope, "method": "GET" if method == "HEAD" else method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


async def _error(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path)


def _bodies(service: Service) -> dict[str, Any]:
    """The schemas of bodies, with the names that the model goes by."""
    schemas = body_schemas()
    for name, schema in schemas.items():
        if "model" in schema.get("properties", {}):
            known = [*service.models, *(f"{model}{LATEST}" for model in service.models if name.startswith("Ollama"))]
            model = schema["properties"]["model"]
            optional = [None] if "anyOf" in model else []
            schema["properties"]["model"] = {"enum": known + optional, "description": model.get("description", "")}
    return schemas


def _openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document["components"]["schemas"] |= _bodies(service)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for said in methods.values():
                said["security"] = [] if path in OPEN or service.tenants.is_open else [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema
