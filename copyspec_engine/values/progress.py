"""What is told of loading a model while it goes on, and the bar for whoever has not said what is to be told."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "LoadPhase",
    "LoadProgress",
    "OnProgress",
    "progress_bar",
]


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


_APPEARS_AFTER_S = 1.0
"""A load that is over sooner shows nothing."""


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar in a notebook, or on standard error where that is a terminal; elsewhere nothing is shown.

    It goes away when the load is over; a terminal that hangs up meanwhile costs the bar, not the load. It is tqdm's,
    which transformers brings along; TQDM_DISABLE=1 turns it off.
    """
    in_notebook = "ipykernel" in sys.modules
    if not (in_notebook or _has_terminal()) or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    bar = _Bar()
    try:
        yield bar.show
    finally:
        bar.close()


def _has_terminal() -> bool:
    stream: Any = sys.stderr
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, as without a console; an object that knows no terminals; closed
        return False


class _Bar:
    """A tqdm bar, made anew for each thing that is counted: tqdm's know one unit."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # Before others import it: a notebook without widgets has a bar of characters, and needs no advice.
            warnings.simplefilter("ignore")
            self._tqdm: Any = importlib.import_module("tqdm.auto").tqdm
        self._begin = time.perf_counter()
        self._bar: Any = None
        self._counts: tuple[int | None, str | None] | None = None
        self._is_gone = False
        """What it was drawn on."""

    def show(self, progress: LoadProgress) -> None:
        if self._is_gone or time.perf_counter() - self._begin < _APPEARS_AFTER_S:
            return
        try:
            self._draw(progress)
        except OSError:
            self._is_gone = True

    def _draw(self, progress: LoadProgress) -> None:
        counts = (progress.total, progress.unit)
        if self._bar is None or counts != self._counts:
            self.close()
            self._bar, self._counts = self._made(progress), counts
        self._bar.set_description_str(progress.text, refresh=False)
        self._bar.n = progress.done or 0
        self._bar.refresh()

    def _made(self, progress: LoadProgress) -> Any:  # noqa: ANN401 - tqdm has no types
        is_bytes = progress.unit == "B"
        shape = {} if progress.done is not None else {"bar_format": "{desc} ..."}
        unit = progress.unit or "it"
        return self._tqdm(total=progress.total, unit=unit, unit_scale=is_bytes, leave=False, **shape)

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.close()
            except OSError:
                self._is_gone = True
