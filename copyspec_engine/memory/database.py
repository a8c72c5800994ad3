"""The memory database: one store of texts for several engines, in PostgreSQL, so that they find each other's.

The schema `copyspec` of a database is a store (store.py); other schemas are left alone. What holds, as for the file:

- **Whole calls.** Every save is one transaction, committed before the call returns: killing an engine at any point
  loses at most the call in flight, and a crash of the server takes back none.
- **Never trusted.** A schema that is not ours, of another version, or made with another tokenizer or template is
  refused and left as it is. Every segment carries the checksum that it has in a file, over its owner too.
- **The user's alone.** The schema belongs to the database user who made it; nobody else is granted anything.
- **Deleted is gone.** Every owner has a table of its own, which `delete` drops, and with it the server's files of it,
  where deleting rows would leave their bytes in pages for as long as nothing else is written there. The server's
  write-ahead log, its replicas and its backups keep what they hold for as long as they are set to, and so may pages
  of a conversation that stays what was dropped of it for want of room.

**One writer.** Whatever reads or changes an owner holds an advisory lock of its own, for one transaction: the server
frees it with the transaction, however that ends, and nothing is left to lose or to hand over. A call writes once, at
its end, so no engine needs to hold a conversation between calls, and one that moves to another engine is found there
without any goodbye. What an engine changes, it changes to a revision; where another was quicker nothing is done, and it
loads anew. Revisions rise in the order in which transactions end: the one row of `state` gives them, as the last thing
that a transaction does.

**A slow or lost database** holds up nobody for long: a statement may take 0.8 s, a call 1 s in all. One that takes
longer, a lost connection, or a server that may only be read (a replica, after a failover) makes the database count as
unreachable. Calls then fail at once, while a thread connects again: after 0.1 s first, and in pauses that double up to
10 s until a call has gone well.

A forked child cannot use what its parent has open, and leaves it alone.

Not covered: putting an older copy of the database in place of a newer one while engines run, encryption at rest.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from copyspec_engine.memory.store import (
    ChangedElsewhereError,
    ForgottenElsewhereError,
    News,
    SavedOwner,
    SavedSegment,
    SavedTexts,
    StoreUnreachableError,
    decoded_name,
    encoded_name,
    encoded_segment,
    read_segment,
)
from copyspec_engine.values.errors import MemoryFileError, missing_extra
from copyspec_engine.values.tokens import Fingerprint

if TYPE_CHECKING:
    import psycopg
    from psycopg.sql import Composed

    _Connection = psycopg.Connection[tuple[Any, ...]]

__all__ = ["MemoryDatabase"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_CALL_S, _CONNECT_S = 1.0, 2
_LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
"""The server's own, shorter than a call's, so that it ends first; an engine that hangs holds up nobody else."""
_SETTINGS = {
    "default_transaction_isolation": "read committed",  # who has waited for a lock sees what was done meanwhile
    "synchronous_commit": "on",  # a revision that others have seen must not come twice
    "client_min_messages": "warning",
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_DAMAGED = "its schema copyspec is damaged, a row is missing"
_MAKING = 0x436F7079
"""The advisory lock of whoever makes the tables."""
_SCHEMA = """
CREATE TABLE copyspec.state (
    format integer NOT NULL, tokenizer text NOT NULL, template text NOT NULL,
    revision bigint NOT NULL, last_deletion bigint NOT NULL
);
CREATE TABLE copyspec.owners (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key bytea NOT NULL UNIQUE, name bytea NOT NULL, began bigint NOT NULL, revision bigint NOT NULL
);
"""
_SEGMENTS = """
CREATE TABLE {} (number bigint PRIMARY KEY, kind bigint NOT NULL, checksum bytea NOT NULL, tokens bytea NOT NULL)
"""
_NEXT = "WITH turn AS (UPDATE copyspec.state SET revision = revision + 1 RETURNING revision)"
"""The next revision; no other gets one up to the end of the transaction."""
_FIND = """
SELECT owners.id, began, owners.revision, last_deletion, to_regclass('copyspec.segments_' || owners.id) IS NOT NULL
FROM copyspec.state LEFT JOIN copyspec.owners ON key = %s
"""
_BEGIN = f"""
{_NEXT} INSERT INTO copyspec.owners (key, name, began, revision) SELECT %s, %s, revision, revision FROM turn
ON CONFLICT (key) DO NOTHING
"""
_CHANGE = f"""
{_NEXT} UPDATE copyspec.owners SET revision = turn.revision FROM turn WHERE key = %s RETURNING owners.revision
"""
_NEWS = """
SELECT state.revision, state.last_deletion > %(since)s, name, began, owners.revision
FROM copyspec.state LEFT JOIN copyspec.owners ON owners.revision > %(since)s OR state.last_deletion > %(since)s
ORDER BY owners.revision
"""


class MemoryDatabase:
    """An open memory database, a `TextStore`; made by `open`."""

    def __init__(self, url: str, fingerprint: Fingerprint, line: _Line) -> None:
        self._url, self._fingerprint = url, fingerprint
        self._line: _Line | None = line
        self._lock, self._closing, self._process = threading.Lock(), threading.Event(), os.getpid()
        self._error: str | None = None
        self._num_failures = 0

    @classmethod
    def open(cls, url: str, fingerprint: Fingerprint) -> MemoryDatabase:
        """Connect, within 2 s for each of the URL's hosts and 2 s more, and make the tables if there are none.

        Raises:
            MemoryFileError: it cannot be reached or used.
            CopySpecError: psycopg is not installed.
        """
        return cls(url, fingerprint, _connect(url, fingerprint))

    @property
    def error(self) -> str | None:
        """See `TextStore.error`."""
        return self._error

    def news(self, since: int) -> News:
        """See `TextStore.news`. One statement."""
        with self._using("read") as connection:
            rows = connection.execute(_NEWS, {"since": since}, binary=True).fetchall()
            if not rows:
                raise ValueError(_DAMAGED)
        owners = []
        for _, _, encoded, began, revision in rows:
            name = decoded_name(encoded)
            if name is not None:  # as in the one row of no owners
                owners.append(SavedOwner(name, began, revision))
        return News(owners, rows[0][1], rows[0][0])

    def load(self, owner: str, vocab_size: int | None = None, revision: int | None = None) -> SavedTexts:
        """See `TextStore.load`. An owner that is new is there from now on, so that others can delete it."""
        segments, refused = [], []
        with self._transaction("load from") as connection:
            found = _locked(connection, owner, shared=True)
            if revision is not None:
                found.refuse_forgotten(revision)
            if found.number is None:
                found = _begin(connection, owner)
            for number, kind, tokens, checksum in _rows(connection, found):
                segment = read_segment(owner, (number, kind, tokens), checksum, vocab_size)
                if isinstance(segment, SavedSegment):
                    segments.append(segment)
                else:
                    refused.append(number)
                    logger.warning("Saved text %s of %r is left out of %s: %s", number, owner, self._url, segment)
            if refused:
                _remove(connection, found, refused)
        return SavedTexts(segments, found.revision)

    def save(self, owner: str, added: Sequence[SavedSegment], removed: Sequence[int] = (), revision: int = 0) -> int:
        """See `TextStore.save`."""
        rows = [encoded_segment(owner, segment) for segment in added]
        with self._transaction("save to") as connection:
            found = _locked(connection, owner)
            found.refuse_forgotten(revision)
            if found.revision > revision:
                raise ChangedElsewhereError
            if found.number is None:
                found = _begin(connection, owner)
            if removed and found.has_table:
                _remove(connection, found, removed)
            if rows:
                if not found.has_table:
                    connection.execute(found.sql(_SEGMENTS))
                insert = found.sql("INSERT INTO {} (number, kind, tokens, checksum) VALUES (%s, %s, %s, %s)")
                connection.cursor().executemany(insert, rows)
            (new,) = _one(connection, _CHANGE, _key(owner))
        return int(new)

    def delete(self, owner: str) -> None:
        """See `TextStore.delete`.

        Copies that other engines hold can be saved no more, not even of an owner that is not here yet.
        """
        with self._transaction("delete from") as connection:
            found = _locked(connection, owner)
            if found.number is not None:
                connection.execute(found.sql("DROP TABLE IF EXISTS {}"))
                connection.execute("DELETE FROM copyspec.owners WHERE id = %s", (found.number,))
            connection.execute("UPDATE copyspec.state SET revision = revision + 1, last_deletion = revision + 1")

    def owners(self) -> list[str]:
        """See `TextStore.owners`."""
        with self._using("read") as connection:
            rows = connection.execute("SELECT name FROM copyspec.owners ORDER BY revision", binary=True).fetchall()
        names = [decoded_name(encoded) for (encoded,) in rows]
        if None in names:
            logger.warning("Conversations in %s are left out, their names cannot be read", self._url)
        return [name for name in names if name is not None]

    def close(self) -> None:
        """See `TextStore.close`."""
        self._closing.set()
        if os.getpid() == self._process:
            with self._lock:
                self._hang_up()

    # ---- the connection ----------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[_Connection]:
        """What runs inside happens whole or not at all."""
        with self._using(doing) as connection, connection.transaction():
            yield connection

    @contextmanager
    def _using(self, doing: str) -> Iterator[_Connection]:
        """The connection, for one call of at most `_CALL_S`; errors as ours, which say what to do."""
        from psycopg import Error

        if os.getpid() != self._process or self._closing.is_set():
            raise MemoryFileError(f"Could not {doing} the memory database {self._url}: it is closed. Open it again")
        with self._lock:
            if self._line is None:
                raise StoreUnreachableError(str(self._error))
            try:
                with self._line.cut_after(_CALL_S):
                    yield self._line.connection
            except (Error, ValueError) as error:
                if not _is_away(error):
                    raise _named(doing, self._url, error) from error
                lost = StoreUnreachableError(
                    f"Could not {doing} the memory database {self._url}: {_line_of(error)}. It is tried again"
                )
                self._lose(str(lost))
                raise lost from error
            self._num_failures = 0

    def _lose(self, error: str) -> None:
        """The database is unreachable, until a thread has found it again."""
        self._hang_up()
        self._error = error
        if not self._closing.is_set():
            threading.Thread(target=self._find_again, name="copyspec-memory", daemon=True).start()

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _find_again(self) -> None:
        while True:
            pause_s = min(_FIRST_PAUSE_S * 2**self._num_failures, _LONGEST_PAUSE_S)
            self._num_failures = min(self._num_failures + 1, 10)
            if self._closing.wait(pause_s):
                return
            try:
                line = _connect(self._url, self._fingerprint)
            except MemoryFileError as error:
                self._error = str(error)
                continue
            with self._lock:
                if self._closing.is_set():
                    line.close()
                    return
                self._line, self._error = line, None
            logger.warning("The memory database %s answers again", self._url)
            return


class _Line:
    """A connection that another thread can cut: psycopg waits for an answer without an end."""

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self._socket = socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        """The same socket under a number of its own, which nobody else can have got meanwhile."""

    @contextmanager
    def cut_after(self, seconds: float) -> Iterator[None]:
        """Whatever waits for an answer then hears that the connection is lost."""
        timer = threading.Timer(seconds, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self) -> None:
        with suppress(OSError):  # it was closed in this very moment
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        self.connection.close()


def _connect(url: str, fingerprint: Fingerprint) -> _Line:
    """A connection to a store that is there and ours."""
    try:
        import psycopg
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        raise missing_extra("psycopg", "scale") from None
    try:
        connection = psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_S,
            target_session_attrs="read-write",  # of several hosts not one that is a replica now
            fallback_application_name="copyspec",
        )
        line = _Line(connection)
        try:
            with line.cut_after(_CONNECT_S):
                limits = dict.fromkeys(_LIMITS, f"{800 * _CALL_S:.0f}ms")
                for name, value in (limits | _SETTINGS).items():
                    line.connection.execute("SELECT set_config(%s, %s, false)", (name, value))
                _prepare(line.connection, fingerprint)
        except BaseException:
            line.close()
            raise
    except (psycopg.Error, ValueError) as error:
        if not _is_away(error):
            raise _named("open", url, error) from error
        raise StoreUnreachableError(
            f"Could not open the memory database {url}: {_line_of(error)}. Check that the server runs, and that host, "
            "user and database are right; a password belongs into PGPASSWORD or the file ~/.pgpass"
        ) from error
    return line


def _prepare(connection: _Connection, fingerprint: Fingerprint) -> None:
    """Make the tables if there are none, and check whose they are."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MAKING,))
        (schema,) = _one(connection, "SELECT to_regnamespace('copyspec')::oid")
        if schema is None:
            connection.execute("CREATE SCHEMA copyspec")
        if schema is None or not _one(connection, "SELECT count(*) FROM pg_class WHERE relnamespace = %s", schema)[0]:
            connection.execute(_SCHEMA)
            made_with = (_FORMAT, fingerprint.tokenizer, fingerprint.template)
            connection.execute("INSERT INTO copyspec.state VALUES (%s, %s, %s, 0, 0)", made_with)
        columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('copyspec.state') AND attname = %s"
        if not _one(connection, columns, "format")[0]:
            raise ValueError("its schema copyspec is not one of ours but another program's")
        (version,) = _one(connection, "SELECT format FROM copyspec.state")
        if version != _FORMAT:
            raise ValueError(f"it has format {version}, this version of copyspec reads and writes format {_FORMAT}")
        saved = _one(connection, "SELECT tokenizer, template FROM copyspec.state")
        for (name, expected), got in zip(asdict(fingerprint).items(), saved, strict=True):
            if got != expected:
                raise ValueError(f"it was made with {name} {got}, but the model's {name} is {expected}")


# ---- statements ------------------------------------------------------------------------------------------------------


def _one(connection: _Connection, query: str, *params: object) -> tuple[Any, ...]:
    from psycopg.sql import SQL

    found = connection.execute(SQL(query), params).fetchone()
    if found is None:
        raise ValueError(_DAMAGED)
    return found


class _Found(NamedTuple):
    """An owner as it is saved; without a number if it is not."""

    number: int | None
    began: int
    revision: int
    last_deletion: int
    """The revision of the last one of anybody."""
    has_table: bool

    def sql(self, query: str) -> Composed:
        """A statement about its table, which stands in it as {}."""
        from psycopg.sql import SQL, Identifier

        return SQL(query).format(Identifier("copyspec", f"segments_{self.number}"))

    def refuse_forgotten(self, revision: int) -> None:
        """Raise for a copy whose owner was deleted. One that is not there, while nobody was deleted, is only new."""
        if (self.number is None or self.began > revision) and self.last_deletion > revision:
            raise ForgottenElsewhereError


def _locked(connection: _Connection, owner: str, *, shared: bool = False) -> _Found:
    """The owner, whom up to the end of the transaction nobody else changes, or, if it is not shared, reads."""
    lock = "SELECT pg_advisory_xact_lock_shared(%s)" if shared else "SELECT pg_advisory_xact_lock(%s)"
    connection.execute(lock, (int.from_bytes(_key(owner)[:8], "big", signed=True),))
    return _found(connection, owner)


def _found(connection: _Connection, owner: str) -> _Found:
    number, began, revision, last_deletion, has_table = _one(connection, _FIND, _key(owner))
    return _Found(number, began or 0, revision or 0, last_deletion, bool(has_table))


def _begin(connection: _Connection, owner: str) -> _Found:
    """The owner, which is there from now on; another reader may have been quicker."""
    connection.execute(_BEGIN, (_key(owner), encoded_name(owner)))
    return _found(connection, owner)


def _rows(connection: _Connection, found: _Found) -> list[tuple[Any, ...]]:
    """Number, kind, tokens and checksum of its texts."""
    if not found.has_table:
        return []
    query = found.sql("SELECT number, kind, tokens, checksum FROM {} ORDER BY number")
    return connection.execute(query, binary=True).fetchall()


def _remove(connection: _Connection, found: _Found, numbers: Sequence[int]) -> None:
    connection.execute(found.sql("DELETE FROM {} WHERE number = ANY(%s)"), ([*map(int, numbers)],))


def _key(owner: str) -> bytes:
    """What an owner is found by; names may be longer than an index of the server takes."""
    return blake2b(encoded_name(owner), digest_size=16).digest()


def _is_away(error: Exception) -> bool:
    """Whether it is the connection or the server that fails, so that another connection may help."""
    from psycopg import InterfaceError, OperationalError
    from psycopg.errors import ReadOnlySqlTransaction

    return isinstance(error, (OperationalError, InterfaceError, ReadOnlySqlTransaction))


def _line_of(error: Exception) -> str:
    """What an error says, without what the server adds of the values that it was about."""
    from psycopg import Error

    told = error.diag.message_primary if isinstance(error, Error) else None
    return " ".join((told or str(error)).split()).rstrip(".") or type(error).__name__


def _named(doing: str, url: str, error: Exception) -> MemoryFileError:
    advice = "Check the rights of its user, or give another memory_path"
    if isinstance(error, ValueError):
        advice = "Give another memory_path, or drop the schema copyspec and a new one is made"
    return MemoryFileError(f"Could not {doing} the memory database {url}: {_line_of(error)}. {advice}")
