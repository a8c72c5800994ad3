"""Answers that go round in circles: a small model repeats itself, and what it repeats is easy to copy.

Figures without such answers say what drafting is worth where a model says something new. An answer loops if it holds
some run of `LENGTH` tokens more than `OFTEN` times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from copyspec_engine.lab.evaluation.records import TurnRecord

__all__ = ["LENGTH", "OFTEN", "RULE", "before_loop", "loop_tokens", "looping"]

LENGTH, OFTEN = 8, 2
RULE = "A token is in a loop if it ends a run of 8 tokens that the answer held twice before."


def loop_tokens(token_ids: Sequence[int]) -> int:
    """How many tokens of an answer are in a loop: each ends a run of 8 tokens that was there twice before."""
    return sum(1 for _ in _places(token_ids))


def _places(token_ids: Sequence[int]) -> Iterator[int]:
    """Numbers of the tokens in loops, the answer's first one being 1."""
    seen: Counter[tuple[int, ...]] = Counter()
    for end in range(LENGTH, len(token_ids) + 1):
        run = tuple(token_ids[end - LENGTH : end])
        if seen[run] >= OFTEN:
            yield end
        seen[run] += 1


def before_loop(record: TurnRecord) -> tuple[int, float]:
    """(tokens, forward passes) of an answer in front of its first token in a loop; all of it where nothing loops.

    Of the pass that wrote that token, the share of its tokens in front of it counts.
    """
    first = next(_places(record.token_ids), None)
    if first is None:
        return record.num_tokens, record.forward_passes
    written, passes = 0, 0.0
    for accepted in record.accepted_lengths or (0,) * record.forward_passes:
        share = min((first - 1 - written) / (accepted + 1), 1.0)
        written, passes = written + accepted + 1, passes + share
        if share < 1:
            break
    return first - 1, passes


def looping(records: Iterable[TurnRecord]) -> set[tuple[str, int]]:
    """(task, turn) of the answers with a token in a loop, whoever wrote them."""
    return {(record.task, record.turn) for record in records if loop_tokens(record.token_ids)}
