"""`copyspec chat`: a conversation in the terminal, copied text in colour."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copyspec_engine import (
    CopySpecError,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
    shared_engine,
)
from copyspec_engine.adapters.remote import AnyEngine, RemoteEngine
from copyspec_engine.cli.documents import load_document
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.files import check_writable, write_text
from copyspec_engine.cli.printing import COPIED, AnswerPrinter

__all__ = ["run_chat", "run_remote_chat"]

HELP = """\
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer.
/load PATH    put a text file into the conversation, as a message of its own
/system TEXT  what the model is told first; without a TEXT nothing
/stats        figures of the answers so far
/why          where the last answer was copied from
/save PATH    write the conversation as Markdown
/clear        begin a new conversation; of this one only /system is kept
/help         show this
/quit         leave (also Ctrl-D)"""
ReadLine = Callable[[str], str]
"""Prompts for one line, as `input` does: raises EOFError at the end of the input."""


@dataclass
class Chat:
    """A conversation and what its answers cost."""

    engine: AnyEngine
    sampling: SamplingParams
    console: Console
    messages: list[dict[str, str]] = field(default_factory=list)
    outputs: list[GenerationOutput] = field(default_factory=list)
    session_id: str = field(default_factory=lambda: f"chat-{uuid.uuid4().hex}")
    """Nobody else's, in a server that others use too."""

    def say(self, text: str) -> None:
        """One turn; an interrupted answer stays in the conversation as far as it came, one that failed does not."""
        self.messages.append({"role": "user", "content": text})
        request = GenerationRequest(
            messages=tuple(self.messages), sampling=self.sampling, session_id=self.session_id, explain=True
        )
        show, said = AnswerPrinter(self.console), ""
        try:
            for chunk in self.engine.stream(request):
                show(chunk.segments)
                said += chunk.text
                if chunk.output is not None:
                    self.outputs.append(chunk.output)
            show.end()
        except CopySpecError as error:
            self.messages.pop()
            self.console.print(f"[red]{escape(str(error))}[/]")
            return
        except KeyboardInterrupt:
            show.end()
            self.console.print("\n[yellow]stopped[/]")
        self.messages.append({"role": "assistant", "content": said})
        self.console.print()

    def load(self, where: str) -> None:
        """Puts a file into the conversation; the next message can ask about it."""
        try:
            document = load_document(where, option="/load")
        except CopySpecError as error:
            self.console.print(f"[red]{escape(str(error))}[/]")
            return
        self.messages.append({"role": "user", "content": document.text})
        self.console.print(f"Loaded {escape(document.name)}, {len(document.text.split())} words. What about it?")

    def instruct(self, text: str) -> None:
        """Tells the model this before the conversation, from the next answer on; an empty text: nothing."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        self.console.print("The model is told so." if text else "The model is told nothing before the conversation.")

    def clear(self) -> None:
        """Begins anew, and has the engine forget what was said."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.outputs.clear()
        try:
            self.engine.memory(self.session_id).clear()
        except CopySpecError as error:
            self.console.print(f"[red]{escape(str(error))}[/]")
        else:
            self.console.print("A new conversation.")

    def stats(self) -> None:
        """Prints a row per answer."""
        grid = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        for heading in ("#", "prompt", "reused", "tokens", "passes", "per pass", "copied", "per s", "time"):
            grid.add_column(heading, justify="right")
        for number, output in enumerate(self.outputs, 1):
            usage = output.usage
            grid.add_row(
                *map(str, (number, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)),
                str(output.draft_stats.num_forward_passes),
                f"{output.tokens_per_forward:.1f}",
                f"{output.copied_share:.0%}",
                f"{output.tokens_per_s:.0f}",
                f"{output.timing.total_s:.2f} s",
            )
        self.console.print(grid if self.outputs else "No answer yet.")

    def why(self) -> None:
        """Prints the last answer with its sources; messages are counted from 0, as they were said."""
        self.console.print(self.outputs[-1].explanation if self.outputs else "No answer yet.")

    def save(self, where: str) -> None:
        """Writes the conversation, or says why it cannot."""
        path = Path(os.path.expanduser(where))
        parts = [f"## {message['role']}\n\n{message['content']}\n" for message in self.messages]
        try:
            check_writable(path, "/save")
            write_text(path, "\n".join(parts), "/save")
        except CopySpecError as error:
            self.console.print(f"[red]{escape(str(error))}[/]")
        else:
            self.console.print(f"Wrote {len(self.messages)} messages to {escape(str(path))}")


def run_chat(config: EngineConfig, sampling: SamplingParams, console: Console, read_line: ReadLine = input) -> int:
    """Talks until /quit or the end of the input; returns the exit code 0."""
    with loading(config.model) as shown:
        engine = shared_engine(config, shown)
    info = engine.info
    console.print(f"[bold]{escape(info.model)}[/] on {info.device}. [{COPIED}]Copied text is green.[/]")
    if info.drafting_error is not None:
        console.print(f"[yellow]Nothing is drafted:[/] {escape(info.drafting_error)}")
    return talk(Chat(engine, sampling, console), read_line)


def run_remote_chat(
    url: str, model: str | None, sampling: SamplingParams, console: Console, read_line: ReadLine = input
) -> int:
    """As `run_chat`, with a model that a server has.

    Args:
        url: of the server, with a key in COPYSPEC_API_KEY if it needs one.
        model: its name there; None: the server's only one.
        sampling: what a call says of it.
        console: where to print.
        read_line: asks for a line.
    """
    engine = RemoteEngine(url, os.environ.get("COPYSPEC_API_KEY"), model)
    console.print(
        f"[bold]{escape(engine.info.model)}[/] at {escape(engine.base_url)}. [{COPIED}]Copied text is green.[/]"
    )
    return talk(Chat(engine, sampling, console), read_line)


def talk(chat: Chat, read_line: ReadLine) -> int:
    """Talks until /quit or the end of the input; returns the exit code 0."""
    console = chat.console
    console.print(HELP, markup=False)
    is_leaving = False
    while True:
        try:
            line = _read_message(read_line)
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            if is_leaving:
                console.print()
                return 0
            console.print("\nThe conversation is still here. Ctrl-C again leaves.")
            is_leaving = True
            continue
        is_leaving = False
        if line == "/quit":
            return 0
        _carry_out(chat, line)


def _carry_out(chat: Chat, line: str) -> None:
    """What a line asks for: a command, or an answer."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    with_path = {"/load": chat.load, "/save": chat.save}
    others: dict[str, Callable[[], None]] = {
        "/stats": chat.stats,
        "/why": chat.why,
        "/clear": chat.clear,
        "/system": partial(chat.instruct, argument),
        "/help": partial(chat.console.print, HELP, markup=False),
    }
    if command in others:
        others[command]()
    elif command in with_path and argument:
        with_path[command](argument)
    elif command.startswith("/"):
        wrong = f"{command} needs a PATH:" if command in with_path else f"There is no {command}:"
        chat.console.print(f"{wrong}\n{HELP}", markup=False)
    elif line:
        chat.say(line)


def _read_message(read_line: ReadLine) -> str:
    lines = [read_line("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line("  "))
    return "\n".join(lines).strip()
