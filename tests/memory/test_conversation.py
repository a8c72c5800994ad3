"""A memory keeps each text once, says what is to be saved of it, and can be erased from among others."""

from __future__ import annotations

import numpy as np

from copyspec_engine.kv.slots import common_prefix_length
from copyspec_engine.memory.conversation import ANSWER, DECLARED_TEXT, PROMPT, SessionMemory
from copyspec_engine.memory.index import CopyIndex
from copyspec_engine.memory.store import SavedSegment


def call(memory: SessionMemory, prompt: list[int], answer: list[int]) -> list[int]:
    """What an adaptive drafter does with a memory in one call; positions where the answer may have started."""
    memory.begin_call()
    starts = memory.add_prompt(prompt)
    span = memory.open_answer(2048)
    memory.index.write(span, answer)
    memory.index.close(span)
    memory.add_answer(span)
    memory.end_call()
    return starts


def texts(memory: SessionMemory) -> list[list[int]]:
    return [memory.index.tokens_of(span).tolist() for span in memory.index.spans]


def save(memory: SessionMemory) -> tuple[list[SavedSegment], list[int]]:
    added, removed = memory.changes()
    memory.mark_saved(added, removed)
    return list(added.values()), list(removed.values())


def test_common_prefix() -> None:
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([], [1]) == 0
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2


def test_a_conversation_that_grows_is_stored_once() -> None:
    memory = SessionMemory(100_000)
    history = list(range(100))
    for turn in range(20):
        answer = list(range(1000 * turn + 1000, 1000 * turn + 1090))
        call(memory, history, answer)
        history += [*answer, *range(1000 * turn + 1500, 1000 * turn + 1600)]
    assert sum(map(len, texts(memory))) < len(history) + 20 * 64


def test_each_conversation_numbers_its_own_texts() -> None:
    shared = CopyIndex(10_000)
    memories = [SessionMemory(10_000), SessionMemory(10_000), SessionMemory(0, shared), SessionMemory(0, shared)]
    for turn in range(2):
        for place, memory in enumerate(memories):
            call(memory, list(range(100 * (4 * turn + place), 100 * (4 * turn + place) + 90)), [9, 8, 7])
    found = [[text.number for text in memory.texts] for memory in memories]
    assert found == [[1, 2, 3, 4]] * 2 + [[-1, -2, -3, -4]] * 2, "nobody can tell how much others say"


def test_text_that_left_the_prompt_stays_a_source() -> None:
    memory = SessionMemory(10_000)
    call(memory, list(range(50)), [100, 101, 102, 103])
    call(memory, [7, 7, 7], [8])
    match = memory.index.longest_match([100, 101])
    assert match is not None
    assert memory.index.read(match.position, 2).tolist() == [102, 103]


def test_an_answer_may_start_like_the_last_answers_and_then_like_what_is_new() -> None:
    memory = SessionMemory(100_000)
    call(memory, list(range(100)), [500, 501])
    call(memory, list(range(200, 300)), [600, 601])
    starts = call(memory, list(range(300, 400)), [700])
    assert [memory.index.read(start, 1).tolist() for start in starts] == [[600], [500], [300]]


def test_a_prediction_is_stored_once() -> None:
    memory = SessionMemory(10_000)
    first = memory.add_prediction(range(100, 200))
    assert memory.index.read(first, 3).tolist() == [100, 101, 102]
    assert memory.add_prediction(list(range(100, 200))) == first
    assert memory.add_prediction(range(100, 201)) != first
    assert [span.kind for span in memory.index.spans] == [DECLARED_TEXT] * 2


def test_what_a_failed_drafter_left_open_is_closed_with_the_last_call() -> None:
    memory = SessionMemory(10_000)
    memory.begin_call()
    memory.begin_call()
    span = memory.open_answer(100)
    memory.end_call()
    assert span.is_open
    memory.end_call()
    assert not span.is_open


# ---- saving --------------------------------------------------------------------------------------------------------


def test_each_text_is_saved_once_and_its_removal_too() -> None:
    memory = SessionMemory(5000)
    call(memory, list(range(100)), [1000, 1001])
    added, removed = save(memory)
    assert [(segment.number, segment.kind) for segment in added] == [(0, PROMPT), (1, ANSWER)]
    assert [segment.tokens.tolist() for segment in added] == [list(range(100)), [1000, 1001]]
    assert all(segment.tokens.dtype == np.int32 for segment in added)
    assert removed == []
    assert save(memory) == ([], [])
    call(memory, list(range(100)), [1002])
    assert [segment.number for segment in save(memory)[0]] == [2]
    for i in range(10):  # push them out
        call(memory, list(range(2000 + 700 * i, 2700 + 700 * i)), [i])
    removed = save(memory)[1]
    assert {1, 2} <= set(removed)
    assert save(memory) == ([], [])


def test_what_was_not_saved_is_saved_the_next_time_under_the_same_number() -> None:
    memory = SessionMemory(5000)
    call(memory, list(range(100)), [1000])
    failed = list(memory.changes()[0].values())
    call(memory, list(range(100)), [2000])
    added, _ = save(memory)
    assert [segment.number for segment in added] == [0, 1, 2]
    assert [segment.tokens.tolist() for segment in added[:2]] == [segment.tokens.tolist() for segment in failed]


def test_open_and_empty_texts_are_not_saved() -> None:
    memory = SessionMemory(10_000)
    memory.begin_call()
    memory.index.write(memory.open_answer(10), [5])
    assert save(memory) == ([], [])
    memory.end_call()
    assert len(save(memory)[0]) == 1
    call(memory, [1] * 70, [])
    assert [segment.kind for segment in save(memory)[0]] == [PROMPT]


def test_a_restored_memory_goes_on_where_the_saved_one_stopped() -> None:
    memory = SessionMemory(100_000)
    call(memory, list(range(100)), [1000, 1001])
    memory.add_prediction(range(3000, 3100))
    call(memory, list(range(200, 300)), [1002, 1003])
    saved, _ = save(memory)
    again = SessionMemory(100_000)
    again.restore(saved)
    assert texts(again) == texts(memory)
    assert save(again) == ([], [])
    starts = call(again, list(range(100)), [9])
    assert [again.index.read(start, 1).tolist() for start in starts] == [[1002], [1000]]
    assert [segment.number for segment in save(again)[0]] == [len(saved)]


# ---- several conversations over one index --------------------------------------------------------------------------


def test_a_conversation_is_erased_from_a_shared_index_alone() -> None:
    index = CopyIndex(100_000)
    first, second = SessionMemory(1, index), SessionMemory(1, index)
    call(first, list(range(100)), [1000, 1001])
    call(second, [*range(100), *range(500, 600)], [2000, 2001])
    call(first, list(range(700, 800)), [1002])
    first.add_prediction(range(4000, 4100))
    first.erase()
    assert first.is_idle_and_empty
    assert not second.is_idle_and_empty
    held = {token for text in texts(second) for token in text}
    assert held == {*range(500, 600), 2000, 2001}
    assert index.longest_match([1000]) is None
    assert first.acceptance is None
    starts = call(first, list(range(800, 900)), [5])
    assert [index.read(start, 1).tolist() for start in starts] == [[800]]


def test_a_memory_in_use_is_not_idle() -> None:
    memory = SessionMemory(10_000)
    memory.begin_call()
    assert not memory.is_idle_and_empty
    memory.end_call()
    assert memory.is_idle_and_empty


def test_what_is_taken_in_comes_in_pieces_that_others_may_come_between() -> None:
    memory, long = SessionMemory(1_000_000), np.arange(100_000, dtype=np.int64)
    given = [(PROMPT, np.arange(10, dtype=np.int64)), (ANSWER, long), (PROMPT, np.arange(50, dtype=np.int64))]
    memory.begin_call()
    pieces = memory.take_in(given)
    sizes = []
    for _ in range(3):
        next(pieces)
        sizes.append(len(memory.index.tokens_of(memory.texts[1])))
    assert sizes == [32768 * number for number in (1, 2, 3)]
    call(memory, list(range(500_000, 500_100)), [7, 8, 9])  # whose end closes nothing
    assert list(pieces)[-1] == 3
    memory.end_call()
    kept = {tuple(text) for text in texts(memory)}
    assert {tuple(tokens.tolist()) for _, tokens in given} <= kept
    assert list(memory.take_in(given)) == [0], "twice is once"


def test_nothing_more_is_taken_in_of_a_text_that_was_erased_meanwhile() -> None:
    memory = SessionMemory(1_000_000)
    memory.begin_call()
    pieces = memory.take_in([(ANSWER, np.arange(100_000, dtype=np.int64)), (PROMPT, np.arange(9, dtype=np.int64))])
    next(pieces)
    memory.erase()
    assert list(pieces) == []
    memory.end_call()
    assert texts(memory) == []
    call(memory, list(range(100)), [1, 2, 3])
    assert texts(memory)[-1] == [1, 2, 3]
