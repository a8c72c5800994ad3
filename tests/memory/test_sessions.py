"""Whose texts an answer may be copied from, and for how long: sessions, pools, restarts, and forgetting for good."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copyspec_engine import Engine, EngineConfig, EngineStoppedError, GenerationRequest, MemoryFileError, SamplingParams
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.memory import conversation
from copyspec_engine.memory.conversation import SessionMemory, SessionStore
from copyspec_engine.memory.file import MemoryFile
from copyspec_engine.memory.index import BREAK, CopyIndex
from copyspec_engine.memory.store import SavedSegment
from copyspec_engine.testing import ByteTokenizer, loop_of, scripted_engine
from copyspec_engine.values.tokens import Fingerprint
from tests.conftest import assert_all_slots_free

TEXT = " ".join(f"{number * 7919 % 9973:04d}" for number in range(100))
"""A text that does not repeat itself."""


def ask(text: str, **options: object) -> GenerationRequest:
    return GenerationRequest(messages=({"role": "user", "content": text},), **options)


def reply(prompt: str) -> str:
    """TEXT if asked for it, else the last message."""
    last = prompt.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]
    return TEXT if "numbers" in last else last


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(**options: object) -> Engine:
        engines.append(scripted_engine(reply, EngineConfig(**{"model": "scripted", **options})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def passes(engine: Engine, **options: object) -> int:
    """Forward passes for TEXT: few if it is known."""
    output = engine.generate(ask("the numbers please", **options))
    assert output.text == TEXT
    return output.draft_stats.num_forward_passes


FEW = 20
"""More than enough passes where TEXT is known; a stranger needs more than a hundred."""


def watch_drafts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[DraftTree]]:
    """The drafts of an engine from now on, by request."""
    drafts: dict[str, list[DraftTree]] = {}
    forward = loop_of(engine).model.runner.forward

    def watched(pieces: Sequence[Piece]) -> torch.Tensor:
        for piece in pieces:
            drafts.setdefault(piece.key, []).append(piece.draft)
        return forward(pieces)

    monkeypatch.setattr(loop_of(engine).model.runner, "forward", watched)
    return drafts


# ---- isolation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["adaptive", "copyspec"])
def test_every_drafted_token_of_a_session_stands_in_its_own_texts(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """Sessions with alphabets of their own, in flight together and one after the other."""
    engine, rng = make_engine(max_running=4), random.Random(0)
    drafts = watch_drafts(engine, monkeypatch)
    alphabets = {"a": "abcdefgh", "b": "ijklmnop", "c": "qrstuvwx", None: "01234567"}
    template = set(ByteTokenizer().render(({"role": "user", "content": ""},), None))
    handles, allowed = [], {}
    for turn in range(6):
        for session_id, alphabet in alphabets.items():
            words = [alphabet[rng.randrange(5) :] for _ in range(6)]
            request = ask(
                " ".join(words * 5), session_id=session_id, request_id=f"{session_id}-{turn}", drafter=drafter
            )
            allowed[request.request_id] = template | set(f"{alphabet} ".encode())
            handles.append(engine.stream(request))
    for handle in handles:
        handle.result()
    for request_id, tokens in allowed.items():
        assert {token for draft in drafts[request_id] for token in draft.tokens} <= tokens
    assert sum(len(draft) for trees in drafts.values() for draft in trees) > 1000
    assert_all_slots_free(engine)


def test_a_session_copies_from_its_own_earlier_calls_only(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = passes(engine, session_id="a")
    assert alone > 100
    assert passes(engine, session_id="a") < FEW
    assert passes(engine, session_id="b") > 100
    assert passes(engine) > 100


# ---- pools ---------------------------------------------------------------------------------------------------------


def test_those_who_name_a_pool_share_its_texts_and_nothing_else(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert passes(engine, session_id="a", memory_pool="team") > 100
    assert passes(engine, session_id="b", memory_pool="team") < FEW
    assert passes(engine, memory_pool="team") < FEW
    assert passes(engine, session_id="c", memory_pool="others") > 100
    assert passes(engine, session_id="a") > 100  # the session's own texts are apart from the pool's
    assert passes(engine, session_id="d") > 100


def test_a_session_keeps_its_kv_and_what_it_has_learnt_when_it_uses_a_pool(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.generate(ask("hello", session_id="a", memory_pool="team"))
    assert engine.generate(ask("hello", session_id="a", memory_pool="team")).usage.cached_tokens > 20
    assert engine.generate(ask("hello", session_id="b", memory_pool="team")).usage.cached_tokens == 0
    pool = loop_of(engine).core.conversations.store.peek_pool("team")
    assert pool is not None
    first, second = pool.memories["a"], pool.memories["b"]
    assert first.index is second.index
    assert first.acceptance is not second.acceptance


def test_a_session_without_texts_keeps_its_kv_and_copies_from_its_prompts_only(make_engine: MakeEngine) -> None:
    engine, alone = make_engine(), {"session_id": "s", "keep_texts": False}
    assert min(passes(engine, **alone) for _ in range(2)) > 100
    output = engine.generate(ask("the numbers please", **alone))
    assert output.usage.cached_tokens == output.usage.prompt_tokens - 1
    assert engine.metrics().num_sessions == len(engine.memory("s")) == 0
    assert engine.forget("s")
    assert not engine.forget("s")
    assert engine.generate(ask("the numbers please", **alone)).usage.cached_tokens == 0


def test_a_session_without_texts_that_is_forgotten_while_it_runs_keeps_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    others = passes(engine, session_id="other", memory_pool="p")
    with engine.stream(ask("the numbers please", session_id="s", keep_texts=False, memory_pool="p")) as handle:
        next(iter(handle))
        engine.forget("s")
        assert handle.result().text == TEXT
    assert engine.generate(ask("the numbers please", session_id="s", keep_texts=False)).usage.cached_tokens == 0
    assert passes(engine, memory_pool="p") <= FEW < others


def test_the_least_recently_used_pool_is_forgotten(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_MAX_POOLS", 2)
    engine = make_engine()
    for pool in ("one", "two", "one", "three"):
        passes(engine, memory_pool=pool)
    assert passes(engine, memory_pool="one") < FEW
    assert passes(engine, memory_pool="two") > 100


def test_the_record_of_who_wrote_into_a_pool_does_not_grow_for_ever(make_engine: MakeEngine) -> None:
    engine = make_engine(memory_tokens=4096, max_sessions=3)
    for i in range(60):
        engine.generate(ask(f"{i} " * 300, session_id=f"s{i}", memory_pool="team"))
    pool = loop_of(engine).core.conversations.store.peek_pool("team")
    assert pool is not None
    assert len(pool.memories) < 30
    assert len(pool.index) <= 4 * 4096 + 2048


# ---- forgetting ----------------------------------------------------------------------------------------------------


def tokens_in(index: CopyIndex) -> bytes:
    return bytes(token for token in index.arrays.tokens.tolist() if token != BREAK and token < 256)


def test_a_forgotten_session_is_gone_from_its_pools_too(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for pool in ("one", "two", None):
        passes(engine, session_id="a", memory_pool=pool)
    engine.generate(ask("hello from b", session_id="b", memory_pool="one"))
    assert engine.forget("a")
    for pool in ("one", "two"):
        assert passes(engine, session_id="c", memory_pool=pool, sampling=SamplingParams(seed=1)) > 100
        engine.forget("c")
    assert not engine.forget("a")
    pool = loop_of(engine).core.conversations.store.peek_pool("one")
    assert pool is not None
    assert b"hello from b" in tokens_in(pool.index)
    assert TEXT.encode()[:20] not in tokens_in(pool.index)
    assert set(pool.memories) == {"b"}


def test_a_pool_can_be_forgotten_whole(make_engine: MakeEngine) -> None:
    engine = make_engine()
    passes(engine, session_id="a", memory_pool="team")
    assert engine.forget_pool("team")
    assert not engine.forget_pool("team")
    assert passes(engine, session_id="a", memory_pool="team") > 100


@pytest.mark.parametrize("pool", [None, "team"])
@pytest.mark.parametrize("what", ["session", "pool"])
def test_a_call_goes_on_when_it_is_forgotten_and_keeps_nothing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, pool: str | None, what: str, tmp_path: Path
) -> None:
    if what == "pool" and pool is None:
        return
    engine = make_engine(memory_path=str(tmp_path / "memory"))
    passes(engine, session_id="a", memory_pool=pool)
    engine.generate(ask("earlier secret", session_id="a", memory_pool=pool))
    drafts = watch_drafts(engine, monkeypatch)
    request = ask(
        "say the numbers", session_id="a", memory_pool=pool, drafter={"name": "adaptive", "max_draft_tokens": 5}
    )
    stream = engine.stream(request)
    text = next(stream).text + next(stream).text
    assert engine.forget("a") if what == "session" else engine.forget_pool("team")
    num_before = len(drafts[request.request_id])
    memory = loop_of(engine).requests[request.request_id][0].drafting.memory
    text += "".join(chunk.text for chunk in stream)
    assert text == TEXT
    assert stream.result().finish_reason == "stop"
    assert len(drafts[request.request_id]) > num_before + 50  # its text could no longer be copied
    assert memory is not None
    assert memory.owner is None
    del drafts
    assert passes(engine, session_id="b", memory_pool=pool) > 100
    if what == "session":
        assert not engine.forget("a")
        assert b"earlier secret" not in bytes_on_disk(tmp_path)
    assert_all_slots_free(engine)


def test_two_calls_of_a_session_in_flight_are_both_forgotten(make_engine: MakeEngine) -> None:
    engine = make_engine()
    slow: dict[str, Any] = {
        "session_id": "a",
        "memory_pool": "team",
        "drafter": {"name": "adaptive", "max_draft_tokens": 2},
    }
    streams = [engine.stream(ask("say the numbers", **slow)) for _ in range(2)]
    for stream in streams:
        next(stream)
    assert engine.forget("a")
    assert [stream.result().text for stream in streams] == [TEXT, TEXT]
    pool = loop_of(engine).core.conversations.store.peek_pool("team")
    assert pool is not None
    assert tokens_in(pool.index) == b""
    assert pool.memories == {}
    assert_all_slots_free(engine)


# ---- the store by itself -------------------------------------------------------------------------------------------


def store_of(dropped: list[str] | None = None, store: MemoryFile | None = None, **limits: int) -> SessionStore:
    def release(session_id: str) -> None:
        if dropped is not None:
            dropped.append(session_id)

    return SessionStore(EngineConfig(**{"max_sessions": 2, **limits}), release, store)


def test_the_least_recently_used_session_is_forgotten_with_its_kv() -> None:
    dropped: list[str] = []
    store = store_of(dropped)
    first = store.open("a")
    store.open("b")
    assert store.open("a") is first
    store.open("c")  # b goes
    assert first.keeps_kv
    assert len(store) == 2
    assert dropped == ["b"]
    store.open("d")
    assert dropped == ["b", "a"]
    assert not first.keeps_kv


@pytest.mark.parametrize("quota", [None, 3])
def test_no_owner_loses_a_session_while_another_has_more(path: Path, quota: int | None) -> None:
    rng, dropped = random.Random(2), list[str]()
    limits: dict[str, Any] = {"max_sessions": 8, "max_sessions_per_owner": quota}
    with contextlib.closing(MemoryFile.open(path, Fingerprint.of("t", "c"))) as file:
        store = store_of(dropped, file, **limits)
        made: dict[str, str] = {}
        for number in range(150):
            owner = rng.choice("aaaaaabbc")
            session_id = f"{owner}/{rng.randrange(number + 1)}"
            had = Counter(info.owner for info in store.infos(None))
            order = [info.session_id for info in store.infos(None)]
            session = store.open(session_id, account=owner)
            store.save(session.memory)
            gone, dropped[:] = list(dropped), []
            made[session_id] = owner
            if session_id in order:
                assert not gone
                continue
            had[owner] += 1
            if quota is not None and had[owner] > quota:
                loser: str | None = owner
            elif sum(had.values()) > 8:
                loser = made[gone[0]]
                assert had[loser] == max(had.values())
            else:
                assert not gone
                continue
            assert gone == [next(name for name in [*order, session_id] if made[name] == loser)]
        infos = store.infos(None)
        assert len(infos) == 8 if quota is None else max(Counter(made[info.session_id] for info in infos).values()) == 3
        assert {info.session_id: info.owner for info in infos} == {
            info.session_id: made[info.session_id] for info in infos
        }
        again = store_of(dropped, file, **limits)  # as after a restart
        assert [(info.session_id, info.owner) for info in again.infos(None)] == [
            (info.session_id, info.owner) for info in infos
        ]
        assert all(info.num_tokens is info.last_used_s is None for info in again.infos("a"))


def test_an_owner_cannot_evict_what_others_keep(make_engine: MakeEngine, path: Path) -> None:
    engine = make_engine(memory_path=str(path), max_sessions=4, max_sessions_per_owner=3, kv_cache_tokens=1200)
    first = engine.generate(ask("the numbers please", session_id="b/1", owner="b"))
    engine.generate(ask("pooled", owner="b", memory_pool="of b"))
    for i in range(20):
        engine.generate(ask(f"question {i}", session_id=f"a/{i}", owner="a", memory_pool=f"of a {i}"))
    told = engine.sessions()
    assert [(info.session_id, info.owner) for info in told] == [
        ("b/1", "b"), ("a/17", "a"), ("a/18", "a"), ("a/19", "a"),
    ]  # fmt: skip
    assert engine.sessions("b") == told[:1]
    assert told[0].num_tokens == engine.memory("b/1").num_tokens > len(TEXT)
    assert told[0].last_used_s is not None
    assert told[0].last_used_s <= (told[1].last_used_s or 0)
    assert loop_of(engine).core.conversations.store.peek_pool("of b") is not None
    history = [{"role": "user", "content": "the numbers please"}, {"role": "assistant", "content": first.text}]
    again = GenerationRequest(messages=[*history, {"role": "user", "content": "numbers"}], session_id="b/1", owner="b")
    assert engine.generate(again).usage.cached_tokens >= first.usage.total_tokens - 1
    assert engine.forget("b/1")
    assert not engine.sessions("b")
    assert TEXT.encode() not in bytes_on_disk(path.parent)
    assert_all_slots_free(engine)


def test_a_call_without_a_session_is_not_kept() -> None:
    store = store_of()
    assert not store.open(None).keeps_kv
    assert store.open(None).memory is not store.open(None).memory
    assert len(store) == 0


def test_forgetting_lets_go_of_the_kv() -> None:
    dropped: list[str] = []
    store = store_of(dropped)
    store.open("a")
    assert store.forget("a")
    assert not store.forget("a")
    assert dropped == ["a"]


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def bytes_on_disk(folder: Path) -> bytes:
    """All text in a folder's files, as far as it stands there as tokens."""
    content = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    joined = []
    for shift in range(4):
        tokens = np.frombuffer(content[shift : shift + (len(content) - shift) // 4 * 4], dtype="<i4")
        joined.append(np.where((tokens > 0) & (tokens < 256), tokens, 0).astype(np.uint8).tobytes())
    return b"\n".join(joined)


@pytest.mark.parametrize("drafter", ["adaptive", "none"])
def test_a_text_that_left_the_prompt_is_copied_after_a_restart(
    make_engine: MakeEngine, path: Path, drafter: str
) -> None:
    with make_engine(memory_path=str(path)) as engine:
        assert engine.info.memory_path == str(path)
        assert passes(engine, session_id="a", drafter=drafter) > 100
    with make_engine(memory_path=str(path)) as engine:
        assert passes(engine, session_id="b") > 100
        assert passes(engine, session_id="a") < FEW


def test_a_pool_and_its_writers_outlive_a_restart(make_engine: MakeEngine, path: Path) -> None:
    with make_engine(memory_path=str(path)) as engine:
        engine.generate(ask("hello from b", session_id="b", memory_pool="team"))
        passes(engine, session_id="a", memory_pool="team")
    with make_engine(memory_path=str(path)) as engine:
        assert passes(engine, session_id="c", memory_pool="team") < FEW
        assert engine.forget("a")
        assert engine.forget("c")
    with make_engine(memory_path=str(path)) as engine:
        assert passes(engine, session_id="d", memory_pool="team") > 100
    assert b"hello from b" in bytes_on_disk(path.parent)


def test_each_call_is_saved_before_it_returns_and_once(
    make_engine: MakeEngine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(memory_path=str(path))
    saved: list[tuple[str, list[SavedSegment], list[int]]] = []
    save = MemoryFile.save

    def watched(file: MemoryFile, owner: str, added: list[SavedSegment], removed: list[int], revision: int) -> int:
        saved.append((owner, added, removed))
        return save(file, owner, added, removed, revision)

    monkeypatch.setattr(MemoryFile, "save", watched)
    for turn in range(3):
        engine.generate(ask(f"hello {turn}", session_id="a"))
        assert len(saved) == turn + 1
    engine.generate(ask("hello"))
    assert len(saved) == 3
    numbers = [segment.number for _, added, _ in saved for segment in added]
    assert numbers == sorted(set(numbers))
    texts = [ByteTokenizer().decode(segment.tokens.tolist()) for _, added, _ in saved for segment in added]
    assert "hello 1" in texts


def test_a_forgotten_session_is_gone_from_the_disk(make_engine: MakeEngine, path: Path) -> None:
    engine = make_engine(memory_path=str(path))
    for pool in (None, "team"):
        passes(engine, session_id="a", memory_pool=pool)
        engine.generate(ask("something of b", session_id="b", memory_pool=pool))
    assert TEXT[:30].encode() in bytes_on_disk(path.parent)
    engine.forget("a")
    assert TEXT[:30].encode() not in bytes_on_disk(path.parent)
    assert b"something of b" in bytes_on_disk(path.parent)
    engine.forget_pool("team")
    engine.forget("b")
    assert b"something of b" not in bytes_on_disk(path.parent)


def test_a_session_that_was_not_used_since_the_start_can_be_forgotten(make_engine: MakeEngine, path: Path) -> None:
    with make_engine(memory_path=str(path)) as engine:
        passes(engine, session_id="a")
    with make_engine(memory_path=str(path)) as engine:
        assert engine.forget("a")
        assert not engine.forget("a")
        assert passes(engine, session_id="a") > 100


def test_the_disk_holds_as_many_sessions_and_pools_as_memory_does(
    make_engine: MakeEngine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "_MAX_POOLS", 2)
    with make_engine(memory_path=str(path), max_sessions=3) as engine:
        for i in range(6):
            engine.generate(ask(f"text of {i}", session_id=f"s{i}"))
            engine.generate(ask(f"pooled {i}", memory_pool=f"p{i}"))
    with make_engine(memory_path=str(path), max_sessions=3) as engine:
        engine.generate(ask("again", session_id="s3"))
        engine.generate(ask("new", session_id="new"))  # s4 goes, s3 was used later
        engine.generate(ask("new", memory_pool="new"))
        assert loop_of(engine).core.text_store is not None
        sessions = {owner for owner in loop_of(engine).core.text_store.owners() if owner.startswith("session:")}
        assert sessions == {"session:s3", "session:s5", "session:new"}
    text = bytes_on_disk(path.parent)
    assert [number for number in range(6) if f"text of {number}".encode() in text] == [3, 5]
    assert [number for number in range(6) if f"pooled {number}".encode() in text] == [5]


def test_texts_that_memory_forgot_are_gone_from_the_disk(make_engine: MakeEngine, path: Path) -> None:
    engine = make_engine(memory_path=str(path), memory_tokens=8192)
    for i in range(30):
        engine.generate(ask(f"<{i}>" * 200, session_id="a", drafter="none"))
    assert loop_of(engine).core.text_store is not None
    saved = [
        ByteTokenizer().decode(segment.tokens.tolist())
        for segment in loop_of(engine).core.text_store.load("session:a").segments
    ]
    assert any("<29><29>" in text for text in saved)
    assert not any("<5><5>" in text for text in saved)
    assert sum(map(len, saved)) <= 8192
    with make_engine(memory_path=str(path)) as other:
        assert other.info.memory_path is None  # the first one has it open


def test_a_second_engine_goes_on_without_the_file(
    make_engine: MakeEngine, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (make_engine(memory_path=str(path)) for _ in range(2))
    assert second.info.memory_path is None
    assert str(path) in str(second.info.memory_error)
    assert "Another engine has it open" in caplog.text
    assert passes(second, session_id="a") > 100
    assert passes(second, session_id="a") < FEW
    second.forget("a")
    assert passes(first, session_id="a") > 100
    first.close()
    with make_engine(memory_path=str(path)) as third:
        assert passes(third, session_id="a") < FEW


def test_a_damaged_file_is_refused_and_left_alone(
    make_engine: MakeEngine, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b"no database at all" * 1000)
    engine = make_engine(memory_path=str(path))
    assert engine.info.memory_path is None
    assert "memory" in str(engine.info.memory_error)
    assert [record.levelname for record in caplog.records if record.name.startswith("copyspec")] == ["ERROR"]
    assert passes(engine, session_id="a") > 100
    engine.forget("a")
    assert path.read_bytes() == b"no database at all" * 1000


def test_a_file_of_another_tokenizer_is_refused(
    make_engine: MakeEngine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(memory_path=str(path)) as engine:
        passes(engine, session_id="a")
    monkeypatch.setattr(ByteTokenizer, "fingerprint", lambda _self: Fingerprint.of("other", "other"))
    with make_engine(memory_path=str(path)) as engine:
        assert "it was made with tokenizer" in str(engine.info.memory_error)
        assert passes(engine, session_id="a") > 100


def test_saved_texts_that_cannot_be_trusted_are_dropped(
    make_engine: MakeEngine, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MemoryFile.open(path, ByteTokenizer().fingerprint())
    for owner in ("session:a", 'pool:["team", null]'):
        file.save(owner, [SavedSegment(0, 0, np.array([1, 2, 100_000], dtype=np.int32))])
    file.close()
    with make_engine(memory_path=str(path)) as engine:
        for _ in range(2):
            engine.generate(ask("hello", session_id="a"))
            engine.generate(ask("hello", memory_pool="team"))
    assert caplog.text.count("ids outside of 0 to 257") == 2
    caplog.clear()
    with make_engine(memory_path=str(path)) as engine:
        engine.generate(ask("hello", session_id="a"))
    assert not caplog.records


def test_names_that_were_damaged_do_not_stop_the_engine(make_engine: MakeEngine, path: Path) -> None:
    file = MemoryFile.open(path, ByteTokenizer().fingerprint())
    for owner in ("pool:", "pool:[1]", 'pool:["a", "b"', "session", "sessjon:a", "", "pool:7", "pool:[[], {}]"):
        file.save(owner, [])
    file.close()
    with make_engine(memory_path=str(path)) as engine:
        assert engine.info.memory_path is not None
        engine.generate(ask("hello", session_id="a", memory_pool="a"))
        engine.forget("a")


class FullDisk:
    """Makes some methods of memory files fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
        self._monkeypatch, self._methods = monkeypatch, methods

    def __enter__(self) -> None:
        def fail(*_: object) -> None:
            raise MemoryFileError("Could not use the memory file: the disk is full")

        for method in self._methods:
            self._monkeypatch.setattr(MemoryFile, method, fail)

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()


def test_what_could_not_be_saved_is_saved_with_the_next_call(
    make_engine: MakeEngine, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with make_engine(memory_path=str(path)) as engine:
        with FullDisk(monkeypatch, "save"):
            assert passes(engine, session_id="a") > 100
        assert "the disk is full" in caplog.text
        engine.generate(ask("hello", session_id="a"))
    with make_engine(memory_path=str(path)) as engine:
        assert passes(engine, session_id="a") < FEW


def test_calls_go_on_whatever_the_disk_does(
    make_engine: MakeEngine, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with make_engine(memory_path=str(path)) as engine:
        passes(engine, session_id="a", memory_pool="team")
    monkeypatch.setattr(conversation, "_MAX_POOLS", 1)
    engine = make_engine(memory_path=str(path), max_sessions=2)
    with FullDisk(monkeypatch, "save", "load", "delete", "owners"):
        for i in range(4):
            assert passes(engine, session_id=f"s{i}", memory_pool=f"p{i}") > 100
            assert passes(engine, session_id=f"s{i}") > 100
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_session_that_is_not_erased_on_disk_is_said_to_be_there(
    make_engine: MakeEngine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(memory_path=str(path))
    passes(engine, session_id="a")
    with FullDisk(monkeypatch, "delete"), pytest.raises(MemoryFileError, match="the disk is full"):
        engine.forget("a")
    assert loop_of(engine).core.kv.pool.num_free == loop_of(engine).core.kv.pool.num_slots
    assert TEXT[:30].encode() in bytes_on_disk(path.parent)
    assert engine.forget("a")
    assert TEXT[:30].encode() not in bytes_on_disk(path.parent)
    assert passes(engine, session_id="a") > 100


KILLED = """
import os, signal, sys, threading
from copyspec_engine import EngineConfig, GenerationRequest
from copyspec_engine.testing import scripted_engine
from tests.memory.test_sessions import TEXT, ask, reply

path = sys.argv[1]
engine = scripted_engine(reply, EngineConfig(model="scripted", memory_path=path))
assert engine.info.memory_path == path, engine.info.memory_error
engine.generate(ask("the numbers please", session_id="a"))
print("saved", flush=True)
for chunk in engine.stream(ask("y" * 2000, session_id="a", drafter="none")):
    if chunk.text == "y":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_of_a_call_loses_that_call_alone(make_engine: MakeEngine, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "saved\n"), done.stderr
    with make_engine(memory_path=str(path)) as engine:
        assert passes(engine, session_id="a") < FEW
        assert passes(engine, session_id="b") > 100
    assert b"yyyyyyyy" not in bytes_on_disk(path.parent)


def test_forgetting_after_the_engine_was_closed_is_an_error(make_engine: MakeEngine, path: Path) -> None:
    engine = make_engine(memory_path=str(path))
    engine.close()
    with pytest.raises(EngineStoppedError):
        engine.forget("a")
    with pytest.raises(EngineStoppedError):
        engine.forget_pool("a")


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert EngineConfig(memory_path="~/memory").memory_path == str(tmp_path / "memory")
    assert EngineConfig().memory_path is None


def test_a_memory_without_an_owner_is_never_saved(path: Path) -> None:
    file = MemoryFile.open(path, ByteTokenizer().fingerprint())
    store = store_of(store=file)
    memory = SessionMemory(1000)
    memory.add_prompt(range(100))
    store.save(memory)
    assert file.owners() == []
    file.close()
