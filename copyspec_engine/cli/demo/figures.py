"""The demo's figures: one row per turn, the table and the JSON file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from copyspec_engine import EngineInfo, Segment
from copyspec_engine.cli.demo.edits import EditStep, Outcome
from copyspec_engine.cli.demo.frameworks import FrameworkAnswer

__all__ = [
    "GENERATE",
    "LLAMA",
    "LLAMA_NGRAM",
    "LOOKUP",
    "DemoTurn",
    "PeerAnswer",
    "as_json",
    "figures",
    "table",
]


GENERATE, LOOKUP = "generate", "prompt lookup"
LLAMA, LLAMA_NGRAM = "llama.cpp", "llama.cpp, ngram"
"""The peers, as the table calls them."""


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What a peer wrote behind the same prompt."""

    tokens: int
    seconds: float
    """From the call to the whole answer."""
    token_ids: tuple[int, ...] | None = None
    """None for a peer that is compared by its text."""
    text: str | None = None
    """None for a peer that is compared by its tokens alone."""
    write_s: float | None = None
    """Of the seconds, those behind the prompt; None where the peer does not tell."""
    ttft_s: float | None = None
    """From the call to the first piece of the answer; of transformers to the end of the first forward pass."""
    forward_passes: int | None = None
    """Of transformers only."""

    def same_as(self, answer: FrameworkAnswer | PeerAnswer) -> bool:
        """Whether it is the same answer."""
        return self.text == answer.text if self.token_ids is None else self.token_ids == answer.token_ids


@dataclass(frozen=True, slots=True)
class DemoTurn:
    """One turn of the chain and the same turn without drafting; peers where they were asked for."""

    step: EditStep
    pieces: tuple[Segment, ...]
    """The answer as it was shown."""
    answer: FrameworkAnswer
    plain: FrameworkAnswer
    outcome: Outcome
    peers: Mapping[str, PeerAnswer] = field(default_factory=dict)
    """By name; those that took part in this turn."""
    exact: bool = True
    """Whether `generate` must give the same tokens: in float32."""

    @property
    def identical(self) -> bool:
        return self.answer.same_as(self.plain)

    @property
    def equals_generate(self) -> bool | None:
        """None where `generate` was not asked, or its arithmetic is not float32."""
        asked = self.peers.get(GENERATE)
        return asked.same_as(self.plain) if asked is not None and self.exact else None


def as_json(turns: Sequence[DemoTurn], framework: str, info: EngineInfo) -> dict[str, Any]:
    """The figures as they go into the file; a peer's keys are there only if it took part."""
    return {
        "turns": [_turn_json(turn) for turn in turns],
        "framework": framework,
        "model": info.model,
        "device": info.device,
        "dtype": info.dtype,
        "versions": dict(info.versions),
    }


def _turn_json(turn: DemoTurn) -> dict[str, Any]:
    row: dict[str, Any] = {
        "edit": turn.step.edit,
        "tokens": turn.answer.tokens,
        "forward_passes": turn.answer.forward_passes,
        "copied_share": round(turn.answer.copied_share, 4),
        "ttft_s": round(turn.answer.ttft_s, 6),
        "seconds": round(turn.answer.seconds, 6),
        "plain_seconds": round(turn.plain.seconds, 6),
    }
    for name, peer in turn.peers.items():
        key = re.sub(r"\W+", "_", name)
        row[f"{key}_seconds"] = round(peer.seconds, 6)
        if peer.write_s is not None:
            row |= {f"{key}_tokens": peer.tokens, f"{key}_write_seconds": round(peer.write_s, 6)}
            row[f"{key}_same_answer"] = peer.same_as(turn.answer)
    return {
        **row,
        "edit_made": turn.outcome.made,
        "words_off": turn.outcome.words_off,
        "identical": turn.identical,
    }


def table(turns: Sequence[DemoTurn]) -> Table:
    """A column per turn and one for all of them; speed-ups are ratios of wall-clock times."""
    title = "Each turn beside plain decoding of the same prompt"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
    grid.add_column("turn\n", no_wrap=True)
    for number, turn in enumerate(turns, 1):
        grid.add_column(f"{number}\n{turn.step.edit.replace('_', ' ')}", justify="right")
    grid.add_column("all\n", justify="right", style="bold")
    everything = figures(turns)
    columns = [figures([turn]) for turn in turns] + [everything]
    for name in everything:
        cells = (column.get(name, "-") for column in columns)
        grid.add_row(name, *cells, end_section=name in _SECTION_ENDS)
    return grid


_SECTION_ENDS = ("words off", "copied", "time", "over plain", "over generate", "over lookup", "same answer, ngram")


def figures(turns: Sequence[DemoTurn]) -> dict[str, str]:
    """The cells of one column: sums over `turns`, rates and ratios of sums, and the mean time to the first token.

    A peer's cells are there if it took part in each of the turns.
    """

    def total(value: Callable[[DemoTurn], float]) -> float:
        return sum(value(turn) for turn in turns)

    tokens, passes = total(lambda t: t.answer.tokens), total(lambda t: t.answer.forward_passes)
    seconds, plain = total(lambda t: t.answer.seconds), total(lambda t: t.plain.seconds)
    first = total(lambda t: t.answer.ttft_s)
    copied = total(lambda t: t.answer.copied_share * t.answer.tokens)
    made = [turn.outcome.made for turn in turns]
    rows = {
        "edit made": f"{sum(made)} of {len(made)}" if len(turns) > 1 else "yes" if made[0] else "no",
        "words off": f"{total(lambda t: t.outcome.words_off):.0f}",
        "tokens": f"{tokens:.0f}",
        "forward passes": f"{passes:.0f}",
        "tokens per pass": f"{tokens / passes:.1f}",
        "copied": f"{copied / tokens:.0%}",
        "first token after": _time(first / len(turns)),
        "tokens per second": f"{tokens / seconds:.0f}",
        "after the prompt": _rate(tokens - len(turns), seconds - first),
        "time": _time(seconds),
        "plain decoding": _time(plain),
        "over plain": f"{plain / seconds:.1f}x",
    }
    took_part = {name: [t.peers[name] for t in turns] for name in turns[0].peers if all(name in t.peers for t in turns)}
    for name, answers in took_part.items():
        rows |= _peer_figures(name, answers, turns, seconds)
    rows["identical to plain"] = _yes(all(turn.identical for turn in turns))
    if turns[0].equals_generate is not None:
        rows["identical to generate"] = _yes(all(turn.equals_generate for turn in turns))
    return rows


def _peer_figures(name: str, answers: Sequence[PeerAnswer], turns: Sequence[DemoTurn], ours: float) -> dict[str, str]:
    seconds = sum(answer.seconds for answer in answers)
    if name in (GENERATE, LOOKUP):
        return {name: _time(seconds), f"over {name.removeprefix('prompt ')}": f"{seconds / ours:.1f}x"}
    tokens, short = sum(answer.tokens for answer in answers), "ngram" if name == LLAMA_NGRAM else "plain"
    same = [peer.same_as(turn.answer) for peer, turn in zip(answers, turns, strict=True)]
    return {
        name: _time(seconds),
        f"tokens/s, {short}": f"{tokens / seconds:.0f}",
        f"after the prompt, {short}": _rate(tokens, sum(answer.write_s or 0.0 for answer in answers)),
        f"same answer, {short}": f"{sum(same)} of {len(same)}" if len(same) > 1 else "yes" if same[0] else "no",
    }


def _rate(tokens: float, seconds: float) -> str:
    return f"{tokens / seconds:.0f}" if seconds > 0 else "-"


def _yes(same: bool) -> str:
    return "[green]yes[/]" if same else "[bold red]NO[/]"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
