"""A run in figures: by turn and category, beside plain decoding, and whether both wrote the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from copyspec_engine.evaluation.records import PLAIN, RunFacts, TurnRecord

__all__ = ["ALL", "identical", "rows", "summary"]

ALL = "all"
"""All turns, or all categories, together."""


def summary(facts: RunFacts, records: Sequence[TurnRecord], metrics: dict[str, Any]) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        facts: of the run.
        records: of complete tasks.
        metrics: what the benchmark says of the answers' quality, by name.
    """
    return {
        "benchmark": facts.benchmark,
        "drafter": facts.drafter,
        "model": facts.model,
        "rows": rows(facts, records),
        "identical": identical(facts, records),
        "metrics": metrics,
        "facts": facts.model_dump(mode="json"),
    }


def rows(facts: RunFacts, records: Sequence[TurnRecord]) -> list[dict[str, Any]]:
    """A row for each turn and category, for each turn over all categories, and for everything.

    Rates are sums over sums. `tokens_per_s` counts from the call to the last token, prefill included, `speedup` is that
    over plain decoding of the same turns in the same run; they are None where nothing was timed, and `modelled_speedup`
    is there instead.
    """
    own = [record for record in records if record.writer == facts.drafter]
    plain = [record for record in records if record.writer == PLAIN]
    turns: list[int | str] = [*sorted({record.turn for record in own}), ALL]
    found = []
    for turn in turns:
        of_turn = [record for record in own if turn in (record.turn, ALL)]
        categories = list(dict.fromkeys(record.category for record in of_turn))
        for category in (*categories, ALL) if len(categories) > 1 else categories or ():
            chosen = [record for record in of_turn if category in (record.category, ALL)]
            beside = [r for r in plain if turn in (r.turn, ALL) and category in (r.category, ALL)]
            found.append({"turn": turn, "category": category, **_figures(chosen, beside)})
    return found


def _figures(records: Sequence[TurnRecord], plain: Sequence[TurnRecord]) -> dict[str, Any]:
    tokens = sum(record.num_tokens for record in records)
    passes = sum(record.forward_passes for record in records)
    speed, plain_speed = _tokens_per_s(records), _tokens_per_s(plain)
    modelled = [record.modelled_passes for record in records if record.modelled_passes is not None]
    return {
        "tokens": tokens,
        "forward_passes": passes,
        "tokens_per_forward": round(tokens / passes, 4),
        "tokens_per_s": _rounded(speed),
        "copied_share": round(sum(record.num_copied for record in records) / max(tokens, 1), 4),
        "plain_tokens_per_s": _rounded(plain_speed),
        "speedup": _rounded(speed / plain_speed if speed and plain_speed else None),
        "modelled_speedup": _rounded(tokens / sum(modelled) if modelled else None),
    }


def _tokens_per_s(records: Iterable[TurnRecord]) -> float | None:
    timed = [(record.num_tokens, record.seconds) for record in records]
    seconds = sum(second or 0.0 for _, second in timed)
    return sum(tokens for tokens, _ in timed) / seconds if seconds else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def identical(facts: RunFacts, records: Sequence[TurnRecord]) -> dict[str, int]:
    """Tasks whose turns plain decoding wrote token for token the same, of those that both wrote."""
    tokens: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    for record in sorted(records, key=lambda record: record.turn):
        tokens.setdefault(record.task, {}).setdefault(record.writer, []).append(record.token_ids)
    pairs = [own for own in tokens.values() if facts.drafter != PLAIN and {facts.drafter, PLAIN} <= own.keys()]
    return {"same": sum(own[facts.drafter] == own[PLAIN] for own in pairs), "of": len(pairs)}
