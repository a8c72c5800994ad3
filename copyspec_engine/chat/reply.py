"""An answer's text taken apart while it is written: text, reasoning, tool calls.

A call that is malformed or cut off becomes an invalid call, never an exception. Joining the deltas of a stream gives
the same as parsing the whole answer. What a piece costs does not depend on how much was written before it.

Where parts begin and end, transformers' parser says. Texts speak of such marks too, so they count only where they can
be meant: reasoning begins an answer, and calls are made of tools that were offered.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from copyspec_engine.chat.formats import REASONING_FIELDS, ChatFormat
from copyspec_engine.chat.tool_calls import CallsReader, PartialCall
from copyspec_engine.values.grammar import CallLayout
from copyspec_engine.values.outputs import InvalidToolCall, Reply, ReplyDelta, ToolCall

__all__ = [
    "Form",
    "PartsParser",
    "ReplyParser",
    "answer_template",
    "begun_by",
]

logger = logging.getLogger(__name__)

CALL_FIELDS = ("tool_calls", "calls_end")


class PartsParser(ResponseParser):
    """Goes on behind a part that cannot be parsed; its closing event then says why, and each says what was written."""

    _begin = 0

    @property
    def pending(self) -> str:
        """What was read but may still be a part of something else."""
        return self._buffer[self._pos :]

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:  # noqa: ANN401 - regex's types
        self._begin = m.start()
        super()._open_explicit(events, field, m)

    def _accumulate(self, events: list[dict[str, Any]], text: str) -> None:
        if self._current is None and text:  # in no part, where the template has none for it
            events.append({"type": "region_chunk", "field": None, "text": text})
        super()._accumulate(events, text)

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        field, count = self._current, len(events)
        try:
            super()._close_current(events)
        except Exception as error:  # a malformed number or JSON, a transform that does not fit it, deep nesting
            events.append({"type": "region_close", "field": field, "error": f"{type(error).__name__}: {error}"})
            self._reset_to_implicit()
        for event in events[count:]:
            event["written"] = self._buffer[self._begin : self._pos]


def answer_template(spec: dict[str, Any], *, may_call: bool, may_reason: bool) -> ResponseTemplate:
    """How an answer's parts are told apart.

    Where text needs no marks of its own, reasoning comes before it only, and marks of parts that cannot be are text.

    Args:
        spec: of a response template, in transformers' form.
        may_call: tools were offered.
        may_reason: nothing says that the answer is text or calls from its beginning.

    Raises:
        ValueError: it is malformed.
    """
    template = load_response_template(spec)
    fields: dict[str, Any] = spec["fields"]
    if template.implicit is not None:
        dropped = {*(() if may_call else CALL_FIELDS), *(() if may_reason else REASONING_FIELDS)}
        fields = {name: field for name, field in fields.items() if name not in dropped - {template.implicit}}
        fields |= {name: _at_begin(fields[name]) for name in REASONING_FIELDS if name in fields}
    # A required part that is missing would cost all others.
    fields = {name: {**field, "optional": True} for name, field in fields.items()}
    return load_response_template({**spec, "fields": fields})


def _at_begin(field: dict[str, Any]) -> dict[str, Any]:
    """A field that opens at the beginning of an answer only."""
    if "open" not in field and "open_pattern" not in field:
        return field
    marks = field.get("open", ())
    literals = [marks] if isinstance(marks, str) else sorted(marks, key=len, reverse=True)
    opened = field.get("open_pattern") or "|".join(map(re.escape, literals))
    others = {key: value for key, value in field.items() if key != "open"}
    return {**others, "open_pattern": rf"\A\s{{0,64}}(?:{opened})"}


def begun_by(prompt: str, spec: dict[str, Any]) -> str:
    """What of an answer the prompt's end has begun: where text needs no marks, from where reasoning opens."""
    template = load_response_template(spec)
    is_known = template.start_anchor_re.search(prompt) is not None
    begun = template.truncate_past_last_anchor(prompt) if is_known else ""
    if template.implicit is None:
        return begun
    for field in (template.fields[name] for name in REASONING_FIELDS if name in template.fields):
        if field.open_re is None:
            continue
        opened = list(field.open_re.finditer(begun if is_known else prompt))
        if is_known and opened:
            return begun[opened[0].start() :]
        if is_known and field.close_re is not None and field.close_re.search(begun):
            return begun
        if opened:  # whatever begins an answer there, nothing else may end the prompt
            rest = prompt[opened[-1].end() :].strip()
            if not rest or (field.close_re is not None and field.close_re.fullmatch(rest)):
                return prompt[opened[-1].start() :]
    return ""


Form = Literal["free", "either", "text"]
"""What an answer may be. free: reasoning, then text with calls in it; either: calls alone or text alone; text: nothing
else, but for a reasoning that the prompt has opened."""


class _Part:
    """A part of an answer; white space between it and another part belongs to the format, not to the text."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held: list[str] = []
        """White space that may still turn out to be between parts."""

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return sum(map(len, self._held))

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

    Reasoning can only begin an answer. Calls are there only where tools were offered; what looks like one but has no
    name is text. All that is in no other part is text, character for character.

    Args:
        chat_format: how the model writes.
        prompt: the end of the rendered prompt, special tokens included: a template may have begun the answer, with an
            opened reasoning say.
        tools: OpenAI-style function schemas that the answer may call; by them arguments are read that the format writes
            without types.
        form: what the answer may be.

    Raises:
        ValueError: the tokenizer's own response template is malformed.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        prompt: str = "",
        tools: Sequence[dict[str, Any]] = (),
        *,
        form: Form = "free",
    ) -> None:
        self._layout = chat_format.calls if chat_format.own_template is None else None
        self._may_call = bool(tools) and form != "text"
        functions = [tool.get("function") or {} for tool in tools]
        spec = chat_format.response_template([str(function.get("name")) for function in functions])
        begun = begun_by(prompt, spec)
        template = answer_template(spec, may_call=self._may_call, may_reason=form == "free" or bool(begun))
        self._parser: PartsParser | None = PartsParser(template, prefix=begun, tools=list(tools))
        self._undecided = "" if form == "either" and self._may_call and self._layout is not None else None
        """The answer as long as it may be calls or text; None: that is clear, or nobody asks."""
        self._has_implicit = template.implicit is not None
        """Text needs no marks."""
        self._is_last = self._has_implicit and not self._may_call
        """No other part comes behind text."""
        self._anchors = chat_format.assistant
        self._loose: list[str] = []
        """Text in no part, where a template has a part for each."""
        self._calls: list[PartialCall] = []
        self._reader: CallsReader | None = None
        self._in_calls = False
        """The mark that ends calls has not come."""
        self._raw: list[str] = []
        """A call that comes as a whole, as far as it is written."""
        self._spaced = chat_format.space_before_text
        self.is_reasoning = False
        """The prompt has opened a reasoning that the answer goes on with."""
        self._of_prompt = ""
        """The prompt's end, which the parser still holds."""
        self._reset()
        for event in self._parser.initial_events:  # what the template has written is no part of the answer
            self._take(event)
            if event["field"] in REASONING_FIELDS:
                self.is_reasoning = event["type"] != "region_close"
        self._reset()
        self._of_prompt = self._parser.pending

    def _reset(self) -> None:
        self._text, self._reasoning = _Part(), _Part()
        self._loose = []
        self._has_others, self._in_text = self.is_reasoning, not self.is_reasoning

    @property
    def num_held(self) -> int:
        """Characters that were read and are in no part yet, since more of the answer decides what they are."""
        of_call = 0 if self._reader is None else self._reader.num_held
        of_marks = 0 if self._parser is None else len(self._parser.pending)
        return of_marks + of_call + self._text.num_held

    def feed(self, text: str) -> list[ReplyDelta]:
        """What more text adds to the parts. `text` is the answer's own, special tokens included."""
        if self._undecided is not None and self._layout is not None:
            self._undecided += text
            first, marks = self._undecided.lstrip(), (self._layout.before, self._layout.begin)
            if not first or any(mark.startswith(first) and mark != first for mark in marks):
                return []
            text, self._undecided = self._undecided, None
            if not any(first.startswith(mark) for mark in marks if mark or not any(marks)):
                self._parser = None
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
        undecided, self._undecided = self._undecided, None
        deltas = self.feed(undecided) if undecided else []
        is_open = self._in_calls
        if self._parser is not None:
            try:
                deltas += [delta for event in self._parser.finalize()[1] for delta in self._take(event)]
            except Exception:
                logger.exception("the end of an answer could not be taken apart")
        if self._reader is not None:
            self._reader.close()
        if not (self._text.text or self._calls) and (loose := self._loose_text()):
            deltas += self._add_text(loose)
        if self._in_text and (rest := self._text.end()):
            deltas.append(ReplyDelta("text", rest))
        results = [call.result() for call in self._calls]
        if is_open and results and isinstance(last := results[-1], InvalidToolCall):
            results[-1] = replace(last, is_open=True)
        return Reply(
            self._text.text,
            self._reasoning.text,
            tuple(call for call in results if isinstance(call, ToolCall)),
            tuple(call for call in results if isinstance(call, InvalidToolCall)),
        ), deltas

    def _loose_text(self) -> str:
        """What is in no part, but for what stands between parts."""
        loose = "".join(self._loose)
        for anchor in self._anchors:
            loose = loose.replace(anchor, "")
        return loose if loose.strip() else ""

    def _take(self, event: dict[str, Any]) -> list[ReplyDelta]:
        field, kind = event["field"], event["type"]
        if field == "tool_calls":
            return self._take_call(event)
        if field == "calls_end":  # of calls that were none it is text as well
            return self._no_call(event) if kind == "region_close" and not self._calls else []
        if field in REASONING_FIELDS:
            self._begin_other()
        if kind != "region_chunk":
            return []
        text = event["text"].removeprefix(self._of_prompt)
        self._of_prompt = ""
        if field is None:
            self._loose.append(text)
            return []
        if field not in REASONING_FIELDS:
            return self._add_text(text)
        added = self._reasoning.feed(text)
        return [ReplyDelta("reasoning", added)] if added else []

    def _begin_other(self) -> None:
        """A part that is not the text begins, or goes on."""
        self._has_others, self._in_text = True, False

    def _add_text(self, text: str) -> list[ReplyDelta]:
        if self._spaced and text:
            text, self._spaced = text.removeprefix(" "), False
        added = self._text.feed(text, after_other=self._has_others)
        if self._is_last:
            added += self._text.end()
        self._in_text |= bool(added)
        return [ReplyDelta("text", added)] if added else []

    def _take_call(self, event: dict[str, Any]) -> list[ReplyDelta]:
        if not self._may_call:
            return self._no_call(event) if event["type"] == "region_close" else []
        self._in_calls = event["type"] != "region_close"
        return self._take_whole_calls(event) if self._layout is None else self._read_calls(event, self._layout)

    def _no_call(self, event: dict[str, Any]) -> list[ReplyDelta]:
        """What looked like a call is text; in front of all text, as what is in no part."""
        if self._has_implicit or self._text.text:
            return self._add_text(event["written"])
        self._loose.append(event["written"])
        return []

    def _read_calls(self, event: dict[str, Any], layout: CallLayout) -> list[ReplyDelta]:
        """Calls whose layout we know are read as they come."""
        if event["type"] == "region_open":
            self._reader = CallsReader(layout, self._calls)
        reader = self._reader
        if reader is None:
            return []
        if event["type"] == "region_close":
            self._reader = None
            return [] if reader.close() else self._no_call(event)
        deltas: list[ReplyDelta] = []
        for delta in reader.feed(event.get("text", "")):
            if delta.kind == "text":
                deltas += self._add_text(delta.text)
            else:
                self._begin_other()
                deltas.append(delta)
        return deltas

    def _take_whole_calls(self, event: dict[str, Any]) -> list[ReplyDelta]:
        """Calls that transformers parses come as a whole, and may be several."""
        if event["type"] == "region_open":
            self._raw = []
            return []
        if event["type"] == "region_chunk":
            self._raw.append(event["text"])
            return []
        value = event.get("value")
        values = value if isinstance(value, list) and value else [value]
        if all(_function(one) is None for one in values):
            return self._no_call(event)
        self._begin_other()
        deltas: list[ReplyDelta] = []
        for one in values:
            call = PartialCall(len(self._calls))
            call.raw = self._raw
            self._calls.append(call)
            deltas += _read_value(call, _function(one))
        return deltas


def _function(value: object) -> dict[str, Any] | None:
    """The function that a call names, as a response template gives it."""
    function = value.get("function", value) if isinstance(value, dict) else None
    is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return function if isinstance(function, dict) and is_named else None


def _read_value(call: PartialCall, function: dict[str, Any] | None) -> list[ReplyDelta]:
    if function is None:
        call.error = "no 'name' in the call"
        return []
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call.named(function["name"]) + call.argue(written)
