"""LangChain messages to the chat-template dicts that the engine reads.

Each message becomes one dict, in the same order; only tool results inside a user message become messages of their own.
Nothing is merged or dropped: two user messages in a row stay two. Arguments of tool calls stay objects, so that a
template writes them as the model did. Images, audio and files raise, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from copyspec_engine import ConfigError

__all__ = ["PROVIDER", "to_engine_messages"]

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
