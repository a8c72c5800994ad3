"""A run in figures: by turn and category, beside plain decoding, and whether both wrote the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS
from copyspec_engine.lab.evaluation.intervals import interval
from copyspec_engine.lab.evaluation.loops import before_loop, loop_tokens, looping
from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, TurnRecord

__all__ = ["ALL", "LENGTHS", "complete_tasks", "histogram", "identical", "rows", "sources", "summary"]

ALL = "all"
"""All turns, or all categories, together."""
LENGTHS = {"0": 0, "1": 1, "2": 2, "3-4": 4, "5-8": 8, "9-16": 16, "17-32": 32, "33-64": 64, "65+": 10**9}
"""Accepted tokens of a pass as a histogram counts them: (name, the most that it counts)."""


def summary(
    facts: RunFacts,
    records: Sequence[TurnRecord],
    metrics: Mapping[str, Any],
    plain_metrics: Mapping[str, Any] | None = None,
    differences: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        facts: of a run with one drafter.
        records: of complete tasks.
        metrics: what the benchmark says of the answers' quality, by name.
        plain_metrics: the same of plain decoding's answers, where it wrote beside the drafter.
        differences: see `differences`.
    """
    return {
        "benchmark": facts.benchmark,
        "drafter": facts.drafter,
        "model": facts.model,
        "num_tasks": len({record.task for record in records}),
        "rows": rows(facts, records),
        "identical": identical(facts, records),
        "differences": list(differences),
        "metrics": dict(metrics),
        "plain_metrics": dict(plain_metrics or {}),
        "facts": facts.model_dump(mode="json"),
    }


def rows(facts: RunFacts, records: Sequence[TurnRecord]) -> list[dict[str, Any]]:
    """A row for each turn and category, for each turn over all categories, and for everything.

    Rates are sums over sums. `tokens_per_s` counts from the call to the last token, prefill included, `speedup` is that
    over plain decoding of the same turns in the same run; they are None where nothing was timed, and `modelled_speedup`
    is there instead. `..._interval` is a 95 % interval, see `interval`. Rows over all categories say besides what is
    left without answers that loop (`without_loops`, see loops.py), and how the other writers of the run did (`peers`).
    """
    own = [record for record in records if record.writer == facts.drafter]
    loops = looping(records)
    turns: list[int | str] = [*sorted({record.turn for record in own}), ALL]
    found = []
    for turn in turns:
        of_turn = [record for record in records if turn in (record.turn, ALL)]
        categories = list(dict.fromkeys(record.category for record in of_turn if record.writer == facts.drafter))
        for category in (*categories, ALL) if len(categories) > 1 else categories or ():
            chosen = [record for record in of_turn if category in (record.category, ALL)]
            row = {"turn": turn, "category": category, **_figures(facts.drafter, chosen)}
            if category == ALL or len(categories) == 1:
                row |= _whole(facts, chosen, loops)
            found.append(row)
    return found


def _figures(drafter: str, records: Sequence[TurnRecord]) -> dict[str, Any]:
    own, plain = _written(records, drafter), _written(records, PLAIN)
    tokens = sum(record.num_tokens for record in own)
    passes = sum(record.forward_passes for record in own)
    modelled = [record.modelled_passes for record in own if record.modelled_passes is not None]
    return {
        "tokens": tokens,
        "forward_passes": passes,
        "tokens_per_forward": round(tokens / passes, 4),
        "tokens_per_forward_interval": _limits(_sums(own, _tokens, _passes)),
        "tokens_per_s": _rounded(_tokens_per_s(own)),
        "copied_share": round(sum(record.num_copied for record in own) / max(tokens, 1), 4),
        "plain_tokens_per_s": _rounded(_tokens_per_s(plain)),
        **_speedup(own, plain),
        "modelled_speedup": _rounded(tokens / sum(modelled) if modelled else None),
    }


def _whole(facts: RunFacts, records: Sequence[TurnRecord], loops: set[tuple[str, int]]) -> dict[str, Any]:
    """What is said of a turn, but not of its categories."""
    own = _written(records, facts.drafter)
    left = [record for record in records if (record.task, record.turn) not in loops]
    names = ("tokens", "tokens_per_forward", "tokens_per_forward_interval", "speedup", "speedup_interval")
    without = _figures(facts.drafter, left) if _written(left, facts.drafter) else {}
    begun = [before_loop(record) for record in own]
    tokens, passes = sum(tokens for tokens, _ in begun), sum((passes for _, passes in begun), 0.0)
    found: dict[str, Any] = {
        "answers": len(own),
        "looping_answers": sum((record.task, record.turn) in loops for record in own),
        "loop_share": round(sum(loop_tokens(r.token_ids) for r in own) / max(sum(map(_tokens, own)), 1), 4),
        "tokens_per_forward_before_loops": round(tokens / passes, 4) if passes else None,
        "without_loops": {name: without[name] for name in names} if without else None,
    }
    peers = [name for name in facts.writers if name not in (facts.drafter, PLAIN)]
    return {**found, "peers": {name: _beside(own, _written(records, name)) for name in peers}} if peers else found


def _beside(own: Sequence[TurnRecord], peer: Sequence[TurnRecord]) -> dict[str, Any]:
    """Figures of another writer, and how much faster the drafter was."""
    ours = {(record.task, record.turn): record.token_ids for record in own}
    return {
        "tokens": sum(map(_tokens, peer)),
        "tokens_per_forward": round(sum(map(_tokens, peer)) / sum(map(_passes, peer)), 4),
        "tokens_per_s": _rounded(_tokens_per_s(peer)),
        **_speedup(own, peer),
        "identical": {
            "same": sum(ours.get((record.task, record.turn)) == record.token_ids for record in peer),
            "of": len(peer),
        },
    }


def _speedup(own: Sequence[TurnRecord], other: Sequence[TurnRecord]) -> dict[str, Any]:
    speed, beside = _tokens_per_s(own), _tokens_per_s(other)
    if not speed or not beside:
        return {"speedup": None, "speedup_interval": None}
    mine, theirs = _sums(own, _tokens, _seconds), _sums(other, _seconds, _tokens)
    both = {task: (*mine[task], *theirs[task]) for task in mine if task in theirs}
    return {"speedup": _rounded(speed / beside), "speedup_interval": _limits(both)}


def _written(records: Iterable[TurnRecord], writer: str) -> list[TurnRecord]:
    return [record for record in records if record.writer == writer]


def _tokens(record: TurnRecord) -> int:
    return record.num_tokens


def _passes(record: TurnRecord) -> int:
    return record.forward_passes


def _seconds(record: TurnRecord) -> float:
    return record.seconds or 0.0


def _sums(records: Iterable[TurnRecord], *values: Callable[[TurnRecord], float]) -> dict[str, tuple[float, ...]]:
    """By task, each of the values over its records."""
    found: dict[str, tuple[float, ...]] = {}
    for record in records:
        before = found.get(record.task, (0.0,) * len(values))
        found[record.task] = tuple(sum_ + value(record) for sum_, value in zip(before, values, strict=True))
    return found


def _limits(sums: Mapping[str, tuple[float, ...]]) -> list[float] | None:
    limits = interval(list(sums.values()))
    return None if limits is None else [round(limit, 4) for limit in limits]


def _tokens_per_s(records: Iterable[TurnRecord]) -> float | None:
    timed = [(record.num_tokens, _seconds(record)) for record in records]
    seconds = sum(second for _, second in timed)
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


def complete_tasks(facts: RunFacts, records: Sequence[TurnRecord]) -> list[TurnRecord]:
    """The records of tasks of which every writer has written every turn of the benchmark."""
    of_task: dict[str, set[tuple[int, str]]] = {}
    for record in records:
        of_task.setdefault(record.task, set()).add((record.turn, record.writer))
    benchmark = BENCHMARKS.get(facts.benchmark)
    num_turns = benchmark.num_turns if benchmark else max((record.turn for record in records), default=0)
    whole = {(turn, writer) for turn in range(1, num_turns + 1) for writer in facts.writers}
    return [record for record in records if of_task[record.task] == whole]


def histogram(records: Iterable[TurnRecord]) -> dict[str, float]:
    """Shares of the passes by accepted draft tokens, as far up as there are any of `LENGTHS`."""
    counts = Counter(
        next(name for name, most in LENGTHS.items() if length <= most)
        for record in records
        for length in record.accepted_lengths
    )
    names = list(LENGTHS)
    longest = max(map(names.index, counts), default=-1)
    return {name: counts[name] / counts.total() for name in names[: longest + 1]}


def sources(records: Iterable[TurnRecord]) -> dict[str, int]:
    """Accepted tokens by where they were copied from, most first."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.accepted_by_source)
    return dict(counts.most_common())
