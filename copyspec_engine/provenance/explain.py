"""Where an answer was copied from in a reader's terms: messages and characters instead of tokens.

Copies of several passes become one span where the model wrote the tokens between them as the source has them. A place
in a message is found by rendering the messages once more with marks around their contents, and holds only if the text
there equals the span's; otherwise the span has no place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from copyspec_engine.chat.detokenizer import answer_stream
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.outputs import CopiedSpan, Copy, CopySource, Explanation, GenerationOutput

if TYPE_CHECKING:
    from copyspec_engine.chat.detokenizer import TextStream
    from copyspec_engine.chat.tokenizer import ChatTokenizer

__all__ = ["explain"]

_UNTOLD = {"draft_model", "recycled"}
"""Sources that are the model's own doing."""
_AROUND = 60
"""Characters shown on each side of a place that the reader does not have at hand."""
_FIRST_MARK, _LAST_MARK = 0xF0002, 0xFFFFD
"""Private characters, two for each part of a message; not those that tokenizers put around control tokens' names."""
_HALF = "\N{REPLACEMENT CHARACTER}"
_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")


def explain(tokenizer: ChatTokenizer, request: GenerationRequest, output: GenerationOutput) -> Explanation:
    """Where the answer `output` to `request` was copied from.

    Takes about a fifth of the time that tokenising the prompt does. `request` must be the one that was answered.
    """
    sources = _Sources(tokenizer, request, output)
    copies = sources.joined()
    texts = {kind: _Located(tokenizer, sources, kind, copies) for kind in {copy.source for copy in copies}}
    spans = (span for copy in copies for span in texts[copy.source].spans(copy))
    return Explanation(output.text, tuple(span for span in spans if span.stop > span.start))


class _Sources:
    """The token streams that an answer was copied from."""

    def __init__(self, tokenizer: ChatTokenizer, request: GenerationRequest, output: GenerationOutput) -> None:
        self.tokenizer, self.request, self.output = tokenizer, request, output
        self._prediction: list[int] | None = None

    def tokens(self, source: CopySource) -> Sequence[int] | None:
        """All tokens of a source that the call has, else None."""
        if source == "prompt":
            return self.output.prompt_token_ids
        if source == "answer":
            return self.output.token_ids
        if source != "prediction":
            return None
        if self._prediction is None:
            self._prediction = self.tokenizer.encode(self.request.prediction or "", special_tokens=False)
        return self._prediction

    def joined(self) -> list[Copy]:
        """The copies, as one where a text goes on over several passes; without what models have drafted."""
        joined: list[Copy] = []
        loose: list[Copy] = []
        for copy in self.output.copies:
            if copy.source in _UNTOLD:
                continue
            if copy.source == "frequent":
                loose.append(copy)
                continue
            if joined and self._goes_on(joined[-1], copy):
                joined[-1] = replace(joined[-1], stop=copy.stop, text_stop=copy.text_stop, after=copy.after)
            else:
                joined += [*loose, copy]
            loose = []
        return [*joined, *loose]

    def _goes_on(self, last: Copy, copy: Copy) -> bool:
        """Whether the answer follows the source of `last` to that of `copy`."""
        if (last.source, last.stored_text) != (copy.source, copy.stored_text):
            return False
        if last.offset is None or copy.offset is None:
            return copy.start == last.stop
        if copy.offset - last.offset != copy.start - last.start:
            return False
        between, tokens = self.output.token_ids[last.stop : copy.start], self.tokens(copy.source)
        if tokens is None:
            return last.after[: len(between)] == between
        return tuple(tokens[last.offset + last.stop - last.start : copy.offset]) == between


class _Part(NamedTuple):
    """Characters of a source that the caller has under another name."""

    start: int
    stop: int
    message: int | None
    offset: int
    """Of the part's beginning in the message's content, or in the text that the caller gave."""


class _Located:
    """Finds characters in one kind of source."""

    def __init__(self, tokenizer: ChatTokenizer, sources: _Sources, kind: CopySource, copies: Sequence[Copy]) -> None:
        self._tokenizer, self._answer = tokenizer, sources.output.text
        tokens, request = sources.tokens(kind), sources.request
        self._places: dict[int, int] = {}
        self._text = ""
        self._parts: list[_Part] = []
        if tokens is None:
            return
        own = [copy for copy in copies if copy.source == kind and copy.offset is not None]
        cuts = sorted({at for copy in own for at in (copy.offset or 0, (copy.offset or 0) + copy.stop - copy.start)})
        parts = [tokens[first:stop] for first, stop in pairwise((0, *cuts, len(tokens)))]
        if kind == "answer":
            pieces = _streamed(answer_stream(tokenizer, request, sources.output.prompt_token_ids), parts)
        else:
            pieces = _pieces(tokenizer, parts, tokens)
        self._places = dict(zip(cuts, _ends(pieces), strict=False))
        self._text = "".join(pieces)
        if kind == "prompt" and request.messages is not None:
            self._parts = _contents(tokenizer, request, request.messages, self._text)
        else:
            given = {"prompt": request.prompt, "prediction": request.prediction, "answer": self._answer}[kind]
            self._parts = _whole(self._text, self._text if given is None else given)

    def spans(self, copy: Copy) -> Iterator[CopiedSpan]:
        """A copy in characters, one span for each part of the source that it touches."""
        start, stop = copy.text_start, copy.text_stop
        if copy.offset is None or copy.offset not in self._places:
            before, after = self._decoded(copy.before).lstrip(_HALF), self._decoded(copy.after).rstrip(_HALF)
            yield CopiedSpan(start, stop, copy.source, before=before[-_AROUND:], after=after[:_AROUND])
            return
        first = self._places[copy.offset]
        there = self._text[first : self._places[copy.offset + copy.stop - copy.start]]
        written = self._answer[start:stop]
        if not there.startswith(written):  # half a character at the start, or a space that only stands inside of texts
            same = _common_end(there, written)
            if same < len(written):
                yield CopiedSpan(start, stop - same, copy.source)
            start, first = stop - same, first + len(there) - same
        yield from self._in_parts(start, stop, first, copy.source)

    def _in_parts(self, start: int, stop: int, first: int, source: CopySource) -> Iterator[CopiedSpan]:
        at, last = first, first + stop - start
        for part in self._parts:
            begin, end = max(at, part.start), min(last, part.stop)
            if begin < end:
                if at < begin:
                    yield self._outside(start + at - first, at, begin, source)
                offset = part.offset + begin - part.start
                yield CopiedSpan(start + begin - first, start + end - first, source, part.message, offset)
                at = end
        if at < last:
            yield self._outside(start + at - first, at, last, source)

    def _outside(self, start: int, at: int, end: int, source: CopySource) -> CopiedSpan:
        before, after = self._text[max(at - _AROUND, 0) : at], self._text[end : end + _AROUND]
        return CopiedSpan(start, start + end - at, source, before=before, after=after)

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""


def _common_end(one: str, other: str) -> int:
    """How many characters at the end of two texts are equal."""
    if one.endswith(other):
        return len(other)
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return same


def _ends(pieces: Sequence[str]) -> Iterator[int]:
    end = 0
    for piece in pieces:
        end += len(piece)
        yield end


def _pieces(tokenizer: ChatTokenizer, parts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[str]:
    """The text of each part of `tokens`, special ones by name; a character in two parts is in the second one."""
    pieces = [tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    if "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=False):
        return pieces
    return _streamed(tokenizer.text_stream((), special="all"), parts)


def _streamed(stream: TextStream, parts: Sequence[Sequence[int]]) -> list[str]:
    """The same of a text that is written token by token."""
    pushed = ([segment.text for token in part for segment in stream.push(token)] for part in parts)
    pieces = ["".join(texts) for texts in pushed]
    pieces[-1] += "".join(segment.text for segment in stream.flush())
    return pieces


def _whole(text: str, given: str) -> list[_Part]:
    """Where in a source the text that the caller knows stands."""
    start = text.find(given)
    return [] if start < 0 else [_Part(start, start + len(given), None, 0)]


def _contents(
    tokenizer: ChatTokenizer, request: GenerationRequest, messages: Sequence[dict[str, Any]], rendered: str
) -> list[_Part]:
    """Where in the prompt's text the messages' contents stand, in order and apart."""
    texts = list(_texts(messages))
    found = _marked(tokenizer, request, texts, rendered)
    if found is None:
        found = _searched(texts, rendered)
    apart: list[_Part] = []
    for part in sorted(found):
        missing = max(apart[-1].stop - part.start, 0) if apart else 0
        if part.start + missing < part.stop:
            apart.append(part._replace(start=part.start + missing, offset=part.offset + missing))
    return apart


class _Text(NamedTuple):
    """A content, or a text part of one."""

    message: int
    part: int | None
    offset: int
    """In the message's content."""
    text: str
    """Without the white space around it, which templates may drop."""
    head: str
    tail: str
    """That white space."""

    def at(self, start: int, stop: int, rendered: str) -> _Part:
        """The place of a text whose end, or all of it, the template has written at `start` to `stop`."""
        missing = len(self.text) - (stop - start)
        before = 0 if missing else _common_end(rendered[max(start - len(self.head), 0) : start], self.head)
        after = _common_end(rendered[stop : stop + len(self.tail)][::-1], self.tail[::-1])
        offset = self.offset + len(self.head) + missing - before
        return _Part(start - before, stop + after, self.message, offset)


def _texts(messages: Sequence[dict[str, Any]]) -> Iterator[_Text]:
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = enumerate(content) if isinstance(content, list | tuple) else [(None, {"text": content})]
        offset = 0
        for place, part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                if core := text.strip():
                    head, _, tail = text.partition(core)
                    yield _Text(number, place, offset, core, head, tail)
                offset += len(text)


def _marked(
    tokenizer: ChatTokenizer, request: GenerationRequest, texts: Sequence[_Text], rendered: str
) -> list[_Part] | None:
    """Where the template writes each text, or None if the marks change what it writes."""
    messages = [dict(message) for message in request.messages or ()]
    if 2 * len(texts) > _LAST_MARK - _FIRST_MARK or _MARK.search(rendered):
        return None
    for number, text in enumerate(texts):
        message = messages[text.message]
        mark, last = chr(_FIRST_MARK + 2 * number), chr(_FIRST_MARK + 2 * number + 1)
        if text.part is None:
            message["content"] = text.head + mark + text.text + last + text.tail
        else:
            parts = list(message["content"])
            part, marked = parts[text.part], text.head + mark + text.text + last + text.tail
            parts[text.part] = {**part, "text": marked} if isinstance(part, dict) else marked
            message["content"] = parts
    try:
        with_marks = tokenizer.render_text(messages, request.tools, request.chat_template_kwargs)
    except ConfigError:  # of a template that looks at the contents
        return None
    plain = _MARK.sub("", with_marks)
    if plain != rendered:
        return None
    found = []
    for number, match in enumerate(_MARK.finditer(with_marks)):
        place, which = match.start() - number, ord(match[0]) - _FIRST_MARK
        text = texts[which // 2]
        if which % 2:  # the end; the beginning may have been cut off, a reasoning say
            same = _common_end(plain[max(place - len(text.text), 0) : place], text.text)
            found.append(text.at(place - same, place, plain))
    return found


def _searched(texts: Sequence[_Text], rendered: str) -> list[_Part]:
    """Where each text stands first behind the one before."""
    found, cursor = [], 0
    for text in texts:
        at = rendered.find(text.text, cursor)
        if at >= 0:
            cursor = at + len(text.text)
            found.append(text.at(at, cursor, rendered))
    return found
