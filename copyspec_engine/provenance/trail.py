"""Where an answer's copied tokens came from: noted pass by pass, resolved when the answer is over.

A draft says for each node which position it was copied from (`DraftTree.sources`). Positions move when old texts are
forgotten, so each pass turns those that were accepted into (stored text, offset) before anything else is written.

What stands in the prompt is stored once, wherever it was first seen, and the same words may stand in several places. So
a copy counts as taken from the prompt if the stored text around it stands there too, at least `_SURE` tokens of it or
the whole text; of several such places the one counts where most of the surroundings agree.

Not covered: places in messages and characters (explain.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.drafting.tree import ALTERNATIVE, DRAFT_MODEL, FORCED, Run
from copyspec_engine.memory.conversation import DECLARED_TEXT, KINDS, SessionMemory
from copyspec_engine.memory.index import CopyIndex, Span
from copyspec_engine.values.outputs import Copy, CopySource

__all__ = ["CopyTrail", "cut", "find_around", "trace"]

_KINDS_WITHOUT_PLACE = {FORCED: "grammar", DRAFT_MODEL: "draft_model", ALTERNATIVE: "recycled"}
_SURE = 16
"""Tokens in a row that do not agree by chance."""
_NEAR = 1024
"""Tokens on each side of a place among which the next one is looked for first."""
_AROUND = 64
"""Tokens of a stored text that are looked at on each side of a copy."""
_STORED: tuple[CopySource, ...] = ("earlier_prompt", "earlier_answer", "earlier_prediction")


def trace(index: CopyIndex, sources: Sequence[int]) -> list[Run]:
    """The runs of accepted nodes.

    Args:
        index: which the sources are positions of.
        sources: as in `DraftTree.sources`, of the accepted nodes from the root down.
    """
    runs: list[Run] = []
    first = expected = 0
    for node, source in enumerate(sources):
        if source != expected:
            if node:
                runs.append(_run_at(index, sources[first], node - first))
            first = node
        # Between two stored texts there is a break, so no run goes from one to the next.
        has_place = source not in (0, *_KINDS_WITHOUT_PLACE)
        expected = source if not has_place else source + 1 if source > 0 else source - 1
    return [*runs, _run_at(index, sources[first], len(sources) - first)] if sources else []


def cut(runs: Iterable[Run], count: int) -> list[Run]:
    """The first `count` tokens of some runs."""
    kept: list[Run] = []
    for run in runs:
        if count > 0:
            kept.append(run if run.num_tokens <= count else run._replace(num_tokens=count))
        count -= run.num_tokens
    return kept


def _run_at(index: CopyIndex, source: int, count: int) -> Run:
    if source in _KINDS_WITHOUT_PLACE:
        return Run(count, _KINDS_WITHOUT_PLACE[source])
    if source < 0:
        return Run(count, "block", offset=~source)
    text = index.span_at(source) if source else None
    return Run(count, "frequent") if text is None else Run(count, KINDS[text.kind], text, source - text.first_indexed)


@compiled
def find_around(tokens: npt.NDArray[np.int64], text: npt.NDArray[np.int64], first: int, stop: int) -> tuple[int, int]:
    """Where `text[first:stop]` stands in `tokens` with most of what is around it in `text`.

    Args:
        tokens: where to look.
        text: what to look for, with its surroundings.
        first: where it begins in `text`.
        stop: where it ends, more than `first`.

    Returns:
        The position, the last one of equally good ones, and how many tokens of `text` in a row agree there; (-1, 0) if
        there is none.
    """
    best, most, count = -1, 0, stop - first
    for at in range(len(tokens) - count + 1):
        if tokens[at] != text[first]:
            continue
        length = 1
        while length < count and tokens[at + length] == text[first + length]:
            length += 1
        if length < count:
            continue
        while first + length < len(text) and at + length < len(tokens) and tokens[at + length] == text[first + length]:
            length += 1
        before = 0
        while before < min(first, at) and tokens[at - before - 1] == text[first - before - 1]:
            before += 1
        if before + length >= most:
            best, most = at, before + length
    return best, most


class _Window(NamedTuple):
    """A part of a stored text: the copied tokens, and some around them."""

    tokens: npt.NDArray[np.int64]
    first: int
    stop: int
    """Of the copied tokens."""
    is_whole: bool
    """There is no more of the text."""


def _window(index: CopyIndex, run: Run, copied: Sequence[int]) -> _Window:
    text = run.text
    if text is None or not index.holds(text):  # forgotten since
        return _Window(np.asarray(copied, dtype=np.int64), 0, run.num_tokens, is_whole=False)
    at = text.first_indexed + run.offset
    begin, end = max(text.start, at - _AROUND), min(text.stop, at + run.num_tokens + _AROUND)
    is_whole = begin == text.start and end == text.stop
    return _Window(index.read(begin, end - begin), at - begin, at - begin + run.num_tokens, is_whole)


class _Prompt:
    """What a call had before it was drafted for: the first `count` of its tokens."""

    def __init__(self, token_ids: Sequence[int], count: int) -> None:
        self._token_ids, self._count, self._last = token_ids, count, 0
        self._tokens: npt.NDArray[np.int64] | None = None

    def find(self, window: _Window) -> int | None:
        """Where the tokens in a window stand, if what is around them does so too; near the last place at first."""
        if self._tokens is None:
            self._tokens = np.array(self._token_ids[: self._count], dtype=np.int64)
        begin = max(self._last - _NEAR, 0)
        near = self._tokens[begin : self._last + _NEAR]
        at, agreeing = find_around(near, window.tokens, window.first, window.stop)
        if agreeing < len(window.tokens):
            begin = 0
            at, agreeing = find_around(self._tokens, window.tokens, window.first, window.stop)
        if agreeing < _SURE and not (window.is_whole and agreeing == len(window.tokens)):
            return None
        self._last = begin + int(at)
        return self._last


@dataclass(slots=True)
class CopyTrail:
    """The copies of one answer so far."""

    _runs: list[tuple[int, Run]] = field(default_factory=list)
    """With the first token of each in the answer; those that are not resolved yet."""
    _copies: list[Copy] = field(default_factory=list)
    """Resolved, without their characters."""

    def note(self, start: int, runs: Iterable[Run]) -> None:
        """A pass has accepted runs of tokens, from the answer's token `start` on."""
        for run in runs:
            self._runs.append((start, run))
            start += run.num_tokens

    def resolve(
        self,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        memory: SessionMemory,
        own: Mapping[Span, int],
        prediction_ids: Sequence[int],
        *,
        is_others: Callable[[Span], bool],
    ) -> None:
        """Say of all runs so far where they came from, while the memory still knows.

        Args:
            token_ids: of prompt and answer.
            num_prompt_tokens: how many of them are the prompt.
            memory: where the drafts came from.
            own: texts in it that hold this answer, and the place of each one's first own token in `token_ids`.
            prediction_ids: the declared text.
            is_others: whether a text of the memory may be another caller's; nothing is said of it but that.
        """
        prompt = _Prompt(token_ids, min(own.values(), default=num_prompt_tokens))
        for start, run in self._runs:
            place: int | None = None
            if run.text is None:
                place = run.offset if run.kind == "block" else None
            elif run.text in own:
                place = own[run.text] + run.offset
            elif not _is_prediction(memory.index, run.text, prediction_ids):
                first = num_prompt_tokens + start
                window = _window(memory.index, run, token_ids[first : first + run.num_tokens])
                place = prompt.find(window)
                if place is None:
                    is_pool = is_others(run.text)
                    self._copies.append(
                        _copy(start, run.num_tokens, "pool") if is_pool else _stored(start, run, window)
                    )
                    continue
            if place is not None:
                self._copies += _in_call(start, run.num_tokens, place, num_prompt_tokens)
            elif run.text is not None:
                missing = len(prediction_ids) - (run.text.stop - run.text.first_indexed)  # of a very long one
                self._copies.append(_copy(start, run.num_tokens, "prediction", run.offset + missing))
            else:
                self._copies.append(_copy(start, run.num_tokens, cast("CopySource", run.kind)))
        self._runs.clear()

    def withdraw(self) -> None:
        """The stored texts were erased: say no more than where from, and how far in."""
        self._copies = [replace(copy, before=(), after=()) for copy in self._copies]

    def copies(self, text_ends: Sequence[int], num_characters: int) -> tuple[Copy, ...]:
        """All that were resolved.

        Args:
            text_ends: how many characters were complete after each token of the answer.
            num_characters: how many of them the answer has; the others are behind a stop text.
        """
        ends = [0, *(min(end, num_characters) for end in text_ends)]
        return tuple(replace(copy, text_start=ends[copy.start], text_stop=ends[copy.stop]) for copy in self._copies)


def _copy(start: int, count: int, source: CopySource, offset: int | None = None) -> Copy:
    return Copy(start, start + count, 0, 0, source, offset)


def _in_call(start: int, count: int, place: int, num_prompt_tokens: int) -> Iterator[Copy]:
    """Copies from the call's own tokens, from `place` on: of the prompt, the answer or, over the edge, both."""
    of_prompt = min(max(num_prompt_tokens - place, 0), count)
    if of_prompt:
        yield _copy(start, of_prompt, "prompt", place)
    if of_prompt < count:
        yield _copy(start + of_prompt, count - of_prompt, "answer", place + of_prompt - num_prompt_tokens)


def _stored(start: int, run: Run, window: _Window) -> Copy:
    """A copy from a text that is in the session's memory only."""
    assert run.text is not None
    before, after = window.tokens[: window.first].tolist(), window.tokens[window.stop :].tolist()
    return Copy(
        start,
        start + run.num_tokens,
        0,
        0,
        _STORED[run.text.kind],
        run.offset,
        run.text.number,
        tuple(before),
        tuple(after),
    )


def _is_prediction(index: CopyIndex, text: Span, prediction_ids: Sequence[int]) -> bool:
    if text.kind != DECLARED_TEXT or not len(prediction_ids):
        return False
    if not index.holds(text):
        return True  # no other one was found by then
    held = index.tokens_of(text)
    return np.array_equal(held, prediction_ids[len(prediction_ids) - len(held) :])
