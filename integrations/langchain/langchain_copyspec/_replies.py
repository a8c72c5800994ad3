"""Engine outputs to LangChain messages.

Text becomes `content`, reasoning `additional_kwargs["reasoning_content"]`, calls `tool_calls` and `invalid_tool_calls`;
with output_version "v1" all of them are content blocks. Counts become `usage_metadata`, the rest `response_metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.utils.json import parse_partial_json

from copyspec_engine import (
    Engine,
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
    logprobs_metadata,
    segment_metadata,
    tool_metadata,
)
from langchain_copyspec._calls import PreparedCall
from langchain_copyspec._convert import PROVIDER

__all__ = ["ReplyWriter"]

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

    def __init__(self, engine: Engine, call: PreparedCall, model: str, *, blocks: bool) -> None:
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
