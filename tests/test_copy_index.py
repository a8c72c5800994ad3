"""The index says exactly what a search through all tokens would say."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine.copy_index import MAX_MATCH_TOKENS, ORDERS, CopyIndex, CopyMatch, EarliestIndex


def brute_force(tokens: list[int], query: list[int]) -> CopyMatch | None:
    for order in ORDERS:
        for position in range(len(tokens) - 1, order - 1, -1):
            if len(query) >= order and tokens[position - order : position] == query[-order:]:
                length = 0
                while length < min(position, len(query), MAX_MATCH_TOKENS):
                    if tokens[position - 1 - length] != query[-1 - length]:
                        break
                    length += 1
                return CopyMatch(position, length)
    return None


few_tokens = st.lists(st.integers(0, 3), max_size=90)


@settings(max_examples=300, deadline=None)
@given(tokens=few_tokens, query=few_tokens, cuts=st.lists(st.integers(0, 90), max_size=6))
def test_index_equals_brute_force_however_the_tokens_arrive(
    tokens: list[int], query: list[int], cuts: list[int]
) -> None:
    index = CopyIndex()
    edges = sorted({0, len(tokens), *(min(cut, len(tokens)) for cut in cuts)})
    for begin, end in itertools.pairwise(edges):
        index.extend(tokens[begin:end])
    assert index.tokens.tolist() == tokens
    assert index.longest_match(query) == brute_force(tokens, query)
    assert index.longest_match(tokens) == brute_force(tokens, tokens)


def test_the_run_at_the_very_end_is_no_match() -> None:
    index = CopyIndex()
    index.extend([1, 2, 3, 4])
    assert index.longest_match([3, 4]) is None
    index.extend([5])
    assert index.longest_match([3, 4]) == CopyMatch(4, 2)


def test_a_hash_that_lies_is_caught_by_the_tokens() -> None:
    index = CopyIndex()
    index.extend([1, 2, 3, 4, 5])
    for latest in index._latest.values():
        for key in latest:
            latest[key] = 5  # every hash now points to a position that the tokens before it contradict
    assert index.longest_match([1, 2]) is None


def test_matches_are_measured_up_to_64_tokens() -> None:
    text = list(range(200))
    index = CopyIndex()
    index.extend([*text, 999])
    assert index.longest_match(text) == CopyMatch(200, MAX_MATCH_TOKENS)


def test_reading_past_the_end_continues_the_repetition() -> None:
    index = CopyIndex()
    index.extend([9, 1, 2, 3])
    assert index.read(1, 2) == [1, 2]
    assert index.read(1, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert index.read(4, 3) == []


def test_growth_keeps_every_token() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50_000, 5000)
    index = CopyIndex()
    for part in np.array_split(tokens, 37):
        index.extend(part)
    assert (index.tokens == tokens).all()
    for at in rng.integers(20, 4999, 50).tolist():
        match = index.longest_match(tokens[:at])
        assert match is not None
        assert match.position == at


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
