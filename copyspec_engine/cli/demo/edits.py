"""Kinds of edits: the words that ask for one, what it makes of a text, and whether an answer made it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["EDITS", "Edit", "EditStep", "Outcome"]

Named = Mapping[str, str]
"""The texts that an instruction names, by the part they play: "old", "new", "text", "key", "value"."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A kind of edit."""

    words: str
    """The words that ask for it where a step has none of its own."""
    apply: Callable[[str, Named], str]
    made: Callable[[str, str, Named], bool]
    """Whether a text (the first) was edited so in another (the second), whatever else was changed there."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an answer did with the edit that it was asked for."""

    made: bool
    """The asked text is there, and the old one is gone."""
    words_off: int
    """Words that differ from the same text with this edit and nothing else changed."""


def _set_value(text: str, named: Named) -> str:
    start = f"{named['key']} = "
    return "\n".join(start + named["value"] if line.startswith(start) else line for line in text.split("\n"))


def _is_replaced(before: str, after: str, named: Named) -> bool:
    old, new = named["old"], named["new"]
    return new in after and (old in new or old not in after) and old in before


def _first(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _last(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


EDITS = {
    "append": Edit(
        "Append this line:\n{text}",
        lambda text, named: f"{text}\n{named['text']}",
        lambda _, after, named: _last(after) == named["text"],
    ),
    "prepend": Edit(
        "Prepend this line:\n{text}",
        lambda text, named: f"{named['text']}\n{text}",
        lambda _, after, named: _first(after) == named["text"],
    ),
    "replace": Edit(
        'Replace "{old}" with "{new}".', lambda text, named: text.replace(named["old"], named["new"]), _is_replaced
    ),
    "set": Edit(
        'Set "{key}" to "{value}".',
        _set_value,
        lambda _, after, named: f"{named['key']} = {named['value']}" in after.split("\n"),
    ),
    "delete_first": Edit(
        "Delete the first line.",
        lambda text, _: text.partition("\n")[2],
        lambda before, after, _: _first(after) == _first(before.strip().partition("\n")[2]),
    ),
    "delete_last": Edit(
        "Delete the last line.",
        lambda text, _: text.rpartition("\n")[0],
        lambda before, after, _: _last(after) == _last(before.strip().rpartition("\n")[0]),
    ),
    "repeat": Edit("Repeat the document.", lambda text, _: text, lambda before, after, _: after == before),
}
"""The bundled model knows these very words."""


@dataclass(frozen=True, slots=True)
class EditStep:
    """One turn of a chain: an edit, and the texts that its words name."""

    edit: str
    named: Named
    words: str = ""
    """The instruction in words of its own, with the names of `named` in braces; empty for those of the edit."""

    @property
    def instruction(self) -> str:
        return (self.words or EDITS[self.edit].words).format(**self.named)

    def apply(self, text: str) -> str:
        """What a perfect answer to `instruction` says."""
        return EDITS[self.edit].apply(text, self.named)

    def judge(self, before: str, after: str) -> Outcome:
        """What an answer did: `before` is the text that was to be edited, `after` the answer."""
        made = EDITS[self.edit].made(before, after, self.named)
        return Outcome(made, _words_between(self.apply(before), after))


def _words_between(one: str, other: str) -> int:
    """Words to replace, insert or delete on the way from one text to the other."""
    matcher = difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False)
    changes = (code for code in matcher.get_opcodes() if code[0] != "equal")
    return sum(max(end - start, new_end - new_start) for _, start, end, new_start, new_end in changes)
