"""The bar that shows a load to whoever has not said what is to be told of it."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["progress_bar"]

_APPEARS_AFTER_S = 1.0
"""A load that is over sooner shows nothing."""


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar in a notebook, or on standard error where that is a terminal; elsewhere nothing is shown.

    It goes away when the load is over. It is tqdm's, which transformers brings along; TQDM_DISABLE=1 turns it off.
    """
    in_notebook = "ipykernel" in sys.modules
    if not (in_notebook or sys.stderr.isatty()) or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    bar = _Bar()
    try:
        yield bar.show
    finally:
        bar.close()


class _Bar:
    """A tqdm bar, made anew for each thing that is counted: tqdm's know one unit."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._bar: Any = None
        self._counts: tuple[int | None, str | None] | None = None

    def show(self, progress: LoadProgress) -> None:
        if time.perf_counter() - self._begin < _APPEARS_AFTER_S:
            return
        counts = (progress.total, progress.unit)
        if self._bar is None or counts != self._counts:
            self.close()
            self._bar, self._counts = _new_bar(progress), counts
        self._bar.set_description_str(progress.text, refresh=False)
        self._bar.n = progress.done or 0
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _new_bar(progress: LoadProgress) -> Any:  # noqa: ANN401 - tqdm has no types
    from tqdm.auto import tqdm

    is_bytes = progress.unit == "B"
    shape = {} if progress.done is not None else {"bar_format": "{desc} ..."}
    return tqdm(total=progress.total, unit=progress.unit or "it", unit_scale=is_bytes, leave=False, **shape)
