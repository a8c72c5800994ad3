"""Each conversation has a slot, which changes with that slot alone; and no slot is given much more than others."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from copyspec_engine.scale.routing import free_slot, most_calls, number_of, ranked, scores

SLOTS = [f"slot-{number}" for number in range(20)]
KEYS = [f"tenant/{number}" for number in range(4000)]


def test_a_slot_that_goes_takes_its_own_keys_along_and_no_other() -> None:
    for key in KEYS[:200]:
        order = ranked(key, SLOTS)
        assert sorted(order) == sorted(SLOTS)
        assert ranked(key, [*reversed(SLOTS), SLOTS[0]]) == order
        for gone in (order[0], order[1], order[-1]):
            assert ranked(key, [slot for slot in SLOTS if slot != gone]) == [slot for slot in order if slot != gone]


def test_first_and_second_slots_of_keys_are_shared_evenly() -> None:
    slots = np.array([number_of(slot) for slot in SLOTS], dtype=np.uint64)
    keys = np.array([number_of(key) for key in KEYS], dtype=np.uint64)
    order = np.argsort(scores(keys[:, None], slots), axis=1)
    pairs = Counter(zip(order[:, -1].tolist(), order[:, -2].tolist(), strict=True))
    expected = len(KEYS) / (len(SLOTS) * (len(SLOTS) - 1))
    statistic = sum((pairs[a, b] - expected) ** 2 / expected for a in range(20) for b in range(20) if a != b)
    assert abs(statistic - 379) < 5 * np.sqrt(2 * 379)  # chi squared: its mean is its degrees of freedom


def test_numbers_of_names_and_keys_alone_decide() -> None:
    slots = np.array([number_of(slot) for slot in SLOTS], dtype=np.uint64)
    for key in KEYS[:50]:
        found = scores(np.array([number_of(key)], dtype=np.uint64), slots)
        assert ranked(key, SLOTS)[0] == SLOTS[int(found.argmax())]
    assert number_of("ann/1") != number_of("ann/2")


@pytest.mark.parametrize("factor", [1.1, 1.25, 2.0])
def test_no_slot_has_more_calls_than_the_bound_and_all_are_placed(factor: float) -> None:
    in_flight: Counter[str] = Counter()
    for number in range(1500):
        key = KEYS[0] if number % 3 else KEYS[number]  # one conversation makes most of the calls
        slot = free_slot(ranked(key, SLOTS), in_flight, factor, least=4)
        assert in_flight[slot] < max(4, most_calls(number, len(SLOTS), factor, least=4))
        in_flight[slot] += 1
    assert max(in_flight.values()) <= np.ceil(factor * 1500 / len(SLOTS))
    assert sum(in_flight.values()) == 1500


def test_few_calls_stay_where_they_belong_and_without_a_bound_all_do() -> None:
    order = ranked(KEYS[0], SLOTS)
    assert free_slot(order, {order[0]: 15}, factor=1.25, least=16) == order[0]
    assert free_slot(order, {order[0]: 16}, factor=1.25, least=16) == order[1]
    assert free_slot(order, {order[0]: 10**6}, factor=float("inf"), least=1) == order[0]
    assert free_slot(order[:1], {order[0]: 10**6}, factor=1.25, least=1) == order[0]
