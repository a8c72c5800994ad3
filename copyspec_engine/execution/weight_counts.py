"""Counting the weights that transformers reads, in place of its own bars."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["counting_weights"]

_OF_WEIGHTS = "Loading weights"
"""What transformers calls the bar that counts them."""


@contextmanager
def counting_weights(text: str, on_progress: OnProgress | None) -> Iterator[None]:
    """Tell of each weight that transformers reads in this thread. Its bars do not show; other threads keep theirs.

    Args:
        text: what is being read, in words.
        on_progress: told of the weights, in this thread.
    """
    thread = threading.get_ident()

    def told(done: int, total: int | None) -> None:
        if on_progress is not None:
            on_progress(LoadProgress("read", text, done=done, total=total, unit="it"))

    def make(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:  # noqa: ANN401
        if threading.get_ident() != thread:
            return factory(*args, **options) if previous is None else previous(factory, args, options)
        return _Counted(told if options.get("desc") == _OF_WEIGHTS else lambda _done, _total: None, *args)

    previous = transformers_logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Counted(transformers_logging.EmptyTqdm):
    """Stands in for a bar over an iterable."""

    def __init__(self, told: Callable[[int, int | None], None], *args: Any) -> None:  # noqa: ANN401
        super().__init__(*args)  # type: ignore[no-untyped-call]
        self._told, self._items = told, args[0] if args else ()

    def __iter__(self) -> Iterator[Any]:
        total = len(self._items) if hasattr(self._items, "__len__") else None
        for done, item in enumerate(self._items, 1):
            yield item
            self._told(done, total)
