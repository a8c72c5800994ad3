"""What a tenant may look at: tokens of texts, what his own conversations remember, where his answers came from.

POST /tokenize and /detokenize; /v1/copyspec/conversations, which can be listed, looked at, exported, imported and
forgotten; POST /v1/copyspec/explain/{id of an answer}. What is another tenant's is as unknown as what never was.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from copyspec_engine.engine.engine import Engine
from copyspec_engine.serve.bodies import Body, documented, read_body, read_json, read_nothing
from copyspec_engine.serve.conversations import checked_session, engine_session
from copyspec_engine.serve.errors import by_names, invalid, not_found
from copyspec_engine.serve.kept import Answered
from copyspec_engine.serve.messages import checked_messages, checked_tools
from copyspec_engine.serve.pages import check_query
from copyspec_engine.serve.schemas import (
    ConversationDeleted,
    ConversationExport,
    ConversationImported,
    ConversationList,
    ConversationMemory,
    ExplainedAnswers,
    TextOfTokens,
    TokensOfText,
    answers,
)
from copyspec_engine.serve.service import Service, ignored_header
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.info import SessionInfo

__all__ = ["conversations_router", "explain_router", "tokens_router"]


class TokenizeBody(Body):
    """A text, or messages for the chat template."""

    model: str | None = None
    """A name of the model that GET /v1/models gives."""
    prompt: str | None = None
    add_special_tokens: bool | None = None
    """Begin with the special tokens that the tokenizer begins a text with; default: yes."""
    messages: list[dict[str, Any]] | None = None
    """A chat, instead of the prompt."""
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    """True only: the tokens are those that the model would read for an answer."""
    session_id: str | None = None
    """A conversation, where no header names it: what it has said is spelled as it was written then."""
    return_token_strs: bool | None = None
    """Give the text of each token too."""


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    """A name of the model that GET /v1/models gives."""
    tokens: list[int]
    skip_special_tokens: bool | None = None
    """Leave special tokens out rather than write their names; default: no."""


def tokens_router(service: Service) -> APIRouter:
    """POST /tokenize and /detokenize."""
    router, engine = APIRouter(), service.engine

    @router.post("/tokenize", openapi_extra=documented(TokenizeBody), responses=answers(TokensOfText))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of a chat as the model would read it."""
        body = await read_body(request, TokenizeBody, service.config)
        if body.model is not None:
            service.check_model(body.model)
        tokens, ignored = await _tokens(service, request, body)
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": service.info.max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = await asyncio.to_thread(
                lambda: [engine.decode([token], skip_special_tokens=False) for token in tokens]
            )
        return JSONResponse(answer, headers=ignored)

    @router.post("/detokenize", openapi_extra=documented(DetokenizeBody), responses=answers(TextOfTokens))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        body = await read_body(request, DetokenizeBody, service.config)
        if body.model is not None:
            service.check_model(body.model)
        if body.tokens:
            with by_names({"prompt_token_ids": "tokens"}):
                # It refuses ids that are none.
                await asyncio.to_thread(lambda: engine.tokenize(GenerationRequest(prompt_token_ids=body.tokens)))
        skip = bool(body.skip_special_tokens)
        text = await asyncio.to_thread(engine.decode, body.tokens, skip_special_tokens=skip)
        return JSONResponse({"prompt": text})

    return router


async def _tokens(service: Service, request: Request, body: TokenizeBody) -> tuple[list[int], dict[str, str]]:
    """What /tokenize was asked for, and the headers of its answer."""
    engine = service.engine
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "Got neither or both of prompt and messages but expected one of them")
    if body.prompt is not None:
        for name in ("tools", "chat_template_kwargs", "session_id", "add_generation_prompt"):
            if getattr(body, name) is not None:
                raise invalid(name, f"Got {name} with prompt but it belongs to messages: leave it out")
        special = body.add_special_tokens is not False
        return await asyncio.to_thread(engine.encode, body.prompt, special_tokens=special), {}
    if body.add_special_tokens is not None:
        raise invalid("add_special_tokens", "Got add_special_tokens with messages: the chat template decides it")
    if body.add_generation_prompt is False:
        raise invalid("add_generation_prompt", "Got add_generation_prompt=false but expected true, or nothing")
    messages, ignored = checked_messages(body.messages or (), service.config)
    tools, _ = checked_tools(body.tools or (), service.config)
    caller = service.caller(request)
    named = caller.named({"session_id": body.session_id})
    asked = GenerationRequest(
        messages=messages,
        tools=tools or None,
        chat_template_kwargs=body.chat_template_kwargs or {},
        session_id=None if named is None else engine_session(caller.tenant, named),
    )
    return await asyncio.to_thread(engine.tokenize, asked), ignored_header(ignored)


_CONVERSATIONS = "/v1/copyspec/conversations"


def conversations_router(service: Service) -> APIRouter:
    """/v1/copyspec/conversations."""
    router, engine, place = APIRouter(), service.engine, _CONVERSATIONS
    router.include_router(_exports_router(service))  # first: their paths are those of a conversation whose name goes on

    @router.get(place, responses=answers(ConversationList))
    async def list_remembered(request: Request) -> Response:
        """The tenant's conversations whose texts are remembered, the one that was not used for longest first."""
        check_query(request, ())
        found = await asyncio.to_thread(_own, engine, service.caller(request).tenant.name)
        return JSONResponse({"object": "list", "data": [_info(name, info) for name, info in found.items()]})

    @router.get(place + "/{name:path}", responses=answers(ConversationMemory))
    async def get_remembered(request: Request, name: str) -> Response:
        """What a conversation remembers, in numbers."""
        check_query(request, ())
        tenant = service.caller(request).tenant
        checked_session(name, "id")
        info = (await asyncio.to_thread(_own, engine, tenant.name)).get(name)
        if info is None:
            raise _unknown(name)
        memory = engine.memory(engine_session(tenant, name))
        sizes = await asyncio.to_thread(lambda: {"num_texts": len(memory), "num_bytes": memory.num_bytes})
        return JSONResponse({**_info(name, info), **sizes})

    @router.delete(place + "/{name:path}", responses=answers(ConversationDeleted))
    async def forget_remembered(request: Request, name: str) -> Response:
        """Erase a conversation: its texts in memory and on disk, its KV, and its answers that are kept."""
        tenant = service.caller(request).tenant
        if not await service.forget(tenant, checked_session(name, "id")):
            raise _unknown(name)
        return JSONResponse({"id": name, "object": "copyspec.conversation.deleted", "deleted": True})

    return router


def _exports_router(service: Service) -> APIRouter:
    """What a conversation remembers, as a whole, out and in."""
    router, engine, place = APIRouter(), service.engine, _CONVERSATIONS

    @router.get(place + "/{name:path}/export", responses=answers(ConversationExport))
    async def export_remembered(request: Request, name: str) -> Response:
        """All that a conversation remembers."""
        check_query(request, ())
        session = engine_session(service.caller(request).tenant, checked_session(name, "id"))
        memory = engine.memory(session)

        def exported() -> str:
            told = json.loads(memory.export())
            if not told["texts"]:
                raise _unknown(name)
            return json.dumps({**told, "session_id": name, "num_bytes": memory.num_bytes}, ensure_ascii=False)

        return Response((await asyncio.to_thread(exported)).encode(), media_type="application/json")

    @router.post(
        place + "/{name:path}/import",
        openapi_extra=documented(ConversationExport),
        responses=answers(ConversationImported),
    )
    async def import_remembered(request: Request, name: str) -> Response:
        """Add what an export has given to a conversation, which need not exist."""
        tenant = service.caller(request).tenant
        session = engine_session(tenant, checked_session(name, "id"))
        largest = service.config.largest_import(engine.config.memory_tokens)
        told = await read_json(request, service.config, largest)
        with by_names({"exported": "texts"}):
            memory = engine.memory(session)
            added = await asyncio.to_thread(memory.load, told, owner=tenant.name)
        return JSONResponse({"id": name, "object": "copyspec.conversation.imported", "num_texts": added})

    return router


def _own(engine: Engine, tenant: str) -> dict[str, SessionInfo]:
    """A tenant's sessions by his own names for them."""
    sessions = ((info.session_id.partition("/"), info) for info in engine.sessions())
    return {name: info for (owner, _, name), info in sessions if owner == tenant}


def _info(name: str, info: SessionInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "copyspec.conversation",
        "num_tokens": info.num_tokens,
        "last_used_at": info.last_used_s,
    }


def _unknown(name: str) -> Exception:
    return not_found(f"There is no conversation {name!r} here, or none of its texts are kept")


def explain_router(service: Service) -> APIRouter:
    """POST /v1/copyspec/explain/{id of an answer}."""
    router, engine = APIRouter(), service.engine

    @router.post("/v1/copyspec/explain/{call_id}", responses=answers(ExplainedAnswers))
    async def explain(request: Request, call_id: str) -> Response:
        """Where the answers to a call were copied from, in messages and characters of what was written."""
        await read_nothing(request, service.config)
        answered = service.caller(request).tenant.answered.get(call_id)
        if answered is None:
            raise not_found(f"There is no answer {call_id!r} here, or it is not kept any more")
        choices = await asyncio.to_thread(_explained, engine, answered)
        return JSONResponse({"id": call_id, "object": "copyspec.explanation", "choices": choices})

    return router


def _explained(engine: Engine, answered: Answered) -> list[dict[str, Any]]:
    choices = []
    for index, (asked, output) in enumerate(zip(answered.requests, answered.outputs, strict=True)):
        told = output.explanation or engine.explain(asked, output)
        choices.append({"index": index, "text": told.text, "spans": told.to_list(), "copied_share": told.copied_share})
    return choices
