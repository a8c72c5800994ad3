"""Reading the document that the demo rewrites: one that ships with the package, or the user's own file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from copyspec_engine import ConfigError

__all__ = ["CHAT_DOCUMENT", "DEFAULT_DOCUMENT", "Document", "load_document", "shipped_folder", "shipped_names"]

DEFAULT_DOCUMENT = "meeting_notes.md"
CHAT_DOCUMENT = "letter.txt"
"""The default for a chat model: small ones follow edits of prose best."""
MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """A text to rewrite; `name` is the file's name, `shipped` says that it came with the package."""

    name: str
    text: str
    shipped: bool = False


def shipped_folder() -> Path:
    """The folder of the example documents, in an installed package or in a checkout."""
    installed = Path(__file__).parent / "shipped_documents"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "examples" / "documents"


def shipped_names() -> list[str]:
    """File names of the documents that ship with the package."""
    return sorted(path.name for path in shipped_folder().iterdir() if path.suffix != ".json")


def load_document(where: str | None, option: str = "--file") -> Document:
    """Reads a file, or one of the shipped documents by its bare name; None is the default document.

    `option` is what the user wrote before the path; errors name it.

    Raises:
        ConfigError: the file is missing, unreadable, a folder, not text, too large or empty.
    """
    path = _find(where)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"Got {option} {path}, which is a folder: name a text file in it") from None
    except OSError as error:
        raise ConfigError(
            f"Cannot read {option} {path}: {error.strerror or error}. Check the path, or name one of the shipped "
            f"documents: {', '.join(shipped_names())}"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"Got {option} {path} of more than {MAX_FILE_BYTES:,} bytes: take a shorter text")
    return Document(path.name, _decode(f"{option} {path}", data), shipped=path.parent == shipped_folder())


def _find(where: str | None) -> Path:
    if where is None:
        return shipped_folder() / DEFAULT_DOCUMENT
    path = Path(os.path.expanduser(where))
    return shipped_folder() / where if where in shipped_names() and not os.path.exists(path) else path


def _decode(named: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Got {named} with a byte that is not UTF-8 at offset {error.start}: expected a text file in UTF-8"
        ) from None
    if "\0" in text:
        raise ConfigError(f"Got {named} with a zero byte at offset {text.index(chr(0))}: expected a text file")
    if not text.strip():
        raise ConfigError(f"Got {named}, which holds no text: name a file with at least one line")
    return text.strip("\n")
