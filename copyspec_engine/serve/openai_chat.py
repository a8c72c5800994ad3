"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from copyspec_engine.adapters.answers import logprobs_metadata
from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.adapters.wire import chunk_to_json
from copyspec_engine.serve.bodies import documented, read_body
from copyspec_engine.serve.call_body import CallBody, CopySpecOptions, StreamOptions, checked_number
from copyspec_engine.serve.chat import (
    ChatAnswer,
    ChatQuestion,
    Effort,
    json_grammar,
    reasoning_template,
    told_logprobs,
)
from copyspec_engine.serve.choices import ChoicesWriter, told_at_end
from copyspec_engine.serve.conversations import Caller
from copyspec_engine.serve.errors import by_names, invalid
from copyspec_engine.serve.events import SSE, Event, answer_of
from copyspec_engine.serve.messages import checked_choice, checked_messages, checked_tools
from copyspec_engine.serve.schemas import ChatCompletion, answers
from copyspec_engine.serve.service import Service, answer_headers
from copyspec_engine.values.grammar import Grammar
from copyspec_engine.values.outputs import GenerationOutput, ReplyDelta, StreamChunk, TokenLogprob

__all__ = ["ChatBody", "chat_router"]


_OF_TOOL, _OF_FORM = ("type", "function"), ("type", "json_schema")
_OF_SCHEMA = ("name", "description", "schema", "strict")


class ChatOptions(CopySpecOptions):
    """What this server alone can do; what was asked for comes back in an object of the same name in each choice."""

    chunks: bool | None = None
    """Give with each event of a stream the chunk as the engine has made it, for this package's own clients."""
    guided: bool | None = None
    """False: calls that the model makes of its own free will are not held to the schemas of their functions."""


class ChatBody(CallBody):
    """The next message of a chat."""

    without_effect: ClassVar[tuple[str, ...]] = (
        *("service_tier", "verbosity", "store", "prompt_cache_retention", "prompt_cache_options"),
    )
    unsupported: ClassVar[Mapping[str, str]] = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "the model writes text only",
        "web_search_options": "the server reads nothing from the web",
        "moderation": "the server has no moderation",
    }
    names: ClassVar[Mapping[str, str]] = {"grammar": "response_format"}

    messages: list[dict[str, Any]]
    """The chat so far; of content only texts are read."""
    stream_options: StreamOptions | None = None
    copyspec: ChatOptions | None = None
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
    reasoning_effort: Effort | None = None
    """"none" switches reasoning off where the chat template can."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What else the chat template reads."""
    modalities: list[str] | None = None
    """["text"] only."""
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
        super().check(service)
        if self.modalities not in (None, ["text"]):
            raise invalid(
                "modalities", f"Got modalities={self.modalities!r} but expected ['text']", "unsupported_value"
            )

    def question(self, service: Service, caller: Caller) -> tuple[ChatQuestion, list[str]]:
        """What is asked, and the names of fields that change nothing of it.

        Raises:
            ApiError, ConfigError: a value cannot be as it is.
        """
        messages, ignored = checked_messages(self.messages, service.config)
        tools, strict = checked_tools(self.tools or (), service.config)
        choice = checked_choice(self.tool_choice, tools)
        answer = self._answer()
        ignored = [*self.ignored(), *ignored, *self._unread()]
        if answer is not None and choice not in ("auto", "none"):
            ignored.append("response_format")  # the answer is calls alone
            answer = None
        if self.reasoning_effort is not None and not service.engine.chat_format.reasons:
            ignored.append("reasoning_effort")
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
            strict=False if not strict and self.copyspec and self.copyspec.guided is False else strict or None,
            answer=answer,
            template={**reasoning_template(self.reasoning_effort), **(self.chat_template_kwargs or {})},
            named=self.named(caller),
            partition=self.partition,
            cache_key=self.prompt_cache_key,
            n=checked_number("n", self.n, service),
            others=self.request_options(service),
        )
        return question, ignored

    def _unread(self) -> Iterator[str]:
        """The names of what is inside of fields and nobody reads."""
        yield from (f"tools[].{name}" for tool in self.tools or () for name in tool if name not in _OF_TOOL)
        form = self.response_format or {}
        yield from (f"response_format.{name}" for name in form if name not in _OF_FORM)
        wrapped = form.get("json_schema")
        if isinstance(wrapped, dict):
            yield from (f"response_format.json_schema.{name}" for name in wrapped if name not in _OF_SCHEMA)

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


def chat_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        openapi_extra=documented(ChatBody),
        responses=answers(ChatCompletion, stream="text/event-stream", links={"explain": "call_id"}),
    )
    async def chat_completions(request: Request) -> Response:
        """Write the next message of a chat."""
        body = await read_body(request, ChatBody, service.config)
        body.check(service)
        call_id = service.new_id("chatcmpl-", 32)
        with by_names(body.names):
            question, ignored = body.question(service, service.caller(request))
            requests, talks = question.asked(service, service.caller(request), call_id)
        call = await service.begin(request, requests, body.names)
        writer = ChatWriter(service, body, call_id, talks)
        headers, framing = answer_headers(talks[0], ignored), SSE if body.stream else None
        return await answer_of(request, call, writer, framing, service.config, headers, body.include_obfuscation)

    return router


class ChatWriter(ChoicesWriter):
    """Writes the answers to a call as messages.

    Args:
        service: whose model has written them.
        body: what was asked.
        call_id: what they call the call.
        talks: the conversations of the answers.
    """

    whole_kind, event_kind = "chat.completion", "chat.completion.chunk"
    empty: ClassVar[Mapping[str, Any]] = {"delta": {}}

    def __init__(self, service: Service, body: ChatBody, call_id: str, talks: Sequence[Talk]) -> None:
        super().__init__(service, body, call_id, len(talks))
        self._answers = [ChatAnswer(talk) for talk in talks]
        self._begun = [False] * len(talks)
        self._with_logprobs = bool(body.logprobs)
        self._with_chunks = bool(body.copyspec and body.copyspec.chunks)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in talks]
        """Those that no event has had yet."""

    @property
    def outputs(self) -> list[GenerationOutput]:
        return [answer.output for answer in self._answers if answer.output is not None]

    def events(self, index: int, chunk: StreamChunk) -> list[Event]:
        """What a chunk of answer `index` adds."""
        deltas = self._answers[index].take(chunk)
        self._logprobs[index] += told_logprobs(self._service.engine, chunk)
        if not self._is_stream:
            return []
        said = self._in_pieces(chunk)
        raw = {"chunk": chunk_to_json(chunk)} if self._with_chunks else {}
        if chunk.output is None:
            said |= raw
        events = [self._event(index, _delta(deltas), None, said)] if deltas or said else []
        if chunk.output is not None:
            at_end = {**raw, **told_at_end(self._options, chunk.output, is_whole=False)}
            events.append(self._event(index, {}, self._answers[index].finish_reason, at_end))
        return events

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

    def choice(self, index: int) -> dict[str, Any]:
        answer = self._answers[index]
        assert answer.output is not None, "the answers are read to their ends"
        said = told_at_end(self._options, answer.output, is_whole=True)
        return {
            "index": index,
            "message": {**answer.message(), "refusal": None},
            "logprobs": _logprobs(self._service, self._logprobs[index]) if self._with_logprobs else None,
            "finish_reason": answer.finish_reason,
            **({"copyspec": said} if said else {}),
        }


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
