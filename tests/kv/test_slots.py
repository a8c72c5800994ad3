"""Slots of the KV pool, and the sequences kept on them: each slot has its users, and nobody loses one in use."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from copyspec_engine.kv.slots import KVPool, PrefixCache
from copyspec_engine.values.tokens import TokenArray


def test_slots_are_never_handed_out_twice_and_all_come_back() -> None:
    rng = random.Random(0)
    pool = KVPool(200)
    owned: list[np.ndarray] = []
    for _ in range(2000):
        if owned and (rng.random() < 0.5 or pool.num_free < 40):
            pool.release(owned.pop(rng.randrange(len(owned))))
        else:
            after = int(owned[-1][-1]) if owned and rng.random() < 0.5 else None
            owned.append(pool.allocate(rng.randrange(1, 40), after=after))
        taken = np.concatenate(owned) if owned else np.empty(0, dtype=np.int64)
        assert len(np.unique(taken)) == len(taken)
        assert pool.num_free == 200 - len(taken)
    for slots in owned:
        pool.release(slots)
    assert pool.num_free == 200


def test_a_row_grows_in_place_while_the_slots_behind_it_are_free() -> None:
    pool = KVPool(100)
    first = pool.allocate(10)
    assert first.tolist() == list(range(10))
    other = pool.allocate(10)
    assert other[0] > 10  # room is left behind the first row
    assert pool.allocate(15, after=9).tolist() == list(range(10, 25))
    assert pool.allocate(5, after=int(other[-1])).tolist() == list(range(int(other[-1]) + 1, int(other[-1]) + 6))


def test_scattered_slots_are_used_when_no_run_is_long_enough() -> None:
    pool = KVPool(20)
    everything = pool.allocate(20)
    pool.release(everything[::2])
    assert pool.allocate(7).tolist() == everything[::2][:7].tolist()


def test_asking_for_too_much_takes_nothing() -> None:
    pool = KVPool(8)
    with pytest.raises(ValueError, match="Got count=9 but only 8 KV slots are free"):
        pool.allocate(9)
    assert pool.num_free == 8


@pytest.mark.parametrize("bad", [[3], [0, 0]])
def test_releasing_what_is_not_owned_is_refused_and_changes_nothing(bad: list[int]) -> None:
    pool = KVPool(8)
    pool.allocate(2)
    with pytest.raises(ValueError, match="some of them are free"):
        pool.release(np.array(bad))
    assert pool.num_free == 6


def test_a_shared_slot_is_free_when_its_last_user_is_gone() -> None:
    pool = KVPool(8)
    slots = pool.allocate(4)
    pool.share(slots[:3])
    assert pool.release(slots) == 1
    assert pool.num_free == 5
    assert not set(pool.allocate(5).tolist()) & set(slots[:3].tolist())
    assert pool.release(slots[:3]) == 3


def test_sharing_a_free_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="free"):
        KVPool(8).share(np.array([3]))


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


def test_no_account_loses_anything_while_another_has_more() -> None:
    rng = random.Random(1)
    pool = KVPool(200)
    cache = PrefixCache(pool, 12, max_per_account=7)

    def sizes() -> Counter[str]:
        held = Counter[str]()
        for sequence in cache.sequences:
            held[str(sequence.account)] += len(sequence.slots)
        return held

    evicted = 0
    for number in range(1000):
        account = rng.choice("aaaaaaaabbc")  # a asks most
        size = rng.randrange(1, 60)
        while pool.num_free < size:
            before = sizes()
            cache.evict(pool.num_free + 1)
            losers = before - sizes()
            assert len(losers) == 1
            assert before[next(iter(losers))] == max(before.values())
            evicted += 1
        rows = Counter(sequence.account for sequence in cache.sequences)
        cache.keep(number, tokens(*range(size)), pool.allocate(size), None, account)
        lost = rows + Counter([account]) - Counter(sequence.account for sequence in cache.sequences)
        if rows[account] == 7:
            assert lost == Counter([account])  # its own, never another's
        elif sum(rows.values()) == 12:
            assert (rows + Counter([account]))[next(iter(lost))] == max((rows + Counter([account])).values())
        else:
            assert not lost
    assert evicted > 100
    assert pool.num_free == 200 - sum(sizes().values())


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
        for row in cache.sequences:
            users[row.slots] += 1
        assert (users == pool.users).all()
        assert pool.num_free == (users == 0).sum()
