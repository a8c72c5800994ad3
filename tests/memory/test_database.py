"""Engines that share a database remember as one engine with a file does, whatever dies, hangs or is forgotten."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copyspec_engine import ConfigError, CopySpecError, Engine, EngineConfig, MemoryFileError
from copyspec_engine.memory.conversation import SessionStore
from copyspec_engine.memory.file import MemoryFile
from copyspec_engine.memory.store import (
    ChangedElsewhereError,
    ForgottenElsewhereError,
    SavedSegment,
    StoreUnreachableError,
    TextStore,
)
from copyspec_engine.testing import loop_of, scripted_engine
from copyspec_engine.values.tokens import Fingerprint
from tests.conftest import assert_all_slots_free
from tests.memory.test_sessions import FEW, KILLED, TEXT, ask, passes, reply

pytest.importorskip("psycopg", reason='needs psycopg: pip install "copyspec[scale]"')
pytest.importorskip("pwd", reason="needs a POSIX system")

from copyspec_engine.memory.database import MemoryDatabase
from tests.memory.postgres import Server, a_server

FINGERPRINT = Fingerprint(tokenizer="a1b2", template="c3d4")
Texts = list[tuple[int, list[int]]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with a_server() as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    return server.new_database()


@pytest.fixture
def store(url: str) -> Iterator[MemoryDatabase]:
    with closing(MemoryDatabase.open(url, FINGERPRINT)) as store:
        yield store


CALL, CONNECT = (f"copyspec_engine.memory.database.{name}" for name in ("_CALL_S", "_CONNECT_S"))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other things is not taken for a database that hangs."""
    monkeypatch.setattr(CALL, 60.0)
    monkeypatch.setattr(CONNECT, 60)


PATIENT = """
import copyspec_engine.memory.database as database
database._CALL_S = database._CONNECT_S = 60
"""

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(url: str) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(**options: object) -> Engine:
        config = EngineConfig(**{"model": "scripted", "memory_path": url, **options})
        engines.append(scripted_engine(reply, config))
        assert engines[-1].info.memory_error is None
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def segment(number: int, size: int = 10) -> SavedSegment:
    return SavedSegment(number, number % 3, np.arange(size, dtype=np.int32) + np.int32(number * 100_000 + 1))


def contents(store: TextStore) -> dict[str, Texts]:
    """Owner to (kind, tokens), both in their order."""
    return {owner: [(k, t.tolist()) for _, k, t in store.load(owner).segments] for owner in store.owners()}


def saved(engine: Engine) -> dict[str, Texts]:
    store = loop_of(engine).core.text_store
    assert store is not None
    return contents(store)


def of_anybody(texts: dict[str, Texts]) -> dict[str, Texts]:
    """Where there are texts, without for whom pools count: one engine remembers that of a pool that is empty."""
    pools = {name: json.loads(name[5:])[:2] for name in texts if name.startswith("pool:")}
    return {str(pools.get(name, name)): held for name, held in texts.items() if held}


def remembered(engine: Engine, session_id: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(text.kind, text.token_ids) for text in engine.memory(session_id).texts()]


def assert_is_copied_from_an_earlier_answer(engine: Engine) -> None:
    """TEXT, which does not stand in the prompt of this call, from what conversation "a" remembers."""
    output = engine.generate(ask("the numbers please", session_id="a", explain=True))
    assert output.text == TEXT
    copied = [copy for copy in output.copies if copy.source == "earlier_answer"]
    assert sum(copy.stop - copy.start for copy in copied) > len(TEXT) - 2 * FEW
    assert {copy.stored_text for copy in copied} <= {text.number for text in engine.memory("a").texts()}


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- as a file -----------------------------------------------------------------------------------------------------


def test_a_database_keeps_what_a_file_keeps(url: str, tmp_path: Path) -> None:
    """Under names and numbers of all kinds, opened again now and then."""
    rng, names = random.Random(1), ["session:a", "\0\ud800", "", "x" * 10_000, "'; DROP TABLE owners; --"]
    file = MemoryFile.open(tmp_path / "memory", FINGERPRINT)
    database = MemoryDatabase.open(url, FINGERPRINT)
    numbers: dict[str, list[int]] = {}
    for turn in range(120):
        owner = rng.choice(names)
        held = numbers.setdefault(owner, [])
        if rng.random() < 0.1:
            del numbers[owner]
            for store in (file, database):
                store.delete(owner)
        else:
            removed = [number for number in held if rng.random() < 0.3]
            added = [
                segment(number, rng.choice([0, 1, 3000])) for number in range(turn * 3, turn * 3 + rng.randrange(4))
            ]
            numbers[owner] = [number for number in held if number not in removed] + [one.number for one in added]
            for store in (file, database):
                revision = store.load(owner).revision
                store.save(owner, added, [*removed, -7], revision)
        if turn % 30 == 29:
            database.close()
            database = MemoryDatabase.open(url, FINGERPRINT)
        if turn % 10 == 9:
            assert contents(file) == contents(database)
            assert file.owners() == database.owners()
    with pytest.raises(MemoryFileError, match="duplicate key"):
        database.save(owner := names[0], [segment(1), segment(1)], (), database.load(owner).revision)
    with pytest.raises(TypeError, match="int64"):
        database.save("new", [SavedSegment(0, 0, np.array([2**40]))])
    assert contents(file) == contents(database)
    for store in (file, database):
        store.close()
        store.close()


@pytest.mark.parametrize("limits", [{}, {"max_sessions": 3, "max_sessions_per_owner": 2}])
@pytest.mark.parametrize("seed", range(2))
def test_two_engines_with_one_database_remember_what_one_with_a_file_does(
    make_engine: MakeEngine, tmp_path: Path, seed: int, limits: dict[str, int]
) -> None:
    alone = make_engine(memory_path=str(tmp_path / "memory"), **limits)
    others, rng = [make_engine(**limits) for _ in range(2)], random.Random(seed)
    for turn in range(30):
        session_id, owner, pool = (
            rng.choice("stuv"),
            rng.choice([None, "ann", "bob"]),
            rng.choice([None, None, "p", "q"]),
        )
        other, doing = rng.choice(others), rng.random()
        if doing < 0.1:
            assert other.forget(session_id) == alone.forget(session_id)
        elif doing < 0.15:
            assert other.forget_pool("p") == alone.forget_pool("p")
        elif doing < 0.25:
            exported = alone.memory(rng.choice("stuv")).export()
            given = [engine.memory(session_id).load(exported, owner=owner) for engine in (alone, other)]
            assert given[0] == given[1]
        else:
            text = rng.choice([f"say {turn} {turn * turn}", "the numbers please", "hello"])
            named = None if limits and pool else session_id  # a database is not told of sessions that use a pool only
            request = ask(text, session_id=named, owner=owner, memory_pool=pool)
            assert other.generate(request).text == alone.generate(request).text
        assert of_anybody(saved(others[turn % 2])) == of_anybody(saved(alone))
        for engine in others:
            assert remembered(engine, session_id) == remembered(alone, session_id)
            told = [{(info.session_id, info.owner) for info in one.sessions()} for one in (engine, alone)]
            assert told[0] == told[1]
    assert len(saved(alone)) > 3
    for engine in (alone, *others):
        assert_all_slots_free(engine)


# ---- several engines -----------------------------------------------------------------------------------------------


def test_a_conversation_that_moves_is_copied_from_there_and_back(make_engine: MakeEngine) -> None:
    first, second = make_engine(), make_engine()
    second.generate(ask("hello", session_id="a"))
    second.generate(ask("hello", memory_pool="team"))
    assert passes(first, session_id="a") > 100
    assert passes(second, session_id="a") < FEW  # its own copy was older
    assert passes(first, session_id="b", memory_pool="team") > 100
    assert passes(second, session_id="c", memory_pool="team") < FEW
    assert passes(second, session_id="c") > 100
    assert len(remembered(first, "a")) == len(remembered(second, "a")) > 2


def test_two_engines_that_write_at_once_lose_nothing(make_engine: MakeEngine) -> None:
    first, second = make_engine(), make_engine()
    first.generate(ask("hello", session_id="a"))
    with first.stream(ask("say the numbers", session_id="a", drafter="none")) as stream:
        next(stream)
        for turn in range(2):
            second.generate(ask(f"meanwhile {turn}", session_id="a"))
        assert stream.result().text == TEXT
    second.generate(ask("afterwards", session_id="a"))
    text = [bytes(token for token in ids if token < 256) for kind, ids in remembered(first, "a") if kind == "answer"]
    assert sorted(text) == sorted([b"hello", b"meanwhile 0", b"meanwhile 1", TEXT.encode(), b"afterwards"])
    assert remembered(second, "a") == [
        (("prompt", "answer")[kind], tuple(ids)) for kind, ids in saved(first)["session:a"]
    ]


def test_an_engine_that_is_closed_hands_over_all_that_it_has(make_engine: MakeEngine, server: Server, url: str) -> None:
    activity = "pg_stat_activity WHERE application_name = 'copyspec' AND datname = current_database()"
    first = make_engine()
    stream = first.stream(ask("say the numbers", session_id="a", drafter="none"))
    next(stream)
    assert server.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", url) == [(0,)]
    assert stream.result().text == TEXT
    first.close()
    wait_until(lambda: server.sql(f"SELECT count(*) FROM {activity}", url) == [(0,)])
    assert_is_copied_from_an_earlier_answer(make_engine())


def test_stores_that_write_at_once_keep_what_each_has_saved(store: MemoryDatabase, url: str) -> None:
    """Each loads anew and tries again where another was quicker, until it is saved."""

    def write(first: int) -> None:
        with closing(MemoryDatabase.open(url, FINGERPRINT)) as own:
            held: list[SavedSegment] = []
            revision = 0
            for number in range(first, first + 8):
                while True:
                    taken = max((one.number for one in held), default=-1) + 1
                    try:
                        revision = own.save("a", [SavedSegment(taken, number, segment(number).tokens)], (), revision)
                    except ChangedElsewhereError:
                        held, revision = own.load("a", None, revision)
                    else:
                        held.append(SavedSegment(taken, number, segment(number).tokens))
                        break

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.load("a").segments
    assert [one.number for one in found] == [*range(24)]
    assert sorted(one.kind for one in found) == [first + place for first in (0, 100, 200) for place in range(8)]


def test_a_forgotten_conversation_does_not_come_back_from_another_engine(make_engine: MakeEngine) -> None:
    first, second = make_engine(), make_engine()
    for pool in (None, "team"):
        passes(second, session_id="a", memory_pool=pool)
        passes(first, session_id="b", memory_pool=pool)
    second.generate(ask("of c", session_id="c", memory_pool="team"))
    streams = [second.stream(ask("say the numbers", session_id=name, drafter="none")) for name in ("a", "new")]
    streams.append(second.stream(ask("say the numbers", session_id="a", memory_pool="team", drafter="none")))
    for stream in streams:
        next(stream)
    for name in ("a", "b", "new"):  # of "new" nothing is saved but that there is one
        assert first.forget(name)
    assert [stream.result().text for stream in streams] == [TEXT] * 3
    assert set(saved(second)) == {"session:c", 'pool:["team", "c"]'}
    assert passes(second, session_id="c", memory_pool="team", drafter="none") > 100
    second.forget_pool("team")
    for name in ("a", "new"):
        assert remembered(second, name) == []
        assert second.generate(ask("the numbers please", session_id=name)).usage.cached_tokens == 0
    assert_all_slots_free(second)


def test_a_copy_of_what_was_deleted_is_refused_though_it_was_begun_again(store: MemoryDatabase) -> None:
    revision = store.save("a", [segment(1)], (), store.load("a").revision)
    unknown = store.news(-1).revision  # as of one whose database could not be reached when it began
    assert store.save("a", [segment(2)], (), revision) > revision
    with pytest.raises(ChangedElsewhereError):
        store.save("a", [segment(3)], (), revision)
    store.save("new", [segment(1)], (), unknown)
    store.delete("a")
    with pytest.raises(ForgottenElsewhereError):
        store.load("a", None, revision)
    again = store.load("a").revision
    for owner, copy in (("a", revision), ("newer", unknown)):
        with pytest.raises(ForgottenElsewhereError):
            store.save(owner, [segment(3)], (), copy)
    assert store.save("a", [segment(4)], (), again) > again
    assert contents(store) == {"new": [(1, segment(1).tokens.tolist())], "a": [(1, segment(4).tokens.tolist())]}


def test_no_byte_of_a_deleted_text_stays_in_the_servers_tables(server: Server, store: MemoryDatabase, url: str) -> None:
    """Beside it the server's log keeps what it was told, as long as it is set to."""

    def is_on_disk(tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> bool:
        server.sql("CHECKPOINT", url)
        return any(
            tokens.tobytes() in file.read_bytes() for file in (server.data / "base").rglob("*") if file.is_file()
        )

    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 2**31, 400, dtype=np.int32) for _ in range(4)]
    for owner in ("session:a", "session:b"):
        store.save(owner, [SavedSegment(i, 0, text + (owner[-1] == "b")) for i, text in enumerate(texts)], (), 0)
    store.save("session:a", [], [0], store.load("session:a").revision)
    assert all(is_on_disk(text) for text in texts)
    store.delete("session:a")
    assert not any(is_on_disk(text) for text in texts)
    assert all(is_on_disk(text + 1) for text in texts)


# ---- what dies -----------------------------------------------------------------------------------------------------


def test_a_kill_in_the_middle_of_a_call_loses_that_call_alone(make_engine: MakeEngine, url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PATIENT + KILLED, url],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "saved\n"), done.stderr
    engine = make_engine()
    assert b"yyyy" not in b"".join(bytes(t % 256 for t in ids) for _, ids in saved(engine)["session:a"])
    assert_is_copied_from_an_earlier_answer(engine)
    assert passes(engine, session_id="b") > 100


KILLED_WRITER = """
import itertools, sys
from copyspec_engine.memory.database import MemoryDatabase
import numpy as np
from copyspec_engine.memory.store import SavedSegment
from copyspec_engine.values.tokens import Fingerprint

FINGERPRINT = Fingerprint(tokenizer="a1b2", template="c3d4")

def segment(number, size=10):
    return SavedSegment(number, 0, np.arange(size, dtype=np.int32))

store = MemoryDatabase.open(sys.argv[1], FINGERPRINT)
revision = store.load("a").revision
for number in itertools.count(int(sys.argv[2]), 2):
    revision = store.save("a", [segment(number, 20_000), segment(number + 1)], [number - 2], revision)
    print(number, flush=True)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_it_whole_or_undone(store: MemoryDatabase, url: str) -> None:
    first, command = 0, [sys.executable, "-W", "ignore", "-c", PATIENT + KILLED_WRITER, url]
    for turn in range(3):
        with subprocess.Popen(
            [*command, str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process:
            assert process.stdout is not None
            for _ in range(3 + turn):
                done = int(process.stdout.readline())
            process.kill()
            done = max([done, *map(int, process.stdout.read().split())])
        found = [one.number for one in store.load("a").segments]
        first = found[-1] + 1
        assert first - done in (2, 4)  # nothing that was done is lost, and one more may be done
        assert found == [*range(1, first - 2, 2), first - 2, first - 1]


def test_engines_go_on_while_the_server_is_away_and_save_later(
    make_engine: MakeEngine, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_engine(), make_engine()
    first.generate(ask("hello", session_id="a"))
    second.generate(ask("hello", session_id="a"))
    server.stop()
    try:
        assert passes(first, session_id="a") > 100
        assert passes(first, session_id="a") < FEW
        assert passes(first, session_id="new") > 100
        assert "It is tried again" in caplog.text
        wait_until(lambda: "Check that the server runs" in str(first.info.memory_error))
        with pytest.raises(MemoryFileError, match="memory database"):
            second.forget("a")
    finally:
        server.start()
    wait_until(lambda: first.info.memory_error is None is second.info.memory_error)
    first.generate(ask("another", session_id="b"))  # the next call of any conversation saves the others
    for name in ("a", "new"):
        assert passes(second, session_id=name) < FEW
    assert {record.levelname for record in caplog.records if record.name.startswith("copyspec")} == {"WARNING"}
    assert second.forget("a")
    assert not first.forget("a")


def test_what_could_not_be_saved_is_saved_at_the_end(make_engine: MakeEngine, server: Server) -> None:
    engine = make_engine()
    server.stop()
    try:
        passes(engine, session_id="a")
    finally:
        server.start()
    wait_until(lambda: engine.info.memory_error is None)
    engine.close()
    assert passes(make_engine(), session_id="a") < FEW


def test_a_server_that_hangs_holds_up_a_call_once(
    make_engine: MakeEngine,
    server: Server,
    url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    engine.generate(ask("hello", session_id="a"))
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'copyspec' AND datname = current_database()"
    [(pid,)] = server.sql(query, url)
    os.kill(pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as hurried:
            hurried.setattr(CALL, 0.5)
            assert passes(engine, session_id="a") > 100
        assert "Could not read the memory database" in caplog.text
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: engine.info.memory_error is None)
    engine.generate(ask("hello", session_id="b"))
    assert passes(make_engine(), session_id="a") < FEW


def test_a_server_that_hangs_while_it_is_called_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    stopped: list[int] = []
    connect = psycopg.connect

    def stop(*arguments: Any, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        connection = connect(*arguments, **options)
        stopped.append(connection.info.backend_pid)
        os.kill(stopped[-1], signal.SIGSTOP)
        return connection

    monkeypatch.setattr(psycopg, "connect", stop)
    monkeypatch.setattr(CONNECT, 2)
    try:
        with pytest.raises(StoreUnreachableError, match="Check that the server runs"):
            MemoryDatabase.open(url, FINGERPRINT)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_a_server_that_may_only_be_read_is_not_used_until_it_takes_texts(
    server: Server, store: MemoryDatabase, url: str
) -> None:
    revision = store.load("a").revision

    def save_until_told() -> bool:
        nonlocal revision
        revision = store.save("a", [], (), revision)
        return False

    server.sql("ALTER SYSTEM SET default_transaction_read_only = on", url)  # as a replica has it
    try:
        server.sql("SELECT pg_reload_conf()", url)
        with pytest.raises(StoreUnreachableError, match="read-only"):
            wait_until(save_until_told)
        wait_until(lambda: "session is read-only" in str(store.error))
    finally:
        server.sql("ALTER SYSTEM RESET default_transaction_read_only", url)
        server.sql("SELECT pg_reload_conf()", url)
    wait_until(lambda: store.error is None)
    store.save("a", [segment(1)], (), revision)


def test_a_schema_that_is_damaged_while_engines_run_fails_no_call(
    make_engine: MakeEngine, server: Server, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    server.sql("DELETE FROM copyspec.state", url)
    assert passes(engine, session_id="a") > 100
    assert passes(engine, session_id="a") < FEW
    assert "its schema copyspec is damaged, a row is missing" in caplog.text
    with pytest.raises(MemoryFileError, match="damaged"):
        engine.forget("a")


def test_a_writer_that_hangs_is_waited_for_in_vain(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    with monkeypatch.context() as hurried:
        hurried.setattr(CALL, 0.5)
        store = MemoryDatabase.open(url, FINGERPRINT)
    revision = store.load("a").revision
    with closing(store), psycopg.connect(url) as other:
        other.execute("UPDATE copyspec.state SET revision = revision + 1")
        with pytest.raises(StoreUnreachableError, match=r"timeout.* It is tried again"):
            store.save("a", [segment(1)], (), revision)
        other.rollback()
        wait_until(lambda: store.error is None)
        store.save("a", [segment(1)], (), revision)


def test_an_answer_of_the_server_that_was_lost_saves_nothing_twice(
    store: MemoryDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = SessionStore(EngineConfig(), lambda _: None, store)
    memory = sessions.open("a").memory
    memory.remember([1, 2, 3, 4, 5], 3)
    save = MemoryDatabase.save

    def lose(*arguments: object) -> int:
        save(*arguments)  # type: ignore[arg-type]
        raise StoreUnreachableError("lost")

    monkeypatch.setattr(MemoryDatabase, "save", lose)
    sessions.save(memory)
    monkeypatch.undo()
    before = contents(store)
    assert len(before["session:a"]) == 2
    memory.remember([1, 2, 3, 4, 5, 6, 7, 8], 7)
    sessions.save(memory)
    assert contents(store)["session:a"][:2] == before["session:a"]
    assert [(text.kind, memory.index.tokens_of(text).tolist()) for text in memory.texts] == contents(store)["session:a"]
    assert len(memory.texts) == len({text.number for text in memory.texts}) > 2


FORK = """
import gc, os, sys
from copyspec_engine.memory.database import MemoryDatabase
from copyspec_engine.values.errors import MemoryFileError
import numpy as np
from copyspec_engine.memory.store import SavedSegment
from copyspec_engine.values.tokens import Fingerprint

FINGERPRINT = Fingerprint(tokenizer="a1b2", template="c3d4")

def segment(number, size=10):
    return SavedSegment(number, 0, np.arange(size, dtype=np.int32))

store = MemoryDatabase.open(sys.argv[1], FINGERPRINT)
revision = store.save("a", [segment(0)], (), store.load("a").revision)
child = os.fork()
if not child:
    try:
        store.save("a", [segment(9)], (), revision)
        os._exit(3)
    except MemoryFileError:
        store.close()
    del store
    gc.collect()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
store.save("a", [segment(1)], (), revision)
store.close()
"""


def test_a_forked_child_cannot_harm_the_connection_of_its_parent(store: MemoryDatabase, url: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PATIENT + FORK, url], check=True, env=environment)
    assert [one.number for one in store.load("a").segments] == [0, 1]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_texts_that_are_not_what_was_saved_are_left_out(
    server: Server, store: MemoryDatabase, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for owner in ("a", "b"):
        store.save(owner, [segment(number) for number in range(3)], (), store.load(owner).revision)
    first, second = (f"copyspec.segments_{number}" for (number,) in server.sql("SELECT id FROM copyspec.owners", url))
    server.sql(f"UPDATE {first} SET tokens = set_byte(tokens, 3, 1) WHERE number = 1", url)
    server.sql(f"DELETE FROM {second} WHERE number < 2", url)
    server.sql(f"INSERT INTO {second} SELECT * FROM {first} WHERE number = 0", url)  # another's
    assert [one.number for one in store.load("a").segments] == [0, 2]
    assert [one.number for one in store.load("b").segments] == [2]
    assert caplog.text.count("it is not what was saved") == 2
    assert [one.number for one in store.load("a", vocab_size=50).segments] == [0]
    server.sql(f"DROP TABLE {first}", url)
    assert store.load("a").segments == []
    store.save("a", [segment(5)], (), store.load("a").revision)
    server.sql(f"ALTER TABLE {second} DROP COLUMN checksum", url)
    with pytest.raises(MemoryFileError, match=r"Could not load from the memory database .* column .*checksum"):
        store.load("b")
    with closing(MemoryDatabase.open(url, FINGERPRINT)) as other:
        sessions = SessionStore(EngineConfig(), lambda _: None, other)
        assert sessions.open("b").memory.texts == []
        other.delete("b")
        assert other.owners() == ["a", "session:b"]


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        (
            "UPDATE copyspec.state SET format = 2",
            "it has format 2, .* reads and writes format 1. Give another memory_path",
        ),
        ("UPDATE copyspec.state SET tokenizer = 'x'", "made with tokenizer x, but the model's tokenizer is a1b2"),
        ("DROP TABLE copyspec.state", "its schema copyspec is not one of ours but another program's"),
        ("DELETE FROM copyspec.state", "its schema copyspec is damaged"),
    ],
)
def test_a_schema_that_is_not_ours_is_refused_and_left_alone(
    server: Server, url: str, statement: str, match: str
) -> None:
    MemoryDatabase.open(url, FINGERPRINT).close()
    server.sql("CREATE TABLE theirs (x int)", url)
    server.sql(statement, url)
    tables = "SELECT relname, relfilenode FROM pg_class WHERE relnamespace = 'copyspec'::regnamespace ORDER BY 1"
    before = server.sql(tables, url)
    with pytest.raises(MemoryFileError, match=match):
        MemoryDatabase.open(url, FINGERPRINT)
    assert server.sql(tables, url) == before


def test_an_engine_without_its_database_goes_on_and_says_why(server: Server, url: str) -> None:
    for wrong in (
        url.replace("copyspec@", "nobody@"),
        "postgresql://u@/d?host=/nowhere",
        "postgresql://u@/d?nonsense=1",
    ):
        with closing(scripted_engine(reply, EngineConfig(model="scripted", memory_path=wrong))) as engine:
            assert engine.info.memory_path is None
            assert f"Could not open the memory database {wrong}: " in str(engine.info.memory_error)
            assert passes(engine, session_id="a") > 100
            assert passes(engine, session_id="a") < FEW
            assert engine.forget("a")


def test_engines_that_start_together_make_the_tables_once(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    with psycopg.connect(url) as other, monkeypatch.context() as hurried:
        hurried.setattr(CALL, 0.5)
        other.execute("SELECT pg_advisory_xact_lock(%s)", (0x436F7079,))
        with pytest.raises(MemoryFileError, match="timeout"):
            MemoryDatabase.open(url, FINGERPRINT)
        other.rollback()
        other.execute("CREATE SCHEMA copyspec")  # as a database's keeper may do for its user
        other.commit()
    MemoryDatabase.open(url, FINGERPRINT).close()
    server.sql("CREATE ROLE other LOGIN", url)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        server.sql("TABLE copyspec.owners", url.replace("copyspec@", "other@"))


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("postgresql://me:secret@host/db", "PGPASSWORD, or into the file ~/.pgpass"),
        ("postgres://me@host/db?password=secret", "PGPASSWORD, or into the file ~/.pgpass"),
        ("redis://secret@host", r"Got redis://... but expected a file, or postgresql://user@host/database"),
        ("postgresql://me:se#secret@host/db", "a URL with a password"),
        ("postgresql://me:se/secret@host/db", "a URL with a password"),
        ("postgresql://me:se?secret@host/db", "a URL with a password"),
        ("postgresql://me@host/db?x=1#&password=secret", "a URL with a password"),
        ("postgresql://me@host/db?sslpassword=secret", "a URL with a password"),
    ],
)
def test_a_url_that_cannot_work_or_would_show_a_password_is_refused(path: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        EngineConfig(memory_path=path)
    assert caught.value.param == "memory_path"
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_without_psycopg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(CopySpecError, match=r'pip install "copyspec\[scale\]"'):
        scripted_engine(reply, EngineConfig(model="scripted", memory_path="postgresql://u@/d"))
