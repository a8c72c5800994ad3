"""How much of a text an answer repeats, however it was drafted."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["count_repeated"]

_RUN = 4
"""Tokens in a row from which on one goes on in a text behind a place where the answer has left it."""


def count_repeated(text: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens of `text` that `answer` has in the same order, `_RUN` or more in a row, or all of a shorter text.

    From where the answer leaves the text it is taken up again at the first place behind, so that time grows with both
    lengths together.
    """
    run = min(_RUN, len(text))
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for at in range(len(text) - run + 1):
        places[tuple(text[at : at + run])].append(at)
    count = at = place = 0
    while at < len(answer) and place < len(text):
        following = places.get(tuple(answer[at : at + run]), [])
        index = bisect_left(following, place)
        if index == len(following):
            at += 1
            continue
        first = place = following[index]
        while at < len(answer) and place < len(text) and answer[at] == text[place]:
            at, place = at + 1, place + 1
        count += place - first
    return count
