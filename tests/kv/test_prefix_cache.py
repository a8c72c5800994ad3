"""Rows of KV that are kept: found by those who may, shared, and given up when slots run short."""

from __future__ import annotations

import random

import numpy as np

from copyspec_engine.kv.prefix_cache import PrefixCache
from copyspec_engine.kv.slots import KVPool
from copyspec_engine.values.tokens import TokenArray


def tokens(*ids: int) -> TokenArray:
    return np.array(ids, dtype=np.int64)


def cache_of(num_slots: int = 64, max_rows: int = 8) -> tuple[KVPool, PrefixCache]:
    pool = KVPool(num_slots)
    return pool, PrefixCache(pool, max_rows)


def test_the_longest_common_beginning_of_rows_that_one_may_use_is_found() -> None:
    pool, cache = cache_of()
    for owner, salt, ids in (("a", None, (1, 2, 3, 4)), ("b", "s", (1, 2, 9)), ("c", "t", (1, 2, 3, 4, 5))):
        cache.keep(owner, tokens(*ids), pool.allocate(len(ids)), salt)
    query = tokens(1, 2, 3, 4, 5, 6)
    assert len(cache.match(query, ["a"], None)) == 4
    assert len(cache.match(query, ["b"], None)) == 2
    assert len(cache.match(query, ["x"], None)) == 0
    assert len(cache.match(query, ["x"], "s")) == 2
    assert len(cache.match(query, ["a"], "t")) == 5
    assert len(cache.match(tokens(7), ["a"], "t")) == 0


def test_an_owner_has_one_row() -> None:
    pool, cache = cache_of()
    cache.keep("a", tokens(1, 2), pool.allocate(2), None)
    cache.keep("a", tokens(3), pool.allocate(1), None)
    assert pool.num_free == 63
    cache.drop("a")
    cache.drop("a")
    assert pool.num_free == 64


def test_the_end_of_the_least_recently_used_row_goes_first() -> None:
    pool, cache = cache_of()
    for owner in "abc":
        cache.keep(owner, tokens(*range(10)), pool.allocate(10), None)
    cache.match(tokens(0), ["a"], None)
    cache.evict(34 + 6)
    assert [len(cache.match(tokens(*range(10)), [owner], None)) for owner in "cab"] == [10, 10, 4]
    cache.evict(64)
    assert len(cache) == 0
    assert pool.num_free == 64


def test_shared_slots_stay_while_anybody_uses_them() -> None:
    pool, cache = cache_of()
    slots = pool.allocate(10)
    pool.share(slots[:6])  # a running sequence
    cache.keep("a", tokens(*range(10)), slots, None)
    assert cache.num_idle_slots == 4
    cache.evict(64)
    assert pool.num_free == 58
    assert cache.num_idle_slots == 0


def test_there_are_never_more_rows_than_allowed() -> None:
    pool, cache = cache_of(max_rows=2)
    for owner in "abc":
        cache.keep(owner, tokens(1), pool.allocate(1), None)
    assert len(cache) == 2
    assert len(cache.match(tokens(1), ["a"], None)) == 0


def test_nothing_is_lost_in_any_order_of_events() -> None:
    rng = random.Random(0)
    pool, cache = cache_of(num_slots=100, max_rows=5)
    running: list[tuple[TokenArray, TokenArray]] = []
    for _ in range(3000):
        if running and rng.random() < 0.5:
            ids, slots = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.7:
                cache.keep(rng.choice("abcdefg"), ids, slots, rng.choice([None, "s"]))
            else:
                pool.release(slots)
            continue
        ids = np.array([rng.randrange(2) for _ in range(rng.randrange(1, 25))], dtype=np.int64)
        prefix = cache.match(ids, [rng.choice("abcdefg")], rng.choice([None, "s"]))
        pool.share(prefix)
        need = len(ids) - len(prefix)
        if pool.num_free + cache.num_idle_slots < need:
            pool.release(prefix)
            continue
        cache.evict(need)
        running.append((ids, np.concatenate((prefix, pool.allocate(need)))))
        users = np.zeros(100, dtype=np.int32)
        for _, slots in running:
            users[slots] += 1
        for row in cache.rows:
            users[row.slots] += 1
        assert (users == pool.users).all()
        assert pool.num_free == (users == 0).sum()
