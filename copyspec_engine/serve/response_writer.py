"""A response of POST /v1/responses as it is written: its items, the events that tell of them, and the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from copyspec_engine.adapters.answers import logprobs_metadata
from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.serve.call_body import CopySpecOptions
from copyspec_engine.serve.chat import ChatAnswer, told_logprobs
from copyspec_engine.serve.choices import told_at_end
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.serve.events import Event, obfuscated
from copyspec_engine.serve.items import item_id, text_part
from copyspec_engine.serve.service import Service
from copyspec_engine.values.outputs import GenerationOutput, ReplyDelta, StreamChunk, TokenLogprob

__all__ = ["ResponseWriter"]

_KINDS = {"text": "message", "reasoning": "reasoning", "tool_call": "function_call"}
_WRITTEN = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
"""What the events are called by which an item grows."""


class ResponseWriter:
    """Writes an answer as items, in events or as a whole.

    Args:
        service: whose model has written it.
        head: what the response says of itself before there is an answer.
        options: what else is to be told of the answer.
        talk: its conversation.
        keep: takes the whole response and the answer's message, once they are over.
    """

    def __init__(
        self,
        service: Service,
        head: Mapping[str, Any],
        options: CopySpecOptions,
        talk: Talk,
        keep: Callable[[Mapping[str, Any], Mapping[str, Any], GenerationOutput], None],
    ) -> None:
        self.obfuscate = False
        self._service, self._head, self._options, self._keep = service, dict(head), options, keep
        self._answer = ChatAnswer(talk)
        self._response: dict[str, Any] = {**self._head, "status": "in_progress", "output": [], "usage": None}
        self._items: list[dict[str, Any]] = []
        """Those that are over."""
        self._item: dict[str, Any] | None = None
        """The one that is being written."""
        self._text = ""
        self._call_index = 0
        self._logprobs: list[dict[str, Any]] = []
        """Of the text that is being written."""
        self._untold: list[TokenLogprob] = []
        """Those of tokens whose text is still to come."""
        self._ready: list[TokenLogprob] = []
        """Those of the text that comes next."""
        self._opening = ["response.created", "response.in_progress"]
        """Events that come before all others."""
        self._number = 0

    def events(self, index: int, chunk: StreamChunk) -> list[Event]:  # noqa: ARG002 - there is one answer
        """What a chunk adds."""
        self._untold += told_logprobs(self._service.engine, chunk)
        events = list(self._opened())
        deltas = self._answer.take(chunk)
        self._sort(deltas)
        for delta in deltas:
            events += self._add(delta)
        if chunk.output is not None:
            events += self._end(chunk.output)
        return events

    def keep_alive(self) -> Event:
        """The state, which is as it was."""
        kind = self._opening.pop(0) if self._opening else "response.in_progress"
        return self._event(kind, response=self._response)

    def end(self) -> list[Event]:
        """The whole response."""
        return [self._event(f"response.{self._response['status']}", response=self._response)]

    def failed(self, error: ApiError) -> list[Event]:
        """The response with what went wrong, and what was written before."""
        events = [*self._opened(), *self._close("incomplete")]
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        told = {"code": code, "message": error.message}
        self._response = {**self._head, "status": "failed", "error": told, "output": self._items, "usage": None}
        return [*events, self._event("response.failed", response=self._response)]

    def whole(self) -> Mapping[str, Any]:
        """The whole response."""
        return self._response

    # ---- events ------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:  # noqa: ANN401 - any JSON value
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return obfuscated(event) if self.obfuscate and kind.endswith(".delta") else event

    def _opened(self) -> Iterator[Event]:
        while self._opening:
            yield self._event(self._opening.pop(0), response=self._response)

    def _add(self, delta: ReplyDelta) -> Iterator[Event]:
        kind = _KINDS[delta.kind]
        is_same = self._item is not None and self._item["type"] == kind
        if not is_same or (kind == "function_call" and delta.index != self._call_index):
            yield from self._close("completed")
            yield from self._open(kind, delta)
        if delta.text:
            logprobs = self._told() if kind == "message" else []
            self._text += delta.text
            said = {"logprobs": logprobs} if kind == "message" else {}
            yield self._event(f"{_WRITTEN[kind]}.delta", **self._place(), delta=delta.text, **said)

    def _open(self, kind: str, delta: ReplyDelta) -> Iterator[Event]:
        """Begin an item."""
        self._item = {"id": item_id(kind), "type": kind, "status": "in_progress"}
        self._text, self._logprobs = "", []
        if kind == "function_call":
            self._call_index = delta.index
            self._item |= {"call_id": delta.id, "name": delta.name, "arguments": ""}
        else:
            own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            self._item |= {**own, "content": []}
        yield self._event("response.output_item.added", output_index=len(self._items), item=dict(self._item))
        if kind != "function_call":
            yield self._event("response.content_part.added", **self._place(), part=self._part())

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is being written, if there is one."""
        if self._item is None:
            return
        item, kind = self._item, self._item["type"]
        if kind == "function_call":
            item["arguments"] = self._text
            said = {"name": item["name"], "arguments": self._text}
        else:
            said = {"text": self._text} | ({"logprobs": self._logprobs} if kind == "message" else {})
        yield self._event(f"{_WRITTEN[kind]}.done", **self._place(), **said)
        if kind != "function_call":
            item["content"] = [self._part()]
            yield self._event("response.content_part.done", **self._place(), part=self._part())
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._item = None

    def _place(self) -> dict[str, Any]:
        assert self._item is not None, "an item is being written"
        place = {"item_id": self._item["id"], "output_index": len(self._items)}
        return place if self._item["type"] == "function_call" else {**place, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        """The text that is being written, as a part of its item."""
        assert self._item is not None, "an item is being written"
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return text_part(self._text, self._logprobs)

    def _sort(self, deltas: Sequence[ReplyDelta]) -> None:
        """Take the log-probabilities of tokens that are text from those untold: of others none are told."""
        places = [at for at, delta in enumerate(deltas) if delta.kind == "text"]
        text = "".join(deltas[at].text for at in places)
        if deltas and not text:
            self._untold = []
        if not text or not self._untold:
            return
        ids, decode = [told.token_id for told in self._untold], self._service.engine.decode
        later = "".join(delta.text for delta in deltas[places[-1] + 1 :]).count(text)
        first = next((at for at in reversed(range(len(ids))) if decode(ids[at:]).count(text) > later), 0)
        stop = next((at for at in range(first + 1, len(ids)) if text in decode(ids[first:at])), len(ids))
        self._ready = self._untold[first:stop]
        self._untold = self._untold[stop:] if deltas[-1].kind == "text" else []

    def _told(self) -> list[dict[str, Any]]:
        """The log-probabilities that go with a piece of text."""
        told = [
            {**_with_bytes(entry), "top_logprobs": [_with_bytes(top) for top in entry["top_logprobs"]]}
            for entry in logprobs_metadata(self._service.engine, self._ready)["content"]
        ]
        self._ready = []
        self._logprobs += told
        return told

    # ---- the end -----------------------------------------------------------------------------------------------

    def _end(self, output: GenerationOutput) -> Iterator[Event]:
        is_whole = output.finish_reason == "stop"
        if not self._items and self._item is None:  # an empty answer is a message too
            yield from self._open("message", ReplyDelta("text"))
        if self._item is not None and self._item["type"] == "message" and self._untold:
            self._ready = self._untold  # of tokens without a text of their own, or of a stop text
            self._told()
        yield from self._close("completed" if is_whole else "incomplete")
        reason = "max_output_tokens" if output.finish_reason == "length" else output.finish_reason
        said = told_at_end(self._options, output, is_whole=True)
        self._response = {
            **self._head,
            "status": "completed" if is_whole else "incomplete",
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": reason},
            "output": self._items,
            "usage": _usage(output),
            **({"copyspec": said} if said else {}),
        }
        if output.finish_reason != "cancelled":
            self._keep(self._response, self._answer.message(), output)


def _with_bytes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log-probability as responses have it, where a part of a character has no bytes rather than null."""
    return {**entry, "bytes": entry["bytes"] or []}


def _usage(output: GenerationOutput) -> dict[str, Any]:
    usage = output.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
