"""What is told of loading a model while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["LoadPhase", "LoadProgress", "OnProgress"]

LoadPhase = Literal["download", "convert", "read", "check", "measure", "compile"]
"""What loading is doing: fetching files, changing their form, reading weights, comparing passes with the model's own,
timing passes, compiling the drafting code."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One report of a load; `str` gives it in words.

    Args:
        phase: what is being done.
        text: the same in words, with the name of the model: "reading the weights of NAME".
        done: how much of it is done, from 0 to `total`; None where that is not counted.
        total: how much there is to do; None where that is not known.
        unit: "B" for bytes, "it" for things such as tensors; None where nothing is counted.
    """

    phase: LoadPhase
    text: str
    done: int | None = None
    total: int | None = None
    unit: Literal["B", "it"] | None = None

    def __str__(self) -> str:
        if self.done is None:
            return self.text
        scale, name = (1e-6, " MB") if self.unit == "B" else (1, "")
        amounts = (f"{amount * scale:,.0f}" for amount in (self.done, self.total) if amount is not None)
        return f"{self.text}: {' of '.join(amounts)}{name}"


OnProgress = Callable[[LoadProgress], None]
"""Told of a load, report by report."""
