"""LangChain messages to engine messages, engine outputs to LangChain messages.

Input flow: system, human, AI and free-role messages, their content a string or a list of text blocks, become
`{"role", "content"}` dicts in the same order. Nothing is merged: two user messages in a row stay two.
Output flow: text becomes `content`, counts `usage_metadata`, the rest `response_metadata`.
Not covered: tool calls and tool results, images, audio, files, reasoning. They raise, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from copyspec_engine import ConfigError, GenerationOutput, Segment, StreamChunk
from copyspec_engine.adapters import answer_metadata, segment_metadata
from langchain_copyspec._calls import Call

__all__ = ["PROVIDER", "to_ai_message", "to_ai_message_chunk", "to_engine_messages"]

PROVIDER = "copyspec"
"""`ls_provider` in traces and `model_provider` of answers: they must be equal for reported usage to be believed."""


def to_engine_messages(messages: Sequence[BaseMessage]) -> tuple[dict[str, Any], ...]:
    """Chat-template dicts for `messages`.

    Raises:
        ConfigError: no messages, or one with content that a text model cannot read.
    """
    if not messages:
        raise ConfigError("Got no messages but expected at least one")
    return tuple(_to_engine_message(position, message) for position, message in enumerate(messages))


def _to_engine_message(position: int, message: BaseMessage) -> dict[str, Any]:
    converted: dict[str, Any] = {"role": _role(position, message), "content": _text(position, message)}
    if message.name:
        converted["name"] = message.name
    return converted


def _role(position: int, message: BaseMessage) -> str:
    if isinstance(message, ToolMessage) or (isinstance(message, AIMessage) and message.tool_calls):
        raise ConfigError(
            f"Got messages[{position}] with a tool call or its result but expected text: ChatCopySpec has no tool "
            "calling yet. Leave such messages out, or turn them into text"
        )
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in ((SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant")):
        if isinstance(message, kind):
            return role
    raise ConfigError(
        f"Got messages[{position}] of type {type(message).__name__} but expected a system, human, AI or chat message"
    )


def _text(position: int, message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(position, block) for block in message.content)


def _block_text(position: int, block: str | dict[str, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type", "text" if "text" in block else "untyped")
    if kind != "text" or not isinstance(block.get("text"), str):
        raise ConfigError(
            f"Got a content block of type {kind!r} in messages[{position}] but expected text: the model reads text "
            "only. Remove the block, or describe it in words"
        )
    return str(block["text"])


def to_ai_message(last: StreamChunk, model: str, call: Call) -> AIMessage:
    """The whole answer as one message, from its last chunk."""
    output = last.output
    assert output is not None, "the last chunk has the whole answer"
    segments = output.segments if call.include_segments else ()
    return AIMessage(
        content=output.text,
        usage_metadata=_usage(output),
        response_metadata={"model_provider": PROVIDER, **_metadata(output, model, call, segments)},
    )


def to_ai_message_chunk(chunk: StreamChunk, model: str, call: Call, *, first: bool) -> AIMessageChunk:
    """One piece of the answer.

    Chunks are added up by concatenating texts, so each text in the metadata comes with exactly one chunk: the provider
    with the first, everything else with the last.
    """
    metadata: dict[str, Any] = {"model_provider": PROVIDER} if first else {}
    segments = chunk.segments if call.include_segments else ()
    if chunk.output is None:
        if segments:
            metadata["copyspec"] = {"segments": segment_metadata(segments)}
        return AIMessageChunk(content=chunk.text, response_metadata=metadata)
    return AIMessageChunk(
        content=chunk.text,
        usage_metadata=_usage(chunk.output),
        response_metadata={**metadata, **_metadata(chunk.output, model, call, segments)},
        chunk_position="last",
    )


def _usage(output: GenerationOutput) -> UsageMetadata:
    usage = output.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _metadata(output: GenerationOutput, model: str, call: Call, segments: Sequence[Segment]) -> dict[str, Any]:
    copyspec = {"session_id": call.request.session_id, **answer_metadata(output)}
    if segments:
        copyspec["segments"] = segment_metadata(segments)
    return {"model_name": model, "finish_reason": output.finish_reason, "copyspec": copyspec}
