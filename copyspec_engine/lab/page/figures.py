"""The figures of some answers together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from copyspec_engine.lab.evaluation.records import TurnRecord
from copyspec_engine.lab.page.transcript import ShownAnswer
from copyspec_engine.values.outputs import NOT_COPIED

__all__ = ["Figures"]


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over answers, and rates of sums."""

    answers: int
    tokens: int
    passes: int
    copied: int
    by_source: dict[str, int]
    """Copied tokens, most first."""
    seconds: float | None
    """Prefill and decoding; None unless all were timed."""
    plain_seconds: float | None
    speedup: float | None
    """In tokens per second, over plain decoding of the same turns; None unless both wrote and timed all of them."""
    modelled_speedup: float | None
    """Tokens over the cost of the passes in passes of one token; None unless no model ran."""
    same: int | None
    """Answers that plain decoding wrote token for token the same; None unless it wrote all of them."""

    @classmethod
    def of(cls, answers: Sequence[ShownAnswer]) -> Figures:
        """The figures of at least one answer."""
        own = [answer.record for answer in answers]
        plain = [answer.plain for answer in answers if answer.plain is not None]
        has_plain = len(plain) == len(own)
        sources: Counter[str] = Counter()
        for record in own:
            sources.update({name: n for name, n in record.accepted_by_source.items() if name not in NOT_COPIED})
        tokens, seconds = sum(record.num_tokens for record in own), _seconds(own)
        plain_seconds = _seconds(plain) if has_plain else None
        modelled = sum(record.modelled_passes or 0.0 for record in own)
        speedup = None
        if seconds and plain_seconds:
            speedup = tokens / seconds / (sum(record.num_tokens for record in plain) / plain_seconds)
        return cls(
            answers=len(own),
            tokens=tokens,
            passes=sum(record.forward_passes for record in own),
            copied=sum(record.num_copied for record in own),
            by_source=dict(sources.most_common()),
            seconds=seconds,
            plain_seconds=plain_seconds,
            speedup=speedup,
            modelled_speedup=tokens / modelled if modelled else None,
            same=sum(a.token_ids == b.token_ids for a, b in zip(own, plain, strict=True)) if has_plain else None,
        )

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.passes

    @property
    def copied_share(self) -> float:
        """Share of the tokens that were copied, 0 to 1."""
        return self.copied / max(self.tokens, 1)


def _seconds(records: Iterable[TurnRecord]) -> float | None:
    times = [record.seconds for record in records]
    timed = [time for time in times if time is not None]
    return sum(timed) if timed and len(timed) == len(times) else None
