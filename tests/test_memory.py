"""A session keeps each text once, within its budget, and never shows it to another session."""

from __future__ import annotations

import numpy as np

from copyspec_engine.copy_index import TokenArray
from copyspec_engine.memory import SessionMemory, SessionStore, common_prefix_length


def store_of(released: list[int], max_sessions: int = 2) -> SessionStore:
    def release(slots: TokenArray) -> None:
        released.extend(slots.tolist())

    return SessionStore(max_sessions, max_tokens=1000, release=release)


def call(session: SessionMemory, prompt: list[int], answer: list[int]) -> None:
    live = session.begin_call(prompt)
    live.extend(answer)
    session.end_call(live, [*prompt, *answer])


def test_common_prefix() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([], [1]) == 0
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2


def test_a_conversation_that_grows_is_stored_once() -> None:
    session = SessionMemory(max_tokens=10_000)
    history = list(range(100))
    for turn in range(5):
        call(session, history, [1000 + turn, 2000 + turn])
        history += [1000 + turn, 2000 + turn, *range(200 + 10 * turn, 210 + 10 * turn)]
    assert session.texts.tokens.tolist() == history[:-10]


def test_text_that_left_the_prompt_stays_a_source() -> None:
    session = SessionMemory(max_tokens=10_000)
    call(session, list(range(50)), [100, 101, 102, 103])
    call(session, [7, 7, 7], [8])
    match = session.texts.longest_match([100, 101])
    assert match is not None
    assert session.texts.read(match.position, 2) == [102, 103]


def test_the_oldest_texts_make_room() -> None:
    session = SessionMemory(max_tokens=100)
    for start in range(0, 1000, 50):
        call(session, list(range(start, start + 49)), [5000])
        assert len(session.texts) <= 100
    assert session.texts.longest_match([0, 1]) is None
    assert session.texts.longest_match([960, 961]) is not None


def test_the_least_recently_used_session_is_forgotten_with_its_slots() -> None:
    released: list[int] = []
    store = store_of(released)
    first = store.open("a")
    first.keep_slots([1, 2], np.array([4, 5]))
    store.open("b")
    assert store.open("a") is first
    store.open("c")  # b goes
    assert store.holds("a", first)
    assert len(store) == 2
    assert released == []
    store.open("d")  # a goes, with its slots
    assert released == [4, 5]
    assert not store.holds("a", first)


def test_a_call_without_a_session_remembers_nothing() -> None:
    store = store_of([])
    call(store.open(None), [1, 2, 3], [4])
    assert len(store) == 0
    assert not store.holds(None, store.open(None))


def test_forgetting_releases_slots_and_texts() -> None:
    released: list[int] = []
    store = store_of(released)
    session = store.open("a")
    call(session, [1, 2, 3], [4])
    session.keep_slots([1, 2, 3], np.array([7, 8, 9]))
    assert store.forget("a")
    assert not store.forget("a")
    assert released == [7, 8, 9]
    assert len(store.open("a").texts) == 0


def test_evicting_slots_keeps_the_texts_and_starts_with_the_least_recently_used() -> None:
    released: list[int] = []
    store = store_of(released)
    for name, slot in (("a", 1), ("b", 2)):
        session = store.open(name)
        call(session, [1, 2, 3], [4])
        session.keep_slots([1], np.array([slot]))
    assert store.num_cached_slots == 2
    store.evict_slots()
    assert released == [1]
    assert len(store.open("a").texts) == 4
    assert store.num_cached_slots == 1
