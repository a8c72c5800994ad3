"""Alternatives: the table is a bounded dict, and what it gives never shows in the tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine.memory.alternatives import (
    NUM_ALTERNATIVES,
    NUM_BUCKETS,
    Alternatives,
    AlternativesTable,
    _group,
    _key,
    buckets_of,
    contexts_of,
)

SMALL = 1 << 10

tokens = st.integers(0, 2**31 - 1)
few_tokens = st.integers(0, 3)
places = st.lists(
    st.tuples(
        st.one_of(st.just(-1), few_tokens, tokens),
        st.one_of(few_tokens, tokens),
        st.lists(st.tuples(tokens, st.integers(0, NUM_BUCKETS - 1)), max_size=NUM_ALTERNATIVES),
    ),
    max_size=12,
)


def alternatives(found: list[tuple[int, int, list[tuple[int, int]]]]) -> Alternatives:
    """(token before, last token, [(likely token, bucket)]) for each place."""
    kept = Alternatives(
        contexts=np.array([place[:2] for place in found], dtype=np.int64).reshape(-1, 2),
        tokens=np.full((len(found), NUM_ALTERNATIVES), -1, dtype=np.int32),
        buckets=np.full((len(found), NUM_ALTERNATIVES), -1, dtype=np.int8),
    )
    for row, (_, _, likely) in enumerate(found):
        for i, (token, chance) in enumerate(likely):
            kept.tokens[row, i], kept.buckets[row, i] = token, chance
    return kept


@settings(max_examples=60, deadline=None)
@given(st.lists(places, max_size=12))
def test_the_table_gives_what_was_stored_last_under_each_key(passes: list[list[tuple[int, int, list]]]) -> None:
    """Against dicts, one for each group of the table, whose oldest key gives way to a fifth one."""
    table = AlternativesTable(max_entries=SMALL)
    groups: dict[int, dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for found in passes:
        table.add(alternatives(found))
        for before, last, likely in found:
            for key in dict.fromkeys([(before, last), (-1, last)]):
                group = groups.setdefault(_group(_key(*key), SMALL), {})
                group.pop(key, None)
                group[key] = likely
                if len(group) > 4:
                    del group[next(iter(group))]
    model = {key: likely for group in groups.values() for key, likely in group.items()}
    assert len(table) == len(model)
    for found in passes:
        for before, last, _ in found:
            for key in ((before, last), (-1, last)):
                assert table.find(*key) == model.get(key, [])
    assert table.find(17, 19) == model.get((17, 19), [])


def test_a_table_grows_while_it_fills_and_stops_at_its_bound() -> None:
    table, sizes = AlternativesTable(max_entries=1 << 14), []
    for i in range(40_000):
        table.add(alternatives([(i, 3 * i, [(7 * i % 1000, i % NUM_BUCKETS)])]))
        sizes.append(table.num_bytes)
        if i in (100, 500, 2000):
            kept = [table.find(j, 3 * j) for j in range(i + 1)]
            right = [[(7 * j % 1000, j % NUM_BUCKETS)] for j in range(i + 1)]
            assert all(found in ([], expected) for found, expected in zip(kept, right, strict=True))
            assert kept.count([]) <= i / 100
    assert sizes[0] < 100_000
    assert max(sizes) == sizes[-1] < 1_000_000
    assert len(table) <= 1 << 14


def test_the_keys_stored_longest_ago_give_way() -> None:
    table = AlternativesTable(max_entries=1 << 10)
    for i in range(20_000):
        table.add(alternatives([(i, i, [(i, 0)])]))
        assert table.find(i, i) == table.find(-1, i) == [(i, 0)]
    kept = [i for i in range(20_000) if table.find(i, i)]
    assert len(kept) > 300
    assert np.mean(kept) > 19_000


def test_erasing_frees_the_memory() -> None:
    table = AlternativesTable()
    small = table.num_bytes
    table.add(alternatives([(i, i, [(i, 0)]) for i in range(5000)]))
    assert table.num_bytes > small
    table.erase()
    assert (len(table), table.num_bytes) == (0, small)
    assert table.find(1, 1) == []
    table.add(alternatives([(1, 2, [(3, 4)])]))
    assert table.find(1, 2) == table.find(-1, 2) == [(3, 4)]


def test_probabilities_fall_into_buckets_around_their_log_odds() -> None:
    buckets = buckets_of(np.array([0.0, 0.003, 0.01, 0.5, 0.99, 1.0, np.nan]))
    assert buckets.tolist()[:2] == [-1, -1]
    assert buckets.tolist()[5:] == [NUM_BUCKETS - 1, -1]
    assert buckets.tolist()[2:5] == [0, 6, NUM_BUCKETS - 1]


def test_contexts_are_the_two_tokens_before_each_place() -> None:
    #        text ... 8 9, then 1 -> 2 -> 3 and 1 -> 4, and 5
    found = contexts_of((8, 9), tokens=(1, 2, 5, 3, 4), parents=(-1, 0, -1, 1, 0), nodes=(-1, 0, 1, 2, 3, 4))
    assert found.tolist() == [[8, 9], [9, 1], [1, 2], [9, 5], [2, 3], [1, 4]]
    assert contexts_of((-1, 9), (), (), (-1,)).tolist() == [[-1, 9]]
