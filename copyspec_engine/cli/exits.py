"""How a command ends: every expected error as one line and an exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from copyspec_engine import CopySpecError, LoadProgress, OnProgress

__all__ = ["console", "exit_with", "loading"]

BAD_INPUT = 2
INTERRUPTED = 130


def console() -> Console:
    """Standard output, as every command prints to it."""
    return Console(highlight=False)


@contextmanager
def loading(name: str) -> Iterator[OnProgress]:
    """Shows the load of a model on standard error: a bar on a terminal, else a line now and then.

    Args:
        name: the model's.
    """
    errors = Console(stderr=True, highlight=False)
    if not errors.is_terminal:
        yield _Lines(errors).show
        return
    columns = (SpinnerColumn(), TextColumn("{task.description} ..."), BarColumn(), _Amount())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(escape(f"Loading the model {name}"), total=None, unit=None)

        def show(told: LoadProgress) -> None:
            text = escape(told.text[:1].upper() + told.text[1:])
            progress.update(task, description=text, total=told.total, completed=told.done or 0, unit=told.unit)

        yield show


class _Amount(ProgressColumn):
    """How much is done, in the unit of what is counted."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if unit is None:
            return Text()
        return DownloadColumn().render(task) if unit == "B" else MofNCompleteColumn().render(task)


class _Lines:
    """Lines for where no bar can be drawn; none of a load that takes no time."""

    _FIRST_AFTER_S = 2.0
    _BETWEEN_S = 10.0
    """Seconds between two lines of the same phase."""

    def __init__(self, errors: Console) -> None:
        self._errors, self._begin = errors, time.perf_counter()
        self._last: tuple[str | None, float] = (None, 0.0)

    def show(self, told: LoadProgress) -> None:
        now = time.perf_counter()
        phase, at = self._last
        if now - self._begin < self._FIRST_AFTER_S or (told.phase == phase and now - at < self._BETWEEN_S):
            return
        self._last = told.phase, now
        text = str(told)
        self._errors.print(escape(text[:1].upper() + text[1:]), soft_wrap=True)


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
