"""`copyspec bench lossless`: how many answers of random conversations differ from plain decoding, and which."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.lab.bench.command import LosslessOptions
from copyspec_engine.lab.bench.lossless_rounds import ROUND, Outcome, ability_of, crowded, rounds, run_round
from copyspec_engine.lab.bench.lossless_ties import Tie, tie_of
from copyspec_engine.lab.display.tables import Table, on_terminal
from copyspec_engine.lab.measuring import Measured, drafting_engine, facts_of_engine
from copyspec_engine.lab.recorded.tiny import write_tiny_model

__all__ = ["TINY", "Tally", "measure_lossless"]

TINY = "tiny"
"""Names a model of random weights that is made for the occasion."""
_SHOWN = 20
"""Differences that are described in the file, at most."""


@dataclass(slots=True)
class Tally:
    """What was seen so far."""

    cases: int = 0
    tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """Cases of each feature."""
    different: Counter[str] = field(default_factory=Counter)
    """Differences of each feature."""
    differing: list[Outcome] = field(default_factory=list)
    ties: list[Tie | None] = field(default_factory=list)
    """How near each of the first differences was to a tie, those that are described."""

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.seen.update(outcome.features)
        if outcome.got is not None:
            self.tokens += len(outcome.got.token_ids)
            self.accepted_tokens += outcome.got.draft_stats.num_accepted_tokens
            self.cached_tokens += outcome.got.usage.cached_tokens
        if not outcome.is_same:
            self.different.update(outcome.features)
            self.differing.append(outcome)

    @property
    def per_1000_tokens(self) -> float:
        """Differing answers per 1,000 tokens written."""
        return 1000 * len(self.differing) / max(self.tokens, 1)

    @property
    def described(self) -> list[dict[str, Any]]:
        """What one needs to know of the first differences."""
        return [
            outcome.described() | {"tie": tie and asdict(tie)}
            for outcome, tie in zip(self.differing, self.ties, strict=False)
        ]

    @property
    def record(self) -> dict[str, Any]:
        """The figures as they go into the file."""
        return {
            "cases": self.cases,
            "differences": len(self.differing),
            "tokens": self.tokens,
            "differences_per_1000_tokens": round(self.per_1000_tokens, 4),
            "accepted_tokens": self.accepted_tokens,
            "cached_tokens": self.cached_tokens,
            "by_feature": {
                name: {"cases": count, "differences": self.different[name]} for name, count in sorted(self.seen.items())
            },
            "differing_cases": [outcome.turn.number for outcome in self.differing],
            "described": self.described,
        }


def measure_lossless(options: LosslessOptions, console: Console) -> Measured:
    """Runs the cases and prints the table; exit code 1 if an answer differs although none may.

    Raises:
        CopySpecError: an option cannot work, or the model cannot be loaded.
    """
    with _opened(options.config) as engine:
        info, before = engine.info, engine.metrics()
        tally = Tally()
        if options.case is None:
            _run_all(engine, options, tally, console)
        else:
            number, at = divmod(options.case, ROUND)
            outcome = run_round(engine, ability_of(engine), options.seed, number)[at]
            tally.add(outcome)
            _print_case(outcome, engine, console)
        preemptions = engine.metrics().num_preemptions - before.num_preemptions
        tally.ties = [tie_of(engine, outcome) for outcome in tally.differing[:_SHOWN]]
    _print(tally, console)
    console.print(escape(f"{_name(options.config)} in {info.dtype}: {info.lossless}"), soft_wrap=True)
    return int(bool(tally.differing) and info.is_lossless), {
        **tally.record,
        **facts_of_engine(info),
        "model": _name(options.config),
        "exact": info.exact,
        "seed": options.seed,
        "preemptions": preemptions,
    }


def _name(config: EngineConfig) -> str:
    """The model as a result may say it: a folder by its last part."""
    return Path(config.model).name if Path(config.model).is_dir() else config.model


@contextmanager
def _opened(config: EngineConfig) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="copyspec-") as folder:
        if config.model == TINY:
            write_tiny_model(Path(folder))
            loaded = config.model_copy(update={"model": folder})
        else:
            loaded = config
        with drafting_engine(crowded(loaded), config.model) as engine:
            yield engine


def _run_all(engine: Engine, options: LosslessOptions, tally: Tally, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("No difference so far", total=options.cases)
        for outcomes in rounds(engine, options.seed, options.cases):
            for outcome in outcomes:
                tally.add(outcome)
            if tally.differing:
                progress.update(task, description=f"{len(tally.differing)} differ")
            progress.advance(task, len(outcomes))


def _print(tally: Tally, console: Console) -> None:
    body = tuple((name, f"{count:,}", f"{tally.different[name]:,}") for name, count in sorted(tally.seen.items()))
    console.print(on_terminal(Table("Beside plain decoding", ("cases with", "answers", "that differ"), body)))
    console.print(
        f"{len(tally.differing):,} of {tally.cases:,} answers differ, {tally.per_1000_tokens:.3g} in 1,000 of their "
        f"{tally.tokens:,} tokens; {tally.accepted_tokens:,} tokens were drafted, {tally.cached_tokens:,} tokens of "
        "prompts reused.",
        soft_wrap=True,
    )
    for found, tie in zip(tally.described, tally.ties, strict=True):
        console.print(
            escape(
                f"case {found['case']} from token {found['position']}: {found['expected']} became {found['got']} "
                f"({', '.join(found['features'])}); {tie or 'their tokens do not part'}"
            ),
            soft_wrap=True,
        )


def _print_case(outcome: Outcome, engine: Engine, console: Console) -> None:
    """All there is to know of one case."""
    turn = outcome.turn
    lines: Sequence[tuple[str, object]] = (
        ("prompt", engine.decode(turn.prompt_ids, skip_special_tokens=False)),
        ("sampling", turn.sampling),
        ("options", turn.options),
        ("grammar", turn.grammar),
        ("cancelled after", turn.cancel_after),
        ("plain decoding", (outcome.expected.text, outcome.expected.token_ids, outcome.expected.finish_reason)),
        (
            "with drafting",
            (outcome.got.text, outcome.got.token_ids, outcome.got.finish_reason) if outcome.got else outcome.error,
        ),
    )
    for name, value in lines:
        console.print(f"[bold]{name}[/]: {escape(str(value))}", soft_wrap=True)
