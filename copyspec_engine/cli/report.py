"""The demo's figures: one row per turn, the table and the JSON file."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine import ConfigError, EngineInfo, Segment
from copyspec_engine.cli.chain import EditStep
from copyspec_engine.cli.frameworks import Answer
from copyspec_engine.evaluation.files import write_text

__all__ = ["Turn", "as_json", "check_writable", "figures", "table", "write_record", "write_text"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the chain and the same turn without drafting; peers where they were asked for."""

    step: EditStep
    pieces: tuple[Segment, ...]
    """The answer as it was shown."""
    answer: Answer
    plain: Answer
    generate_s: float | None = None
    prompt_lookup_s: float | None = None
    equals_generate: bool | None = None
    """Whether `generate` gave the same tokens; None where it was not asked, or its arithmetic is not float32."""

    @property
    def identical(self) -> bool:
        return self.answer.same_as(self.plain)


def as_json(turns: Sequence[Turn], framework: str, info: EngineInfo) -> dict[str, Any]:
    """The figures as they go into the file; the peers' keys are there only if the peers ran."""
    return {
        "turns": [_turn_json(turn) for turn in turns],
        "framework": framework,
        "model": info.model,
        "device": info.device,
        "versions": dict(info.versions),
    }


def _turn_json(turn: Turn) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tokens": turn.answer.tokens,
        "forward_passes": turn.answer.forward_passes,
        "copied_share": round(turn.answer.copied_share, 4),
        "ttft_s": round(turn.answer.ttft_s, 6),
        "seconds": round(turn.answer.seconds, 6),
        "plain_seconds": round(turn.plain.seconds, 6),
    }
    if turn.generate_s is not None and turn.prompt_lookup_s is not None:
        row["generate_seconds"] = round(turn.generate_s, 6)
        row["prompt_lookup_seconds"] = round(turn.prompt_lookup_s, 6)
    return {**row, "identical": turn.identical}


def table(turns: Sequence[Turn]) -> Table:
    """A column per turn and one for all of them; speed-ups are ratios of wall-clock times."""
    title = "Each turn beside plain decoding of the same prompt"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
    grid.add_column("turn\n", no_wrap=True)
    for number, turn in enumerate(turns, 1):
        grid.add_column(f"{number}\n{turn.step.edit.replace('_', ' ')}", justify="right")
    grid.add_column("all\n", justify="right", style="bold")
    columns = [figures([turn]) for turn in turns] + [figures(turns)]
    for name in columns[0]:
        grid.add_row(name, *(column[name] for column in columns), end_section=name in _SECTION_ENDS)
    return grid


_SECTION_ENDS = ("copied", "speed-up over plain", "speed-up over lookup")


def figures(turns: Sequence[Turn]) -> dict[str, str]:
    """The cells of one column: sums over `turns`, rates and ratios of sums, and the mean time to the first token."""

    def total(value: Callable[[Turn], float]) -> float:
        return sum(value(turn) for turn in turns)

    tokens, passes = total(lambda t: t.answer.tokens), total(lambda t: t.answer.forward_passes)
    seconds, plain = total(lambda t: t.answer.seconds), total(lambda t: t.plain.seconds)
    copied = total(lambda t: t.answer.copied_share * t.answer.tokens)
    rows = {
        "tokens": f"{tokens:.0f}",
        "forward passes": f"{passes:.0f}",
        "tokens per pass": f"{tokens / passes:.1f}",
        "copied": f"{copied / tokens:.0%}",
        "first token after": _time(total(lambda t: t.answer.ttft_s) / len(turns)),
        "tokens per second": f"{tokens / seconds:.0f}",
        "time": _time(seconds),
        "plain decoding": _time(plain),
        "speed-up over plain": f"{plain / seconds:.1f}x",
    }
    if turns[0].generate_s is not None:
        lookup = total(lambda t: t.prompt_lookup_s or 0.0)
        rows["generate"] = _time(total(lambda t: t.generate_s or 0.0))
        rows["prompt lookup"] = _time(lookup)
        rows["speed-up over lookup"] = f"{lookup / seconds:.1f}x"
    rows["identical to plain"] = _yes(all(turn.identical for turn in turns))
    if turns[0].equals_generate is not None:
        rows["identical to generate"] = _yes(all(turn.equals_generate for turn in turns))
    return rows


def _yes(same: bool) -> str:
    return "[green]yes[/]" if same else "[bold red]NO[/]"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def check_writable(path: Path, option: str) -> None:
    """Raises `ConfigError` now, rather than after minutes of work, if `write_text` could not write here."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"Got {option} {path}, which is not a file: name a file, it is made if it is not there")
    if not path.parent.is_dir():
        raise ConfigError(f"Got {option} {path} but there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"Got {option} {path} but the folder {path.parent} is not writable: choose another")


def write_record(path: Path, record: dict[str, Any], console: Console) -> None:
    """Write a benchmark's figures and the time as JSON, and say so. Raises as `write_text` does."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_text(path, json.dumps({**record, "date": now}, indent=1) + "\n", "--json")
    console.print(f"Wrote {escape(str(path))}", soft_wrap=True)
