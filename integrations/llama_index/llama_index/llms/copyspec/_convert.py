"""LlamaIndex messages to engine messages, engine chunks to LlamaIndex responses.

Input flow: each message becomes a `{"role", "content"}` dict, its text blocks joined by newlines as
`ChatMessage.content` does. Nothing is merged and the history is never changed.
Output flow: every streamed response has the text so far and what is new in `delta`; the last one has the counts.
Not covered: tool calls and tool results, thinking, images, audio, video, documents, citations. They raise, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
)

from copyspec_engine import ConfigError, GenerationOutput, StreamChunk
from copyspec_engine.adapters import answer_metadata, segment_metadata

__all__ = ["chat_response", "completion_response", "to_engine_messages"]

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_engine_messages(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """Chat-template dicts for `messages`.

    Raises:
        ConfigError: no messages, or one with content that a text model cannot read.
    """
    if not messages:
        raise ConfigError("Got no messages but expected at least one")
    return tuple(_to_engine_message(position, message) for position, message in enumerate(messages))


def _to_engine_message(position: int, message: ChatMessage) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None or message.additional_kwargs.get("tool_calls"):
        raise ConfigError(
            f"Got messages[{position}], a {message.role.value} message with a tool call or its result, but expected "
            "text: CopySpec has no tool calling yet. Leave such messages out, or turn them into text"
        )
    return {"role": role, "content": _text(position, message)}


def _text(position: int, message: ChatMessage) -> str:
    texts = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        # A cache point is a hint without content; the engine reuses every prefix that it knows anyway.
        elif not isinstance(block, CachePoint):
            raise ConfigError(
                f"Got a block of type {block.block_type!r} in messages[{position}] but expected text: the model reads "
                "text only. Remove the block, or describe it in words"
            )
    return "\n".join(texts)


def chat_response(model: str, session_id: str | None, text: str, last: StreamChunk | GenerationOutput) -> ChatResponse:
    """The answer so far, of which `last` is the newest chunk; or the whole answer."""
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text=text)])
    return ChatResponse(message=message, delta=_delta(last), raw=_raw(model, session_id, last))


def completion_response(
    model: str, session_id: str | None, text: str, last: StreamChunk | GenerationOutput
) -> CompletionResponse:
    """The answer so far, of which `last` is the newest chunk; or the whole answer."""
    return CompletionResponse(text=text, delta=_delta(last), raw=_raw(model, session_id, last))


def _delta(last: StreamChunk | GenerationOutput) -> str | None:
    return last.text if isinstance(last, StreamChunk) else None


def _raw(model: str, session_id: str | None, last: StreamChunk | GenerationOutput) -> dict[str, Any]:
    """Metadata of a response; `segments` are the pieces of its delta, or of the whole answer if there is no delta."""
    copyspec: dict[str, Any] = {"session_id": session_id, "segments": segment_metadata(last.segments)}
    output = last.output if isinstance(last, StreamChunk) else last
    if output is None:
        return {"model": model, "copyspec": copyspec}
    return {
        "model": model,
        "finish_reason": output.finish_reason,
        "usage": _usage(output),
        "copyspec": {**copyspec, **answer_metadata(output)},
    }


def _usage(output: GenerationOutput) -> dict[str, int]:
    usage = output.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
