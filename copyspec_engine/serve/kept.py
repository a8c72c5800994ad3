"""What the server keeps of calls that are over, for those who ask for it later: a bounded number of things."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.outputs import GenerationOutput

__all__ = ["Answered", "Kept", "StoredConversation", "StoredResponse", "Told"]

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Answered:
    """A call that was answered: what `Engine.explain` needs of it."""

    requests: tuple[GenerationRequest, ...]
    """One for each answer."""
    outputs: tuple[GenerationOutput, ...]
    """Theirs, in the same order."""


@dataclass(frozen=True, slots=True)
class Told:
    """What was said so far, to go on from: by a response, or in a conversation."""

    items: tuple[Mapping[str, Any], ...] = ()
    """As OpenAI's responses have it."""
    messages: tuple[dict[str, Any], ...] = ()
    """The same for the chat template, without instructions."""
    named: str | None = None
    """The conversation that it belongs to, as the client calls it; None: one that nobody has named."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, for those who ask for it by its id or go on from it."""

    body: Mapping[str, Any]
    """As it was given."""
    asked: tuple[Mapping[str, Any], ...]
    """The items of its input, those of earlier responses included."""
    told: Told
    """All of it, with its output."""
    session: str | None
    """The engine's name of its conversation."""


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation that was made to be gone on with by name."""

    body: Mapping[str, Any]
    told: Told
    num_tokens: int
    """What it counted for when it was made."""


class Kept(Generic[Thing]):
    """Things of one tenant by their ids; those that were not used for longest go first. For one event loop.

    Args:
        max_things: of them.
        max_tokens: of all of them together; one that is larger by itself is not kept.
    """

    def __init__(self, max_things: int, max_tokens: int) -> None:
        self._max_things, self._max_tokens = max_things, max_tokens
        self._things: OrderedDict[str, tuple[Thing, int]] = OrderedDict()
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._things)

    def __iter__(self) -> Iterator[Thing]:
        """The one that was not used for longest first."""
        return iter([thing for thing, _ in self._things.values()])

    def keep(self, name: str, thing: Thing, num_tokens: int) -> None:
        """Keep a thing, in place of one with this id."""
        self.pop(name)
        if num_tokens > self._max_tokens:  # the others would go for nothing
            return
        self._things[name] = thing, num_tokens
        self._num_tokens += num_tokens
        while len(self._things) > self._max_things or self._num_tokens > self._max_tokens:
            self.pop(next(iter(self._things)))

    def get(self, name: str) -> Thing | None:
        """The thing of an id; None: there is none, or not any more."""
        if name not in self._things:
            return None
        self._things.move_to_end(name)
        return self._things[name][0]

    def pop(self, name: str) -> Thing | None:
        """Keep it no longer. Gives what was kept."""
        if name not in self._things:
            return None
        thing, num_tokens = self._things.pop(name)
        self._num_tokens -= num_tokens
        return thing

    def drop(self, unwanted: Callable[[Thing], bool]) -> int:
        """Keep those no longer that are `unwanted`. Gives how many they were."""
        names = [name for name, (thing, _) in self._things.items() if unwanted(thing)]
        for name in names:
            self.pop(name)
        return len(names)
