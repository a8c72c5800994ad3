"""What keeps the texts of conversations outside of main memory: one interface, for a file and for a database.

A store holds, for every owner (`session:<id>`, or `pool:[name, session]`), segments of text as token ids. Where several
engines share one, a **revision** orders what they do: it rises with every change, and each owner bears that of its
last one. Whoever holds a copy in main memory knows by it whether the copy is still what is saved.

Not covered: how a file (file.py) and a database (database.py) keep their promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from copyspec_engine.values.errors import MemoryFileError

__all__ = [
    "ChangedElsewhereError",
    "ForgottenElsewhereError",
    "News",
    "SavedOwner",
    "SavedSegment",
    "SavedTexts",
    "StoreUnreachableError",
    "TextStore",
    "checksum_of",
    "decoded_name",
    "encoded_name",
    "encoded_segment",
    "read_segment",
]


class SavedSegment(NamedTuple):
    """One text of an owner.

    `number` is its place in the owner's stream, unique and ascending; `kind` means what the caller likes; `tokens` has
    shape (n,), n may be 0, and is read-only when it comes from a store.
    """

    number: int
    kind: int
    tokens: npt.NDArray[np.int32]


class SavedTexts(NamedTuple):
    """An owner's segments by number, as they were at a revision (0 in a store that nobody else uses)."""

    segments: list[SavedSegment]
    revision: int


class SavedOwner(NamedTuple):
    """An owner in a store: since which revision it is there, and that of its last change."""

    name: str
    began: int
    revision: int


class News(NamedTuple):
    """What has changed in a store since a revision, up to `revision`."""

    owners: list[SavedOwner]
    """Those that were written, by their last change; all that there are if `is_all`."""
    is_all: bool
    """Some owner was deleted meanwhile: whoever is not among these is gone."""
    revision: int


class StoreUnreachableError(MemoryFileError):
    """The store does not answer for now; what it holds is not damaged."""


class ChangedElsewhereError(Exception):
    """Another engine has saved to the owner since: nothing was done, load it first."""


class ForgottenElsewhereError(Exception):
    """Another engine has deleted the owner since: nothing was done, and nothing of it may be saved."""


class TextStore(Protocol):
    """An open store.

    Every method may be called from any thread and raises `MemoryFileError`. Each happens whole or not at all, and calls
    work again as soon as the reason is gone.
    """

    @property
    def error(self) -> str | None:
        """Why it does not answer now; None if it does, as far as is known."""

    def news(self, since: int) -> News:
        """What was done to it after a revision, by this engine too; of -1 everything is news."""

    def load(self, owner: str, vocab_size: int | None = None, revision: int | None = None) -> SavedTexts:
        """The owner's texts; none for one that is new. Does not count as use.

        Segments that are not what was saved, or hold other ids than 0 to `vocab_size` - 1 if that is given, are left
        out and removed. A revision is that of the copy that is to be brought up to date.

        Raises:
            ForgottenElsewhereError: as `save` does, for a copy.
        """

    def save(self, owner: str, added: Sequence[SavedSegment], removed: Sequence[int] = (), revision: int = 0) -> int:
        """Take the numbers `removed` out, put `added` in, and note the owner as the one used last.

        A number that is not there counts as removed; adding one that is there is an error. Tokens of a type that does
        not fit into int32 are a TypeError.

        Args:
            owner: whose texts.
            added: in any order.
            removed: numbers.
            revision: of the copy that these changes are made to.

        Returns:
            The revision of what is saved now.

        Raises:
            ChangedElsewhereError: the copy is older than what is saved.
            ForgottenElsewhereError: the copy is of an owner that was deleted, or may be.
        """

    def delete(self, owner: str) -> None:
        """Erase the owner and its text; nothing happens if there is none. After an error call again."""

    def owners(self) -> list[str]:
        """Every owner, least recently used first; one whose name cannot be read is left out."""

    def close(self) -> None:
        """Let go of it when a call in another thread is done; closing twice is no error."""


# ---- how texts are written, in every store ---------------------------------------------------------------------------


def encoded_segment(owner: str, segment: SavedSegment) -> tuple[int, int, bytes, bytes]:
    """Number, kind, tokens and checksum, as they are saved. Tokens that may not fit into int32 are a TypeError."""
    number, kind = int(segment.number), int(segment.kind)
    tokens = segment.tokens.astype("<i4", casting="safe").tobytes()
    return number, kind, tokens, checksum_of(owner, number, kind, tokens)


def read_segment(
    owner: str, row: tuple[int, int, bytes], checksum: bytes, vocab_size: int | None
) -> SavedSegment | str:
    """What a row of (number, kind, tokens) holds, or why it cannot be what was saved, or be read by the model."""
    number, kind, tokens = row
    try:
        if checksum != checksum_of(owner, number, kind, tokens):
            return "it is not what was saved"
        ids = np.frombuffer(tokens, "<i4").astype(np.int32, copy=False)
    except (TypeError, ValueError) as error:
        return f"it is not what was saved, {error}"
    if vocab_size is not None and len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        return f"it holds ids outside of 0 to {vocab_size - 1}"
    return SavedSegment(number, kind, ids)


def checksum_of(owner: str, number: int, kind: int, tokens: bytes) -> bytes:
    """Over all that a segment is, its owner too: a row that came to another owner is nobody's."""
    name = encoded_name(owner)
    digest = blake2b(f"{number} {kind} {len(name)} ".encode() + name, digest_size=16)
    digest.update(tokens)
    return digest.digest()


def encoded_name(owner: str) -> bytes:
    """Bytes for every name that a str can hold, with lone surrogates and NULs too."""
    return owner.encode("utf-8", "surrogatepass")


def decoded_name(name: object) -> str | None:
    """The name of `encoded_name`; None if it is damaged."""
    try:
        return bytes.decode(name, "utf-8", "surrogatepass") if isinstance(name, bytes) else None
    except UnicodeDecodeError:
        return None
