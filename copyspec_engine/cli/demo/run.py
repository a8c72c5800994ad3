"""`copyspec demo`: a document rewritten in a chat, turn by turn, beside plain decoding of the same prompts.

The shown answer is the timed one. Its time is the engine's own (`Timing`), plain decoding has a session of its own so
that it reuses its KV as well, and who goes first alternates from turn to turn.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from copyspec_engine import Engine, EngineConfig, EngineInfo, GenerationRequest, NoDrafter, Segment, shared_engine
from copyspec_engine.cli.demo.chain import ChainTask, chain_for
from copyspec_engine.cli.demo.edits import EditStep, Outcome
from copyspec_engine.cli.demo.figures import DemoTurn, as_json, figures, table
from copyspec_engine.cli.demo.frameworks import Ask, Message, Show, ask_engine, ask_through, check_framework
from copyspec_engine.cli.documents import CHAT_DOCUMENT, Document, load_document
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.files import check_writable, write_text
from copyspec_engine.cli.options import BUNDLED
from copyspec_engine.cli.printing import COPIED, AnswerPrinter

__all__ = ["DemoOptions", "run_demo"]

"""Colour of copied text, here and in `copyspec chat`."""
A = TypeVar("A")
PICTURE_TURNS, PICTURE_WIDTH = 2, 88
ROOM_TOKENS = 64
"""Tokens that an answer may be longer than the text that it rewrites, besides a quarter of it."""
WARM_UP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What was asked for on the command line."""

    config: EngineConfig
    file: str | None = None
    framework: str = "engine"
    compare: bool = False
    json_path: Path | None = None
    svg_path: Path | None = None
    command: str = "copyspec demo"
    """What was typed, for the file of figures."""


def run_demo(options: DemoOptions, console: Console) -> int:
    """Runs the chain and returns the exit code: 0, or 1 if any turn differs from plain decoding or `generate`.

    A turn that differs where the dtype promises no better is told of, and is no failure.

    Raises:
        ConfigError: an input or output path cannot work; found before the model is loaded.
    """
    check_framework(options.framework)
    model = options.config.model
    document = load_document(options.file or (None if model == BUNDLED else CHAT_DOCUMENT))
    task = chain_for(document, model)
    check_writable(options.json_path, "--json")
    check_writable(options.svg_path, "--svg")
    with loading(model) as shown:
        engine = shared_engine(options.config, shown)
        chain = Chain(engine, ask_through(options.framework, engine), task, document, compare=options.compare)
    with chain:
        with console.status("Warming up ..."):
            chain.warm_up()
        _introduce(console, document, engine, options.framework)
        turns = chain.run(console)
    console.print()
    console.print(table(turns))
    for note in chain.notes:
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    if options.json_path is not None:
        from copyspec_engine.lab.measuring import machine

        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = {"command": options.command, "date": now, "machine": machine(engine.info.device)}
        data = {**as_json(turns, options.framework, engine.info), **facts}
        write_text(options.json_path, json.dumps(data, indent=2) + "\n", "--json")
    code = _verdict(turns, engine.info, console)
    if options.svg_path is not None:
        write_text(options.svg_path, _picture(document, engine, options.framework, turns), "--svg")
    return code


def _picture(document: Document, engine: Engine, framework: str, turns: Sequence[DemoTurn]) -> str:
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


def _verdict(turns: Sequence[DemoTurn], info: EngineInfo, console: Console) -> int:
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
    """Rewrites a document step by step: each answer is the text that the next instruction is about.

    Leaving its `with` block ends the peers that were started.
    """

    def __init__(self, engine: Engine, ask: Ask, task: ChainTask, document: Document, *, compare: bool) -> None:
        self._engine, self._task, self._document = engine, task, document
        self._session = f"demo-{uuid.uuid4().hex}"
        self._ask = ask
        self._plain = ask_engine(engine, NoDrafter())
        self._peers = None
        if compare:
            from copyspec_engine.cli.demo.peers import Peers

            self._peers = Peers(engine)

    @property
    def notes(self) -> list[str]:
        """A line for each peer that did not take part to the end."""
        return self._peers.notes if self._peers is not None else []

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        if self._peers is not None:
            self._peers.close()

    def warm_up(self) -> None:
        """Starts the peers and runs every lane once, untimed, in sessions that are then forgotten."""
        messages = self._task.messages(self._document.text, ())
        for ask, session_id in ((self._ask, "warm-up"), (self._plain, "warm-up, plain")):
            ask(messages, session_id, WARM_UP_TOKENS, _show_nothing)
            self._engine.forget(session_id)
        if self._peers is not None:
            self._peers.start_servers(self._document.text)
            self._peers.warm_up(self._engine.tokenize(_request(messages)))

    def run(self, console: Console) -> list[DemoTurn]:
        """The turns, each shown while it is written."""
        answers: list[str] = []
        turns = []
        for number, step in enumerate(self._task.steps, 1):
            before = answers[-1] if answers else self._document.text
            _head(console, number, step)
            show = AnswerPrinter(console)
            turn = self._turn(number, before, answers, show)
            show.end()
            console.print()
            console.print(_summary(turn), style="dim")
            turns.append(turn)
            answers.append(turn.answer.text)
        return turns

    def _turn(self, number: int, before: str, answers: Sequence[str], show: Show) -> DemoTurn:
        swap, step = number % 2 == 0, self._task.steps[number - 1]
        messages, room = self._task.messages(self._document.text, answers), self._room(before)
        pieces: list[Segment] = []

        def show_and_keep(segments: Sequence[Segment]) -> None:
            pieces.extend(segments)
            show(segments)

        answer, plain = _both(
            lambda: self._ask(messages, self._session, room, show_and_keep),
            lambda: self._plain(messages, f"{self._session}, plain", room, _show_nothing),
            swap=swap,
        )
        turn = DemoTurn(step, tuple(pieces), answer, plain, step.judge(before, answer.text))
        if self._peers is None:
            return turn
        peers = self._peers.answer(self._engine.tokenize(_request(messages)), room, backwards=swap)
        return replace(turn, peers=peers, exact=self._engine.info.dtype == "float32")

    def _room(self, text: str) -> int:
        return len(self._engine.encode(text)) * 5 // 4 + ROOM_TOKENS


def _summary(turn: DemoTurn) -> str:
    cells = figures([turn])
    return (
        f"{_edit_in_words(turn.outcome)}. {cells['tokens']} tokens in {cells['forward passes']} forward passes, "
        f"{cells['time']}; plain decoding: {cells['over plain']} as long, "
        f"{'same tokens' if turn.identical else 'OTHER TOKENS'}."
    )


def _edit_in_words(outcome: Outcome) -> str:
    if outcome.made and not outcome.words_off:
        return "Edit made, nothing else changed"
    words = "1 word differs" if outcome.words_off == 1 else f"{outcome.words_off} words differ"
    return f"Edit {'made' if outcome.made else 'not made'}, {words} from the right text"


def _both(first: Callable[[], A], second: Callable[[], A], *, swap: bool) -> tuple[A, A]:
    """The results of both, called one after the other, the second one first if `swap`."""
    if swap:
        later = second()
        return first(), later
    return first(), second()


def _request(messages: Sequence[Message]) -> GenerationRequest:
    return GenerationRequest(messages=tuple(dict(message) for message in messages))


def _show_nothing(_: Sequence[Segment]) -> None:
    """For lanes that are timed only."""
