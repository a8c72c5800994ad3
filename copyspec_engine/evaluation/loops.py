"""Answers that go round in circles: a small model repeats itself, and what it repeats is easy to copy.

Figures without such answers say what drafting is worth where a model says something new. An answer loops if it holds
some run of `LENGTH` tokens more than `OFTEN` times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from copyspec_engine.evaluation.records import TurnRecord

__all__ = ["LENGTH", "OFTEN", "RULE", "before_loop", "loop_tokens", "looping"]

LENGTH, OFTEN = 8, 2
RULE = "A token is in a loop if it ends a run of 8 tokens that the answer held twice before."


def loop_tokens(token_ids: Sequence[int]) -> int:
    """How many tokens of an answer are in a loop: each ends a run of 8 tokens that was there twice before."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = 0
    for end in range(LENGTH, len(token_ids) + 1):
        run = tuple(token_ids[end - LENGTH : end])
        found += seen[run] >= OFTEN
        seen[run] += 1
    return found


def before_loop(record: TurnRecord) -> tuple[int, int]:
    """(tokens, forward passes) of an answer up to the pass that wrote its first token in a loop, that one left out.

    All of the answer where nothing loops. Passes that wrote no more than a token count as one token each.
    """
    first = next((end for end in range(1, record.num_tokens + 1) if loop_tokens(record.token_ids[:end])), None)
    if first is None:
        return record.num_tokens, record.forward_passes
    lengths = record.accepted_lengths or (0,) * record.forward_passes
    tokens = passes = 0
    for accepted in lengths:
        if tokens + accepted + 1 >= first:
            break
        tokens += accepted + 1
        passes += 1
    return tokens, passes


def looping(records: Iterable[TurnRecord]) -> set[tuple[str, int]]:
    """(task, turn) of the answers with a token in a loop, whoever wrote them."""
    return {(record.task, record.turn) for record in records if loop_tokens(record.token_ids)}
