"""`copyspec explain`: the answers of a run as one HTML file that shows where each part was copied from."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from copyspec_engine import ConfigError, Engine, EngineConfig, GenerationRequest, SamplingParams, shared_engine
from copyspec_engine.cli.demo.chain import steps_for
from copyspec_engine.cli.demo.edits import EditStep
from copyspec_engine.cli.documents import Document, load_document
from copyspec_engine.cli.exits import loading
from copyspec_engine.cli.files import check_writable, write_text
from copyspec_engine.lab.evaluation.records import PLAIN, RUN_FILE, RunFolder, TurnRecord, read_turns
from copyspec_engine.lab.evaluation.turns import turn_record
from copyspec_engine.lab.page import Decode, render_page, transcripts
from copyspec_engine.lab.replay import load_tokenizer
from copyspec_engine.values.config import drafter_of

__all__ = ["ExplainOptions", "demo_records", "run_explain"]

ROOM_TOKENS = 64
"""Tokens that an answer of the demo may be longer than the text that it rewrites, besides a quarter of it."""


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """What was asked for on the command line."""

    config: EngineConfig
    """Of the demo's engine."""
    output: Path
    run: Path | None = None
    demo: bool = False
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    writer: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """What is to be shown."""

    title: str
    facts: list[str]
    records: list[TurnRecord]
    decode: Decode | None


def run_explain(options: ExplainOptions, console: Console) -> int:
    """Writes the page and returns the exit code 0.

    Raises:
        ConfigError: an input or output path cannot work, or nothing is left to show.
    """
    if options.demo == (options.run is not None):
        given = f"{options.run} and --demo" if options.demo else "no run"
        raise ConfigError(f"Got {given} but expected either the turns.jsonl of a run, or --demo")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"Got --limit {options.limit} but expected at least 1 conversation")
    check_writable(options.output, "--output")
    run = _demo(options, console) if options.run is None else _recorded(options.run, options)
    writer = _writer(run.records, options.writer)
    tasks = _tasks([record.task for record in run.records if record.writer == writer], options.tasks)
    conversations = transcripts(run.records, writer, tasks[: options.limit], run.decode)
    write_text(options.output, render_page(run.title, run.facts, writer, conversations), "--output")
    counts = (
        _count(sum(len(one.answers) for one in conversations), "answer"),
        _count(len(conversations), "conversation"),
    )
    console.print(
        f"Wrote {escape(str(options.output))}: {counts[0]} in {counts[1]}. Open it in a browser.",
        soft_wrap=True,
    )
    return 0


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _writer(records: Sequence[TurnRecord], wanted: str | None) -> str:
    """Whose answers are shown: who was asked for, else the one that drafts, else plain decoding."""
    writers = list(dict.fromkeys(record.writer for record in records))
    if wanted is not None:
        if wanted not in writers:
            raise ConfigError(f"Got --writer {wanted} but expected one of {_some(writers)}")
        return wanted
    drafting = [writer for writer in writers if writer != PLAIN] or writers
    if len(drafting) > 1:
        raise ConfigError(f"Got answers of the writers {', '.join(drafting)}: choose one of them with --writer")
    return drafting[0]


def _tasks(written: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The tasks to show, in the order in which they were written."""
    known = list(dict.fromkeys(written))
    for task in wanted:
        if task not in known:
            raise ConfigError(f"Got --task {task} but expected one of {_some(known)}")
    return [task for task in known if task in wanted or not wanted]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _recorded(path: Path, options: ExplainOptions) -> _Run:
    """The records of a file, or of the folder of a run."""
    path = RunFolder(path).turns_path if path.is_dir() else path
    decode = None if options.tokenizer is None else load_tokenizer(options.tokenizer).decode
    records = list(read_turns(path))
    if not records:
        raise ConfigError(f"Got {path}, which holds no answer: name the turns.jsonl of an evaluation run")
    if not (path.parent / RUN_FILE).is_file():
        return _Run(path.name, [], records, decode)
    run = RunFolder(path.parent).facts()
    facts = [run.model, run.device, run.dtype, "recorded answers, forced" if run.recorded else "", run.date[:10]]
    return _Run(run.benchmark, [fact for fact in facts if fact], records, decode)


def _demo(options: ExplainOptions, console: Console) -> _Run:
    if options.tokenizer is not None:
        raise ConfigError("Got --tokenizer with --demo but expected one of them: the demo's model has its own")
    with loading(options.config.model) as shown:
        engine = shared_engine(options.config, shown)
    with console.status("Writing the answers ...") as status:
        document = load_document(None)
        records = demo_records(engine, document, steps_for(document), status.update)
    info = engine.info
    facts = [f"the {info.model} model", info.device, info.dtype, "a document rewritten in a chat, turn by turn"]
    return _Run(f"Rewriting {document.name}", facts, records, engine.decode)


def demo_records(
    engine: Engine, document: Document, steps: Sequence[EditStep], tell: Callable[[str], None]
) -> list[TurnRecord]:
    """Rewrites a document step by step, with drafting and by plain decoding, who go first by turns."""
    drafter = drafter_of(engine.config.drafter).name
    messages: list[dict[str, str]] = [{"role": "user", "content": document.text}]
    text = document.text
    records: list[TurnRecord] = []

    def ask(writer: str, turn: int) -> TurnRecord:
        room = SamplingParams(max_tokens=len(engine.encode(text)) * 5 // 4 + ROOM_TOKENS)
        request = GenerationRequest(
            messages=tuple(messages), drafter=writer, session_id=sessions[writer], sampling=room, explain=True
        )
        return turn_record(document.name, "rewriting", turn, writer, messages, engine.generate(request))

    sessions = dict.fromkeys((drafter, PLAIN), "warm-up")
    messages.append({"role": "user", "content": "Repeat the document."})
    for writer in sessions:
        ask(writer, 1)
        engine.forget("warm-up")
    messages.pop()
    sessions = {writer: f"explain-{uuid.uuid4().hex}" for writer in sessions}
    for turn, step in enumerate(steps, 1):
        tell(f"Turn {turn} of {len(steps)}: {escape(step.instruction.splitlines()[0])} ...")
        messages.append({"role": "user", "content": step.instruction})
        answers = {writer: ask(writer, turn) for writer in sorted(sessions, reverse=turn % 2 == 0)}
        records += answers.values()
        text = answers[drafter].text
        messages.append({"role": "assistant", "content": text})
    return records
