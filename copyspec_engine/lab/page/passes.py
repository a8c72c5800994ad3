"""What each forward pass of an answer wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from copyspec_engine.lab.evaluation.records import TurnRecord

__all__ = ["Decode", "pass_ends"]

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, without special tokens."""


def pass_ends(record: TurnRecord, decode: Decode) -> tuple[int, ...]:
    """How many characters of the answer were complete after each pass; empty if the tokens do not give its text.

    A pass writes what it accepted and one token more, the last one perhaps not: an accepted token may end the answer.
    """
    stops = [min(stop, record.num_tokens) for stop in accumulate(n + 1 for n in record.accepted_lengths)]
    pieces = [decode(record.token_ids[start:stop]) for start, stop in pairwise((0, *stops))]
    if "".join(pieces) == record.text:
        return tuple(accumulate(map(len, pieces)))
    # Tokens that mean something else at the beginning of a text, or are parts of characters.
    texts = [decode(record.token_ids[:stop]).rstrip("\N{REPLACEMENT CHARACTER}") for stop in stops]
    return (
        tuple(map(len, texts)) if texts and texts[-1] == record.text and all(map(record.text.startswith, texts)) else ()
    )
