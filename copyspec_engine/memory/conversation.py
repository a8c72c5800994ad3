"""What a conversation remembers of its texts: those of every prompt and answer, each stored once.

A prompt adds only those stretches that the memory does not hold yet, wherever they stand, so that a history that is
trimmed, summarised or rearranged loses no source.

Not covered: whose memory it is, for how long, and keeping it on disk (store.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from copyspec_engine.memory.acceptance import Acceptance
from copyspec_engine.memory.alternatives import AlternativesTable
from copyspec_engine.memory.draft_acceptance import DraftAcceptance
from copyspec_engine.memory.file import SavedSegment
from copyspec_engine.memory.index import OVERLAP, CopyIndex, Span

__all__ = [
    "ANSWER",
    "DECLARED_TEXT",
    "KINDS",
    "PROMPT",
    "SessionMemory",
]

PROMPT, ANSWER, DECLARED_TEXT = 0, 1, 2
"""Kinds of texts."""

KINDS = ("prompt", "answer", "prediction")
"""Their names."""

_STARTS = 4
"""Answers and new texts whose beginnings are kept in mind."""


class SessionMemory:
    """The texts that one conversation has added to an index, and what was learnt about copying them.

    Args:
        max_tokens: tokens of text to keep; see `CopyIndex`.
        index: texts shared with other conversations; default: an index of its own.
        alternatives: candidates shared with them; default: a table of its own.
    """

    def __init__(
        self, max_tokens: int, index: CopyIndex | None = None, alternatives: AlternativesTable | None = None
    ) -> None:
        self.index = CopyIndex(max_tokens) if index is None else index
        self.alternatives = AlternativesTable() if alternatives is None else alternatives
        """What the model held likely in its texts; not kept in a memory file."""
        self.owner: str | None = None
        """Its name in a memory file; None: it is not kept there."""
        self.acceptance: Acceptance | None = None
        self.draft_acceptance: DraftAcceptance | None = None
        """Set by the first adaptive call."""
        self._spans: list[Span] = []
        self._answers: list[Span] = []
        self._saved: dict[Span, int] = {}
        """Texts that are in the memory file, and their numbers there."""
        self._next_number = self._num_calls = 0
        self._noted: list[Span] | None = None

    # ---- for drafters ----------------------------------------------------------------------------------------------

    def add_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """Keep what is new in a prompt; positions where an answer to it may start, the likeliest first."""
        self._forget_what_is_gone()
        new = self._add(self.index.append_unseen(prompt_ids, PROMPT))
        recent = [span for span in reversed(self._answers) if self.index.holds(span)]
        return [span.first_indexed for span in (*recent, *reversed(new[-_STARTS:]))]

    def add_prediction(self, token_ids: Sequence[int]) -> int:
        """Keep a text that an answer is expected to repeat; the position where it begins."""
        for span in reversed(self._spans):
            is_prediction = span.kind == DECLARED_TEXT and self.index.holds(span)
            if is_prediction and np.array_equal(self.index.tokens_of(span), token_ids):
                return span.first_indexed
        return self._add([self.index.append(token_ids, DECLARED_TEXT)])[0].first_indexed

    def open_answer(self, size: int) -> Span:
        """Room for an answer, or a further part of one, that is written bit by bit."""
        return self._add([self.index.open(size, ANSWER)])[0]

    def add_answer(self, span: Span) -> None:
        """An answer is complete."""
        self._answers = [*self._answers, span][-_STARTS:]

    def remember(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Keep what is new in a finished call's prompt, and its answer, which follows it in `token_ids`."""
        self._add(self.index.append_unseen(token_ids[:num_prompt_tokens], PROMPT))
        if len(token_ids) > num_prompt_tokens:
            overlap = min(OVERLAP, num_prompt_tokens)
            span = self.index.append(token_ids[num_prompt_tokens - overlap :], ANSWER, overlap=overlap)
            self.add_answer(self._add([span])[0])

    def _add(self, spans: list[Span]) -> list[Span]:
        self._spans += spans
        if self._noted is not None:
            self._noted += spans
        return spans

    @contextmanager
    def noting(self, texts: list[Span]) -> Iterator[None]:
        """What is added meanwhile goes into `texts` too: that of one call among others."""
        self._noted = texts
        try:
            yield
        finally:
            self._noted = None

    @property
    def texts(self) -> list[Span]:
        """The texts that this conversation has added and the index still holds, oldest first."""
        self._forget_what_is_gone()
        return list(self._spans)

    def has(self, text: Span) -> bool:
        """Whether this conversation has added a text."""
        return text in self._spans

    # ---- for whoever keeps it --------------------------------------------------------------------------------------

    def withdraw(self, texts: Iterable[Span]) -> None:
        """Take texts out again that a failed call has added: nothing of it may fail another one."""
        own = set(self._spans)
        self.index.erase([span for span in texts if span in own])
        self._forget_what_is_gone()
        self._answers = [span for span in self._answers if self.index.holds(span)]

    def begin_call(self) -> None:
        """A call is going to use this memory, until `end_call`."""
        self._num_calls += 1

    def end_call(self) -> None:
        """After a memory's last call in flight nothing stays open, not even what a drafter that failed has left."""
        self._num_calls -= 1
        if not self._num_calls:
            for span in self._spans:
                if span.is_open:
                    self.index.close(span)

    @property
    def is_idle_and_empty(self) -> bool:
        """No call uses this memory, and the index holds nothing of it."""
        return not self._num_calls and not any(map(self.index.holds, self._spans))

    def erase(self) -> None:
        """Take this conversation's texts out of the index, and forget candidates and what was learnt."""
        self.index.erase(self._spans)
        self.alternatives.erase()  # with those of the others who share it, since nobody knows whose is whose
        self.acceptance = self.draft_acceptance = None
        self._spans, self._answers, self._saved = [], [], {}

    def changes(self) -> tuple[dict[Span, SavedSegment], dict[Span, int]]:
        """What is to be saved: complete texts that are not in the file yet; and the numbers of those forgotten."""
        self._forget_what_is_gone()
        complete = [span for span in self._spans if not span.is_open and span.stop > span.first_indexed]
        new = [span for span in complete if span not in self._saved]
        added = {
            span: SavedSegment(number, span.kind, self.index.tokens_of(span).astype(np.int32))
            for number, span in enumerate(new, self._next_number)
        }
        return added, {span: number for span, number in self._saved.items() if not self.index.holds(span)}

    def mark_saved(self, added: Mapping[Span, SavedSegment], removed: Iterable[Span] = ()) -> None:
        """These `changes` are in the file."""
        for span, segment in added.items():
            self._saved[span] = segment.number
            self._next_number = segment.number + 1
        for span in removed:
            del self._saved[span]

    def restore(self, segments: Sequence[SavedSegment]) -> None:
        """Take in what was saved, oldest first, into a memory without texts."""
        for segment in segments:
            span = self._add([self.index.append(segment.tokens.astype(np.int64), segment.kind)])[0]
            self.mark_saved({span: segment})
            if segment.kind == ANSWER:
                self.add_answer(span)

    def _forget_what_is_gone(self) -> None:
        self._spans = [span for span in self._spans if self.index.holds(span)]
