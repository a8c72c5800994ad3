"""What a call gives back: chunks while it runs, then the whole answer, its counts, times, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.text import Text

__all__ = [
    "NOT_COPIED",
    "CopiedSpan",
    "Copy",
    "CopySource",
    "DraftStats",
    "EndedBy",
    "Explanation",
    "FinishReason",
    "GenerationOutput",
    "InvalidToolCall",
    "Reply",
    "ReplyDelta",
    "Segment",
    "StreamChunk",
    "Timing",
    "TokenLogprob",
    "ToolCall",
    "Usage",
]


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
shared pool, which is never shown. The others are drafted but not copied: grammar: nothing else was allowed; frequent: a
token that is just frequent, from no text; and two that are in no `Explanation`: draft_model: a draft model wrote it;
recycled: the model held it likely in an earlier pass."""

NOT_COPIED: frozenset[str] = frozenset({"grammar", "frequent", "draft_model", "recycled"})
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
        """Share of the characters that were copied, 0 to 1."""
        copied = (span.stop - span.start for span in self.spans if span.source not in NOT_COPIED)
        return sum(copied) / max(len(self.text), 1)

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

    def _repr_html_(self) -> str:
        """What notebooks show: the text, in a colour for each kind of source, and where each part stands."""
        from copyspec_engine.values.html import Marked, marked_text

        return marked_text(
            Marked(piece)
            if span is None
            else Marked(piece, span.source, _note(span) if span.source in _COLOURS else "")
            for piece, span in self.pieces()
        )


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


FinishReason = Literal["stop", "length", "cancelled", "timeout"]
"""stop: an end-of-sequence id, a stop text or the end of the grammar; length: max_tokens or the context is full;
cancelled: by the caller; timeout: it took longer than its `timeout_s`."""


EndedBy = Literal["eos", "stop_text", "stop_token", "grammar"]
"""What ended an answer whose finish_reason is "stop". eos: an end-of-sequence id of the model's own; stop_text: one of
`SamplingParams.stop`; stop_token: one of `SamplingParams.stop_token_ids`; grammar: it was complete."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the answer's text, and where its tokens were drafted from."""

    text: str
    source: CopySource | None = None
    """None: the model wrote it by itself. In a stream, what stands in the prompt and what only the conversation holds
    have one name: "prompt", "answer" or "prediction" by what it was, and "pool" for all that others may have put into
    one. `GenerationOutput.segments` tells them apart, as `GenerationOutput.copies`."""

    @property
    def copied(self) -> bool:
        """Whether its tokens count in `GenerationOutput.copied_share`."""
        return self.source is not None and self.source not in NOT_COPIED


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens of an answer in a row that were drafted from places in a row, in one forward pass.

    `answer.token_ids[start:stop]` stands in the source at `offset`. Between the copies of two passes lies at least one
    token that the model wrote by itself.
    """

    start: int
    stop: int
    """Tokens of the answer, 0 <= start < stop."""
    text_start: int
    text_stop: int
    """The characters of the answer's text that these tokens complete; equal if there are none (half a character, an
    end-of-sequence id, text behind a stop text)."""
    source: CopySource
    offset: int | None = None
    """Tokens from the source's beginning: that of the prompt, the answer, the prediction or the stored text; None for
    "pool", whose texts are nobody's to look at, "grammar", "frequent", "draft_model" and "recycled"."""
    stored_text: int | None = None
    """The number of the stored text in `Engine.memory`, for the sources that begin with "earlier_"; that of a text in
    a pool, which is not shown there, is negative."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    """Tokens around the place in the stored text, at most 64 each; none if it was forgotten meanwhile."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held a token of the answer to be, by its own logits before any sampling option."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability, at most 0."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely tokens there, the likeliest first; as many as `top_logprobs`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that the model asks for."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A call that cannot be carried out: malformed, or cut off by the end of the answer."""

    id: str
    name: str | None
    arguments: str
    """What was written, as it was."""
    error: str
    is_open: bool = False
    """The answer ended before it did."""


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """What a piece of an answer adds to one of its parts."""

    kind: Literal["text", "reasoning", "tool_call"]
    text: str = ""
    """More text or reasoning, or more of a call's arguments as JSON."""
    index: int = 0
    """Which of the answer's tool calls this belongs to, from 0."""
    id: str | None = None
    """With the first delta of a call, as its name."""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer in its parts."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one call."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was there already: from an earlier call of the session, or one with the same salt."""
    completion_tokens: int = 0
    """Sampled tokens, the end-of-sequence token included."""
    reasoning_tokens: int = 0
    """Tokens of the answer up to the one that completes its reasoning, marks before it included; 0 unless the request
    asked for its parts (`parse_reply`) and it has some."""
    accepted_prediction_tokens: int = 0
    """Tokens of the request's `prediction` that the answer repeats in the prediction's order, at least four in a row
    (or all of a shorter one), whatever was drafted."""
    rejected_prediction_tokens: int = 0
    """The other tokens of the prediction: both together are all of it."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class DraftStats:
    """How the answer's tokens came about."""

    num_forward_passes: int = 0
    """Forward passes that sampled a token (the last prompt chunk's pass is one of them)."""
    num_prefill_passes: int = 0
    """Forward passes that only read prompt tokens."""
    num_draft_tokens: int = 0
    """Draft tokens offered for verification."""
    num_accepted_tokens: int = 0
    """Tokens of the answer that came from accepted drafts, whatever their source."""
    draft_lengths: tuple[int, ...] = ()
    """Draft tokens offered in each forward pass, in order."""
    accepted_lengths: tuple[int, ...] = ()
    """Accepted draft tokens of each forward pass, in order."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock seconds of one call, from `Engine.stream` on."""

    queue_s: float = 0.0
    """Until the first forward pass began."""
    ttft_s: float = 0.0
    """Until the first token was sampled."""
    total_s: float = 0.0
    """Until the last token was sampled."""
    prepare_s: float = 0.0
    """Until the prompt was tokens, and the call checked; a part of `queue_s`."""


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A whole answer. Joining the chunks of a stream gives the same."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    draft_stats: DraftStats
    timing: Timing
    segments: tuple[Segment, ...] = ()
    """`text` in pieces by where they were drafted from."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`; None unless the request asked for them."""
    reply: Reply | None = None
    """The answer in its parts; None unless the request asked for them (`parse_reply`)."""
    copies: tuple[Copy, ...] = ()
    """Where its drafted tokens came from, in order; together exactly `draft_stats.num_accepted_tokens` tokens."""
    explanation: Explanation | None = None
    """The same in messages and characters; None unless the request asked for it (`explain`). See also
    `Engine.explain`."""
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    """What the model has read."""
    ended_by: EndedBy | None = None
    """What ended it; None unless finish_reason is "stop"."""
    stop_reason: str | int | None = None
    """The stop text, or the id of `stop_token_ids`, that ended it; None: neither did, see `ended_by`."""

    @property
    def tokens_per_forward(self) -> float:
        """Sampled tokens per forward pass; 1.0 for plain decoding."""
        return self.usage.completion_tokens / max(self.draft_stats.num_forward_passes, 1)

    @property
    def copied_share(self) -> float:
        """Share of the answer's tokens that were copied, 0 to 1: those of the sources in `NOT_COPIED` are not."""
        others = sum(copy.stop - copy.start for copy in self.copies if copy.source in NOT_COPIED)
        return (self.draft_stats.num_accepted_tokens - others) / max(self.usage.completion_tokens, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.usage.completion_tokens / self.timing.total_s if self.timing.total_s else 0.0

    def _repr_html_(self) -> str:
        """What notebooks show: the answer, with what was copied in colour, and how it came about."""
        from copyspec_engine.values.html import Marked, figures_line, marked_text

        said = self.explanation
        pieces = (Marked(segment.text, segment.source) for segment in self.segments)
        return (marked_text(pieces) if said is None else said._repr_html_()) + figures_line(
            f"{self.usage.completion_tokens:,} tokens in {self.draft_stats.num_forward_passes:,} passes",
            f"{self.tokens_per_forward:.1f} per pass",
            f"{self.copied_share:.0%} copied",
            f"{self.usage.cached_tokens:,} of {self.usage.prompt_tokens:,} prompt tokens reused",
            f"{self.timing.total_s:.2f} s",
            self.finish_reason,
        )


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one step added to an answer. The last chunk has `output`, the whole answer, and may have no text."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    """`text` in pieces by where they were drafted from."""
    output: GenerationOutput | None = field(default=None)
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`; None unless the request asked for them."""
    deltas: tuple[ReplyDelta, ...] = ()
    """What the step added to the answer's parts; empty unless the request asked for them (`parse_reply`)."""

    @property
    def is_last(self) -> bool:
        return self.output is not None
