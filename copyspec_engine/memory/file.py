"""The memory file: the texts of conversations on disk, so that they outlive the process.

One SQLite file is the store (store.py) of one engine. What holds:

- **Whole calls.** A call that returned is in the file whole, one that was cut short is there whole or not at all:
  killing the process at any point loses at most the call in flight. A power cut may take back the last calls, never
  half of one; waiting for the disk in every call (`synchronous=FULL`) would cost more than those are worth.
- **Never trusted.** A file that is not ours, of another version, damaged, or made with another tokenizer or template is
  refused and left as it is. Every segment carries a checksum over its tokens, number, kind and owner; one that does not
  agree with it is left out and removed, and the others are read all the same.
- **The user's alone.** A file that others could read, or write, is theirs no longer once it is opened.
- **One writer.** An open file is locked against other engines, in this process too. The operating system frees the lock
  when the process dies.
- **Deleted is gone.** After `delete` no byte of the owner's text is left in the file or its write-ahead log. The space
  is used again; the file does not shrink.

A forked child cannot use what its parent has open, and leaves it alone.

Not covered: network file systems, encryption, what a file system or a disk keeps of overwritten bytes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from copyspec_engine.memory.store import (
    News,
    SavedSegment,
    SavedTexts,
    decoded_name,
    encoded_name,
    encoded_segment,
    read_segment,
)
from copyspec_engine.values.errors import MemoryFileError
from copyspec_engine.values.tokens import Fingerprint

__all__ = ["MemoryFile"]

logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x436F7079
"""Marks the file as ours in its header ("Copy")."""
_VERSION = 1
_SETTINGS = (
    "locking_mode=EXCLUSIVE",  # keeps the lock between calls
    "synchronous=NORMAL",
    "secure_delete=ON",
    "temp_store=MEMORY",  # no text in temporary files
)
_SCHEMA = (
    f"PRAGMA application_id={_APPLICATION_ID}",
    f"PRAGMA user_version={_VERSION}",
    "CREATE TABLE fingerprint (tokenizer TEXT NOT NULL, template TEXT NOT NULL)",
    "CREATE TABLE owners (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, last_used INTEGER NOT NULL)",
)
# Every owner has a table of its own, `segments_<id>`: when SQLite balances a tree, pages may keep stale copies of rows
# that moved, out of secure_delete's reach, but dropping a table overwrites every page that its rows have been on.
_COLUMNS = "number INTEGER PRIMARY KEY, kind INTEGER NOT NULL, checksum BLOB NOT NULL, tokens BLOB NOT NULL"


class MemoryFile:
    """An open memory file, a `TextStore`; made by `open`. Nobody else changes it, so every revision in it is 0."""

    error = None
    """What fails fails for a call; the next one tries again."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self._path = connection, path
        self._lock = threading.Lock()  # closing a connection while another thread uses it crashes the interpreter
        _open_files.add(self)

    @classmethod
    def open(cls, path: str | Path, fingerprint: Fingerprint) -> MemoryFile:
        """Open the file for this engine alone, until `close`; a new one can be read by its user only.

        Reads the whole file to check its structure: 0.04 s for 100 MB in the system's cache.
        """
        with _named_errors("open", path):
            file = Path(os.path.realpath(path))
            # Exclusive, since closing a file that another engine of this process has open would drop its lock.
            with suppress(FileExistsError):
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            if not file.is_file():
                raise ValueError("it is not a regular file")
            _refuse_foreign(file)
            connection = sqlite3.connect(
                f"{file.as_uri()}?mode=rw", uri=True, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(connection, file, fingerprint)
                _narrow(file)
            except BaseException:
                connection.close()
                raise
        return cls(connection, file)

    def news(self, since: int) -> News:
        """Nothing: nobody else writes here."""
        return News([], False, since)

    def load(self, owner: str, vocab_size: int | None = None, revision: int | None = None) -> SavedTexts:
        """See `TextStore.load`."""
        segments, refused = [], []
        with self._transaction("load from") as connection:
            table = _table_of(connection, owner)
            query = f"SELECT number, kind, tokens, checksum FROM {table} ORDER BY number"
            for number, kind, tokens, checksum in connection.execute(query).fetchall() if table else ():
                found = read_segment(owner, (number, kind, tokens), checksum, vocab_size)
                if isinstance(found, SavedSegment):
                    segments.append(found)
                else:
                    refused.append((number,))
                    logger.warning("Saved text %s of %r is left out of %s: %s", number, owner, self._path, found)
            if refused:
                connection.executemany(f"DELETE FROM {table} WHERE number = ?", refused)
        return SavedTexts(segments, revision or 0)

    def save(self, owner: str, added: Sequence[SavedSegment], removed: Sequence[int] = (), revision: int = 0) -> int:
        """See `TextStore.save`."""
        rows = [encoded_segment(owner, segment) for segment in added]
        with self._transaction("save to") as connection:
            connection.execute(
                # Uses are counted: a clock may be set back.
                "INSERT INTO owners (name, last_used) SELECT ?, ifnull(max(last_used), 0) + 1 FROM owners WHERE true "
                "ON CONFLICT (name) DO UPDATE SET last_used = excluded.last_used",
                (encoded_name(owner),),
            )
            table = _table_of(connection, owner)
            connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({_COLUMNS})")
            connection.executemany(f"DELETE FROM {table} WHERE number = ?", [(int(number),) for number in removed])
            connection.executemany(f"INSERT INTO {table} (number, kind, tokens, checksum) VALUES (?, ?, ?, ?)", rows)
        return revision

    def delete(self, owner: str) -> None:
        """Erase the owner and its text from the disk; nothing happens if there is none.

        Needs free space, up to twice what the text takes. After an error call again: the owner may be gone already
        while the bytes of its text are not (the next `open` finishes that too).
        """
        with self._transaction("delete from") as connection:
            if table := _table_of(connection, owner):
                connection.execute(f"DROP TABLE {table}")
                connection.execute("DELETE FROM owners WHERE name = ?", (encoded_name(owner),))
        with self._lock, _named_errors("delete from", self._path):
            _empty_log(self._connection)

    def owners(self) -> list[str]:
        """See `TextStore.owners`."""
        names = []
        with self._transaction("read") as connection:
            for (encoded,) in connection.execute("SELECT name FROM owners ORDER BY last_used").fetchall():
                name = decoded_name(encoded)
                if name is None:
                    logger.warning("A conversation in %s is left out, its name cannot be read", self._path)
                else:
                    names.append(name)
        return names

    def close(self) -> None:
        """See `TextStore.close`."""
        with self._lock, _named_errors("close", self._path):
            self._connection.close()

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        """What runs inside happens whole or not at all."""
        with self._lock, _named_errors(doing, self._path):
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # some errors have ended it already
                    connection.execute("ROLLBACK")
                raise


_open_files: weakref.WeakSet[MemoryFile] = weakref.WeakSet()


def _abandon_in_child() -> None:
    """Put connections out of reach without closing them, which would take the parent's log away from under it."""
    for file in list(_open_files):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(file._connection))  # nothing ever closes it
        file._connection = sqlite3.connect(":memory:")
        file._connection.close()
        file._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)


def _refuse_foreign(file: Path) -> None:
    """Raise for a file that is not ours or of another version, without touching it or a log beside it.

    SQLite reads the header, since closing the file ourselves could drop a lock, as above; `immutable` makes it look at
    nothing else.
    """
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as header:
        # A process killed while it moved its log into the file may leave a header that counts pages of the log. That is
        # no damage, and with this setting no error.
        header.execute("PRAGMA writable_schema=ON")
        names = ("application_id", "user_version")
        application, version = (header.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    if file.stat().st_size == 0:  # SQLite would also take a few bytes of anything for an empty database
        return
    if application != _APPLICATION_ID:
        raise ValueError("it is not one of ours but another program's")
    if version != _VERSION:
        raise ValueError(f"it has format {version}, this version of copyspec reads and writes format {_VERSION}")


def _prepare(connection: sqlite3.Connection, file: Path, fingerprint: Fingerprint) -> None:
    """Lock the file, make its tables if it is empty, and check it."""
    for setting in _SETTINGS:
        connection.execute(f"PRAGMA {setting}")
    connection.execute("BEGIN IMMEDIATE")
    if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
        file.chmod(0o600)  # an empty file may come from elsewhere; the log takes over the mode
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO fingerprint VALUES (:tokenizer, :template)", asdict(fingerprint))
    # Only now the log: the header must be in the file itself, where the next `open` looks for it.
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode=WAL")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise ValueError(f"it is damaged, {' '.join(verdict.split())}")
    (saved,) = connection.execute("SELECT tokenizer, template FROM fingerprint").fetchall()
    for (name, expected), got in zip(asdict(fingerprint).items(), saved, strict=True):
        if got != expected:
            raise ValueError(f"it was made with {name} {got}, but the model's {name} is {expected}")
    _empty_log(connection)  # finishes a delete that was cut short


def _narrow(file: Path) -> None:
    """Let the user alone read and write the file and what lies beside it."""
    if os.name == "posix":
        for part in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
            if part.exists() and part.stat().st_mode & 0o077:
                part.chmod(0o600)


def _empty_log(connection: sqlite3.Connection) -> None:
    """Move the write-ahead log into the file; no other reader can hold this up."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _table_of(connection: sqlite3.Connection, owner: str) -> str | None:
    found = connection.execute("SELECT id FROM owners WHERE name = ?", (encoded_name(owner),)).fetchone()
    return f"segments_{found[0]}" if found else None


@contextmanager
def _named_errors(doing: str, path: str | Path) -> Iterator[None]:
    """Errors as ours, which name the file and say what to do; TypeError and ValueError come from damaged values."""
    try:
        yield
    except (sqlite3.Error, OSError, TypeError, ValueError) as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            advice = "Another engine has it open: give every engine a memory_path of its own"
        elif isinstance(error, sqlite3.ProgrammingError):
            advice = "Open it again"
        elif isinstance(error, sqlite3.OperationalError | OSError):
            advice = "Check the space on the disk, and the rights to the file and its folder"
        else:
            advice = "Give another memory_path, or move the file away and a new one is made"
        raise MemoryFileError(f"Could not {doing} the memory file {path}: {error}. {advice}") from error
