"""`copyspec demo`: a document rewritten in a chat, turn by turn, beside plain decoding of the same prompts.

The shown answer is the timed one. Its time is the engine's own (`Timing`), plain decoding has a session of its own so
that it reuses its KV as well, and who goes first alternates from turn to turn.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from copyspec_engine import Engine, EngineConfig, EngineInfo, GenerationRequest, NoDrafter, Segment, shared_engine
from copyspec_engine.cli.chain import EditStep, steps_for
from copyspec_engine.cli.documents import Document, load_document
from copyspec_engine.cli.exits import shown_on
from copyspec_engine.cli.frameworks import Ask, Message, Show, ask_engine, ask_through, check_framework
from copyspec_engine.cli.report import Turn, as_json, check_writable, figures, table, write_text

__all__ = ["COPIED", "DemoOptions", "run_demo", "show_on"]

COPIED = "green"
"""Colour of copied text, here and in `copyspec chat`."""
A = TypeVar("A")
PICTURE_TURNS, PICTURE_WIDTH = 2, 88
ROOM_TOKENS = 64
"""Tokens that an answer may be longer than the text that it rewrites, besides a quarter of it."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What was asked for on the command line."""

    config: EngineConfig
    file: str | None = None
    framework: str = "engine"
    compare: bool = False
    json_path: Path | None = None
    svg_path: Path | None = None


def run_demo(options: DemoOptions, console: Console) -> int:
    """Runs the chain and returns the exit code: 0, or 1 if any turn differs from plain decoding or `generate`.

    A turn that differs where the dtype promises no better is told of, and is no failure.

    Raises:
        ConfigError: an input or output path cannot work; found before the model is loaded.
    """
    check_framework(options.framework)
    document = load_document(options.file)
    steps = steps_for(document)
    for path, option in ((options.json_path, "--json"), (options.svg_path, "--svg")):
        if path is not None:
            check_writable(path, option)
    with console.status(f"Loading the model {escape(options.config.model)} ...") as status:
        engine = shared_engine(options.config, shown_on(status))
        chain = Chain(engine, ask_through(options.framework, engine), compare=options.compare)
        chain.warm_up(document)
    _introduce(console, document, engine, options.framework)
    turns = chain.run(document, steps, console)
    console.print()
    console.print(table(turns))
    if options.json_path is not None:
        data = as_json(turns, options.framework, engine.info)
        write_text(options.json_path, json.dumps(data, indent=2) + "\n", "--json")
    code = _verdict(turns, engine.info, console)
    if options.svg_path is not None:
        write_text(options.svg_path, _picture(document, engine, options.framework, turns), "--svg")
    return code


def _picture(document: Document, engine: Engine, framework: str, turns: Sequence[Turn]) -> str:
    """The first turns and the table once more, as an SVG image of a terminal that wraps long lines."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=PICTURE_WIDTH, file=nowhere, highlight=False)
        _introduce(console, document, engine, framework)
        for number, turn in enumerate(turns[:PICTURE_TURNS], 1):
            _head(console, number, turn.step)
            console.print(Text.assemble(*((piece.text, COPIED if piece.copied else "") for piece in turn.pieces)))
            console.print(_summary(turn), style="dim")
        console.print("\n...\n")
        console.print(table(turns))
        # Without the web fonts that Rich names: the picture needs nothing from elsewhere.
        return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="copyspec demo"), flags=re.DOTALL)


def _head(console: Console, number: int, step: EditStep) -> None:
    console.print()
    console.print(Text(f"{number}. {step.instruction}", style="bold cyan"))


def _introduce(console: Console, document: Document, engine: Engine, framework: str) -> None:
    info = engine.info
    words = len(document.text.split())
    console.print(
        f"[bold]{escape(document.name)}[/] ({words} words), rewritten through [bold]{framework}[/] with the model "
        f"[bold]{escape(info.model)}[/] on {info.device} in {info.dtype}. [{COPIED}]Copied text is green.[/]",
        highlight=False,
    )


def _verdict(turns: Sequence[Turn], info: EngineInfo, console: Console) -> int:
    wrong = [number for number, turn in enumerate(turns, 1) if not turn.identical]
    if wrong:
        colour = "bold red" if info.is_lossless else "yellow"
        console.print(f"[{colour}]Turns {wrong} differ from plain decoding.[/]")
        console.print(f"Promised in {info.dtype}: {info.lossless}.", soft_wrap=True)
    unlike = [number for number, turn in enumerate(turns, 1) if turn.equals_generate is False]
    if unlike:
        console.print(f"[bold red]Turns {unlike} differ from transformers generate.[/]")
    if not wrong and not unlike:
        checked = any(turn.equals_generate is not None for turn in turns)
        console.print(f"All {len(turns)} turns are identical to plain decoding{' and to generate' if checked else ''}.")
    return int(bool(wrong and info.is_lossless) or bool(unlike))


class Chain:
    """Rewrites a document step by step: each answer is the text that the next instruction is about."""

    def __init__(self, engine: Engine, ask: Ask, *, compare: bool) -> None:
        self._engine = engine
        self._session = f"demo-{uuid.uuid4().hex}"
        self._ask = ask
        self._plain = ask_engine(engine, NoDrafter())
        self._peers = None
        if compare:
            from copyspec_engine.cli.compare import Peers

            self._peers = Peers(engine.info, trust_remote_code=engine.config.trust_remote_code)

    def warm_up(self, document: Document) -> None:
        """Runs every lane once, untimed, in sessions that are then forgotten."""
        messages = [_user(document.text), _user("Repeat the document.")]
        for ask, session_id in ((self._ask, "warm-up"), (self._plain, "warm-up, plain")):
            ask(messages, session_id, 32, _show_nothing)
            self._engine.forget(session_id)
        if self._peers is not None:
            prompt_ids = self._engine.tokenize(_request(messages))
            self._peers.greedy(prompt_ids, 4)
            self._peers.prompt_lookup(prompt_ids, 4)

    def run(self, document: Document, steps: Sequence[EditStep], console: Console) -> list[Turn]:
        messages: list[Message] = [_user(document.text)]
        text, turns = document.text, []
        for number, step in enumerate(steps, 1):
            messages.append(_user(step.instruction))
            _head(console, number, step)
            turn = self._turn(number, step, messages, self._room(text), show_on(console))
            console.print()
            console.print(_summary(turn), style="dim")
            turns.append(turn)
            text = turn.answer.text
            messages.append({"role": "assistant", "content": text})
        return turns

    def _room(self, text: str) -> int:
        return len(self._engine.encode(text)) * 5 // 4 + ROOM_TOKENS

    def _turn(self, number: int, step: EditStep, messages: Sequence[Message], room: int, show: Show) -> Turn:
        swap = number % 2 == 0
        pieces: list[Segment] = []

        def show_and_keep(segments: Sequence[Segment]) -> None:
            pieces.extend(segments)
            show(segments)

        answer, plain = _both(
            lambda: self._ask(messages, self._session, room, show_and_keep),
            lambda: self._plain(messages, f"{self._session}, plain", room, _show_nothing),
            swap=swap,
        )
        if self._peers is None:
            return Turn(step, tuple(pieces), answer, plain)
        peers = self._peers
        prompt_ids = self._engine.tokenize(_request(messages))
        greedy, lookup = _both(
            lambda: peers.greedy(prompt_ids, room), lambda: peers.prompt_lookup(prompt_ids, room), swap=swap
        )
        exact = self._engine.info.dtype == "float32"
        same = greedy.token_ids == plain.token_ids if exact else None
        return Turn(step, tuple(pieces), answer, plain, greedy.seconds, lookup.seconds, same)


def _summary(turn: Turn) -> str:
    cells = figures([turn])
    return (
        f"{cells['tokens']} tokens in {cells['forward passes']} forward passes, {cells['time']}; plain decoding: "
        f"{cells['speed-up over plain']} as long, {'same tokens' if turn.identical else 'OTHER TOKENS'}"
    )


def _both(first: Callable[[], A], second: Callable[[], A], *, swap: bool) -> tuple[A, A]:
    """The results of both, called one after the other, the second one first if `swap`."""
    if swap:
        later = second()
        return first(), later
    return first(), second()


def _request(messages: Sequence[Message]) -> GenerationRequest:
    return GenerationRequest(messages=tuple(dict(message) for message in messages))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _show_nothing(_: Sequence[Segment]) -> None:
    """For lanes that are timed only."""


def show_on(console: Console) -> Show:
    """Prints pieces of an answer as they come, copied text in colour."""

    def show(segments: Sequence[Segment]) -> None:
        for segment in segments:
            console.print(Text(segment.text, style=COPIED if segment.copied else ""), end="", soft_wrap=True)

    return show
