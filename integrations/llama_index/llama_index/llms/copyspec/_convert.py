"""LlamaIndex messages and tools to what chat templates take.

Each message becomes one dict in the same order, its text blocks joined by newlines as `ChatMessage.content` does;
nothing is merged and the history is never changed. Calls keep their ids, and a result learns the name of the function
that its id belongs to. Images, audio, video, documents and citations raise, by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.tools.types import BaseTool

from copyspec_engine import ConfigError
from copyspec_engine.adapters.tools import check_nesting

__all__ = ["to_engine_messages", "to_function_schemas"]

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


def to_function_schemas(tools: Iterable[BaseTool | dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """OpenAI-style schemas, under the tools' own names: calls are looked up by them.

    Raises:
        ConfigError: this is no list, or one of something else.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ConfigError(f"Got tools={tools!r} but expected a list of tools or function schemas")
    return tuple(_to_function_schema(position, tool) for position, tool in enumerate(tools))


def _to_function_schema(position: int, tool: object) -> dict[str, Any]:
    if isinstance(tool, dict):
        check_nesting(tool, f"tools[{position}]")
        return tool
    if not isinstance(tool, BaseTool):
        raise ConfigError(
            f"Got tools[{position}]={tool!r} but expected a tool or a function schema: FunctionTool.from_defaults "
            "makes a tool of a function"
        )
    schema = tool.metadata.to_openai_tool(skip_length_check=True)
    return {**schema, "function": {**schema["function"], "name": tool.metadata.get_name()}}


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
