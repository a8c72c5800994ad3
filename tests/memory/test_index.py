"""The index says exactly what a search through all of its texts would say, whatever came, went or moved before."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine.memory import index as copy_index
from copyspec_engine.memory.index import BREAK, MAX_MATCH_TOKENS, OVERLAP, CopyIndex, CopyMatch, EarliestIndex, Span

EVERY = {"most": 5000, "steps": 5000}


def whole(index: CopyIndex, span: Span) -> list[int]:
    """A text with the tokens repeated before it."""
    return index.read(span.start, span.stop - span.start).tolist()


def brute_force(index: CopyIndex, query: list[int]) -> set[CopyMatch]:
    """Every place in a text whose preceding tokens are those at the end of `query`."""
    found = set()
    for span in index.spans:
        text = whole(index, span)
        for at in range(span.first_indexed - span.start, len(text)):
            length = 0
            while length < min(at, len(query), MAX_MATCH_TOKENS) and text[at - 1 - length] == query[-1 - length]:
                length += 1
            if length:
                found.add(CopyMatch(span.start + at, length))
    return found


def assert_equals_brute_force(index: CopyIndex, query: list[int]) -> None:
    expected = brute_force(index, query)
    assert set(index.matches(query, **EVERY)) == expected
    assert len(index.matches(query, **EVERY)) == len(expected)
    longest = max(index.matches(query, **EVERY), key=lambda match: (match.length, match.position), default=None)
    assert longest == max(expected, key=lambda match: (match.length, match.position), default=None)


few_tokens = st.lists(st.integers(0, 3), max_size=60)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), few_tokens, st.integers(0, 8)),
        st.tuples(st.just("open"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("write"), few_tokens, st.just(0)),
        st.tuples(st.just("close"), st.just(0), st.just(0)),
        st.tuples(st.just("touch"), st.integers(0, 400), st.just(0)),
        st.tuples(st.just("erase"), st.integers(0, 20), st.integers(0, 20)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(operations=operations, query=few_tokens, max_tokens=st.sampled_from([20, 90, 5000]))
def test_index_equals_brute_force_whatever_happened_to_its_texts(  # noqa: C901 - one branch for each operation
    operations: list[tuple[str, Any, int]], query: list[int], max_tokens: int
) -> None:
    index = CopyIndex(max_tokens)
    texts: dict[Span, list[int]] = {}
    last: Span | None = None
    for name, value, extra in operations:
        if name == "append":
            overlap = min(extra, len(value), max(max_tokens - 60, 0))
            span = index.append(value, overlap=overlap)
            texts[span] = value[overlap:][-max_tokens:]
        elif name == "open" and last is None:
            last = index.open(value)
            texts[last] = []
        elif name == "write" and last is not None:
            if index.write(last, value):
                texts[last] += value
        elif name == "close" and last is not None:
            index.close(last)
            last = None
        elif name == "touch":
            index.touch([value])
        elif name == "erase":
            index.erase([span for number, span in enumerate(texts) if number in (value, extra) and span is not last])
        held = list(index.spans)
        assert all(index.holds(span) == (span in held) for span in texts)
        assert [index.tokens_of(span).tolist() for span in held] == [texts[span] for span in held]
        if last is None and name == "append":
            assert len(index) <= max_tokens + 1
    assert_equals_brute_force(index, query)
    for span in list(index.spans)[-2:]:
        assert_equals_brute_force(index, texts[span])


def test_a_text_that_ends_in_front_of_a_forgotten_one_hides_nothing() -> None:
    index = CopyIndex(20)
    index.append([0, 0])
    last = index.open(0)
    forgotten = index.append([0, 0])
    index.erase([forgotten])
    index.close(last)
    assert_equals_brute_force(index, [0, 0])
    index.append([1, 0, 0])
    assert_equals_brute_force(index, [0, 0])


def test_index_equals_brute_force_across_growth_and_many_texts() -> None:
    rng = random.Random(0)
    index = CopyIndex(6000)
    for _ in range(400):
        index.append([rng.randrange(9) for _ in range(rng.randrange(60))])
        if rng.random() < 0.3:
            index.touch([rng.randrange(int(index.arrays.bounds[1]))])
    assert len(index) <= 6000 < index.arrays.bounds[1]
    for _ in range(20):
        assert_equals_brute_force(index, [rng.randrange(9) for _ in range(30)])


def test_positions_are_numbered_afresh_before_they_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    index = CopyIndex(700)
    first = index.append([8, 8, 8])
    monkeypatch.setattr(copy_index, "_LAST_POSITION", 3000)
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(40)]
        assert index.tokens_of(index.append(text)).tolist() == text
        assert index.arrays.bounds[1] < 3100
    assert not index.holds(first)
    assert_equals_brute_force(index, text)


def test_the_run_at_the_very_end_is_no_match() -> None:
    index = CopyIndex(100)
    span = index.open(10)
    index.write(span, [1, 2, 3, 4])
    assert index.longest_match([3, 4]) is None
    index.write(span, [5])
    assert index.longest_match([3, 4]) == CopyMatch(span.start + 4, 2)


def test_matches_do_not_run_from_one_text_into_the_next() -> None:
    index = CopyIndex(100)
    index.append([1, 2])
    second = index.append([3, 4])
    assert index.longest_match([1, 2]) is None
    assert index.longest_match([1, 2, 3]) == CopyMatch(second.start + 1, 1)
    assert index.read(1, 9).tolist() == [1, 2]


def test_a_hash_that_lies_is_caught_by_the_tokens() -> None:
    index = CopyIndex(100)
    index.append([1, 2, 3, 4, 5])
    index.arrays.heads[:] = 5  # every run now seems to end before position 5, where 4 stands before
    assert index.longest_match([1, 2]) is None
    assert index.longest_match([4]) == CopyMatch(5, 1)


def test_matches_are_measured_up_to_a_limit() -> None:
    text = list(range(200))
    index = CopyIndex(1000)
    index.append([*text, 999])
    assert index.longest_match(text) == CopyMatch(201, MAX_MATCH_TOKENS)


def test_texts_in_use_move_to_the_new_end_and_others_go() -> None:
    index = CopyIndex(400)
    spans = [index.append(range(100 * i, 100 * i + 90)) for i in range(4)]
    for turn in range(4, 40):
        index.touch([spans[1].start + 5])
        spans.append(index.append(range(100 * turn, 100 * turn + 90)))
        assert index.tokens_of(spans[1]).tolist() == list(range(100, 190))
        assert index.longest_match(range(100, 150)) is not None
        assert len(index) <= 401
    assert not index.holds(spans[0])
    assert index.longest_match(range(50)) is None


def test_an_open_text_stays_however_much_comes_after_it() -> None:
    index = CopyIndex(100)
    span = index.open(30)
    index.write(span, [7, 8, 9])
    for i in range(50):
        index.append([i] * 20)
    assert index.write(span, [10])
    assert index.tokens_of(span).tolist() == [7, 8, 9, 10]
    index.close(span)
    index.append([1] * 20)
    assert not index.holds(span)
    assert not index.write(span, [11])


def test_a_full_text_takes_no_more_and_wrong_tokens_are_refused() -> None:
    index = CopyIndex(100)
    span = index.open(3)
    assert index.write(span, [1, 2, 3])
    assert not index.write(span, [4])
    index.close(span)
    with pytest.raises(ValueError, match="Got token -5"):
        index.append([1, -5])
    with pytest.raises(ValueError, match="max_tokens=0"):
        CopyIndex(0)


def test_of_a_text_beyond_the_budget_the_end_is_held() -> None:
    index = CopyIndex(100)
    assert index.tokens_of(index.append(range(250))).tolist() == list(range(150, 250))


# ---- texts that are there already ----------------------------------------------------------------------------------


def contains(index: CopyIndex, run: list[int]) -> bool:
    texts = [whole(index, span) for span in index.spans]
    return any(text[at : at + len(run)] == run for text in texts for at in range(len(text) - len(run) + 1))


def test_only_unseen_stretches_are_stored_and_every_short_run_is_found() -> None:
    rng = random.Random(2)
    paragraphs = [[rng.randrange(1000) for _ in range(rng.randrange(30, 200))] for _ in range(12)]
    index = CopyIndex(100_000)
    for turn in range(15):
        text = [token for paragraph in rng.sample(paragraphs, 6) for token in (*paragraph, 1000 + turn)]
        index.append_unseen(text)
        assert all(contains(index, text[at : at + OVERLAP]) for at in range(0, len(text) - OVERLAP, 7))
    assert len(index) < 6 * sum(map(len, paragraphs))


def test_a_prompt_that_grows_is_stored_once() -> None:
    index = CopyIndex(100_000)
    assert index.append_unseen(range(5000, 5200)) != []
    assert index.append_unseen(range(5000, 5200)) == []
    history: list[int] = []
    for turn in range(30):
        history += range(1000 * turn, 1000 * turn + 80)
        index.append_unseen(history)
    assert len(index) < len(history) + 30 * (2 * OVERLAP + 2)


def test_texts_met_again_count_as_used() -> None:
    index = CopyIndex(1000)
    kept = index.append(range(100))
    index.append(range(200, 300))
    index.append_unseen([*range(100), 5000])
    assert [span.used for span in index.spans][:2] == [True, False]
    for i in range(20):
        index.append_unseen([*range(100), *range(10_000 + 100 * i, 10_080 + 100 * i)])
    assert index.tokens_of(kept).tolist() == list(range(100))


# ---- counts and erasing --------------------------------------------------------------------------------------------


def counted(index: CopyIndex) -> dict[int, int]:
    tokens, counts = index.arrays.frequent
    return {int(token): int(count) for token, count in zip(tokens, counts, strict=True) if count}


def test_the_most_frequent_tokens_are_known_in_order() -> None:
    rng = random.Random(3)
    text = [min(int(rng.expovariate(0.1)), 60) for _ in range(3000)]
    index = CopyIndex(10_000)
    for at in range(0, len(text), 50):
        index.append(text[at : at + 50])
    assert counted(index) == Counter(text)
    counts = index.arrays.frequent[1]
    assert (np.diff(counts) <= 0).all()


def test_counts_are_halved_before_they_grow_without_end() -> None:
    index = CopyIndex(1000)
    for _ in range(1100):
        index.append([7] * 999)
    assert index.arrays.total[0] <= 1 << 20
    assert 0 < counted(index)[7] <= 1 << 20


def test_nothing_of_an_erased_text_is_left() -> None:
    index = CopyIndex(1000)
    public, secret = index.append(range(100)), index.append([*range(5000, 5100), *range(50)])
    answer = index.open(50)
    index.write(answer, [6000, 6001, 6000])
    index.erase([secret, answer])
    assert list(index.spans) == [public]
    assert not index.holds(secret)
    assert not index.write(answer, [6002])
    index.close(answer)
    held = {token for token in index.arrays.tokens.tolist() if token != BREAK}
    assert held == set(range(100))
    assert counted(index).keys() <= held
    assert index.longest_match([5000, 5001]) is None
    assert index.longest_match(range(40)) is not None
    index.erase([public])
    assert len(index) == 0
    assert_equals_brute_force(index, list(range(10)))


def test_the_room_of_erased_texts_is_used_again() -> None:
    index = CopyIndex(500)
    for i in range(200):
        spans = [index.append([i] * 60) for _ in range(3)]
        index.erase(spans[:2] if i % 2 else spans)
        assert len(index) <= 501
    assert len(index.arrays.tokens) == 1024


def test_the_reference_lookup_finds_the_earliest_occurrence() -> None:
    rng = random.Random(0)
    for _ in range(200):
        order = rng.randrange(1, 4)
        index, tokens = EarliestIndex(order), []
        for _ in range(rng.randrange(1, 40)):
            tokens.append(rng.randrange(3))
            if rng.random() < 0.7:  # lookups need not follow every token
                ends = [end for end in range(order, len(tokens)) if tokens[end - order : end] == tokens[-order:]]
                assert index.find(tokens) == (ends[0] if ends and len(tokens) >= order else None)
