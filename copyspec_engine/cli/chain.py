"""The rewrite chain as data: which edits the demo asks for, one after the other, and what each should give."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from copyspec_engine import ConfigError
from copyspec_engine.cli.documents import Document, shipped_folder

__all__ = ["EDITS", "Edit", "EditStep", "steps_for"]


@dataclass(frozen=True, slots=True)
class Edit:
    """A kind of edit: the words that ask for it, and what it makes of a text."""

    words: str
    apply: Callable[[str, Mapping[str, str]], str]


def _set_value(text: str, named: Mapping[str, str]) -> str:
    start = f"{named['key']} = "
    return "\n".join(start + named["value"] if line.startswith(start) else line for line in text.split("\n"))


EDITS = {
    "append": Edit("Append this line:\n{text}", lambda text, named: f"{text}\n{named['text']}"),
    "prepend": Edit("Prepend this line:\n{text}", lambda text, named: f"{named['text']}\n{text}"),
    "replace": Edit('Replace "{old}" with "{new}".', lambda text, named: text.replace(named["old"], named["new"])),
    "set": Edit('Set "{key}" to "{value}".', _set_value),
    "delete_first": Edit("Delete the first line.", lambda text, _: text.partition("\n")[2]),
    "delete_last": Edit("Delete the last line.", lambda text, _: text.rpartition("\n")[0]),
    "repeat": Edit("Repeat the document.", lambda text, _: text),
}
"""The bundled model knows these very words; any chat model understands them."""


@dataclass(frozen=True, slots=True)
class EditStep:
    """One turn of the chain: an edit, and the texts that its words name."""

    edit: str
    named: Mapping[str, str]

    @property
    def instruction(self) -> str:
        return EDITS[self.edit].words.format(**self.named)

    def apply(self, text: str) -> str:
        """What a correct answer to `instruction` says."""
        return EDITS[self.edit].apply(text, self.named)


def steps_for(document: Document) -> tuple[EditStep, ...]:
    """The steps that `chains.json` holds for a shipped document, or those for any other text.

    Raises:
        ConfigError: a step names an edit that does not exist, or lacks one of its texts.
    """
    chains = json.loads((shipped_folder() / "chains.json").read_text(encoding="utf-8"))
    rows = chains[document.name] if document.shipped and document.name in chains else chains["*"]
    return tuple(_step(row) for row in rows)


def _step(row: dict[str, str]) -> EditStep:
    named = {name: text for name, text in row.items() if name != "edit"}
    try:
        EDITS[row["edit"]].words.format(**named)
    except KeyError as error:
        raise ConfigError(f"Got the step {row!r} in chains.json but {error} is unknown or missing") from None
    return EditStep(row["edit"], named)
