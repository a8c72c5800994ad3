"""Transcripts as one HTML file, without a single request to anywhere.

Every text goes through the template's escaping, and stands in the page character by character: offsets into it stay
true. A content policy allows the page its own script alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from copyspec_engine import CopiedSpan, CopySource
from copyspec_engine.lab.page.figures import Figures
from copyspec_engine.lab.page.transcript import ShownAnswer, ShownConversation, ShownMessage, ShownPiece
from copyspec_engine.values.html import KINDS, MARKED_CHARACTERS, exact, look

__all__ = ["render_page"]


LONG_CHARACTERS, LONG_LINES = 1500, 18
"""Messages of more than this are folded until someone asks for them."""


def render_page(title: str, facts: Sequence[str], writer: str, conversations: Sequence[ShownConversation]) -> str:
    """The whole file.

    Args:
        title: heading of the page.
        facts: what was run, in a few words each.
        writer: whose answers these are.
        conversations: with at least one answer.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "exact": lambda text: Markup(exact(text)),
        "number": _number,
        "seconds": _seconds,
        "place": _place,
        "mark": _mark,
    }
    environment.tests |= {"long": _is_long, "reachable": _is_reachable}
    script = (folder / "page.js").read_text(encoding="utf-8")
    answers = [answer for conversation in conversations for answer in conversation.answers]
    return environment.get_template("page.html.jinja").render(
        title=title,
        facts=facts,
        writer=writer,
        conversations=conversations,
        figures_of=Figures.of,
        total=Figures.of(answers),
        kinds=KINDS,
        sources=_sources_in(answers),
        style=Markup(look() + (folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _sources_in(answers: Sequence[ShownAnswer]) -> list[CopySource]:
    """The kinds of sources that the page's legend has to explain."""
    spans = {piece.span.source for answer in answers for piece in answer.pieces if piece.span is not None}
    counted = {source for answer in answers for source in answer.record.accepted_by_source}
    return [source for source in KINDS if source in spans | counted]


def _is_long(message: ShownMessage) -> bool:
    return len(message.text) > LONG_CHARACTERS or message.text.count("\n") >= LONG_LINES


def _is_reachable(piece: ShownPiece) -> bool:
    """Whether the Tab key stops at a copied piece: it can be seen there, and there is more to say of it."""
    return bool(piece.text.strip()) and piece.span is not None and piece.span.source not in ("grammar", "frequent")


def _mark(span: CopiedSpan) -> str:
    if span.stop - span.start < MARKED_CHARACTERS:
        return ""
    return KINDS[span.source].mark if span.message is None else str(span.message)


def _place(piece: ShownPiece) -> str:
    """Where a copied piece came from, in words."""
    span, place = piece.span, piece.place
    assert span is not None
    if place is not None:
        where = "this answer" if span.message is None else f"message {place.message.number} ({place.message.role})"
        return f"{where}, from character {span.offset:,}"
    if span.message is not None:
        return f"message {span.message}"
    if span.offset is not None:
        return f"from its character {span.offset:,}"
    if span.source == "prompt":
        return "between the messages, where the chat template writes"
    return KINDS[span.source].meaning


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
