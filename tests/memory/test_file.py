"""What was saved comes back whole or not at all, and never from a file that cannot be trusted.

Run as a script, this file is the other process of its tests: `python test_file.py TASK PATH [NUMBER]`.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine.memory.file import MemoryFile
from copyspec_engine.memory.store import SavedSegment
from copyspec_engine.values.errors import MemoryFileError
from copyspec_engine.values.tokens import Fingerprint

FINGERPRINT = Fingerprint(tokenizer="a1b2", template="c3d4")
Contents = dict[str, dict[int, tuple[int, list[int]]]]
"""Owner to number to (kind, tokens)."""
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs fork, signals and file modes of POSIX")


def reopened(path: Path) -> MemoryFile:
    return MemoryFile.open(path, FINGERPRINT)


def segment(number: int, size: int, kind: int = 0) -> SavedSegment:
    """A text whose tokens no other number has."""
    return SavedSegment(number, kind, np.arange(size, dtype=np.int32) + np.int32(number * 100_000 + 1))


def contents(file: MemoryFile) -> Contents:
    return {owner: {n: (k, t.tolist()) for n, k, t in file.load(owner).segments} for owner in file.owners()}


def expected(segments: list[SavedSegment]) -> dict[int, tuple[int, list[int]]]:
    return {number: (kind, tokens.tolist()) for number, kind, tokens in segments}


def other_process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", __file__, *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def answer_of_process(*arguments: object) -> str:
    """What another process prints; it must end well."""
    with other_process(*arguments) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out.strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@pytest.fixture
def file(path: Path) -> Iterator[MemoryFile]:
    with closing(reopened(path)) as file:
        yield file


# --- what comes back ---


def test_what_was_saved_comes_back_in_the_order_of_the_stream(file: MemoryFile, path: Path) -> None:
    file.save("session:a", [segment(7, 5, kind=3), segment(2, 0), segment(4, 1000)])
    file.save("pool:team", [segment(1, 3)])
    file.close()
    with closing(reopened(path)) as again:
        loaded = again.load("session:a").segments
        assert [s.number for s in loaded] == [2, 4, 7]
        assert [s.kind for s in loaded] == [0, 0, 3]
        assert all(s.tokens.dtype == np.int32 for s in loaded)
        assert expected(loaded) == expected([segment(2, 0), segment(4, 1000), segment(7, 5, kind=3)])
        assert expected(again.load("pool:team").segments) == expected([segment(1, 3)])
        assert again.load("session:unknown").segments == []
        assert again.owners() == ["session:a", "pool:team"]


def test_a_save_may_take_out_and_put_in_the_same_number(file: MemoryFile) -> None:
    file.save("a", [segment(1, 10), segment(2, 10)])
    file.save("a", [SavedSegment(1, 9, np.array([5], dtype=np.int32))], removed=[1, 2, 77])
    assert contents(file) == {"a": {1: (9, [5])}}


def test_an_owner_may_have_no_text(file: MemoryFile) -> None:
    file.save("empty", [])
    assert file.owners() == ["empty"]
    assert file.load("empty").segments == []


def test_extreme_tokens_and_numbers_survive(file: MemoryFile) -> None:
    limits = np.array([np.iinfo(np.int32).min, -1, 0, np.iinfo(np.int32).max], dtype=np.int32)
    file.save("a", [SavedSegment(-(2**62), -5, limits), SavedSegment(2**62, 2**40, limits[::-2])])
    assert contents(file)["a"] == {-(2**62): (-5, limits.tolist()), 2**62: (2**40, limits[::-2].tolist())}


def test_numpy_integers_are_numbers_too(file: MemoryFile) -> None:
    file.save("a", [SavedSegment(np.int64(3), np.int8(1), np.array([4], dtype=np.uint16))])  # type: ignore[arg-type]
    assert contents(file) == {"a": {3: (1, [4])}}
    file.save("a", [], removed=[np.int64(3)])  # type: ignore[list-item]
    assert contents(file) == {"a": {}}


def test_tokens_that_may_not_fit_are_refused(file: MemoryFile) -> None:
    with pytest.raises(TypeError, match="int64"):
        file.save("a", [SavedSegment(0, 0, np.array([2**40]))])
    assert file.owners() == []


def test_a_number_is_saved_once(file: MemoryFile) -> None:
    file.save("a", [segment(1, 10)])
    with pytest.raises(MemoryFileError, match="UNIQUE"):
        file.save("a", [segment(2, 10), segment(1, 3)], removed=[])
    assert contents(file) == {"a": expected([segment(1, 10)])}


def test_owners_are_listed_by_their_last_save(file: MemoryFile, path: Path) -> None:
    for owner in ("a", "b", "c", "a"):
        file.save(owner, [])
    file.load("b")
    file.close()
    with closing(reopened(path)) as again:
        assert again.owners() == ["b", "c", "a"]
        again.save("b", [])
        again.delete("c")
        assert again.owners() == ["a", "b"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=[])), unique=True, max_size=6))
def test_any_text_is_a_name(names: list[str]) -> None:
    names += [
        "",
        "\0",
        "a\0b",
        "a",
        "\ud800",
        "é",
        "e\N{COMBINING ACUTE ACCENT}",
        "'; DROP TABLE owners; --",
        "x" * 10_000,
    ]
    names = list(dict.fromkeys(names))
    with tempfile.TemporaryDirectory() as folder, closing(reopened(Path(folder) / "m")) as file:
        for number, name in enumerate(names):
            file.save(name, [segment(number, 3)])
        assert contents(file) == {name: expected([segment(n, 3)]) for n, name in enumerate(names)}


@pytest.mark.parametrize("name", ["a b.db", "100%?x=1#y.db", "ünï-記憶.db", "-wal", "'.db"])
def test_any_file_name_works(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for number in range(2):
        with closing(MemoryFile.open(str(path), FINGERPRINT)) as file:
            file.save("a", [segment(number, 3)])
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with closing(reopened(path)) as file:
        assert contents(file) == {"a": expected([segment(0, 3), segment(1, 3)])}


def test_a_million_tokens_and_quick_small_calls(file: MemoryFile, path: Path) -> None:
    rng = np.random.default_rng(0)
    large = rng.integers(0, 2**31, 1_000_000, dtype=np.int32)
    file.save("large", [SavedSegment(0, 0, large)])
    small = rng.integers(0, 2**31, (50, 4096), dtype=np.int32)
    seconds = []
    for number, tokens in enumerate(small):
        start = time.perf_counter()
        file.save("small", [SavedSegment(number, 0, tokens)])
        seconds.append(time.perf_counter() - start)
    file.close()
    with closing(reopened(path)) as again:
        assert np.array_equal(again.load("large").segments[0].tokens, large)
        assert np.array_equal(np.stack([s.tokens for s in again.load("small").segments]), small)
    assert sorted(seconds)[25] < 0.02  # 0.2 ms on an idle machine; waiting for the disk takes longer than the bound


# --- deleted is gone ---


def test_no_byte_of_a_deleted_text_stays_on_disk(path: Path) -> None:
    rng = random.Random(5)
    numbers = itertools.count()
    live: dict[int, list[int]] = {}
    deleted = []
    # Only whether a mark is in the raw bytes counts here; reading them drops the lock, which nobody else wants.
    with closing(reopened(path)) as file:
        for _ in range(300):
            if live and rng.random() < 0.2:
                owner = rng.choice(list(live))
                assert _mark(owner).tobytes() in _bytes_on_disk(path) or not live[owner]
                file.delete(f"session:{owner}")
                deleted.append(owner)
                del live[owner]
                assert _mark(owner).tobytes() not in _bytes_on_disk(path)
                continue
            owner = rng.choice(list(live)) if live and rng.random() < 0.8 else next(numbers)
            held = live.setdefault(owner, [])
            removed = rng.sample(held, rng.randint(0, len(held))) if rng.random() < 0.4 else []
            added = [next(numbers) for _ in range(rng.randint(0, 6))]
            sizes = [1, 2, 5, 20, 60, 200, 500, 2000]
            texts = [SavedSegment(number, 0, np.tile(_mark(owner), rng.choice(sizes))) for number in added]
            file.save(f"session:{owner}", texts, removed)
            live[owner] = [number for number in held if number not in removed] + added
    assert len(deleted) > 30
    on_disk = _bytes_on_disk(path)
    assert not any(_mark(owner).tobytes() in on_disk for owner in deleted)


def _mark(owner: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array([owner + 70_000, owner * 7 + 1, 987_654_321], dtype=np.int32)


def _bytes_on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_deleting_nobody_is_no_error(file: MemoryFile) -> None:
    file.delete("nobody")
    assert file.owners() == []


def test_a_deleted_owner_may_come_back(file: MemoryFile) -> None:
    file.save("a", [segment(1, 10)])
    file.delete("a")
    assert file.load("a").segments == []
    file.save("a", [segment(2, 10)])
    assert contents(file) == {"a": expected([segment(2, 10)])}


def test_a_delete_that_was_cut_short_is_finished_by_the_next_open(path: Path, tmp_path: Path) -> None:
    with closing(reopened(path)) as file:
        file.save("a", [SavedSegment(0, 0, np.tile(_mark(1), 1000))])
        sql(file, "PRAGMA wal_checkpoint")
        sql(file, "DROP TABLE segments_1")  # the first half of delete
        sql(file, "DELETE FROM owners")
        crashed = _copy(path, tmp_path / "crashed")
    assert _mark(1).tobytes() in _bytes_on_disk(crashed)
    with closing(reopened(crashed)):
        assert _mark(1).tobytes() not in _bytes_on_disk(crashed)


# --- killed ---


@posix_only
def test_a_kill_at_any_point_loses_at_most_the_call_in_flight(path: Path) -> None:
    rounds, calls = map(int, answer_of_process("survive", path, 40).split())
    assert rounds == 40
    assert calls > 40  # it did work between the kills


def _call(file: MemoryFile | None, state: Contents, index: int) -> Contents:
    """The contents after call `index`, which is applied to `file` too, if given."""
    rng = random.Random(index)
    owner = f"session:{rng.randrange(3)}"
    if rng.random() < 0.1:
        if file is not None:
            file.delete(owner)
        return {name: held for name, held in state.items() if name != owner}
    added = [segment(4 * index + i, rng.choice([0, 10, 1000, 30_000]), kind=i) for i in range(rng.randint(0, 3))]
    removed = [number for number in state.get(owner, {}) if rng.random() < 0.3]
    if file is not None:
        file.save(owner, added, removed)
    kept = {number: held for number, held in state.get(owner, {}).items() if number not in removed}
    return {**state, owner: {**kept, **expected(added)}}


def _survive(path: Path, rounds: int) -> None:
    """Kill a process that opens and saves, check the file, and again; prints the rounds and the calls done."""
    rng = random.Random(0)
    state: Contents = {}
    total = first = 0
    for number in range(rounds):
        if number % 8 == 0:  # a kill while the file is made
            path, state = path.with_name(f"{number}.db"), {}
        from_child, to_parent = os.pipe()
        child = os.fork()
        if child == 0:
            file = reopened(path)
            for index in itertools.count(first):
                state = _call(file, state, index)
                os.write(to_parent, b".")
        os.close(to_parent)
        if number % 2:
            os.read(from_child, 1)  # not before the first call is done
            first += 1
            state = _call(None, state, first - 1)
        time.sleep(rng.random() * 0.025)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(from_child, "rb") as pipe:
            acknowledged = len(pipe.read())
        for index in range(first, first + acknowledged):
            state = _call(None, state, index)
        total, first = total + acknowledged, first + acknowledged
        with closing(reopened(path)) as file:
            found = contents(file)
        in_flight = _call(None, state, first)
        assert found in (state, in_flight), f"round {number}: {acknowledged} calls were lost or halved"
        if found == in_flight:
            state, first = in_flight, first + 1
    print(rounds, total)


def _copy(path: Path, folder: Path) -> Path:
    """The files as they are on disk now, as a kill would leave them."""
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns(folder.name))
    return folder / path.name


def test_a_kill_while_the_log_moves_into_the_file_is_no_damage(path: Path, tmp_path: Path) -> None:
    with closing(reopened(path)) as file:
        file.save("a", [segment(1, 10)])
        sql(file, "PRAGMA wal_checkpoint(TRUNCATE)")
        file.save("a", [segment(2, 50_000)])
        crashed = _copy(path, tmp_path / "crashed")
    # The first page has been moved: it counts pages that only the log has as yet.
    after, before = path.read_bytes(), crashed.read_bytes()
    assert len(after) > len(before)
    crashed.write_bytes(after[:4096] + before[4096:])
    with closing(reopened(crashed)) as file:
        assert contents(file) == {"a": expected([segment(1, 10), segment(2, 50_000)])}


# --- one writer ---


def test_a_second_engine_of_this_process_is_refused(file: MemoryFile, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(MemoryFileError, match=f"{name}: database is locked.*Another engine has it open"):
            reopened(name)
    file.save("a", [segment(1, 10)])
    assert "Another engine has it open" in answer_of_process("open", path)  # the refused opens have dropped no lock
    file.close()
    with closing(reopened(link)) as again:
        assert contents(again) == {"a": expected([segment(1, 10)])}


@posix_only
def test_the_lock_of_a_process_dies_with_it(path: Path) -> None:
    with other_process("hold", path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        with pytest.raises(MemoryFileError, match="Another engine has it open"):
            reopened(path)
        process.kill()
    with closing(reopened(path)) as file:
        assert contents(file) == {"held": expected([segment(1, 1000)])}


def test_closing_waits_for_a_call_in_another_thread(path: Path) -> None:
    file = reopened(path)
    saved, errors = [], []

    def save_on() -> None:
        try:
            for number in itertools.count():
                file.save("a", [segment(number, 2000)])
                saved.append(number)
        except MemoryFileError as error:
            errors.append(str(error))

    thread = threading.Thread(target=save_on)
    thread.start()
    while len(saved) < 20 and thread.is_alive():
        time.sleep(0.001)
    file.close()
    file.close()
    thread.join(10)
    assert "closed database" in errors[0]
    with closing(reopened(path)) as again:
        assert [s.number for s in again.load("a").segments] == saved


# --- files that are refused ---


def sql(file: MemoryFile, statement: str) -> sqlite3.Cursor:
    """Change a file behind its back."""
    return file._connection.execute(statement)


def _refused(path: Path, match: str, fingerprint: Fingerprint = FINGERPRINT) -> None:
    """The error names the file and `match`, and the file stays as it is."""
    before = {file.name: file.read_bytes() for file in path.parent.glob("*") if file.is_file()}
    with pytest.raises(MemoryFileError, match=match) as caught:
        MemoryFile.open(path, fingerprint)
    assert str(path) in str(caught.value)
    assert {file.name: file.read_bytes() for file in path.parent.glob("*") if file.is_file()} == before


def test_another_tokenizer_or_template_is_refused(path: Path) -> None:
    with closing(reopened(path)) as file:
        file.save("a", [segment(1, 10)])
    _refused(path, "made with tokenizer a1b2, but the model's tokenizer is ffff", Fingerprint("ffff", "c3d4"))
    _refused(path, r"made with template c3d4, .* is eeee.*another memory_path", Fingerprint("a1b2", "eeee"))
    with closing(reopened(path)) as file:
        assert contents(file) == {"a": expected([segment(1, 10)])}


@pytest.mark.parametrize("version", [0, 2, 2**31 - 1, -1])
def test_another_version_is_refused(path: Path, version: int) -> None:
    reopened(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={version}")
    _refused(path, rf"it has format {version}, .* reads and writes format 1\. Give another memory_path")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_database_of_another_program_is_refused(path: Path, tmp_path: Path, mode: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
        connection.execute("CREATE TABLE owners (name)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO owners VALUES ('theirs')")
        crashed = _copy(path, tmp_path / "crashed")  # with a log or journal that only they may play back
        _refused(crashed, "another program's")
        connection.execute("COMMIT")
    _refused(path, "another program's")


@pytest.mark.parametrize("content", [b"x", b"Dear diary,\n" * 1000, b"SQLite format 3\0", os.urandom(5000)])
def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _refused(path, "not a database|malformed|another program")


def test_folders_devices_and_missing_folders_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path, "not a regular file")
    _refused(tmp_path / "missing" / "m.db", "No such file.*the rights to the file and its folder")
    with pytest.raises(MemoryFileError, match="null"):
        MemoryFile.open("a\0b", FINGERPRINT)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(MemoryFileError, match="loop"):
        reopened(loop)
    with pytest.raises(MemoryFileError, match="not a regular file"):
        MemoryFile.open(os.devnull, FINGERPRINT)


def test_an_empty_file_becomes_ours(path: Path) -> None:
    path.touch(0o644)
    with closing(reopened(path)) as file:
        file.save("a", [segment(1, 10)])
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600


# --- damage ---


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Callable[[bytes, bytes], Contents | None]]:
    """Opens and reads a file (and its log) of these bytes; None if that was refused."""
    numbers = itertools.count()

    def read(main: bytes, log: bytes = b"") -> Contents | None:
        path = tmp_path / f"damaged{next(numbers)}.db"
        path.write_bytes(main)
        if log:
            path.with_name(f"{path.name}-wal").write_bytes(log)
        try:
            with closing(reopened(path)) as file:
                found = contents(file)
                for owner in found:
                    file.save(owner, [segment(99, 10)], removed=list(found[owner]))
                return found
        except MemoryFileError:
            return None

    return read


def _example(path: Path) -> tuple[list[Contents], bytes, bytes, bytes]:
    """The contents after each call, the file's bytes when closed, and the file and log of a kill after all calls."""
    states: list[Contents] = [{}]
    with closing(reopened(path)) as file:
        for owner, segments in (
            ("session:a", [segment(1, 300), segment(2, 5), segment(3, 4000)]),
            ("session:b", [segment(i, 20 * i) for i in range(10, 30)]),
            ("session:c", []),
        ):
            file.save(owner, segments)
            states.append({**states[-1], owner: expected(segments)})
        killed = _copy(path, path.parent / "killed")
    return states, path.read_bytes(), killed.read_bytes(), Path(f"{killed}-wal").read_bytes()


def _may_be_read(found: Contents | None, saved: Contents) -> bool:
    """Whether there is no segment that was not saved just so. A lost one only costs speed."""
    if found is None:
        return True
    return all(held.items() <= saved.get(owner, {}).items() for owner, held in found.items() if held)


def test_flipped_bytes_are_refused_or_left_out_or_do_not_matter(
    path: Path, damaged: Callable[..., Contents | None]
) -> None:
    (*_, saved), clean, _, _ = _example(path)
    rng = random.Random(1)
    refused = 0
    positions = [*range(0, 100, 3), *range(100, 4096, 128), *rng.sample(range(len(clean)), 150)]
    for position in positions:
        flipped = bytearray(clean)
        flipped[position] ^= rng.choice([1, 0x80, 0xFF])
        found = damaged(bytes(flipped))
        assert _may_be_read(found, saved), position
        refused += found != saved
    assert refused > 50  # most of the file is text


def test_flipped_bytes_in_the_log_take_back_whole_calls(path: Path, damaged: Callable[..., Contents | None]) -> None:
    states, _, main, log = _example(path)
    assert damaged(main, log) == states[-1]
    rng = random.Random(2)
    for position in rng.sample(range(len(log)), 60):
        flipped = bytearray(log)
        flipped[position] ^= rng.choice([1, 0x80, 0xFF])
        assert damaged(main, bytes(flipped)) in states, position


def test_cut_files_are_refused_and_cut_logs_take_back_whole_calls(
    path: Path, damaged: Callable[..., Contents | None]
) -> None:
    states, clean, main, log = _example(path)
    assert damaged(b"") == {}  # an empty file is a new one
    last_page = len(clean) - 4096
    for size in [1, 50, 99, 100, 511, 512, *range(1000, last_page, 3001), *range(8192, last_page + 1, 16384)]:
        assert damaged(clean[:size]) is None, size
    for size in range(last_page + 1, len(clean), 301):
        assert damaged(clean[:size]) in (None, states[-1]), size  # as it was if only zeros are cut
    for size in [0, 1, 31, 32, *range(500, len(log), 3001)]:
        assert damaged(main, log[:size]) in states, size


def test_a_broken_page_is_found_when_the_file_is_opened(path: Path) -> None:
    with closing(reopened(path)) as file:
        file.save("a", [segment(1, 10)])
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'segments_1'"
        (page,) = sql(file, query).fetchone()
    broken = bytearray(path.read_bytes())
    broken[4096 * (page - 1) : 4096 * page] = bytes(4096)
    path.write_bytes(broken)
    _refused(path, r"memory\.db: it is damaged.*move the file away")


def test_a_segment_moved_to_another_owner_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(reopened(path)) as file:
        file.save("session:a", [segment(1, 10)])
        file.save("session:b", [segment(2, 10)])
        sql(file, "UPDATE owners SET name = CAST('session:c' AS BLOB) WHERE id = 1")
        sql(file, "INSERT INTO segments_2 SELECT * FROM segments_1")
        assert contents(file) == {"session:c": {}, "session:b": expected([segment(2, 10)])}
        assert caplog.text.count("it is not what was saved") == 2
        caplog.clear()
        assert contents(file) == {"session:c": {}, "session:b": expected([segment(2, 10)])}
        assert not caplog.text, "they are gone from the file"


@pytest.mark.parametrize("change", ["kind = 1.5", "kind = 'x'", "tokens = 'text'", "tokens = 5", "number = 2"])
def test_values_of_other_types_are_left_out_and_their_numbers_free(file: MemoryFile, change: str) -> None:
    file.save("a", [segment(1, 10, kind=1), segment(3, 5)])
    sql(file, f"UPDATE segments_1 SET {change} WHERE number = 1")
    assert contents(file) == {"a": expected([segment(3, 5)])}
    file.save("a", [segment(1, 10), segment(2, 10)])
    assert contents(file) == {"a": expected([segment(1, 10), segment(2, 10), segment(3, 5)])}


def test_a_text_with_ids_beyond_the_vocabulary_is_left_out(file: MemoryFile) -> None:
    file.save("a", [SavedSegment(i, 0, np.array(ids, dtype=np.int32)) for i, ids in enumerate(([0, 99], [100], [-1]))])
    assert [text.number for text in file.load("a", vocab_size=100).segments] == [0]


@pytest.mark.parametrize("name", ["x'ff'", "'a text'", "5"])
def test_an_owner_whose_name_cannot_be_read_leaves_the_others_alone(
    file: MemoryFile, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for owner in ("session:a", "session:b"):
        file.save(owner, [segment(1, 10)])
    sql(file, f"UPDATE owners SET name = {name} WHERE id = 1")
    assert contents(file) == {"session:b": expected([segment(1, 10)])}
    assert "its name cannot be read" in caplog.text


@posix_only
def test_a_file_that_others_can_read_is_the_users_alone_once_it_is_opened(path: Path) -> None:
    with closing(reopened(path)) as file:
        file.save("a", [segment(1, 10)])
        killed = _copy(path, path.parent / "killed")
    for part in killed.parent.iterdir():
        part.chmod(0o664)
    with closing(reopened(killed)) as file:
        assert contents(file) == {"a": expected([segment(1, 10)])}
        modes = {part.name: part.stat().st_mode & 0o777 for part in killed.parent.iterdir()}
    assert modes == {"memory.db": 0o600, "memory.db-wal": 0o600}


# --- rights and space ---


@posix_only
def test_only_the_user_can_read_the_file(path: Path) -> None:
    mask = os.umask(0)
    try:
        with closing(reopened(path)) as file:
            file.save("a", [segment(1, 10)])
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(mask)
    assert modes == {"memory.db": 0o600, "memory.db-wal": 0o600}


@posix_only
@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_that_is_read_only_is_refused(existing: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if existing:
            with closing(reopened(folder / "m.db")) as file:
                file.save("a", [segment(1, 10)])
            (folder / "m.db").chmod(0o644)
        before = [(file, file.read_bytes()) for file in folder.iterdir()]
        folder.chmod(0o555)
        answer = answer_of_process("open-as-nobody", folder / "m.db")
        assert "m.db" in answer
        assert "rights to the file and its folder" in answer
        folder.chmod(0o755)
        assert [(file, file.read_bytes()) for file in folder.iterdir()] == before


@posix_only
def test_a_file_that_cannot_grow_keeps_what_it_has(path: Path) -> None:
    assert answer_of_process("file-size-limit", path) == "went on"
    with closing(reopened(path)) as file:
        assert contents(file) == {"a": expected([segment(1, 1000), segment(3, 100_000)])}


def _file_size_limit(path: Path) -> None:
    import resource

    file = reopened(path)
    file.save("a", [segment(1, 1000)])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    for number, size in ((2, 100_000), (3, 100_000), (4, 30_000)):
        try:
            file.save("a", [segment(number, size)], removed=[1])
        except MemoryFileError as error:
            assert "Check the space on the disk" in str(error)  # noqa: PT017 - no pytest in this process
        else:
            raise AssertionError("saved beyond the limit")
        assert contents(file) == {"a": expected([segment(1, 1000)])}
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    file.save("a", [segment(3, 100_000)])
    file.close()
    print("went on")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_only_the_calls_that_did_not_fit(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    path = small_disk / "memory.db"
    with closing(reopened(path)) as file:
        file.save("a", [segment(1, 1000)])
        kept = contents(file)
        ballast.write_bytes(bytes(500_000))
        for _ in range(3):
            with pytest.raises(MemoryFileError, match=r"memory.db: database or disk is full. Check the space"):
                file.save("b", [segment(2, 200_000)], removed=[1])
            assert contents(file) == kept
        ballast.unlink()
        file.save("a", [segment(3, 100_000)])
        kept["a"] |= expected([segment(3, 100_000)])
        assert contents(file) == kept
    with closing(reopened(path)) as file:
        assert contents(file) == kept


def test_a_delete_that_the_disk_had_no_space_for_works_later(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    path = small_disk / "memory.db"
    with closing(reopened(path)) as file:
        file.save("a", [SavedSegment(0, 0, np.tile(_mark(1), 10_000))])
        ballast.write_bytes(bytes(750_000))
        with pytest.raises(MemoryFileError, match="full"):
            file.delete("a")
        assert _mark(1).tobytes() in _bytes_on_disk(path)
        ballast.unlink()
        file.delete("a")
        assert _mark(1).tobytes() not in _bytes_on_disk(path)
        assert contents(file) == {}


def test_a_full_disk_refuses_a_new_file(small_disk: Path) -> None:
    with suppress(OSError), (small_disk / "ballast").open("wb") as ballast:
        while True:
            ballast.write(bytes(4096))
    with pytest.raises(MemoryFileError, match=r"m.db: .*(full|space)"):
        reopened(small_disk / "m.db")
    (small_disk / "ballast").unlink()
    with closing(reopened(small_disk / "m.db")) as file:
        assert file.owners() == []


# --- the other process ---


def _open(path: Path) -> None:
    try:
        reopened(path).close()
        print("opened")
    except MemoryFileError as error:
        print(error)


def _hold(path: Path) -> None:
    file = reopened(path)
    file.save("held", [segment(1, 1000)])
    print("holding", flush=True)
    sys.stdin.read()  # until it is killed


def _main(task: str, name: str, number: str = "0") -> None:
    path = Path(name)
    if task == "open-as-nobody" and os.geteuid() == 0:  # root may write everywhere
        os.setgid(65534)
        os.setuid(65534)
    if task == "survive":
        _survive(path, int(number))
    elif task == "file-size-limit":
        _file_size_limit(path)
    elif task == "hold":
        _hold(path)
    else:
        _open(path)


FORK = """
import gc, os, sys
from pathlib import Path
from copyspec_engine.values.errors import MemoryFileError
from copyspec_engine.memory.file import MemoryFile
from tests.memory.test_file import FINGERPRINT, segment

path = Path(sys.argv[1])
file = MemoryFile.open(path, FINGERPRINT)
file.save("session:a", [segment(0, 10)])
child = os.fork()
if not child:
    for attempt in range(2):
        try:
            file.save("session:a", [segment(9, 10)])
            os._exit(3)
        except MemoryFileError:
            file.close()
    del file
    gc.collect()
    sys.exit(7)  # an orderly exit, which closes what is open
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
file.save("session:a", [segment(1, 10)])
os._exit(0)  # as if it was killed: the log stays as it is
"""


@posix_only
def test_a_forked_child_cannot_harm_the_file_of_its_parent(path: Path) -> None:
    """A connection that the child closes takes the log away from under its parent, whose calls are then lost."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(path)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with closing(reopened(path)) as file:
        assert [segment.number for segment in file.load("session:a").segments] == [0, 1]


if __name__ == "__main__":
    _main(*sys.argv[1:])
