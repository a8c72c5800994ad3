"""How a command ends: every expected error as one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from copyspec_engine import CopySpecError, LoadProgress

__all__ = ["console", "exit_with", "shown_on"]

BAD_INPUT = 2
INTERRUPTED = 130


def console() -> Console:
    """Standard output, as every command prints to it."""
    return Console(highlight=False)


def shown_on(status: Status) -> Callable[[LoadProgress], None]:
    """Shows each phase of loading beside a spinner."""

    def show(progress: LoadProgress) -> None:
        text = str(progress)
        status.update(f"{escape(text[:1].upper() + text[1:])} ...")

    return show


def exit_with(run: Callable[[], int]) -> None:
    """Ends the program with what `run` returns; an expected error is one line on standard error."""
    errors = Console(stderr=True, highlight=False)
    try:
        code = run()
    except CopySpecError as error:
        errors.print(f"[red]Error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        code = BAD_INPUT
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        code = INTERRUPTED
    raise typer.Exit(code)
