"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from copyspec_engine.adapters.answers import answer_metadata, logprobs_metadata, segment_metadata
from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.adapters.model import AdapterOptions
from copyspec_engine.adapters.tools import tool_choice_of
from copyspec_engine.adapters.wire import chunk_to_json
from copyspec_engine.serve.bodies import Body, documented, read_body
from copyspec_engine.serve.chat import ChatAnswer, ChatQuestion, json_grammar, told_logprobs, usage_of
from copyspec_engine.serve.conversations import Caller
from copyspec_engine.serve.errors import ApiError, invalid
from copyspec_engine.serve.events import SSE, Event, EventResponse, obfuscated, wants_obfuscation
from copyspec_engine.serve.messages import checked_messages, checked_tools
from copyspec_engine.serve.sampling import SamplingBody
from copyspec_engine.serve.service import Service, answer_headers
from copyspec_engine.values.grammar import Grammar
from copyspec_engine.values.outputs import GenerationOutput, ReplyDelta, StreamChunk, TokenLogprob

__all__ = ["ChatBody", "CopySpecOptions", "StreamOptions", "chat_router"]


class StreamOptions(Body):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    """A last chunk without choices has the counts of tokens."""
    include_obfuscation: bool | None = None
    """Each event has random letters, so that its length does not show how much was copied. Default: yes, but for
    clients on this machine."""


class CopySpecOptions(Body):
    """What this server alone can do; what was asked for comes back in an object of the same name in each choice."""

    segments: bool | None = None
    """Give the answer in pieces that were copied or not."""
    explain: bool | None = None
    """Say where each copied part came from, in messages and characters."""
    stats: bool | None = None
    """Give tokens per forward pass, the share that was copied, and times."""
    chunks: bool | None = None
    """Give with each event of a stream the chunk as the engine has made it, for this package's own clients."""
    timeout_s: float | None = None
    """Seconds after which the answer ends with what is written by then, if the server's own limit is not shorter."""
    guided: bool | None = None
    """False: calls that the model makes of its own free will are not held to the schemas of their functions."""
    drafter: str | dict[str, Any] | None = None
    """Where drafts come from: "adaptive", "copyspec", "draft-model", "none", or an object with options."""


class ChatBody(SamplingBody):
    """The next message of a chat."""

    without_effect: ClassVar[tuple[str, ...]] = (
        *("service_tier", "verbosity", "store", "prompt_cache_retention", "prompt_cache_options"),
    )
    _unsupported: ClassVar[Mapping[str, str]] = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "the model writes text only",
        "web_search_options": "the server reads nothing from the web",
        "moderation": "the server has no moderation",
    }

    model: str
    """A name of the model that GET /v1/models gives."""
    messages: list[dict[str, Any]]
    """The chat so far; of content only texts are read."""
    stream: bool | None = None
    """Send the answer as it is written."""
    stream_options: StreamOptions | None = None
    n: int | None = None
    """Answers to write; they are read from one prompt."""
    max_completion_tokens: int | None = None
    """Most tokens of an answer; goes before max_tokens."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    """{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """"auto", "none", "required", or {"type": "function", "function": {"name": ...}}."""
    parallel_tool_calls: bool | None = None
    """Several calls in one answer; default: yes."""
    prediction: dict[str, Any] | None = None
    """{"type": "content", "content": ...}: a text that the answer will repeat in large part."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """"none" switches reasoning off where the chat template can."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What else the chat template reads."""
    modalities: list[str] | None = None
    """["text"] only."""
    session_id: str | None = None
    """The conversation, where no header names it."""
    metadata: dict[str, str] | None = None
    """"session_id", "thread_id" or "conversation_id" name the conversation, where nothing else does."""
    user: str | None = None
    safety_identifier: str | None = None
    """Whose talk this is: a conversation that nothing names goes on for him alone. Goes before `user`."""
    prompt_cache_key: str | None = None
    """Calls of one key share the KV of what their prompts have in common."""
    copyspec: CopySpecOptions | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    store: bool | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None

    def check(self, service: Service) -> None:
        """Refuse what cannot be done.

        Raises:
            ApiError: 400 which names the field, 404 for another model.
        """
        service.check_model(self.model)
        for name, instead in self._unsupported.items():
            if getattr(self, name) is not None:
                raise invalid(name, f"Got {name} but it is not supported: {instead}", "unsupported_parameter")
        if self.modalities not in (None, ["text"]):
            raise invalid(
                "modalities", f"Got modalities={self.modalities!r} but expected ['text']", "unsupported_value"
            )
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "Got stream_options without stream: set stream to true, or leave it out")
        most = service.config.max_n
        if self.n is not None and not 1 <= self.n <= most:
            raise invalid("n", f"Got n={self.n} but expected 1 to {most}")

    def question(self, service: Service, caller: Caller) -> tuple[ChatQuestion, list[str]]:
        """What is asked, and the names of fields that change nothing of it.

        Raises:
            ApiError, ConfigError: a value cannot be as it is.
        """
        messages, ignored = checked_messages(self.messages, service.config)
        tools, strict = checked_tools(self.tools or (), service.config)
        choice = self._choice(tools)
        answer = self._answer()
        ignored = [*self.ignored(), *ignored]
        if answer is not None and choice not in ("auto", "none"):
            ignored.append("response_format")  # the answer is calls alone
            answer = None
        if self.reasoning_effort is not None and not service.engine.chat_format.reasons:
            ignored.append("reasoning_effort")
        if self.metadata and not any(name in self.metadata for name in ("session_id", "thread_id", "conversation_id")):
            ignored.append("metadata")
        options = self.copyspec or CopySpecOptions()
        others = {
            "prediction": self.prediction,
            "drafter": options.drafter,
            "explain": bool(options.explain),
            "timeout_s": service.time_limit(options.timeout_s),
        }
        question = ChatQuestion(
            messages=messages,
            sampling=self.sampling(
                service,
                max_tokens=self.max_completion_tokens,
                logprobs=self.logprobs,
                top_logprobs=self.top_logprobs,
            ),
            tools=tools if tools and choice != "none" else None,
            tool_choice=choice,
            parallel=self.parallel_tool_calls is not False,
            strict=False if options.guided is False and not strict else strict or None,
            answer=answer,
            template=self._template(),
            named=caller.named({"session_id": self.session_id, "metadata": self.metadata}),
            partition=self.safety_identifier or self.user,
            cache_key=self.prompt_cache_key,
            n=self.n or 1,
            others=others,
        )
        return question, ignored

    def _choice(self, tools: Sequence[Mapping[str, Any]]) -> str:
        choice = "auto" if self.tool_choice is None else tool_choice_of(self.tool_choice)
        names = [tool["function"]["name"] for tool in tools]
        known = ("auto", "none", *(("required", *names) if names else ()))
        if not isinstance(choice, str) or choice not in known:
            raise invalid("tool_choice", f"Got tool_choice={self.tool_choice!r} but expected one of {', '.join(known)}")
        return choice

    def _answer(self) -> Grammar | None:
        form = self.response_format
        if form is None or form == {"type": "text"}:
            return None
        if form == {"type": "json_object"}:
            return json_grammar()
        wrapped = form.get("json_schema")
        if (
            form.get("type") != "json_schema"
            or not isinstance(wrapped, dict)
            or not isinstance(wrapped.get("schema"), dict)
        ):
            raise invalid(
                "response_format",
                f"Got response_format={form!r} but expected "
                '{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}, {"type": "json_object"} or '
                '{"type": "text"}',
            )
        return json_grammar(wrapped["schema"], strict=wrapped.get("strict") is True)

    def _template(self) -> dict[str, Any]:
        effort: dict[str, Any] = {}
        if self.reasoning_effort == "none":
            effort = {"enable_thinking": False}
        elif self.reasoning_effort is not None:
            effort = {"enable_thinking": True, "reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}


def chat_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Write the next message of a chat."""
        body = await read_body(request, ChatBody, service.config)
        body.check(service)
        question, ignored = body.question(service, service.caller(request))
        call_id = f"chatcmpl-{secrets.token_hex(16)}"
        requests, talks = question.asked(service, service.caller(request), call_id)
        call = await service.begin(request, requests)
        writer = ChatWriter(service, body, call_id, talks, obfuscate=False)
        headers = answer_headers(talks[0], ignored)
        if not body.stream:
            try:
                async for index, chunk in call.chunks():
                    writer.events(index, chunk)
            finally:
                call.close()
            return JSONResponse(writer.whole(), headers=headers)
        writer.obfuscate = wants_obfuscation(
            None if body.stream_options is None else body.stream_options.include_obfuscation, request.scope
        )
        return EventResponse(call, writer, SSE, service.config, headers)

    return router


class ChatWriter:
    """Writes the answers to a call, in events or as a whole.

    Args:
        service: whose model has written them.
        body: what was asked.
        call_id: what they call the call.
        talks: the conversations of the answers.
        obfuscate: see `obfuscated`.
    """

    def __init__(
        self, service: Service, body: ChatBody, call_id: str, talks: Sequence[Talk], *, obfuscate: bool
    ) -> None:
        self.obfuscate = obfuscate
        self._service, self._body = service, body
        self._options = body.copyspec or CopySpecOptions()
        self._answers = [ChatAnswer(talk) for talk in talks]
        self._begun = [False] * len(talks)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in talks]
        """Those that no event has had yet."""
        self._head = {
            "id": call_id,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint,
        }
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)

    # ---- a stream ----------------------------------------------------------------------------------------------

    def events(self, index: int, chunk: StreamChunk) -> list[Event]:
        """What a chunk of answer `index` adds."""
        deltas = self._answers[index].take(chunk)
        self._logprobs[index] += told_logprobs(self._service.engine, chunk)
        if not self._body.stream:
            return []
        said: dict[str, Any] = {"chunk": chunk_to_json(chunk)} if self._options.chunks else {}
        at_end = {**said, **self._at_end(chunk.output)} if chunk.output is not None else {}
        if chunk.output is not None:
            said = {}
        if self._options.segments and chunk.segments:
            said["segments"] = segment_metadata(chunk.segments)
        events = [self._event(index, _delta(deltas), None, said)] if deltas or said else []
        if chunk.output is not None:
            events.append(self._event(index, {}, self._answers[index].finish_reason, at_end))
        return events

    def keep_alive(self) -> Event:
        """An empty delta."""
        return self._chunk([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}])

    def end(self) -> list[Event]:
        """The counts, where they were asked for."""
        return [{**self._chunk([]), "usage": self._usage()}] if self._with_usage else []

    def failed(self, error: ApiError) -> list[Event]:
        """The error, as clients look for it."""
        return [error.body()]

    def _event(self, index: int, delta: dict[str, Any], finish: str | None, said: Mapping[str, Any]) -> Event:
        if not self._begun[index]:
            delta = {"role": "assistant", "content": "", **delta} if finish else {"role": "assistant", **delta}
            self._begun[index] = True
        logprobs, self._logprobs[index] = self._logprobs[index], []
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(self._service, logprobs) if logprobs else None,
            "finish_reason": finish,
            **({"copyspec": said} if said else {}),
        }
        return self._chunk([choice])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._with_usage:
            event["usage"] = None
        return obfuscated(event) if self.obfuscate and choices else event

    # ---- a whole answer ----------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """All answers at once."""
        choices = [self._choice(index, answer) for index, answer in enumerate(self._answers)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _choice(self, index: int, answer: ChatAnswer) -> dict[str, Any]:
        assert answer.output is not None, "the answers are read to their ends"
        said = self._at_end(answer.output)
        if self._options.segments:
            said["segments"] = segment_metadata(answer.output.segments)
        return {
            "index": index,
            "message": {**answer.message(), "refusal": None},
            "logprobs": _logprobs(self._service, self._logprobs[index]) if self._body.logprobs else None,
            "finish_reason": answer.finish_reason,
            **({"copyspec": said} if said else {}),
        }

    def _usage(self) -> dict[str, Any]:
        return usage_of([answer.output for answer in self._answers if answer.output is not None])

    def _at_end(self, output: GenerationOutput) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self._options.explain and output.explanation is not None:
            said["explanation"] = {"text": output.explanation.text, "spans": output.explanation.to_list()}
        if self._options.stats:
            said["stats"] = answer_metadata(replace(output, explanation=None), AdapterOptions())
        return said


def _logprobs(service: Service, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {**logprobs_metadata(service.engine, logprobs), "refusal": None}


def _delta(deltas: Sequence[ReplyDelta]) -> dict[str, Any]:
    """Deltas of a message as one."""
    joined: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.kind != "tool_call":
            name = "content" if delta.kind == "text" else "reasoning_content"
            joined[name] = joined.get(name, "") + delta.text
        elif delta.id is not None:
            function = {"name": delta.name, "arguments": delta.text}
            calls.append({"index": delta.index, "id": delta.id, "type": "function", "function": function})
        elif calls and calls[-1]["index"] == delta.index:
            calls[-1]["function"]["arguments"] += delta.text
        else:
            calls.append({"index": delta.index, "function": {"arguments": delta.text}})
    return {**joined, **({"tool_calls": calls} if calls else {})}
