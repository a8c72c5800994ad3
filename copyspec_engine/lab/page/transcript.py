"""Records of turns as transcripts: each message once, and each copied span with the place that it came from.

Answers that follow on from one another are one block, in which a message's number is its place in the call, as in
`CopiedSpan.message`. A call whose messages are not those of the call before it with its answer begins a new block.
Offsets count characters in Python and UTF-16 code units in a browser: `Place` has the browser's.

Not covered: what it looks like (html.py).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from pydantic import TypeAdapter, ValidationError

from copyspec_engine import ConfigError, CopiedSpan
from copyspec_engine.lab.evaluation.records import PLAIN, TurnRecord
from copyspec_engine.lab.page.passes import Decode, pass_ends

__all__ = ["Place", "ShownAnswer", "ShownConversation", "ShownMessage", "ShownPiece", "transcripts"]

_SPANS = TypeAdapter(tuple[CopiedSpan, ...])


@dataclass(frozen=True)
class ShownMessage:
    """A message of a prompt."""

    key: str
    """The id of its element, the only one in the page."""
    number: int
    """Which message of the call, from 0."""
    role: str
    text: str
    extra: str = ""
    """What it says besides its text (tool calls, ...), as JSON."""

    @cached_property
    def _astral(self) -> list[int]:
        return [at for at, character in enumerate(self.text) if character > "\uffff"]

    def utf16(self, offset: int) -> int:
        """UTF-16 code units in front of a character."""
        return offset + bisect_left(self._astral, offset)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the page a copied span came from, in UTF-16 code units of a message's text."""

    message: ShownMessage
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShownPiece:
    """A stretch of an answer; `span` if it was copied, with `place` if that is in the page."""

    text: str
    key: str = ""
    span: CopiedSpan | None = None
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class ShownAnswer(ShownMessage):
    """An answer, which is also a message for the turns after it."""

    record: TurnRecord
    plain: TurnRecord | None
    """What plain decoding wrote for the same turn, if the run has it."""
    pieces: tuple[ShownPiece, ...]
    ends: tuple[int, ...]
    """Where in `text` each forward pass ended, in UTF-16 code units; empty if that is not known."""


@dataclass(frozen=True, slots=True)
class ShownConversation:
    """All answers of one writer to one task."""

    task: str
    category: str
    blocks: tuple[tuple[ShownMessage, ...], ...]

    @property
    def answers(self) -> list[ShownAnswer]:
        return [message for block in self.blocks for message in block if isinstance(message, ShownAnswer)]


def transcripts(
    records: Sequence[TurnRecord], writer: str, tasks: Sequence[str], decode: Decode | None = None
) -> list[ShownConversation]:
    """The conversations of one writer.

    Args:
        records: of a run; the first one is line 1 in errors.
        writer: whose answers.
        tasks: which conversations, in this order; the writer has answered each of them.
        decode: token ids to text, if it is at hand: it tells what each forward pass wrote.

    Raises:
        ConfigError: a copied span contradicts the texts.
    """
    plain = {(record.task, record.turn): record for record in records if record.writer == PLAIN != writer}
    lines: dict[str, list[tuple[int, TurnRecord]]] = {task: [] for task in tasks}
    for line, record in enumerate(records, 1):
        if record.writer == writer and record.task in lines:
            lines[record.task].append((line, record))
    builder = _Builder(plain, decode)
    return [
        ShownConversation(
            task, found[0][1].category, tuple(builder.blocks(sorted(found, key=lambda pair: pair[1].turn)))
        )
        for task, found in lines.items()
    ]


class _Builder:
    """Makes messages and answers with keys that are unique in the page."""

    def __init__(self, plain: Mapping[tuple[str, int], TurnRecord], decode: Decode | None) -> None:
        self._plain, self._decode = plain, decode
        self._message_keys, self._piece_keys = count(1), count(1)

    def blocks(self, records: Iterable[tuple[int, TurnRecord]]) -> list[tuple[ShownMessage, ...]]:
        found: list[list[ShownMessage]] = []
        said: list[dict[str, Any]] = []
        for line, record in records:
            messages = list(record.messages)
            if not found or messages[: len(said)] != said:
                found.append([])
                said = []
            block = found[-1]
            block += [self._message(number, messages[number]) for number in range(len(said), len(messages))]
            block.append(self._answer(line, record, block))
            said = [*messages, {"role": "assistant", "content": record.text}]
        return [tuple(block) for block in found]

    def _key(self) -> str:
        return f"m{next(self._message_keys)}"

    def _message(self, number: int, message: Mapping[str, Any]) -> ShownMessage:
        extra = {name: value for name, value in message.items() if name not in ("role", "content") and value}
        shown = json.dumps(extra, ensure_ascii=False, indent=1) if extra else ""
        return ShownMessage(self._key(), number, str(message.get("role", "")), _text(message.get("content")), shown)

    def _answer(self, line: int, record: TurnRecord, before: Sequence[ShownMessage]) -> ShownAnswer:
        bare = ShownMessage(self._key(), len(before), "assistant", record.text)
        texts = [*before, bare]
        pieces, end = [], 0
        for span in _spans(line, record):
            if not end <= span.start < span.stop <= len(record.text):
                raise _broken(
                    line, span, f"expected them in order, apart, and within its {len(record.text)} characters"
                )
            if end < span.start:
                pieces.append(ShownPiece(record.text[end : span.start]))
            text, end = record.text[span.start : span.stop], span.stop
            pieces.append(ShownPiece(text, f"c{next(self._piece_keys)}", span, _place(line, span, text, texts)))
        if end < len(record.text):
            pieces.append(ShownPiece(record.text[end:]))
        ends = () if self._decode is None else pass_ends(record, self._decode)
        return ShownAnswer(
            bare.key,
            bare.number,
            bare.role,
            bare.text,
            record=record,
            plain=self._plain.get((record.task, record.turn)),
            pieces=tuple(pieces),
            ends=tuple(map(bare.utf16, ends)),
        )


def _text(content: object) -> str:
    """A message's text, parts joined as `CopiedSpan.offset` counts them."""
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _spans(line: int, record: TurnRecord) -> tuple[CopiedSpan, ...]:
    try:
        return _SPANS.validate_python(record.copies)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"Got on line {line} copies that are no spans: {where}: {problem['msg']}") from None


def _place(line: int, span: CopiedSpan, text: str, texts: Sequence[ShownMessage]) -> Place | None:
    """Where a span came from, if the page shows it; the last of `texts` is the answer itself."""
    if span.offset is None or (span.message is None and span.source != "answer"):
        return None
    number = len(texts) - 1 if span.message is None else span.message
    if not 0 <= number < len(texts) or not 0 <= span.offset <= span.offset + len(text) <= len(texts[number].text):
        raise _broken(line, span, f"expected a place in one of its {len(texts) - 1} messages, or in the answer itself")
    source, stop = texts[number], span.offset + len(text)
    if source.text[span.offset : stop] != text:
        raise _broken(line, span, f"that place says {source.text[span.offset : stop][:40]!r}, not {text[:40]!r}")
    return Place(source, source.utf16(span.offset), source.utf16(stop))


def _broken(line: int, span: CopiedSpan, why: str) -> ConfigError:
    return ConfigError(
        f"Got on line {line} a copy of source={span.source!r}, start={span.start}, stop={span.stop}, "
        f"message={span.message}, offset={span.offset} but {why}"
    )
