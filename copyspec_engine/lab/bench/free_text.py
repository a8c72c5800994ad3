"""`copyspec bench free-text`: a model writes as it likes, and what copies and alternatives give there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from copyspec_engine import (
    AdaptiveDrafter,
    DrafterConfig,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.lab.bench.command import FreeTextOptions
from copyspec_engine.lab.display.tables import Table, on_terminal
from copyspec_engine.lab.measuring import Measured, drafting_engine, facts_of_engine
from copyspec_engine.lab.replay import load_cost_curve

__all__ = ["MEASURED", "measure_free_text"]

MEASURED = "measured"
PLAIN = "plain"
WAYS: dict[str, DrafterConfig] = {
    PLAIN: NoDrafter(),
    "copies": AdaptiveDrafter(),
    "copies and recycled": AdaptiveDrafter(recycle=True),
}
PROMPTS = (
    "Tell me a story about a lighthouse.",
    "Explain why the sea is salt.",
    "What is the capital of France, and what can one see there?",
    "Write a list of colours and of birds.",
    "Describe a day in the life of a gardener.",
    "How do I learn to play the piano?",
)


@dataclass(slots=True)
class _Row:
    """What one way wrote at one temperature, in all."""

    temperature: float
    way: str
    tokens: int = 0
    forward_passes: int = 0
    seconds: float = 0.0

    def add(self, output: GenerationOutput) -> None:
        self.tokens += len(output.token_ids)
        self.forward_passes += output.draft_stats.num_forward_passes
        self.seconds += output.timing.total_s

    @property
    def figures(self) -> dict[str, float]:
        return {
            "tokens_per_forward": round(self.tokens / self.forward_passes, 4),
            "tokens_per_s": round(self.tokens / self.seconds, 4),
        }


def measure_free_text(options: FreeTextOptions, console: Console) -> Measured:
    """Writes every prompt every way and prints the table.

    Every answer is of a conversation of its own, so that there is nothing to copy but the prompt and itself. The ways
    write a prompt back to back, each time another one first, so that a machine that slows down slows all of them down.

    Returns:
        Exit code 1 if two ways wrote something else although the dtype promises the same.

    Raises:
        CopySpecError: an option cannot work, or the model cannot be loaded.
    """
    for temperature in options.temperature:
        SamplingParams(temperature=temperature)  # says what is wrong before anything is loaded
    with drafting_engine(_config(options)) as engine, console.status("Writing ...") as status:
        rows: dict[tuple[float, str], _Row] = {}
        identical = True
        for temperature, number, answers in _answers(engine, options):
            status.update(f"Writing at temperature {temperature:g}: {number} ...")
            for way, output in answers.items():
                rows.setdefault((temperature, way), _Row(temperature, way)).add(output)
            identical &= len({output.token_ids for output in answers.values()}) == 1
        results = _results(list(rows.values()))
        info = engine.info
    console.print(on_terminal(_table(results)))
    if not identical:
        console.print("[bold red]The ways wrote different tokens.[/]")
        console.print(f"Promised in {info.dtype}: {info.lossless}.", soft_wrap=True)
    return int(not identical and info.is_lossless), {
        "results": results,
        "identical": identical,
        "prompts": len(PROMPTS),
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "cost_model": options.cost_model,
        **facts_of_engine(info),
    }


def _config(options: FreeTextOptions) -> EngineConfig:
    if options.cost_model == MEASURED:
        return options.config
    return options.config.model_copy(update={"step_cost": load_cost_curve(options.cost_model).points})


def _answers(engine: Engine, options: FreeTextOptions) -> Iterator[tuple[float, int, dict[str, GenerationOutput]]]:
    """(temperature, number of the turn, each way's answer), one prompt after the other."""
    names = list(WAYS)
    _write(engine, names[0], PROMPTS[0], "warm-up", SamplingParams(max_tokens=8))
    for temperature in options.temperature:
        number = 0
        for round_ in range(options.rounds):
            for seed, prompt in enumerate(PROMPTS):
                sampling = SamplingParams(
                    temperature=temperature,
                    seed=seed + len(PROMPTS) * round_,
                    max_tokens=options.max_tokens,
                    ignore_eos=True,
                )
                first = number % len(names)
                number += 1
                yield (
                    temperature,
                    number,
                    {
                        way: _write(engine, way, prompt, f"{way}-{temperature}-{number}", sampling)
                        for way in (*names[first:], *names[:first])
                    },
                )


def _write(engine: Engine, way: str, prompt: str, session_id: str, sampling: SamplingParams) -> GenerationOutput:
    output = engine.generate(
        GenerationRequest(
            messages=[{"role": "user", "content": prompt}],
            drafter=WAYS[way],
            session_id=session_id,
            sampling=sampling,
        )
    )
    engine.forget(session_id)
    return output


def _results(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """The rows with their rates, and their speed over plain decoding at the same temperature."""
    plain = {row.temperature: row for row in rows if row.way == PLAIN}
    return [
        {
            **asdict(row),
            "seconds": round(row.seconds, 4),
            **row.figures,
            "over_plain": round(plain[row.temperature].seconds / row.seconds, 4),
        }
        for row in rows
    ]


def _table(results: Sequence[dict[str, Any]]) -> Table:
    headings = ("temperature", "drafts", "tokens", "tokens per forward", "tokens/second", "over plain")
    body = tuple(
        (
            f"{row['temperature']:g}",
            row["way"],
            f"{row['tokens']}",
            f"{row['tokens_per_forward']:.3f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['over_plain']:.2f}x",
        )
        for row in results
    )
    return Table("Free text", headings, body, 2)
