"""Behaviours of a client: what its users do with a server, one after the other, each of which holds or does not."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["KEY", "Answer", "Behaviour", "Behaviours", "Place", "Result", "same"]

KEY = "conformance"
"""The servers' key."""
Answer: TypeAlias = Any
"""Whatever a client gives; its own types are tested by what is read of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client finds a server.

    Args:
        url: with /v1.
        model: its name.
    """

    url: str
    model: str

    @property
    def is_scripted(self) -> bool:
        """Whether the model says what it is told to."""
        return self.model == "scripted"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One thing that users of a client do.

    Args:
        name: what holds.
        run: takes the place of the server, or a client, and raises where it does not hold.
        is_scripted: it looks at the very words of an answer, which only a scripted model has.
    """

    name: str
    run: Callable[[Any], Awaitable[None] | None]
    is_scripted: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a behaviour.

    Args:
        name: of the behaviour.
        error: why it does not hold; None: it does.
        seconds: that it took.
    """

    name: str
    error: str | None
    seconds: float

    @classmethod
    def of(cls, name: str, run: Callable[[], Awaitable[None] | None]) -> Result:
        """Run a behaviour; an error of any kind is a result too."""
        begin, error = time.perf_counter(), None
        try:
            found = run()
            if inspect.isawaitable(found):
                asyncio.run(_awaited(found))
        except Exception as failure:
            error = _told(failure)
        return cls(name, error, time.perf_counter() - begin)


class Behaviours(list[Behaviour]):
    """The behaviours of one client, in the order in which they are written down."""

    def any_model(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A behaviour that holds with any model; its docstring is its name."""
        return self._added(run, is_scripted=False)

    def scripted(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A behaviour that looks at words which a scripted model says; see `replies.py`."""
        return self._added(run, is_scripted=True)

    def main(self, package: str) -> None:
        """Run them all against the server whose address and model the command line names, and print the results.

        Args:
            package: whose version is told.
        """
        place = Place(*sys.argv[1:])
        self.tell(package, (Result.of(behaviour.name, partial(behaviour.run, place)) for behaviour in self.of(place)))

    def of(self, place: Place) -> list[Behaviour]:
        """Those that hold with a server's model."""
        return [behaviour for behaviour in self if place.is_scripted or not behaviour.is_scripted]

    @staticmethod
    def tell(package: str, results: Iterable[Result]) -> None:
        """Print the version of a package and then results, in lines of JSON."""
        print(json.dumps({"version": importlib.metadata.version(package)}), flush=True)
        for result in results:
            told = {"name": result.name, "error": result.error, "seconds": result.seconds}
            print(json.dumps(told), flush=True)

    def _added(self, run: Callable[[Any], Any], *, is_scripted: bool) -> Callable[[Any], Any]:
        name = (inspect.getdoc(run) or "").partition("\n")[0].removesuffix(".")
        self.append(Behaviour(name, run, is_scripted))
        return run


def same(got: object, expected: object) -> None:
    """Raise unless two values are equal, and tell both."""
    assert got == expected, f"got {got!r} but expected {expected!r}"


async def _awaited(found: Awaitable[None]) -> None:
    await found


def _told(failure: Exception) -> str:
    """An error in one line, with the place in the script where it came from."""
    own = [
        frame
        for frame in traceback.extract_tb(failure.__traceback__)
        if Path(frame.filename).parent == _HERE and frame.name != "same"
    ]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}{where}"


_HERE = Path(__file__).parent
