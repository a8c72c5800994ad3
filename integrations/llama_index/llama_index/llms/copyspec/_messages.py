"""LlamaIndex's messages to what chat templates take, and what the engine writes to LlamaIndex's responses.

On the way in each message becomes one dict in the same order, its text blocks joined by newlines as
`ChatMessage.content` does; nothing is merged and the history is never changed. Calls keep their ids, and a result
learns the name of the function that its id belongs to. Images, audio, video, documents and citations raise, by name.

On the way out each response has the answer so far, and in `delta` what is new. Text, reasoning and tool calls become a
`TextBlock`, a `ThinkingBlock` and `ToolCallBlock`s. A call whose arguments are still being written has them as text;
the arguments of a complete one are a dict. The last response has the counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.output_parsers import PydanticOutputParser
from pydantic import BaseModel

from copyspec_engine import (
    ConfigError,
    GenerationOutput,
    GenerationRequest,
    Reply,
    ReplyDelta,
    Segment,
    StreamChunk,
    TokenLogprob,
)
from copyspec_engine.adapters.answers import (
    answer_metadata,
    call_error,
    cut_off,
    is_whole_json,
    logprobs_metadata,
    segment_metadata,
    tool_metadata,
)
from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.adapters.remote import AnyEngine
from llama_index.llms.copyspec._options import CheckedCall

__all__ = [
    "ResponseWriter",
    "refuse_cut_off",
    "to_engine_messages",
]


_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


def to_engine_messages(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """Chat-template dicts for `messages`.

    Raises:
        ConfigError: no messages, or one with content that a text model cannot read.
    """
    if not messages:
        raise ConfigError("Got no messages but expected at least one")
    converted: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for position, message in enumerate(messages):
        converted.append(_to_engine_message(position, message, names))
        names |= {call["id"]: call["function"]["name"] for call in converted[-1].get("tool_calls", ())}
    return tuple(converted)


def _to_engine_message(position: int, message: ChatMessage, names: Mapping[str, str]) -> dict[str, Any]:
    role = _ROLES[message.role]
    converted: dict[str, Any] = {"role": role, "content": _text(position, message, role)}
    if role == "assistant":
        thinking = "\n".join(block.content or "" for block in message.blocks if isinstance(block, ThinkingBlock))
        if thinking:
            converted["reasoning_content"] = thinking
        calls = _calls(position, message)
        if calls:
            converted["tool_calls"] = calls
    if role == "tool":
        call_id = message.additional_kwargs.get("tool_call_id")
        name = message.additional_kwargs.get("name") or names.get(call_id or "")
        converted |= {key: value for key, value in (("tool_call_id", call_id), ("name", name)) if value}
    return converted


def _text(position: int, message: ChatMessage, role: str) -> str:
    texts = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        # A cache point is a hint without content; the engine reuses every prefix that it knows anyway.
        elif not isinstance(block, CachePoint):
            kind = getattr(block, "block_type", type(block).__name__)
            if role != "assistant" or not isinstance(block, ThinkingBlock | ToolCallBlock):
                raise ConfigError(
                    f"Got a block of type {kind!r} in messages[{position}], a {role} message, but expected text: the "
                    "model reads text only. Remove the block, or describe it in words"
                )
    return "\n".join(texts)


def _calls(position: int, message: ChatMessage) -> list[dict[str, Any]]:
    """The message's calls, from its blocks or else, as in older histories, from its `additional_kwargs`."""
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if blocks:
        given = [(block.tool_call_id, block.tool_name, block.tool_kwargs) for block in blocks]
    else:
        given = [_older_call(position, call) for call in message.additional_kwargs.get("tool_calls") or ()]
    return [
        {
            "id": call_id or f"call{position}x{number}",
            "type": "function",
            "function": {"name": name, "arguments": _arguments(position, arguments)},
        }
        for number, (call_id, name, arguments) in enumerate(given)
    ]


def _older_call(position: int, call: object) -> tuple[str | None, str, dict[str, Any] | str]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not function.get("name"):
        raise ConfigError(
            f"Got tool call {call!r} in messages[{position}] but expected a ToolCallBlock, or "
            '{"id": ..., "function": {"name": ..., "arguments": ...}}'
        )
    return call.get("id"), function["name"], function.get("arguments") or {}


def _arguments(position: int, arguments: dict[str, Any] | str) -> dict[str, Any]:
    """Arguments as an object: chat templates write it as their model is used to."""
    if isinstance(arguments, dict):
        return arguments
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"Got tool call arguments {arguments!r} in messages[{position}] but expected a JSON object: leave the "
            "message out, or mend them"
        )
    return parsed


@dataclass
class _WrittenCall:
    """A tool call as far as it is written."""

    id: str | None
    name: str
    arguments: dict[str, Any] | str = ""
    """JSON text while it is written."""

    def end(self) -> None:
        """Nothing more will come."""
        if isinstance(self.arguments, str):
            try:
                parsed = json.loads(self.arguments or "{}")
            except ValueError:
                return  # malformed: it stays text, and the whole reply will not have it
            self.arguments = parsed if isinstance(parsed, dict) else self.arguments

    def block(self) -> ToolCallBlock:
        return ToolCallBlock(tool_call_id=self.id, tool_name=self.name, tool_kwargs=self.arguments)


class ResponseWriter:
    """One answer as it grows.

    Args:
        engine: which writes it.
        model: its name.
        request: what was asked.
        call: the same, with what is to be attached; of the tool calls as many are kept as it allows, the first ones.
        talk: its conversation, which goes on with the whole answer.
    """

    def __init__(
        self, engine: AnyEngine, model: str, request: GenerationRequest, call: CheckedCall, talk: Talk
    ) -> None:
        self._engine, self._model, self._request, self._call, self._talk = engine, model, request, call, talk
        self._max_calls = call.max_calls
        self._text = self._thinking = ""
        self._calls: dict[int, _WrittenCall] = {}
        """By the engine's numbers, in order; one that cannot be read has a number but never comes."""
        self._delta, self._thinking_delta = "", ""
        self._segments: list[Segment] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._output: GenerationOutput | None = None
        self._is_whole = False

    @classmethod
    def whole(
        cls,
        engine: AnyEngine,
        model: str,
        request: GenerationRequest,
        call: CheckedCall,
        talk: Talk,
        output: GenerationOutput,
    ) -> ResponseWriter:
        """An answer that came in one piece; its responses have no `delta`."""
        answer = cls(engine, model, request, call, talk)
        answer.take(
            StreamChunk(
                output.request_id,
                text=output.text,
                segments=output.segments,
                output=output,
                logprobs=output.logprobs,
                deltas=_all_at_once(output.reply),
            )
        )
        answer._is_whole = True
        return answer

    def take(self, chunk: StreamChunk) -> bool:
        """Add a chunk; True if there is something to tell.

        Raises:
            ConfigError: an object is expected, and it was cut off.
        """
        self._segments += chunk.segments
        if chunk.logprobs is not None:
            self._logprobs = [*(self._logprobs or ()), *chunk.logprobs]
        self._output = chunk.output
        if self._request.parse_reply:
            for delta in chunk.deltas:
                self._take_delta(delta)
            if chunk.output is not None and chunk.output.reply is not None:
                self._finish(chunk.output.reply)
        else:
            self._delta += chunk.text
            self._text += chunk.text
        if chunk.is_last:
            self._talk.answered(to_engine_messages([self._message()])[0])
            if self._call.object_class is not None and not self._has_object(self._call.object_class):
                refuse_cut_off(self._raw(), f"a whole {self._call.object_class.__name__}")
        return bool(chunk.text or chunk.deltas or chunk.is_last)

    def _take_delta(self, delta: ReplyDelta) -> None:
        if delta.kind == "reasoning":
            self._thinking += delta.text
            self._thinking_delta += delta.text
        elif delta.kind == "text":
            self._add_text(delta.text)
        else:
            self._take_call(delta)

    def _take_call(self, delta: ReplyDelta) -> None:
        if delta.index not in self._calls:
            for call in self._calls.values():
                call.end()
            if len(self._calls) == self._max_calls:
                return
            self._calls[delta.index] = _WrittenCall(delta.id, delta.name or "")
        call = self._calls[delta.index]
        if isinstance(call.arguments, str):
            call.arguments += delta.text

    def _finish(self, reply: Reply) -> None:
        """Only whole calls stay."""
        calls = reply.tool_calls[: self._max_calls]
        self._calls = {at: _WrittenCall(call.id, call.name, call.arguments) for at, call in enumerate(calls)}

    def _has_object(self, object_class: type[BaseModel]) -> bool:
        """Whether there is a whole object in an answer that may have been cut off, in a call or among other text."""
        if self._calls or is_whole_json(self._text):
            return True
        try:
            PydanticOutputParser(output_cls=object_class).parse(self._text)
        except ValueError:
            return False
        return True

    def _add_text(self, text: str) -> None:
        self._text += text
        self._delta += text

    # Responses

    def chat(self) -> ChatResponse:
        """The answer so far, and what is new since the last response."""
        response = ChatResponse(
            message=self._message(),
            delta=None if self._is_whole else self._delta,
            raw=self._raw(),
            logprobs=self._response_logprobs(),
            additional_kwargs={"thinking_delta": self._thinking_delta} if self._thinking_delta else {},
        )
        self._begin_next()
        return response

    def completion(self) -> CompletionResponse:
        """The answer so far, and what is new since the last response; reasoning is in `additional_kwargs`."""
        response = CompletionResponse(
            text=self._text,
            delta=None if self._is_whole else self._delta,
            raw=self._raw(),
            logprobs=self._response_logprobs(),
            additional_kwargs={"thinking": self._thinking} if self._thinking else {},
        )
        self._begin_next()
        return response

    def _message(self) -> ChatMessage:
        blocks: list[ContentBlock] = [ThinkingBlock(content=self._thinking)] if self._thinking else []
        if self._text or not self._calls:
            blocks.append(TextBlock(text=self._text))
        blocks += [call.block() for call in self._calls.values()]
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=self._older_calls())

    def _begin_next(self) -> None:
        self._delta = self._thinking_delta = ""
        self._segments, self._logprobs = [], None

    def _older_calls(self) -> dict[str, Any]:
        """Complete calls as older code looks for them; `FunctionCallingProgram` streams by nothing else."""
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for call in self._calls.values()
            if isinstance(call.arguments, dict)
        ]
        return {"tool_calls": calls} if calls else {}

    def _raw(self) -> dict[str, Any]:
        """Metadata; `segments` are the pieces of what is new, or of the whole answer, mark-up included."""
        copyspec: dict[str, Any] = {"session_id": self._talk.named}
        if self._call.options.include_segments:
            copyspec["segments"] = segment_metadata(self._segments)
        output = self._output
        if output is None:
            return {"model": self._model, "copyspec": copyspec}
        if output.reply is not None and (invalid := self._invalid_calls(output, output.reply)):
            copyspec["invalid_tool_calls"] = invalid
        return {
            "model": self._model,
            "finish_reason": output.finish_reason,
            "usage": {
                "prompt_tokens": output.usage.prompt_tokens,
                "cached_tokens": output.usage.cached_tokens,
                "completion_tokens": output.usage.completion_tokens,
                "total_tokens": output.usage.total_tokens,
            },
            "copyspec": {
                **copyspec,
                **answer_metadata(output, self._call.options),
                **tool_metadata(self._engine, self._request),
            },
        }

    def _invalid_calls(self, output: GenerationOutput, reply: Reply) -> list[dict[str, Any]]:
        """Calls that nobody makes, and why: they cannot be read, or are more than were asked for."""
        invalid = [(call.id, call.name, call.arguments, call_error(call, output)) for call in reply.invalid_tool_calls]
        if self._max_calls is not None:
            invalid += [
                (call.id, call.name, json.dumps(call.arguments, ensure_ascii=False), "one call too many was written")
                for call in reply.tool_calls[self._max_calls :]
            ]
        return [dict(zip(("id", "name", "arguments", "error"), values, strict=True)) for values in invalid]

    def _response_logprobs(self) -> list[list[LogProb]] | None:
        """For each new token its own log-probability, then those of the other likeliest ones."""
        if self._logprobs is None:
            return None
        entries = logprobs_metadata(self._engine, self._logprobs)["content"]
        return [
            [_logprob(entry), *(_logprob(other) for other, (token, _) in alternatives if token != found.token_id)]
            for found, entry in zip(self._logprobs, entries, strict=True)
            for alternatives in (zip(entry["top_logprobs"], found.top, strict=True),)
        ]


def refuse_cut_off(raw: Any, expected: str) -> None:  # noqa: ANN401 - what a response has there
    """Raise `ConfigError` if the answer whose metadata `raw` is was cut off."""
    if isinstance(raw, dict) and "finish_reason" in raw:
        error = cut_off(raw["finish_reason"], raw["usage"]["completion_tokens"], expected)
        if error is not None:
            raise ConfigError(error)


def _logprob(entry: dict[str, Any]) -> LogProb:
    return LogProb(token=entry["token"], logprob=entry["logprob"], bytes=entry["bytes"] or [])


def _all_at_once(reply: Reply | None) -> tuple[ReplyDelta, ...]:
    """A whole reply as if it had been streamed in one piece. Its calls are taken from the reply itself."""
    if reply is None:
        return ()
    parts = (ReplyDelta("reasoning", reply.reasoning), ReplyDelta("text", reply.text))
    return tuple(part for part in parts if part.text)
