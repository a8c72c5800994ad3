"""Where the parts of an answer begin and end, for transformers' parser.

Texts speak of such marks too, so they count only where they can be meant: reasoning begins an answer, and calls are
made of tools that were offered.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from copyspec_engine.chat.formats import REASONING_FIELDS

__all__ = ["PartsParser", "answer_template", "begun_by"]

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
