"""How answers and figures look as HTML, in notebooks: `_repr_html_` of what the engine gives back.

Texts are whoever's, and escaped. Colours are translucent and text keeps the page's own, so that both hold on light and
dark pages; styles stand in the elements themselves, which viewers that drop style sheets keep.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

from copyspec_engine.values.outputs import CopySource

__all__ = ["KINDS", "MARKED_CHARACTERS", "Kind", "Marked", "exact", "figures_line", "look", "marked_text", "table"]


class Kind(NamedTuple):
    """How pages speak of a kind of source."""

    mark: str
    """Stands behind longer copies, where a prompt's have the message's number."""
    name: str
    heading: str
    meaning: str
    colour: str
    """Red, green and blue of its tint, as in CSS."""


_REMEMBERED = "remembered from an earlier call, not in this one"
KINDS: dict[CopySource, Kind] = {
    "prompt": Kind("", "prompt", "Copied from the prompt", "a message of the call, by its number", "30 160 110"),
    "answer": Kind("a", "this answer", "Copied from this answer", "what the answer said before", "50 120 230"),
    "prediction": Kind(
        "p", "prediction", "Copied from the prediction", "the text that the caller declared", "140 80 210"
    ),
    "earlier_prompt": Kind("e", "earlier prompt", "Copied from an earlier prompt", _REMEMBERED, "200 130 20"),
    "earlier_answer": Kind("ea", "earlier answer", "Copied from an earlier answer", _REMEMBERED, "200 130 20"),
    "earlier_prediction": Kind(
        "ep", "earlier prediction", "Copied from an earlier prediction", _REMEMBERED, "200 130 20"
    ),
    "pool": Kind("s", "shared pool", "Copied from the shared pool", "a text of another conversation", "210 60 110"),
    "grammar": Kind("g", "grammar", "Forced by the grammar", "nothing else was allowed there", "128 128 128"),
    "frequent": Kind(
        "f", "frequent token", "A frequent token", "guessed because it is frequent, from no text", "128 128 128"
    ),
}
"""The kinds of sources that answers are explained by."""

_NOT_HELD = re.compile("[\0\ud800-\udfff]")
MARKED_CHARACTERS = 12
"""Copies of fewer have no mark: it would tear words apart."""
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;line-height:1.6;margin:0.3em 0"
_SMALL = "opacity:0.75;font-size:0.9em;margin:0.3em 0"


class Marked(NamedTuple):
    """A piece of a text."""

    text: str
    source: CopySource | None = None
    """None, or one that is not in `KINDS`: nothing is told of it."""
    note: str = ""
    """Where it came from, in words."""


def look() -> str:
    """The style sheet that all pages share: colours, letters and distances, for light and dark."""
    return Path(__file__).with_name("look.css").read_text(encoding="utf-8")


def exact(text: str) -> str:
    """A text as a browser reads it back: line ends as they are, and something in place of what no page can hold.

    That is a zero, which HTML drops, and half a surrogate pair, which UTF-8 has no bytes for.
    """
    return _NOT_HELD.sub("\N{REPLACEMENT CHARACTER}", escape(text)).replace("\r", "&#13;")


def marked_text(pieces: Iterable[Marked]) -> str:
    """A text with what was copied in colour: longer pieces have the number of their note, and notes stand below."""
    notes: dict[str, int] = {}
    shown = "".join(_shown(notes, pieces))
    listed = "<br>".join(f"<sup>{number}</sup> {exact(note)}" for note, number in notes.items())
    return f'<div style="{_TEXT}">{shown}</div>' + (f'<div style="{_SMALL}">{listed}</div>' if listed else "")


def _shown(notes: dict[str, int], pieces: Iterable[Marked]) -> Iterator[str]:
    for text, source, note in pieces:
        kind = None if source is None else KINDS.get(source)
        if kind is None:
            yield exact(text)
            continue
        style = f"background:rgb({kind.colour}/0.22);border-bottom:1px solid rgb({kind.colour});border-radius:2px"
        title = f"{kind.heading}: {note}" if note else kind.heading
        seen = text.rstrip()
        yield f'<span style="{style}" title="{exact(title)}">{exact(seen)}</span>' if seen else ""
        if note and len(seen) >= MARKED_CHARACTERS:
            yield f"<sup>{notes.setdefault(note, len(notes) + 1)}</sup>"
        yield exact(text[len(seen) :])


def figures_line(*figures: str) -> str:
    """Figures in one line below a text."""
    line = " \N{MIDDLE DOT} ".join(figures)
    return f'<div style="{_SMALL}">{exact(line)}</div>'


def table(title: str, rows: Mapping[str, object]) -> str:
    """Names and values, with what they are of above them."""
    cell = "text-align:left;padding:0.1em 1em 0.1em 0;vertical-align:top"
    shown = "".join(
        f'<tr><th scope="row" style="{cell};font-weight:normal;opacity:0.75;white-space:nowrap">{exact(name)}</th>'
        f'<td style="{cell};overflow-wrap:anywhere">{exact(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f'<div style="margin:0.3em 0"><b>{exact(title)}</b></div><table style="border:none">{shown}</table>'
