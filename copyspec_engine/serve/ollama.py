"""Ollama's API: POST /api/chat and /api/generate.

Its clients know no conversations, so a chat goes on with the one that it shows the whole of, as everywhere; a header
may name one. Where a model is loaded or unloaded there is nothing to do: the server has its own, until it ends.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from copyspec_engine.adapters.answers import logprobs_metadata
from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.serve.bodies import documented, read_body
from copyspec_engine.serve.chat import ChatAnswer, ChatQuestion, told_logprobs
from copyspec_engine.serve.conversations import Caller
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.serve.events import LINES, Event, answer_of, obfuscated
from copyspec_engine.serve.ollama_bodies import OllamaBody, OllamaChatBody, OllamaGenerateBody
from copyspec_engine.serve.schemas import OLLAMA_ERRORS, OllamaChatAnswer, OllamaGenerateAnswer, answers
from copyspec_engine.serve.service import Service, answer_headers
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk

__all__ = ["AnswerLines", "ChatLines", "GenerateLines", "ollama_router", "timestamp"]


def ollama_router(service: Service) -> APIRouter:
    """The endpoints that answer."""
    router = APIRouter(responses=OLLAMA_ERRORS)

    @router.post(
        "/api/chat",
        openapi_extra=documented(OllamaChatBody),
        responses=answers(OllamaChatAnswer, stream="application/x-ndjson"),
    )
    async def ollama_chat(request: Request) -> Response:
        """Write the next message of a chat."""
        body = await read_body(request, OllamaChatBody, service.config)
        body.check(service)
        if not body.asks:
            return JSONResponse(ChatLines(service, body).loaded())
        caller = service.caller(request)
        messages, tools, ignored = body.checked(service)
        question = _question(service, body, caller, messages, tools)
        requests, talks = question.asked(service, caller, _call_id())
        lines = ChatLines(service, body, talks[0])
        return await _answer(service, request, requests, lines, answer_headers(talks[0], ignored))

    @router.post(
        "/api/generate",
        openapi_extra=documented(OllamaGenerateBody),
        responses=answers(OllamaGenerateAnswer, stream="application/x-ndjson"),
    )
    async def ollama_generate(request: Request) -> Response:
        """Answer one prompt."""
        body = await read_body(request, OllamaGenerateBody, service.config)
        body.check(service)
        if not body.asks:
            return JSONResponse(GenerateLines(service, body).loaded())
        caller = service.caller(request)
        if body.raw or body.context:
            talk = caller.talk(caller.named({}), None)
            requests = [await _unchatted(service, body, talk)]
        else:
            question = _question(service, body, caller, body.messages(), None)
            requests, (talk,) = question.asked(service, caller, _call_id())
        lines = GenerateLines(service, body, talk)
        return await _answer(service, request, requests, lines, answer_headers(talk, body.ignored_names(service)))

    return router


def timestamp(seconds: float | None = None) -> str:
    """A time in seconds since 1970 as Ollama writes it; default: now."""
    when = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _call_id() -> str:
    return f"ollama-{secrets.token_hex(16)}"


def _question(
    service: Service,
    body: OllamaBody,
    caller: Caller,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
) -> ChatQuestion:
    return ChatQuestion(
        messages=messages,
        sampling=body.sampling(service),
        tools=tools,
        answer=body.answer(),
        template=body.template_values(),
        named=caller.named({}),
    )


async def _unchatted(service: Service, body: OllamaGenerateBody, talk: Talk) -> GenerationRequest:
    """The request for a prompt that is laid out already, in part or as a whole."""
    prompt: dict[str, Any] = {"prompt": body.prompt}
    if body.context:
        asked = GenerationRequest(messages=body.messages(), chat_template_kwargs=body.template_values())
        ids = await asyncio.to_thread(service.engine.tokenize, asked)
        begin = service.engine.encode("")  # stands in the context already
        ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
        prompt = {"prompt_token_ids": [*body.context, *ids]}
    return GenerationRequest(
        **prompt,
        grammar=body.answer(),
        sampling=body.sampling(service),
        parse_reply=not body.raw,
        timeout_s=service.config.timeout_s,
        request_id=f"{_call_id()}-0",
        **talk.request_options(),
    )


async def _answer(
    service: Service,
    request: Request,
    requests: Sequence[GenerationRequest],
    lines: AnswerLines,
    headers: Mapping[str, str],
) -> Response:
    call = await service.begin(request, requests)
    return await answer_of(request, call, lines, LINES if lines.streams else None, service.config, headers)


@dataclass(slots=True)
class _Part:
    """A piece of an answer, or all of it."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.calls or self.logprobs)

    def add(self, other: _Part) -> None:
        self.content += other.content
        self.thinking += other.thinking
        self.calls += other.calls
        self.logprobs += other.logprobs


class AnswerLines:
    """Writes an answer in lines, or as a whole. Made as the call comes in: its time counts from there.

    Args:
        service: whose model writes it.
        body: what was asked.
        talk: the conversation that goes on with it; None: there is none, because nothing is answered.
    """

    def __init__(self, service: Service, body: OllamaBody, talk: Talk | None = None) -> None:
        self.obfuscate = False
        """See `obfuscated`."""
        self.streams = body.stream is not False
        self._service, self._body = service, body
        self._began_ns = time.perf_counter_ns()
        self._answer = None if talk is None else ChatAnswer(talk)
        self._num_calls = 0
        """Calls that were told."""
        self._all = _Part()
        self._output: GenerationOutput | None = None

    # ---- in lines ------------------------------------------------------------------------------------------------

    def events(self, index: int, chunk: StreamChunk) -> list[Event]:  # noqa: ARG002 - there is one answer
        """What a chunk adds."""
        part = self._taken(chunk)
        part.logprobs += self._logprobs(chunk)
        if not self.streams:
            self._all.add(part)
        lines = [self._line(part)] if part else []
        if chunk.output is not None:
            self._output = chunk.output
            lines.append(self._end(_Part(), chunk.output))
        return [obfuscated(line) for line in lines] if self.obfuscate else list(lines)

    def keep_alive(self) -> Event:
        """A line that adds nothing."""
        return self._line(_Part())

    def end(self) -> list[Event]:
        """Nothing: the last line says that it is the last."""
        return []

    def failed(self, error: ApiError) -> list[Event]:
        """The error, as clients look for it."""
        return [error.ollama_body()]

    # ---- as a whole ----------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """All of the answer."""
        assert self._output is not None, "the answer is read to its end"
        return self._end(self._all, self._output)

    def loaded(self) -> dict[str, Any]:
        """What is said where there is nothing to answer."""
        return {**self._line(_Part()), "done": True, "done_reason": "load"}

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _said(self, part: _Part) -> dict[str, Any]:
        """The fields of a line that hold a part."""
        raise NotImplementedError

    def _beside(self, output: GenerationOutput) -> dict[str, Any]:  # noqa: ARG002 - some need it
        """What else the end of an answer says."""
        return {}

    def _taken(self, chunk: StreamChunk) -> _Part:
        """The part that a chunk completes. A call is told as a whole, for its arguments are an object."""
        assert self._answer is not None, "something is answered"
        deltas = self._answer.take(chunk)
        text, thinking = ("".join(d.text for d in deltas if d.kind == kind) for kind in ("text", "reasoning"))
        part = _Part(text, thinking)
        calls = sorted(self._answer.calls.items())
        whole = calls[self._num_calls : None if chunk.output is not None else -1]
        self._num_calls += len(whole)
        for index, call in whole:
            arguments = _object(call["arguments"])
            if arguments is None:  # cut off, or malformed: it can only be shown
                part.content += call["arguments"]
            else:
                function = {"index": index, "name": call["name"], "arguments": arguments}
                part.calls.append({"id": call["id"], "function": function})
        return part

    def _logprobs(self, chunk: StreamChunk) -> list[dict[str, Any]]:
        engine = self._service.engine
        entries: list[dict[str, Any]] = logprobs_metadata(engine, told_logprobs(engine, chunk))["content"]
        return entries

    def _line(self, part: _Part) -> dict[str, Any]:
        return {
            "model": self._body.model,
            "created_at": timestamp(),
            **self._said(part),
            "done": False,
            **({"logprobs": part.logprobs} if part.logprobs else {}),
        }

    def _end(self, part: _Part, output: GenerationOutput) -> dict[str, Any]:
        usage, timing = output.usage, output.timing
        return {
            **self._line(part),
            "done": True,
            "done_reason": "stop" if output.finish_reason == "stop" else "length",
            **self._beside(output),
            "total_duration": time.perf_counter_ns() - self._began_ns,
            "load_duration": _ns(timing.queue_s),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _ns(timing.ttft_s - timing.queue_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": _ns(timing.total_s - timing.ttft_s),
        }


class ChatLines(AnswerLines):
    """Of POST /api/chat."""

    def _said(self, part: _Part) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": part.content, **_others(part)}}


class GenerateLines(AnswerLines):
    """Of POST /api/generate."""

    _body: OllamaGenerateBody

    def _said(self, part: _Part) -> dict[str, Any]:
        return {"response": part.content, **_others(part)}

    def _beside(self, output: GenerationOutput) -> dict[str, Any]:
        return {} if self._body.raw else {"context": [*output.prompt_token_ids, *output.token_ids]}

    def _taken(self, chunk: StreamChunk) -> _Part:
        return _Part(chunk.text) if self._body.raw else super()._taken(chunk)


def _others(part: _Part) -> dict[str, Any]:
    thinking = {"thinking": part.thinking} if part.thinking else {}
    return thinking | ({"tool_calls": part.calls} if part.calls else {})


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object that can be given back; None: this is none. No text stands for one without anything."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999, or half a character
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _ns(seconds: float) -> int:
    """Nanoseconds, never none: clients divide by them."""
    return max(1, round(seconds * 1e9))
