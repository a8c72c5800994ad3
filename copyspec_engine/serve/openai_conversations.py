"""/v1/conversations: conversations that responses go on with by name."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from copyspec_engine.serve.bodies import Body, documented, read_body
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.serve.items import checked_items, messages_of
from copyspec_engine.serve.kept import StoredConversation, Told
from copyspec_engine.serve.openai_responses import known_items, stored_conversation
from copyspec_engine.serve.pages import PAGE, check_query, page_of, query
from copyspec_engine.serve.schemas import ItemList, NamedConversation, NamedConversationDeleted, answers
from copyspec_engine.serve.service import Service, body_tokens, ignored_header

__all__ = ["named_conversations_router"]

_LINKS = dict.fromkeys(("get_conversation", "list_items", "delete_conversation"), "name")


class ConversationBody(Body):
    """A conversation to be."""

    items: list[dict[str, Any]] | None = None
    """What was said already."""
    metadata: dict[str, str] | None = None
    """Given back as it is."""


def named_conversations_router(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post(
        "/v1/conversations",
        openapi_extra=documented(ConversationBody),
        responses=answers(NamedConversation, links=_LINKS),
    )
    async def create_conversation(request: Request) -> Response:
        """Make a conversation."""
        body = await read_body(request, ConversationBody, service.config)
        tenant, ignored = service.caller(request).tenant, dict[str, None]()
        items = checked_items("items", body.items or (), known_items(tenant), ignored)
        messages = messages_of("items", items, service.config) if items else []
        name = service.new_id("conv_", 48)
        made = {
            "id": name,
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": body.metadata or {},
        }
        told, size = Told(tuple(items), tuple(messages), name), body_tokens(request)
        tenant.named.keep(name, StoredConversation(made, told, size), size)
        if tenant.named.get(name) is None:
            raise ApiError(413, "body_too_large", "Got a longer conversation than this server keeps: shorten it")
        return JSONResponse(made, headers=ignored_header(ignored))

    @router.get("/v1/conversations/{name}", responses=answers(NamedConversation))
    async def get_conversation(request: Request, name: str) -> Response:
        """A conversation that is kept."""
        check_query(request, ())
        return JSONResponse(stored_conversation(service.caller(request).tenant, name).body)

    @router.get("/v1/conversations/{name}/items", openapi_extra=query(*PAGE), responses=answers(ItemList))
    async def list_items(request: Request, name: str) -> Response:
        """What was said in a conversation; the last item first."""
        return JSONResponse(page_of(request, stored_conversation(service.caller(request).tenant, name).told.items))

    @router.delete("/v1/conversations/{name}", responses=answers(NamedConversationDeleted))
    async def delete_conversation(request: Request, name: str) -> Response:
        """Erase a conversation, with all that is remembered and kept of it."""
        tenant = service.caller(request).tenant
        stored_conversation(tenant, name)
        await service.forget(tenant, name)
        return JSONResponse({"id": name, "object": "conversation.deleted", "deleted": True})

    return router
