"""What figures were measured on, in words: hardware, model, date and command stand beside every table and plot."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

__all__ = ["day", "hardware", "model_name", "shortened"]

MOST_VALUES = 2
"""Values of an option that are shown; the names of nine files say no more than that of the first."""


def hardware(machine: Mapping[str, Any], device: str = "cpu") -> str:
    """The GPU if there is one and it was used, else the threads that the CPU runs at once."""
    if device.startswith("cuda") and machine.get("gpu"):
        return str(machine["gpu"])
    threads = f"{machine.get('cpu_cores') or '?'} CPU threads"
    return f"{threads} ({machine['cpu']})" if machine.get("cpu") else threads


def day(date: str | None) -> str:
    """The day of an ISO date, or that there is none."""
    return date[:10] if date else "date not recorded"


def shortened(command: str) -> str:
    """A command without where it wrote its figures, and without all but the first of more than two values."""
    words: list[str] = []
    values: list[str] = []
    for word in [*shlex.split(command), "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if words and words[-1] in ("--json", "--output"):
            words.pop()
            values = values[1:]
        many = bool(words) and len(values) > MOST_VALUES
        words += [shlex.quote(values[0]), f"...({len(values) - 1} more)"] if many else map(shlex.quote, values)
        words.append(word)
        values = []
    return " ".join(words[:-1])


def model_name(model: str) -> str:
    """The model of a run; one that replayed records has none."""
    return model or "no model, recorded answers replayed"
