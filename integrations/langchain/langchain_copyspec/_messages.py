"""LangChain's messages to the chat-template dicts that the engine reads, and what it gives back to messages again.

On the way in each message becomes one dict, in the same order; only tool results inside a user message become messages
of their own. Nothing is merged or dropped: two user messages in a row stay two. Arguments of tool calls stay objects,
so that a template writes them as the model did. Images, audio and files raise, by name.

On the way out text becomes `content`, reasoning `additional_kwargs["reasoning_content"]`, calls `tool_calls` and
`invalid_tool_calls`; with output_version "v1" all of them are content blocks. Counts become `usage_metadata`, the rest
`response_metadata`, by which an answer can be explained after pickling and out of a checkpoint too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.utils.json import parse_partial_json

from copyspec_engine import (
    ConfigError,
    Explanation,
    GenerationOutput,
    Reply,
    ReplyDelta,
    Segment,
    StreamChunk,
    TokenLogprob,
)
from copyspec_engine.adapters.answers import (
    answer_metadata,
    call_error,
    explain_metadata,
    logprobs_metadata,
    segment_metadata,
    tool_metadata,
)
from copyspec_engine.adapters.model import AdapterOptions
from copyspec_engine.adapters.remote import AnyEngine
from langchain_copyspec._calls import PreparedCall

__all__ = [
    "PROVIDER",
    "ReplyWriter",
    "explain",
    "to_engine_messages",
]


PROVIDER = "copyspec"
"""`ls_provider` in traces and `model_provider` of answers: they must be equal for reported usage to be believed."""

_ROLES: tuple[tuple[type[BaseMessage], str], ...] = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_TEXTS = {"text", "input_text", "output_text", "text-plain"}
_CALLS = {"tool_call", "tool_use", "function_call"}
_WRITTEN_ELSEWHERE = {"tool_call_chunk", "invalid_tool_call", "redacted_thinking"}
"""Blocks whose content is in a field of the message too, or that nobody can read."""
_MEDIA = {
    "audio",
    "document",
    "file",
    "image",
    "image_url",
    "input_audio",
    "input_file",
    "input_image",
    "media",
    "video",
    "video_url",
}


@dataclass
class _Parts:
    """What the content of one message holds."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    invalid: set[str] = field(default_factory=set)
    """Ids of calls that are malformed, which are in a field of the message too."""


def to_engine_messages(messages: Sequence[BaseMessage]) -> tuple[dict[str, Any], ...]:
    """Chat-template dicts for `messages`.

    Raises:
        ConfigError: no messages, or one with content that a text model cannot read.
    """
    if not messages:
        raise ConfigError("Got no messages but expected at least one")
    names: dict[str, str] = {}
    """Functions by the ids of their calls: templates want the name of what a result is the result of."""
    converted: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        converted += _to_engine_messages(position, message, names)
    return tuple(converted)


def _to_engine_messages(position: int, message: BaseMessage, names: dict[str, str]) -> list[dict[str, Any]]:
    parts = _read(position, message)
    for result in parts.results:
        result["name"] = names.get(result["tool_call_id"], "")
    role = _role(position, message)
    own: dict[str, Any] = {"role": role, "content": parts.text}
    if isinstance(message, AIMessage):
        _add_answer_parts(own, message, parts)
        names.update({call["id"]: call["function"]["name"] for call in own.get("tool_calls", ())})
    if isinstance(message, ToolMessage):
        own |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
    if message.name:
        own["name"] = message.name
    if parts.results and not parts.text:
        return parts.results
    return [*parts.results, own]


def _role(position: int, message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise ConfigError(
        f"Got messages[{position}] of type {type(message).__name__} but expected a system, human, AI, tool or chat "
        "message"
    )


def _add_answer_parts(own: dict[str, Any], message: AIMessage, parts: _Parts) -> None:
    """Reasoning, calls, and what was written for calls that could not be read."""
    reasoning = parts.reasoning or message.additional_kwargs.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        own["reasoning_content"] = reasoning
    known = {call["id"] or "" for call in message.tool_calls}
    calls = [_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    calls += [call for call in parts.calls if call["id"] not in known]
    if calls:
        own["tool_calls"] = calls
    for call in message.invalid_tool_calls:
        written = _as_written(call.get("name") or "", call.get("args") or "")
        own["content"] = f"{own['content']}\n{written}" if own["content"] else written


def _as_written(name: str, arguments: str) -> str:
    """A call that could not be read: its arguments may be all that was written of it, with its name before them."""
    begins = r"\W*(?:(?:name|function|tool|tool_name)\W+)?" + re.escape(name) + r"(?!\w)"
    return arguments if re.match(begins, arguments) else f"{name} {arguments}".strip()


def _call(call_id: str | None, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id or "", "type": "function", "function": {"name": name, "arguments": arguments}}


def _read(position: int, message: BaseMessage) -> _Parts:
    parts = _Parts()
    if isinstance(message, AIMessage):
        parts.invalid = {call["id"] or "" for call in message.invalid_tool_calls}
    for block in [message.content] if isinstance(message.content, str) else message.content:
        _read_block(position, block, parts)
    return parts


def _read_block(position: int, block: object, parts: _Parts) -> None:
    if isinstance(block, str):
        parts.text += block
        return
    block, kind = _typed(position, block)
    if kind in _TEXTS and isinstance(block.get("text"), str):
        parts.text += block["text"]
    elif kind in ("reasoning", "thinking", "reasoning_content"):
        parts.reasoning += _reasoning(block)
    elif kind in _CALLS and isinstance(block.get("name"), str):
        call_id = block.get("call_id") or block.get("id") or ""
        if call_id not in parts.invalid:
            parts.calls.append(_call(call_id, block["name"], _arguments(position, block)))
    elif kind == "tool_result":
        result = _Parts()
        content = block.get("content") or ""
        for inner in content if isinstance(content, list | tuple) else [content]:
            _read_block(position, inner, result)
        parts.results.append(
            {"role": "tool", "content": result.text, "tool_call_id": str(block.get("tool_use_id") or "")}
        )
    elif kind in _TEXTS:
        raise ConfigError(
            f"Got text={block.get('text')!r} in a content block of type {kind!r} in messages[{position}] but expected "
            "a string"
        )
    elif kind not in _WRITTEN_ELSEWHERE:
        raise ConfigError(_unreadable(position, kind))


def _typed(position: int, block: object) -> tuple[dict[str, Any], str]:
    """A content block and its type."""
    if isinstance(block, dict):
        kind = block.get("type", "text" if "text" in block else "untyped")
        if isinstance(kind, str):
            return block, kind
    raise ConfigError(
        f'Got {block!r} in the content of messages[{position}] but expected a text or {{"type": "text", "text": ...}}'
    )


def _unreadable(position: int, kind: str) -> str:
    if kind in _MEDIA:
        return (
            f"Got a content block of type {kind!r} in messages[{position}] but expected text: the model reads text "
            "only. Remove the block, or describe it in words"
        )
    return (
        f"Got a content block of type {kind!r} in messages[{position}] but expected text, reasoning, a tool call or "
        "its result: remove the block, or turn it into text"
    )


def _reasoning(block: dict[str, Any]) -> str:
    """The text of a reasoning block, in LangChain's, Anthropic's, Bedrock's or OpenAI's form."""
    text = block.get("reasoning") or block.get("thinking") or block.get("reasoning_content") or ""
    if isinstance(text, dict):
        text = text.get("text") or ""
    summary = block.get("summary") or ()
    return str(text) + "".join(str(part.get("text", "")) for part in summary if isinstance(part, dict))


def _arguments(position: int, block: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call in a content block, as an object."""
    arguments: Any = next((block[key] for key in ("args", "input", "arguments") if block.get(key)), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ConfigError(
            f"Got a call of {block['name']!r} in messages[{position}] whose arguments are no JSON object: {block!r}"
        )
    return arguments


_ENDINGS = ("", "]", "}", '"]', '"}', '""]', '""}')
"""One of these closes what is not open, wherever arguments are cut off: in a list, an object, a text, an escape."""


class ReplyWriter:
    """Writes the messages of one call.

    Args:
        engine: that answers, for the text of single tokens.
        call: what was asked.
        model: its name.
        blocks: write content blocks, as output_version "v1" has them.
    """

    def __init__(self, engine: AnyEngine, call: PreparedCall, model: str, *, blocks: bool) -> None:
        self._engine, self._call, self._model, self._blocks = engine, call, model, blocks
        self._first = True
        self._index, self._part = -1, ("", 0)
        self._places: dict[int, int] = {}
        """Content blocks by the indices of their calls: what ends a call may come behind another one."""
        self._arguments: dict[int, str] = {}
        self._calls: dict[str, int] = {}

    # A whole answer

    def message(self, last: StreamChunk) -> AIMessage:
        """The whole answer as one message, from its last chunk."""
        output = last.output
        assert output is not None, "the last chunk has the whole answer"
        assert output.reply is not None, "every request asks for the parts"
        reply = output.reply
        segments = output.segments if self._call.options.include_segments else ()
        metadata = {"model_provider": PROVIDER, **self._metadata(output, segments), **self._logprobs(output.logprobs)}
        calls = [{"name": call.name, "args": call.arguments, "id": call.id} for call in reply.tool_calls]
        invalid = [
            {"name": call.name, "args": call.arguments, "id": call.id, "error": call_error(call, output)}
            for call in reply.invalid_tool_calls
        ]
        return AIMessage(
            content=_blocks(reply, calls, invalid) if self._blocks else reply.text,
            additional_kwargs={"reasoning_content": reply.reasoning} if reply.reasoning and not self._blocks else {},
            tool_calls=calls,
            invalid_tool_calls=invalid,
            usage_metadata=_usage(output),
            response_metadata={**metadata, "output_version": "v1"} if self._blocks else metadata,
        )

    # A stream

    def generations(self, chunk: StreamChunk) -> Iterator[ChatGenerationChunk]:
        """The same as `chunks`, as LangChain streams them; the last one has the figures of the answer."""
        told = None if chunk.output is None else self.figures(chunk.output)
        for message in self.chunks(chunk):
            yield ChatGenerationChunk(message=message, generation_info=told if message.chunk_position else None)

    def chunks(self, chunk: StreamChunk) -> list[AIMessageChunk]:
        """What a step of the engine adds, a part of the answer each, then what is known at its end.

        Chunks are added up by concatenating texts, so each text in the metadata comes with exactly one chunk: the
        provider with the first, everything else with the last.
        """
        deltas = list(_joined(chunk.deltas))
        for delta in deltas:
            self._note(delta)
        if chunk.output is not None and chunk.output.reply is not None:
            deltas += self._corrections(chunk.output.reply)
        made = [self._piece(delta) for delta in deltas]
        if chunk.output is not None:
            made.append(self._chunk([] if self._blocks else "", {}))
            made[-1].usage_metadata = _usage(chunk.output)
            made[-1].chunk_position = "last"
            made[-1].response_metadata |= self._metadata(chunk.output, ())
        segments = segment_metadata(chunk.segments) if self._call.options.include_segments else ()
        if segments or chunk.logprobs:
            made = made or [self._chunk([] if self._blocks else "", {})]
            made[0].response_metadata |= self._logprobs(chunk.logprobs)
            if segments:
                made[0].response_metadata.setdefault("copyspec", {})["segments"] = segments
        return made

    def _corrections(self, reply: Reply) -> Iterable[ReplyDelta]:
        """Deltas after which calls add up as the whole answer has them.

        A call without arguments has no deltas before its end. One that cannot be carried out must not read as valid:
        LangChain completes what is cut off, so a mismatched bracket ends it.
        """
        for call in reply.tool_calls:
            if call.id not in self._calls:
                self._calls[call.id] = self._free_index()
                args = json.dumps(call.arguments)
                yield ReplyDelta("tool_call", args, self._calls[call.id], call.id, call.name)
        for invalid in reply.invalid_tool_calls:
            index = self._calls.setdefault(invalid.id, self._free_index())
            sent = self._arguments.get(index)
            if sent is None:
                args = invalid.arguments
                yield ReplyDelta("tool_call", args + _ending(args), index, invalid.id, invalid.name)
            elif _ending(sent):
                yield ReplyDelta("tool_call", _ending(sent), index)

    def _free_index(self) -> int:
        """An index that no call has: those that are unreadable so far have one that is not in any delta."""
        return 1 + max((*self._calls.values(), *self._arguments), default=-1)

    def _note(self, delta: ReplyDelta) -> None:
        if delta.kind == "tool_call":
            self._arguments[delta.index] = self._arguments.get(delta.index, "") + delta.text
            if delta.id is not None:
                self._calls[delta.id] = delta.index

    def _piece(self, delta: ReplyDelta) -> AIMessageChunk:
        is_call = delta.kind == "tool_call"
        if (delta.kind, delta.index) != self._part and not (is_call and delta.index in self._places):
            self._index += 1
        self._part = (delta.kind, delta.index)
        if is_call:
            place = self._places.setdefault(delta.index, self._index)
            index = place if self._blocks else delta.index
            part = tool_call_chunk(name=delta.name, args=delta.text, id=delta.id, index=index)
            return self._chunk([dict(part)] if self._blocks else "", {"tool_call_chunks": [part]})
        if self._blocks:
            return self._chunk([{"type": delta.kind, delta.kind: delta.text, "index": self._index}], {})
        if delta.kind == "text":
            return self._chunk(delta.text, {})
        return self._chunk("", {"additional_kwargs": {"reasoning_content": delta.text}})

    def _chunk(self, content: str | list[Any], fields: dict[str, Any]) -> AIMessageChunk:
        metadata: dict[str, Any] = {"model_provider": PROVIDER} if self._first else {}
        if self._blocks:
            metadata["output_version"] = "v1"
        self._first = False
        return AIMessageChunk(content=content, response_metadata=metadata, **fields)

    # Metadata

    def figures(self, output: GenerationOutput) -> dict[str, Any]:
        """What callbacks and traces are told of an answer: no texts, and no conversation, as caches keep it too."""
        told = answer_metadata(replace(output, explanation=None), AdapterOptions())
        return {"model_name": self._model, "finish_reason": output.finish_reason, "copyspec": told}

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        return {"logprobs": logprobs_metadata(self._engine, logprobs)} if logprobs else {}

    def _metadata(self, output: GenerationOutput, segments: Sequence[Segment]) -> dict[str, Any]:
        call = self._call
        copyspec = {
            "session_id": call.talk.named,
            **answer_metadata(output, call.options),
            **tool_metadata(self._engine, call.request),
        }
        if segments:
            copyspec["segments"] = segment_metadata(segments)
        return {"model_name": self._model, "finish_reason": output.finish_reason, "copyspec": copyspec}


def _blocks(reply: Reply, calls: list[dict[str, Any]], invalid: list[dict[str, Any]]) -> list[str | dict[Any, Any]]:
    blocks: list[str | dict[Any, Any]] = []
    if reply.reasoning:
        blocks.append({"type": "reasoning", "reasoning": reply.reasoning})
    if reply.text:
        blocks.append({"type": "text", "text": reply.text})
    blocks += [{"type": "tool_call", **call} for call in calls]
    blocks += [{"type": "invalid_tool_call", **call} for call in invalid]
    return blocks


def _joined(deltas: Sequence[ReplyDelta]) -> Iterable[ReplyDelta]:
    """Deltas of one part in a row as one."""
    held: ReplyDelta | None = None
    for delta in deltas:
        if held is not None and (held.kind, held.index) == (delta.kind, delta.index):
            held = ReplyDelta(held.kind, held.text + delta.text, held.index, held.id, held.name)
        else:
            if held is not None:
                yield held
            held = delta
    if held is not None:
        yield held


def _ending(arguments: str) -> str:
    """The shortest text behind which LangChain's reader, which completes what is cut off, takes them for malformed."""
    return next(ending for ending in _ENDINGS if not _reads_as_object(arguments + ending))


def _reads_as_object(arguments: str) -> bool:
    try:
        return not arguments or isinstance(parse_partial_json(arguments), dict)
    except ValueError:
        return False


def _usage(output: GenerationOutput) -> UsageMetadata:
    usage = output.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def explain(message: AIMessage) -> Explanation:
    """The copied spans of an answer.

    Raises:
        ConfigError: the message is no whole answer of ours, or its text was changed.
    """
    if not isinstance(message, AIMessage):
        raise ConfigError(
            f"Got message of type {type(message).__name__} but expected the AIMessage that a call returned; of what an "
            'agent returned that is one of ["messages"]'
        )
    return explain_metadata(message.response_metadata.get("copyspec"), str(message.text))
