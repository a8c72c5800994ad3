"""An answer's text taken apart while it is written: text, reasoning, tool calls.

A call that is malformed or cut off becomes an invalid call, never an exception. Joining the deltas of a stream gives
the same as parsing the whole answer. What a piece costs does not depend on how much was written before it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from copyspec_engine.call_reader import Call, CallsReader
from copyspec_engine.chat_format import ChatFormat
from copyspec_engine.outputs import InvalidToolCall, Reply, ReplyDelta, ToolCall

__all__ = ["ReplyParser"]

logger = logging.getLogger(__name__)

_REASONING = ("thinking", "reasoning", "reasoning_content")
"""Names that response templates give to it."""


class _Parser(ResponseParser):
    """Goes on behind a part that cannot be parsed; its closing event then says why."""

    @property
    def pending(self) -> str:
        """What was read but may still be a part of something else."""
        return self._buffer[self._pos :]

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        field = self._current
        try:
            super()._close_current(events)
        except Exception as error:  # a malformed number or JSON, a transform that does not fit it, deep nesting
            events.append({"type": "region_close", "field": field, "error": f"{type(error).__name__}: {error}"})
            self._reset_to_implicit()


class _Part:
    """A part of an answer; white space between it and another part belongs to the format, not to the text."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held: list[str] = []
        """White space that may still turn out to be between parts."""

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def feed(self, text: str, *, after_other: bool = True) -> str:
        """What `text` adds for sure, behind another part or as the first one."""
        is_first = after_other and not self._pieces
        if text.isspace() or not text:
            if not is_first:
                self._held.append(text)
            return ""
        whole = text.lstrip() if is_first else "".join(self._held) + text
        added = whole.rstrip()
        self._held = [whole[len(added) :]]
        self._pieces.append(added)
        return added

    def end(self) -> str:
        """What an end of the answer adds: no other part follows."""
        added, self._held = "".join(self._held), []
        self._pieces.append(added)
        return added


class ReplyParser:
    """Takes one answer apart.

    Args:
        chat_format: how the model writes.
        prompt: the end of the rendered prompt, special tokens included: a template may have begun the answer, with an
            opened reasoning say.
        tools: OpenAI-style function schemas, by which arguments are read that the format writes without types.

    Raises:
        ValueError: the tokenizer's own response template is malformed.
    """

    def __init__(self, chat_format: ChatFormat, prompt: str = "", tools: Sequence[dict[str, Any]] = ()) -> None:
        self._layout = chat_format.calls if chat_format.own_template is None else None
        functions = [tool.get("function") or {} for tool in tools]
        template = load_response_template(chat_format.response_template([str(f.get("name")) for f in functions]))
        # A required part that is missing would cost all others.
        template.fields = {name: replace(field, optional=True) for name, field in template.fields.items()}
        self._parser: _Parser | None = _Parser(template, prefix=_begun(chat_format, prompt), tools=list(tools))
        self._unread: list[str] | None = None if template.implicit is not None else []
        """All text, where what is in no part would be lost."""
        self._calls: list[Call] = []
        self._reader: CallsReader | None = None
        self._spaced = chat_format.space_before_text
        self.is_reasoning = False
        """The prompt has opened a reasoning that the answer goes on with."""
        self._of_prompt = ""
        """The prompt's end, which the parser still holds."""
        self._reset()
        for event in self._parser.initial_events:  # what the template has written is no part of the answer
            self._take(event)
            if event["field"] in _REASONING:
                self.is_reasoning = event["type"] != "region_close"
        self._reset()
        self._of_prompt = self._parser.pending

    def _reset(self) -> None:
        self._text, self._reasoning = _Part(), _Part()
        self._has_others, self._in_text = self.is_reasoning or self._spaced, not self.is_reasoning

    def feed(self, text: str) -> list[ReplyDelta]:
        """What more text adds to the parts. `text` is the answer's own, special tokens included."""
        if self._unread is not None:
            self._unread.append(text)
        if self._parser is None:
            return self._add_text(text)
        try:
            return [delta for event in self._parser.feed(text) for delta in self._take(event)]
        except Exception:  # a fault of the parser's or a template's, which must not end the answer
            logger.exception("an answer could not be taken apart: the rest of it is text")
            self._parser = None
            return self._add_text(text)

    def finish(self) -> tuple[Reply, list[ReplyDelta]]:
        """The whole answer, and what its end added."""
        deltas: list[ReplyDelta] = []
        if self._parser is not None:
            try:
                deltas = [delta for event in self._parser.finalize()[1] for delta in self._take(event)]
            except Exception:
                logger.exception("the end of an answer could not be taken apart")
        self._close_reader()
        if self._unread and not (self._text.text or self._reasoning.text or self._calls):
            deltas += self._add_text("".join(self._unread))
        if self._in_text and (rest := self._text.end()):
            deltas.append(ReplyDelta("text", rest))
        results = [call.result() for call in self._calls]
        return Reply(
            self._text.text,
            self._reasoning.text,
            tuple(call for call in results if isinstance(call, ToolCall)),
            tuple(call for call in results if isinstance(call, InvalidToolCall)),
        ), deltas

    def _take(self, event: dict[str, Any]) -> list[ReplyDelta]:
        field, kind = event["field"], event["type"]
        if field in (*_REASONING, "tool_calls", "rest"):
            self._has_others, self._in_text = True, False
        if field == "rest":
            return []
        if field == "tool_calls":
            return self._take_call(event) if self._layout is None else self._read_calls(event)
        if kind != "region_chunk":
            return []
        text = event["text"].removeprefix(self._of_prompt)
        self._of_prompt = ""
        if field not in _REASONING:
            return self._add_text(text)
        added = self._reasoning.feed(text)
        return [ReplyDelta("reasoning", added)] if added else []

    def _add_text(self, text: str) -> list[ReplyDelta]:
        added = self._text.feed(text, after_other=self._has_others)
        self._in_text |= bool(added)
        return [ReplyDelta("text", added)] if added else []

    def _read_calls(self, event: dict[str, Any]) -> list[ReplyDelta]:
        """Calls whose layout we know are read as they come."""
        if event["type"] == "region_open" and self._layout is not None:
            self._reader = CallsReader(self._layout, self._calls)
        elif event["type"] == "region_close":
            self._close_reader()
        elif self._reader is not None:
            deltas = self._reader.feed(event["text"])
            return [d for delta in deltas for d in ([delta] if delta.kind != "text" else self._add_text(delta.text))]
        return []

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _take_call(self, event: dict[str, Any]) -> list[ReplyDelta]:
        """Calls that transformers parses come as a whole, and may be several."""
        if event["type"] == "region_open":
            self._calls.append(Call(len(self._calls)))
            return []
        call = self._calls[-1]
        if event["type"] == "region_chunk":
            call.raw.append(event["text"])
            return []
        call.error = event.get("error")
        if call.error is not None:
            return []
        first, *others = event["value"] if isinstance(event["value"], list) and event["value"] else [event["value"]]
        deltas = _read_value(call, first)
        for value in others:
            self._calls.append(Call(len(self._calls)))
            self._calls[-1].raw = call.raw
            deltas += _read_value(self._calls[-1], value)
        return deltas


def _read_value(call: Call, value: object) -> list[ReplyDelta]:
    """A call as a response template gives it."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        call.error = "no 'name' in the call"
        return []
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call.named(function["name"]) + call.argue(written)


def _begun(chat_format: ChatFormat, prompt: str) -> str:
    """The prompt, or nothing of it if no answer begins there: the parser would take all of it for the answer's."""
    known = chat_format.own_template is not None or any(mark in prompt for mark in chat_format.assistant)
    return prompt if known else ""
