"""Every slot has one owner or none."""

from __future__ import annotations

import random

import numpy as np
import pytest

from copyspec_engine.kv.slots import KVPool


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
