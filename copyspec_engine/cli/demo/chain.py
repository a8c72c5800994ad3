"""The rewrite chains as data: which edits the demo asks for, turn by turn, and how each kind of model is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from copyspec_engine import ConfigError
from copyspec_engine.cli.demo.edits import EditStep
from copyspec_engine.cli.demo.frameworks import Message
from copyspec_engine.cli.documents import Document, shipped_folder
from copyspec_engine.cli.options import BUNDLED

__all__ = ["ChainTask", "chain_for", "steps_for"]


@dataclass(frozen=True, slots=True)
class ChainTask:
    """The steps of a chain, and how a model is asked for each."""

    steps: tuple[EditStep, ...]
    opening: tuple[Message, ...] = ()
    """What stands before each request: the system message, and worked examples."""
    as_talk: bool = False
    """One growing talk (document, instruction, answer, instruction ...), as the bundled model knows it; else each turn
    is a request of its own that holds the instruction and the text as it is by then."""

    def messages(self, text: str, answers: Sequence[str]) -> list[Message]:
        """The messages of the turn behind `answers`, for a chain that began with `text`."""
        step = self.steps[len(answers)]
        if not self.as_talk:
            return [*self.opening, _user(f"{step.instruction}\n\n{answers[-1] if answers else text}")]
        talk = [*self.opening, _user(text)]
        for earlier, answer in zip(self.steps, answers, strict=False):
            talk += [_user(earlier.instruction), _assistant(answer)]
        return [*talk, _user(step.instruction)]


def chain_for(document: Document, model: str) -> ChainTask:
    """The chain for a document: the bundled model has its own words, any other one is asked as a chat model.

    Raises:
        ConfigError: a step names an edit that does not exist, or lacks one of its texts.
    """
    steps = steps_for(document, model)
    if model == BUNDLED:
        return ChainTask(steps, as_talk=True)
    asked = _read()["chat"]
    opening: list[Message] = [{"role": "system", "content": asked["system"]}]
    for example in asked["examples"]:
        opening += [_user(f"{example['ask']}\n\n{example['text']}"), _assistant(example["answer"])]
    return ChainTask(steps, tuple(opening))


def steps_for(document: Document, model: str = BUNDLED) -> tuple[EditStep, ...]:
    """The steps that `chains.json` holds for a shipped document, or those for any other text.

    Raises:
        ConfigError: see `chain_for`.
    """
    chains = _read()["bundled" if model == BUNDLED else "chat"]["chains"]
    rows = chains[document.name] if document.shipped and document.name in chains else chains["*"]
    return tuple(_step(row) for row in rows)


def _read() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((shipped_folder() / "chains.json").read_text(encoding="utf-8"))
    return data


def _step(row: dict[str, str]) -> EditStep:
    named = {name: text for name, text in row.items() if name not in ("edit", "ask")}
    try:
        step = EditStep(row["edit"], named, row.get("ask", ""))
        step.instruction, step.apply("")
    except KeyError as error:
        raise ConfigError(f"Got the step {row!r} in chains.json but {error} is unknown or missing") from None
    return step


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
