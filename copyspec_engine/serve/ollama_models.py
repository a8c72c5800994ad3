"""Ollama's API: what is said of the model, and what only Ollama does with models."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from copyspec_engine.serve.bodies import Body, documented, read_body
from copyspec_engine.serve.errors import invalid, not_found
from copyspec_engine.serve.ollama import timestamp
from copyspec_engine.serve.ollama_bodies import LATEST, check_ollama_model
from copyspec_engine.serve.schemas import (
    OLLAMA_ERRORS,
    OllamaModelList,
    OllamaModelShown,
    OllamaRunningList,
    OllamaVersion,
    answers,
)
from copyspec_engine.serve.service import Service, ignored_header

__all__ = ["OllamaShowBody", "ollama_models_router"]

_NEVER = "9999-12-31T23:59:59Z"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_OTHER_MODEL = "the model is chosen as the server starts, copyspec serve MODEL"
_NO_EMBEDDINGS = "the model writes text, ask a server with an embedding model"
_ELSEWHERE = (
    ("POST", "/api/pull", _OTHER_MODEL),
    ("POST", "/api/push", "upload the model's files with the tools of the hub they go to"),
    ("POST", "/api/create", f"{_OTHER_MODEL}, its template with chat_template, and each call says its own options"),
    ("POST", "/api/copy", "other names of the model are model_aliases of the server"),
    ("DELETE", "/api/delete", "stop the server, then delete the model's files"),
    ("POST", "/api/embed", _NO_EMBEDDINGS),
    ("POST", "/api/embeddings", _NO_EMBEDDINGS),
    ("POST", "/api/blobs/{digest}", _OTHER_MODEL),
    ("GET", "/api/blobs/{digest}", _OTHER_MODEL),
)
"""Methods and paths of what Ollama does and this server does not, and what to do instead."""


class OllamaShowBody(Body):
    """Which model to show."""

    without_effect: ClassVar[tuple[str, ...]] = ("verbose", "system", "template", "options")

    model: str | None = None
    name: str | None = None
    """The old name of `model`."""
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


def ollama_models_router(service: Service) -> APIRouter:
    """The endpoints that do not answer."""
    router = APIRouter(responses=OLLAMA_ERRORS)

    @router.get("/api/tags", responses=answers(OllamaModelList))
    async def ollama_tags() -> JSONResponse:
        """The model, under each of its names."""
        listed = {"modified_at": timestamp(service.created), "capabilities": _capabilities(service)}
        return JSONResponse({"models": [{**entry, **listed} for entry in _entries(service)]})

    @router.get("/api/ps", responses=answers(OllamaRunningList))
    async def ollama_ps() -> JSONResponse:
        """The same: the model is loaded as long as the server runs."""
        info = service.info
        on_device = 0 if info.device == "cpu" else _size(service)
        loaded = {"expires_at": _NEVER, "size_vram": on_device, "context_length": info.max_model_len}
        return JSONResponse({"models": [{**entry, **loaded} for entry in _entries(service)]})

    @router.post("/api/show", openapi_extra=documented(OllamaShowBody), responses=answers(OllamaModelShown))
    async def ollama_show(request: Request) -> JSONResponse:
        """What is known of the model."""
        body = await read_body(request, OllamaShowBody, service.config)
        name = body.model or body.name
        if name is None:
            raise invalid("model", "Got no model for the body but it is required", "missing_parameter")
        check_ollama_model(name, service)
        return JSONResponse(_shown(service), headers=ignored_header(body.ignored()))

    @router.get("/api/version", responses=answers(OllamaVersion))
    async def ollama_version() -> JSONResponse:
        """The version of copyspec."""
        return JSONResponse({"version": importlib.metadata.version("copyspec")})

    for method, path, instead in _ELSEWHERE:
        router.add_api_route(path, _refusal(path, instead), methods=[method], include_in_schema=False)
    return router


def _refusal(path: str, instead: str) -> Callable[[], Coroutine[Any, Any, None]]:
    async def refuse() -> None:
        raise not_found(f"This server has no {path}: {instead}", "unsupported_endpoint")

    return refuse


def _entries(service: Service) -> list[dict[str, Any]]:
    """What every list of models says of each name."""
    facts = {
        "size": _size(service),
        "digest": hashlib.sha256(service.fingerprint.encode()).hexdigest(),
        "details": _details(service),
    }
    names = [name if ":" in name.rpartition("/")[2] else f"{name}{LATEST}" for name in service.models]
    return [{"name": name, "model": name, **facts} for name in names]


def _size(service: Service) -> int:
    """Bytes of the weights."""
    return service.info.weight_bytes + service.info.narrow_weight_bytes


def _family(service: Service) -> str:
    return re.sub("(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model)$", "", service.info.architecture).lower()


def _details(service: Service) -> dict[str, Any]:
    info, family = service.info, _family(service)
    kind = info.quantization or _DTYPES.get(info.dtype, info.dtype)
    millions = info.num_parameters / 1e6
    return {
        "parent_model": "",
        "format": "gguf" if kind.startswith("GGUF") else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.2f}M",
        "quantization_level": kind.removeprefix("GGUF "),
        "context_length": info.max_model_len,
    }


def _capabilities(service: Service) -> list[str]:
    form = service.engine.chat_format
    able = {"completion": True, "tools": form.tool_calling is not None, "thinking": form.reasons}
    return [name for name, can in able.items() if can]


def _shown(service: Service) -> dict[str, Any]:
    info, family = service.info, _family(service)
    return {
        "modelfile": f"FROM {service.model}\n",
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in info.sampling_defaults.items()),
        "details": _details(service),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": info.num_parameters,
            f"{family}.context_length": info.max_model_len,
        },
        "capabilities": _capabilities(service),
        "modified_at": timestamp(service.created),
    }
