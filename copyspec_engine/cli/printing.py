"""Answers on a terminal as they are written: copied text in colour, and no word broken at the edge."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from copyspec_engine.values.outputs import Segment

__all__ = ["COPIED", "AnswerPrinter", "size_text"]

COPIED = "green"
"""The style of copied text."""
_PIECES = re.compile(r"\n|[^\S\n]+|\S+")
"""A line end, blanks, or a word as far as it has come."""


def size_text(num_bytes: int) -> str:
    """A size on disk, in MB of a million bytes, or in kB."""
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"


class AnswerPrinter:
    """Prints the pieces of one answer as they come.

    On a terminal a word waits for its end, since only then it is known which line it fits. Elsewhere, in a file say,
    the text stays as it is.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        """Cells of the terminal's line that are taken."""
        self._word: list[Text] = []
        """Pieces of a word whose end has not come."""
        self._is_endless = False
        """The word is one that lines break, and has begun already."""
        self._is_in_gap = False
        """A line was broken within blanks, and the rest of them is to come."""

    def __call__(self, segments: Sequence[Segment]) -> None:
        """Print more of the answer."""
        for segment in segments:
            style = COPIED if segment.copied else ""
            if self._console.is_terminal:
                for piece in _PIECES.findall(segment.text):
                    self._take(Text(piece, style=style))
            else:
                self._print(Text(segment.text, style=style))

    def end(self) -> None:
        """The answer has ended: print what waits."""
        width = sum(map(_width, self._word))
        if self._column and self._column + width > self._console.width:
            self._break_line()
        for piece in self._word:
            self._print(piece)
        self._column += width
        self._word.clear()
        self._is_endless = False

    def _take(self, piece: Text) -> None:
        """A piece of a word waits for the rest; blanks end the word, and are not carried into a new line."""
        if piece.plain == "\n":
            self.end()
            self._break_line()
            self._is_in_gap = False
        elif piece.plain.isspace():
            self.end()
            if self._column + _width(piece) > self._console.width:
                self._break_line()
                self._is_in_gap = True
            elif not self._is_in_gap:
                self._print(piece)
                self._column += _width(piece)
        else:
            self._is_in_gap = False
            self._word.append(piece)
            # Scripts without blanks, and words longer than a line, are broken where the line ends.
            is_wide = any(cell_len(letter) > 1 for letter in piece.plain)
            if self._is_endless or is_wide or sum(map(_width, self._word)) > self._console.width:
                self._break_up()

    def _break_up(self) -> None:
        """Print a word that has no end of its own, filling each line."""
        for piece in self._word:
            for letter in piece.divide(range(1, len(piece))):
                if self._column + _width(letter) > self._console.width:
                    self._break_line()
                self._print(letter)
                self._column += _width(letter)
        self._word.clear()
        self._is_endless = True

    def _break_line(self) -> None:
        self._print(Text("\n"))
        self._column = 0

    def _print(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)


def _width(text: Text) -> int:
    """Cells that a text takes on a terminal; a tab counts as rich prints it, as eight at most."""
    return cell_len(text.plain.replace("\t", " " * 8))
