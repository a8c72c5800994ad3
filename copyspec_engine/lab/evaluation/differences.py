"""Answers that are not what plain decoding wrote: where they part, and how near the two tokens were to a tie there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, TurnRecord

__all__ = ["Gap", "differences"]

Gap = Callable[[TurnRecord, int, int], float | None]
"""(plain decoding's record, position, other token) -> by how much the model's logit of plain decoding's token at that
position of the answer is above that of the other one; None if that cannot be said."""


def differences(facts: RunFacts, records: Sequence[TurnRecord], gap: Gap) -> list[dict[str, Any]]:
    """The first place of each task at which the drafter wrote another token than plain decoding.

    What follows such a place is the answer to another prompt, and is not looked at.

    Args:
        facts: of a run with one drafter.
        records: of complete tasks.
        gap: see `Gap`; told of places with a token on both sides.

    Returns:
        {"task", "turn", "position": in tokens of the answer, "gap"} for each.
    """
    plain = {(record.task, record.turn): record for record in records if record.writer == PLAIN}
    found: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record.turn):
        beside = plain.get((record.task, record.turn))
        if record.writer != facts.drafter or beside is None or record.task in found:
            continue
        pairs = enumerate(zip_longest(beside.token_ids, record.token_ids))
        place = next(((at, other) for at, (token, other) in pairs if token != other), None)
        if place is None:
            continue
        at, other = place
        known = other is not None and at < len(beside.token_ids)
        found[record.task] = {
            "task": record.task,
            "turn": record.turn,
            "position": at,
            "gap": gap(beside, at, other) if known else None,
        }
    return list(found.values())
