"""Tokens to text, one at a time: an answer's text goes on where its prompt ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.outputs import CopySource, Segment

if TYPE_CHECKING:
    from copyspec_engine.chat.tokenizer import ChatTokenizer

__all__ = ["Detokenizer", "StoppingTextStream", "TextStream", "answer_stream"]

_BEHIND = 32
"""Tokens at a prompt's end that are looked at: as many as may give no text of their own, and one that does."""


class TextStream(Protocol):
    """Turns sampled tokens into text, one at a time, and watches for stop texts."""

    @property
    def stopped_by(self) -> str | None:
        """The stop text that has been completed; nothing is released after it. None: none has."""
        ...

    @property
    def num_characters(self) -> int:
        """How many the tokens so far have completed, released or not."""
        ...

    def push(self, token_id: int, source: CopySource | None = None) -> list[Segment]:
        """The text that is certain after this token: neither half a character nor the start of a stop text.

        Args:
            token_id: the next token.
            source: where it was drafted from.
        """
        ...

    def flush(self) -> list[Segment]:
        """What was held back, once no more tokens come."""
        ...


class Detokenizer:
    """The text that each token completes.

    Decoders of the sentencepiece kind leave out the space at the beginning of a text. So an answer to messages has none
    there, and one that goes on with a raw prompt has the one that is written: its text is that of prompt and answer
    without that of the prompt.

    Args:
        backend: the tokenizer.
        hidden: tokens that give no text.
        skip_special_tokens: nor does any special one.
        behind: the end of the prompt that the text goes on with.
    """

    def __init__(
        self, backend: Tokenizer, hidden: Collection[int], *, skip_special_tokens: bool, behind: Sequence[int] = ()
    ) -> None:
        self._backend, self._hidden, self._skips = backend, hidden, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []
        """Tokens that have given no text yet, the prompt's last ones among them."""
        self._open = ""
        """What the prompt's last tokens would give if the character that they begin is not completed."""
        for token_id in behind:
            self.step(token_id)
        self._open = self.rest()

    def step(self, token_id: int) -> str:
        """The text that a token completes, "" inside a character."""
        if token_id in self._hidden:
            return ""
        self._pending.append(token_id)
        try:
            piece: str = self._stream.step(self._backend, token_id) or ""
        except Exception:  # it gives up on bytes that are no UTF-8, which some tokenizers can write
            piece = self._pending_text()
            self._stream = DecodeStream(skip_special_tokens=self._skips)
            self._stream.step(self._backend, token_id)  # so that the next one is not taken for the first of a text
        if piece:
            self._pending.clear()
            piece, self._open = piece.removeprefix(self._open), ""
        return piece

    def rest(self) -> str:
        """The text that is left when no more tokens come."""
        return self._pending_text().removeprefix(self._open)

    def _pending_text(self) -> str:
        text: str = self._backend.decode(self._pending, skip_special_tokens=self._skips)
        return text


class StoppingTextStream:
    """Releases an answer's text once no stop text can begin in it, and ends it before the first stop text.

    Args:
        step: token id -> the text it completes, "" inside a character.
        rest: the text that is left when no more tokens come.
        stop: texts of at least one character.
    """

    def __init__(self, step: Callable[[int], str], rest: Callable[[], str], stop: Sequence[str]) -> None:
        self._step, self._rest, self._stop = step, rest, tuple(stop)
        self._held: list[Segment] = []
        self.stopped_by: str | None = None
        self.num_characters = 0

    def push(self, token_id: int, source: CopySource | None = None) -> list[Segment]:
        piece = self._step(token_id)
        self.num_characters += len(piece)
        if not piece or self.stopped_by is not None:
            return []
        self._held.append(Segment(piece, source))
        if not self._stop:
            return self._release(len(piece))
        text = "".join(segment.text for segment in self._held)
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            first, self.stopped_by = min(found, key=lambda place: place[0])
            released = self._release(first)
            self._held = []
            return released
        return self._release(len(text) - _longest_beginning(text, self._stop))

    def flush(self) -> list[Segment]:
        if self.stopped_by is not None:
            return []
        rest = self._rest()
        if rest:
            self._held.append(Segment(rest))
        return self._release(sum(len(segment.text) for segment in self._held))

    def _release(self, count: int) -> list[Segment]:
        """Take the first `count` characters of what is held."""
        released: list[Segment] = []
        while count > 0 and self._held:
            segment = self._held[0]
            taken = Segment(segment.text[:count], segment.source)
            if len(segment.text) > count:
                self._held[0] = Segment(segment.text[count:], segment.source)
            else:
                self._held.pop(0)
            count -= len(taken.text)
            released.append(taken)
        return released


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop text."""
    longest = max(len(stop) for stop in stops) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def answer_stream(
    tokenizer: ChatTokenizer, request: GenerationRequest, prompt_ids: Sequence[int], stop: Sequence[str] = ()
) -> TextStream:
    """A fresh detokeniser for the answer to a request, whose prompt has these ids."""
    behind = prompt_ids[-_BEHIND:] if request.messages is None else ()
    return tokenizer.text_stream(stop, special="parts" if request.parse_reply else "none", behind=behind)
