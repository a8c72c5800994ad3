"""What an answer was copied from, as a reader is told it: characters, messages, surroundings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["NOT_COPIED", "CopiedSpan", "CopySource", "Explanation"]

CopySource = Literal[
    "prompt",
    "answer",
    "prediction",
    "earlier_prompt",
    "earlier_answer",
    "earlier_prediction",
    "pool",
    "grammar",
    "frequent",
    "draft_model",
    "recycled",
]
"""prompt: the prompt of this call; answer: what this answer said before; prediction: the declared one;
earlier_...: a stored text of the conversation that is not in this prompt; pool: what another caller put into the
shared pool, which is never shown; grammar: nothing else was allowed; frequent: a token that is just frequent, from no
text. Two are drafted but not copied, and in no `Explanation`: draft_model: a draft model wrote it; recycled: the model
held it likely in an earlier pass."""

NOT_COPIED: frozenset[str] = frozenset({"draft_model", "recycled"})
"""Sources of drafted tokens that were not copied."""

_COLOURS = {
    "prompt": "green",
    "answer": "cyan",
    "prediction": "blue",
    "earlier_prompt": "magenta",
    "earlier_answer": "magenta",
    "earlier_prediction": "magenta",
    "pool": "yellow",
}


@dataclass(frozen=True, slots=True)
class CopiedSpan:
    """Characters `start` to `stop` of an answer, and where they were copied from."""

    start: int
    stop: int
    source: CopySource
    message: int | None = None
    """Which message of the call the source stands in, from 0; None: in none of them, but in what the chat template
    writes around them, or not in the prompt."""
    offset: int | None = None
    """Characters from the beginning of that message's content (of several text parts, joined); or of the raw prompt,
    the answer or the prediction; None: unknown, or not in a text that the caller has."""
    before: str = ""
    after: str = ""
    """Up to 60 characters around a place without an offset."""

    def cut(self, first: int, stop: int) -> CopiedSpan:
        """What of it lies in characters `first` to `stop` of the answer, counted from `first`."""
        missing = max(first - self.start, 0)
        return replace(
            self,
            start=max(self.start - first, 0),
            stop=min(self.stop, stop) - first,
            offset=None if self.offset is None else self.offset + missing,
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """An answer's copied spans, in order and apart. Can be printed by rich: one colour for each kind of source."""

    text: str
    """All that the model wrote; `GenerationOutput.text`."""
    spans: tuple[CopiedSpan, ...]

    def pieces(self) -> Iterator[tuple[str, CopiedSpan | None]]:
        """The text in pieces, each with its span or, if it was not copied, None."""
        end = 0
        for span in self.spans:
            if span.start > end:
                yield self.text[end : span.start], None
            yield self.text[span.start : span.stop], span
            end = span.stop
        if end < len(self.text):
            yield self.text[end:], None

    def of_part(self, text: str, after: int = 0) -> Explanation:
        """What concerns the first place from `after` on where `text` stands in one piece; no spans if there is none."""
        first = self.text.find(text, after) if text else -1
        if first < 0:
            return Explanation(text, ())
        stop = first + len(text)
        inside = (span for span in self.spans if span.start < stop and span.stop > first)
        return Explanation(text, tuple(span.cut(first, stop) for span in inside))

    @property
    def copied_share(self) -> float:
        """Share of the characters that lie in spans, 0 to 1."""
        return sum(span.stop - span.start for span in self.spans) / max(len(self.text), 1)

    def to_list(self) -> list[dict[str, Any]]:
        """The spans as plain values, without what is empty."""
        names = [field.name for field in fields(CopiedSpan)]
        values = ({name: getattr(span, name) for name in names} for span in self.spans)
        return [{name: value for name, value in span.items() if value not in (None, "")} for span in values]

    @classmethod
    def from_list(cls, text: str, spans: Sequence[Mapping[str, Any]]) -> Explanation:
        """The inverse of `to_list`."""
        return cls(text, tuple(CopiedSpan(**span) for span in spans))

    def __rich__(self) -> Text:
        from rich.text import Text

        shown = Text()
        notes: dict[str, int] = {}
        for piece, span in self.pieces():
            shown.append(piece, style=None if span is None else _COLOURS.get(span.source))
            if span is not None and span.source in _COLOURS:
                note = _note(span)
                shown.append(f"[{notes.setdefault(note, len(notes) + 1)}]", style="dim")
        for note, number in notes.items():
            shown.append(f"\n[{number}] {note}", style="dim")
        return shown


def _note(span: CopiedSpan) -> str:
    """A span's source in words."""
    if span.message is not None:
        return f"message {span.message}, from character {span.offset}"
    where = {
        "prompt": "the prompt",
        "answer": "this answer",
        "prediction": "the prediction",
        "earlier_prompt": "an earlier prompt, not in this one",
        "earlier_answer": "an earlier answer, not in this prompt",
        "earlier_prediction": "an earlier prediction",
        "pool": "the shared pool",
    }[span.source]
    if span.offset is not None:
        return f"{where}, from character {span.offset}"
    around = f"{span.before}[...]{span.after}"
    return f"{where}: {around!r}" if span.before or span.after else where
