"""POST /v1/responses, and what was made there: GET and DELETE by id, and the items that a response was asked with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import BeforeValidator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from copyspec_engine.serve.bodies import Body, documented, read_body
from copyspec_engine.serve.call_body import CallBody
from copyspec_engine.serve.calls import Call
from copyspec_engine.serve.chat import ChatQuestion, Effort, json_grammar, reasoning_template
from copyspec_engine.serve.conversations import Caller
from copyspec_engine.serve.errors import by_names, invalid, not_found
from copyspec_engine.serve.events import NAMED_EVENTS, answer_of
from copyspec_engine.serve.items import Item, checked_items, messages_of
from copyspec_engine.serve.kept import StoredConversation, StoredResponse, Told
from copyspec_engine.serve.messages import checked_choice, checked_tools
from copyspec_engine.serve.pages import PAGE, check_query, page_of, query
from copyspec_engine.serve.response_writer import ResponseWriter
from copyspec_engine.serve.schemas import ItemList, ResponseDeleted, ResponseObject, answers
from copyspec_engine.serve.service import Service, answer_headers
from copyspec_engine.serve.tenants import Tenant
from copyspec_engine.values.config import SamplingParams
from copyspec_engine.values.grammar import Grammar
from copyspec_engine.values.outputs import GenerationOutput

__all__ = ["ResponseBody", "responses_router"]

_LINKS = {"get_response": "name", "delete_response": "name", "input_items": "name", "explain": "call_id"}
_LOGPROBS = "message.output_text.logprobs"


def _items(value: object) -> object:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise ValueError("a text or a list of items")
    return value


def _id_of(value: object) -> object:
    return value["id"] if isinstance(value, dict) and set(value) == {"id"} else value


class TextOptions(Body):
    """What the text of an answer is like."""

    without_effect: ClassVar[tuple[str, ...]] = ("verbosity",)

    format: dict[str, Any] | None = None
    """{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "name": ..., "schema": ...}."""
    verbosity: str | None = None


class ReasoningOptions(Body):
    """How much the model reasons."""

    without_effect: ClassVar[tuple[str, ...]] = ("summary", "generate_summary", "context", "mode")

    effort: Effort | None = None
    """"none" switches reasoning off where the chat template can."""
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseBody(CallBody):
    """What a response is to answer."""

    without_effect: ClassVar[tuple[str, ...]] = (
        *("service_tier", "verbosity", "max_tool_calls", "prompt_cache_retention", "prompt_cache_options"),
    )
    unsupported: ClassVar[Mapping[str, str]] = {
        "background": "ask for a stream, or wait for the answer",
        "background_options": "ask for a stream, or wait for the answer",
        "prompt": "the server keeps no prompts, send them as instructions and input",
        "context_management": "shorten the input",
        "moderation": "the server has no moderation",
        "image": "the model reads text only",
        "access_programs": "the server has none",
    }
    names: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "grammar": "text.format",
    }

    input: Annotated[str | list[dict[str, Any]], BeforeValidator(_items)]
    """A text of a user, or items: messages, function_call, function_call_output, reasoning, item_reference."""
    instructions: str | None = None
    """A system message before all others; it holds for this response only."""
    previous_response_id: str | None = None
    """A response to go on from, which was not made with store=false."""
    conversation: Annotated[str | None, BeforeValidator(_id_of, json_schema_input_type=str | dict[str, str] | None)] = (
        None
    )
    """One of POST /v1/conversations to go on with, and to add to."""
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = None
    """Most tokens of the answer, reasoning and calls included; goes before max_tokens."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """"auto", "none", "required", or {"type": "function", "name": ...}."""
    parallel_tool_calls: bool | None = None
    """Several calls in one answer; default: yes."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What else the chat template reads."""
    include: list[str] | None = None
    """"message.output_text.logprobs" gives the log-probability of each token of the text."""
    top_logprobs: int | None = None
    truncation: str | None = None
    """"auto" changes nothing: what is too long is refused and never cut."""
    store: bool | None = None
    """Keep the response, to be asked for and gone on from; default: yes."""
    service_tier: str | None = None
    verbosity: str | None = None
    max_tool_calls: int | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    background: bool | None = None
    background_options: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None

    def check(self, service: Service) -> None:
        super().check(service)
        if self.conversation is not None and self.previous_response_id is not None:
            raise invalid(
                "previous_response_id", "Got both conversation and previous_response_id but expected one of them"
            )
        if self.truncation not in (None, "auto", "disabled"):
            raise invalid("truncation", f"Got truncation={self.truncation!r} but expected 'disabled' or 'auto'")

    def ignored(self) -> list[str]:
        parts = {"text": self.text, "reasoning": self.reasoning}
        return [
            *(name for name in super().ignored() if name.partition(".")[0] != "metadata"),  # which is given back
            *(f"{name}.{inner}" for name, part in parts.items() if part is not None for inner in part.ignored()),
            *(("include",) if any(name != _LOGPROBS for name in self.include or ()) else ()),
            *(("truncation",) if self.truncation == "auto" else ()),
        ]

    def before(self, tenant: Tenant) -> Told:
        """What was said before.

        Raises:
            ApiError: 404, there is no such response or conversation of this tenant.
        """
        if self.previous_response_id is not None:
            response = tenant.responses.get(self.previous_response_id)
            if response is None:
                raise not_found(
                    f"There is no response {self.previous_response_id!r} to go on from, or it is not kept any more: "
                    "send what was said as input",
                    "previous_response_not_found",
                    "previous_response_id",
                )
            return response.told
        if self.conversation is not None:
            return stored_conversation(tenant, self.conversation, "conversation").told
        return Told()

    def question(
        self, service: Service, caller: Caller, before: Told, messages: list[dict[str, Any]]
    ) -> tuple[ChatQuestion, list[str]]:
        """What is asked, and the names of fields that change nothing of it.

        Args:
            service: whose model answers.
            caller: who asks.
            before: what was said before.
            messages: what the input adds to it.

        Raises:
            ApiError, ConfigError: a value cannot be as it is.
        """
        tools, strict = checked_tools([_tool(tool) for tool in self.tools or ()], service.config)
        choice = checked_choice(self.tool_choice, tools)
        answer, effort = self._answer(), self._effort
        ignored = self.ignored()
        if answer is not None and choice not in ("auto", "none"):
            ignored.append("text.format")  # the answer is calls alone
            answer = None
        if effort is not None and not service.engine.chat_format.reasons:
            ignored.append("reasoning.effort")
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        question = ChatQuestion(
            messages=[*first, *before.messages, *messages],
            sampling=self._sampling(service),
            tools=tools if tools and choice != "none" else None,
            tool_choice=choice,
            parallel=self.parallel_tool_calls is not False,
            strict=strict or None,
            answer=answer,
            template={**reasoning_template(effort), **(self.chat_template_kwargs or {})},
            named=self.named(caller) or self.conversation or before.named,
            partition=self.partition,
            cache_key=self.prompt_cache_key,
            others=self.request_options(service),
        )
        return question, ignored

    def _sampling(self, service: Service) -> SamplingParams:
        with_logprobs = _LOGPROBS in (self.include or ()) or self.top_logprobs is not None
        return self.sampling(
            service,
            max_tokens=self.max_output_tokens,
            logprobs=with_logprobs or None,
            top_logprobs=self.top_logprobs,
        )

    @property
    def _effort(self) -> Effort | None:
        return None if self.reasoning is None else self.reasoning.effort

    def _answer(self) -> Grammar | None:
        form = None if self.text is None else self.text.format
        if form is None or form == {"type": "text"}:
            return None
        if form == {"type": "json_object"}:
            return json_grammar()
        if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            raise invalid(
                "text.format",
                f'Got text.format={form!r} but expected {{"type": "json_schema", "name": ..., "schema": ...}}, '
                '{"type": "json_object"} or {"type": "text"}',
            )
        return json_grammar(form["schema"], strict=form.get("strict") is True)

    def head(self, service: Service, response_id: str) -> dict[str, Any]:
        """What the response says of itself before there is an answer."""
        sampling, defaults = self._sampling(service), service.info.sampling_defaults
        used = {name: getattr(sampling, name) for name in ("temperature", "top_p")}
        used |= {name: defaults[name] for name in used if name in {*defaults} - sampling.model_fields_set}
        return {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": sampling.max_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "model": self.model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "conversation": None if self.conversation is None else {"id": self.conversation},
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": self._effort, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.store is not False,
            "text": {"format": (self.text and self.text.format) or {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            **({} if self.user is None else {"user": self.user}),
            **used,
        }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as messages have it, where it has a name in an object of its own."""
    if tool.get("type") != "function" or "function" in tool:
        return dict(tool)
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}


def stored_conversation(tenant: Tenant, name: str, param: str | None = None) -> StoredConversation:
    """A conversation of a tenant that was made by POST /v1/conversations.

    Raises:
        ApiError: 404, there is none of this id.
    """
    found = tenant.named.get(name)
    if found is None:
        raise not_found(
            f"There is no conversation {name!r} here, or it is not kept any more: make one by POST /v1/conversations",
            "conversation_not_found",
            param,
        )
    return found


def known_items(tenant: Tenant) -> Callable[[str], Item | None]:
    """Finds items of what is kept of a tenant's responses and conversations by their ids.

    All of them are looked through once, at the first question.
    """
    found: dict[str, Item] = {}

    def known(name: str) -> Item | None:
        if not found:
            kept = [*(response.told for response in tenant.responses), *(talk.told for talk in tenant.named)]
            found.update((item["id"], item) for told in reversed(kept) for item in told.items)
        return found.get(name)

    return known


def responses_router(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    def stored(request: Request, name: str) -> StoredResponse:
        found = service.caller(request).tenant.responses.get(name)
        if found is None:
            raise not_found(f"There is no response {name!r} here, or it is not kept any more", "response_not_found")
        return found

    @router.post(
        "/v1/responses",
        openapi_extra=documented(ResponseBody),
        responses=answers(ResponseObject, stream="text/event-stream", links=_LINKS),
    )
    async def create_response(request: Request) -> Response:
        """Answer a text or items."""
        body = await read_body(request, ResponseBody, service.config)
        body.check(service)
        caller, ignored_inside = service.caller(request), dict[str, None]()
        before = body.before(caller.tenant)
        added = checked_items("input", body.input, known_items(caller.tenant), ignored_inside)
        messages = messages_of("input", added, service.config)
        response_id = service.new_id("resp_", 48)
        with by_names(body.names):
            question, ignored = body.question(service, caller, before, messages)
            requests, talks = question.asked(service, caller, response_id)
        call = await service.begin(request, requests, body.names)
        asked = Told((*before.items, *added), (*before.messages, *messages), question.named)
        keep = _Keeper(caller.tenant, body, call, asked)
        writer = ResponseWriter(service, body.head(service, response_id), body.options, talks[0], keep)
        headers, framing = answer_headers(talks[0], [*ignored, *ignored_inside]), NAMED_EVENTS if body.stream else None
        return await answer_of(request, call, writer, framing, service.config, headers, body.include_obfuscation)

    @router.get("/v1/responses/{name}", openapi_extra=query("include"), responses=answers(ResponseObject))
    async def get_response(request: Request, name: str) -> Response:
        """A response that is kept."""
        check_query(request, ("include",))
        return JSONResponse(stored(request, name).body)

    @router.delete("/v1/responses/{name}", responses=answers(ResponseDeleted))
    async def delete_response(request: Request, name: str) -> Response:
        """Keep a response no longer."""
        stored(request, name)
        tenant = service.caller(request).tenant
        tenant.responses.pop(name)
        tenant.answered.pop(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    @router.get("/v1/responses/{name}/input_items", openapi_extra=query(*PAGE), responses=answers(ItemList))
    async def input_items(request: Request, name: str) -> Response:
        """The items that a response was asked with, those of earlier responses included; the last one first."""
        return JSONResponse(page_of(request, stored(request, name).asked))

    return router


class _Keeper:
    """Keeps a response and adds it to its conversation, once it is over.

    Args:
        tenant: whose it is.
        body: what was asked.
        call: the call that answers.
        asked: all that was said before the answer.
    """

    def __init__(self, tenant: Tenant, body: ResponseBody, call: Call, asked: Told) -> None:
        self._tenant, self._body, self._call, self._asked = tenant, body, call, asked

    def __call__(self, response: Mapping[str, Any], message: Mapping[str, Any], output: GenerationOutput) -> None:
        if self._call.is_forgotten:
            return
        tenant, asked, size = self._tenant, self._asked, output.usage.total_tokens + self._call.body_tokens
        told = Told((*asked.items, *response["output"]), (*asked.messages, dict(message)), asked.named)
        if self._body.store is not False:
            session = self._call.requests[0].session_id
            tenant.responses.keep(response["id"], StoredResponse(response, asked.items, told, session), size)
        name = self._body.conversation
        known = None if name is None else tenant.named.get(name)
        if name is not None and known is not None:
            grown = StoredConversation(known.body, told, known.num_tokens)
            tenant.named.keep(name, grown, size + known.num_tokens)
