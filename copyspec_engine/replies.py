"""An answer's text taken apart while it is written: text, reasoning, tool calls.

A call that is malformed or cut off becomes an invalid call, never an exception. Joining the deltas of a stream gives
the same as parsing the whole answer.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from copyspec_engine.chat_format import ChatFormat
from copyspec_engine.grammar_options import CallLayout
from copyspec_engine.outputs import InvalidToolCall, Reply, ReplyDelta, ToolCall

__all__ = ["ReplyParser"]

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9
"""Some chat templates (Mistral's) take ids of exactly nine letters and digits."""


class _Trimmed:
    """A part whose white space at both ends belongs to the format, not to the text."""

    def __init__(self) -> None:
        self.text = ""
        self._held = ""

    def feed(self, text: str) -> str:
        """What `text` adds for sure."""
        whole = self._held + text
        if not self.text:
            whole = whole.lstrip()
        added = whole.rstrip()
        self._held = whole[len(added) :]
        self.text += added
        return added


class ReplyParser:
    """Takes one answer apart.

    Args:
        chat_format: how the model writes.
        prompt: the end of the rendered prompt, special tokens included: a template may have begun the answer, with an
            opened reasoning say.
        tools: OpenAI-style function schemas, by which arguments are read that the format writes without types.
    """

    def __init__(self, chat_format: ChatFormat, prompt: str = "", tools: Sequence[dict[str, Any]] = ()) -> None:
        self._layout = chat_format.calls if chat_format.own_template is None else None
        self._parser = ResponseParser(chat_format.response_template(), prefix=prompt, tools=list(tools))
        self._text, self._reasoning = _Trimmed(), _Trimmed()
        self._calls: list[_CallReader] = []
        for event in self._parser.initial_events:  # what the template has written is no part of the answer
            self._take(event)
        self._text, self._reasoning = _Trimmed(), _Trimmed()

    def feed(self, text: str) -> list[ReplyDelta]:
        """What more text adds to the parts. `text` is the answer's own, special tokens included."""
        return [delta for event in self._parser.feed(text) for delta in self._take(event)]

    def finish(self) -> tuple[Reply, list[ReplyDelta]]:
        """The whole answer, and what its end added."""
        _, events = self._parser.finalize()
        deltas = [delta for event in events for delta in self._take(event)]
        results = [call.result() for call in self._calls]
        return Reply(
            self._text.text,
            self._reasoning.text,
            tuple(call for call in results if isinstance(call, ToolCall)),
            tuple(call for call in results if isinstance(call, InvalidToolCall)),
        ), deltas

    def _take(self, event: dict[str, Any]) -> list[ReplyDelta]:
        field, kind = event["field"], event["type"]
        if field == "tool_calls":
            if kind == "region_open":
                self._calls.append(_CallReader(len(self._calls), self._layout or CallLayout()))
            return self._calls[-1].feed(event["text"]) if kind == "region_chunk" else []
        if kind != "region_chunk":
            return []
        if field == "content":
            added = self._text.feed(event["text"])
            return [ReplyDelta("text", added)] if added else []
        added = self._reasoning.feed(event["text"])
        return [ReplyDelta("reasoning", added)] if added else []


class _CallReader:
    """Reads one call: its name, then its arguments as they come."""

    def __init__(self, index: int, layout: CallLayout) -> None:
        self._index, self._layout = index, layout
        self._id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
        self._body = ""
        self._sent: int | None = None
        """Characters of the arguments that were given out; None while the name is not known."""

    def feed(self, text: str) -> list[ReplyDelta]:
        self._body += text
        name, arguments = _parts(self._body, self._layout)
        if name is None or arguments is None:
            return []
        first, sent = self._sent is None, self._sent or 0
        self._sent = len(arguments)
        if not first and not arguments[sent:]:
            return []
        begin = {"id": self._id, "name": name} if first else {}
        return [ReplyDelta("tool_call", arguments[sent:], self._index, **begin)]

    def result(self) -> ToolCall | InvalidToolCall:
        name, _ = _parts(self._body, self._layout)
        try:
            call = json.loads(self._body)
        except ValueError as error:
            return InvalidToolCall(self._id, name, self._body.strip(), f"not JSON: {error}")
        if not isinstance(call, dict) or not isinstance(call.get(self._layout.name_key), str):
            return InvalidToolCall(self._id, name, self._body.strip(), f"no {self._layout.name_key!r} in the call")
        arguments = call.get(self._layout.arguments_key, {})
        if not isinstance(arguments, dict):
            return InvalidToolCall(self._id, name, self._body.strip(), "the arguments are no JSON object")
        return ToolCall(self._id, call[self._layout.name_key], arguments)


def _parts(body: str, layout: CallLayout) -> tuple[str | None, str | None]:
    """The name in the beginning of a call, and its arguments as far as they are written."""
    name: str | None = None
    arguments: str | None = None
    decoder, at = json.JSONDecoder(), body.find("{") + 1
    if not at:
        return None, None
    try:
        while True:
            at = _skip(body, at, " \t\r\n,")
            key, at = decoder.raw_decode(body, at)
            at = _skip(body, at, " \t\r\n:")
            if key == layout.arguments_key:
                try:
                    _, end = decoder.raw_decode(body, at)
                except ValueError:
                    return name, body[at:]
                arguments, at = body[at:end], end
            else:
                value, at = decoder.raw_decode(body, at)
                if key == layout.name_key and isinstance(value, str):
                    name = value
    except ValueError:
        return name, arguments


def _skip(text: str, at: int, letters: str) -> int:
    while at < len(text) and text[at] in letters:
        at += 1
    return at
