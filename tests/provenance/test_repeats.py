"""How much of a text an answer repeats, counted without looking at drafts."""

from __future__ import annotations

import random
from difflib import SequenceMatcher

import pytest

from copyspec_engine.provenance.repeats import count_repeated


@pytest.mark.parametrize(
    ("text", "answer", "count"),
    [
        ("", "abc", 0),
        ("abc", "", 0),
        ("abc", "xxabcxx", 3),
        ("abc", "ab", 0),
        ("abcdefgh", "abcdefgh", 8),
        ("abcdefgh", "abcdXefgh", 8),
        ("abcdefgh", "abcXdefgh", 5),
        ("abcdefgh", "efghabcd", 4),
        ("abcdabcd", "abcd", 4),
        ("abcd", "abcdabcd", 4),
        ("aaaaaaaa", "aaaaa", 5),
    ],
)
def test_runs_in_order_count(text: str, answer: str, count: int) -> None:
    assert count_repeated(text.encode(), answer.encode()) == count


def test_edits_of_a_long_text_cost_no_more_than_they_change() -> None:
    rng = random.Random(3)
    text = [rng.randrange(5000) for _ in range(3000)]
    answer = list(text)
    for _ in range(40):
        at = rng.randrange(len(answer))
        answer[at : at + rng.randrange(6)] = [rng.randrange(5000) for _ in range(rng.randrange(6))]
    blocks = SequenceMatcher(None, text, answer, autojunk=False).get_matching_blocks()
    assert count_repeated(text, answer) == pytest.approx(sum(block.size for block in blocks), abs=3 * 40)
    assert count_repeated(text, answer) > 2700
