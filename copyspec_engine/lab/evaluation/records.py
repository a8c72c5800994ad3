"""What a run leaves behind: a folder with `run.json`, a line in `turns.jsonl` for every answer, and a summary.

The lines of a task (a conversation) are complete when each of the run's writers has written each of its turns. A run
that was killed goes on behind the last complete task: a conversation that was cut off begins anew, since what the
engine knew of it (its memory, the very tokens of its answers) is gone.

Not covered: writing answers (writing.py), what the figures say (summary.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from copyspec_engine import ConfigError
from copyspec_engine.cli.files import write_text
from copyspec_engine.values.outputs import NOT_COPIED

__all__ = ["PLAIN", "RUN_FILE", "TURNS_FILE", "RunFacts", "RunFolder", "TurnRecord", "read_turns"]

RUN_FILE, TURNS_FILE = "run.json", "turns.jsonl"
PLAIN = "none"
"""The writer that does not draft; what every other one is measured against, on the same decoder in the same run."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TurnRecord(_Record):
    """One answer: what was asked, what was written, and how it came about."""

    task: str
    """The task's own id in its data set ("81", "HumanEval/0")."""
    category: str
    turn: int = Field(ge=1)
    writer: str
    """Name of the drafter: "adaptive", "copyspec", "draft-model" or "none" (`PLAIN`); of transformers "generate" or
    "prompt-lookup"."""
    messages: tuple[dict[str, Any], ...]
    """The whole prompt of this turn as chat messages, earlier answers of the same writer in it."""
    text: str
    """The answer."""
    token_ids: tuple[int, ...]
    """Of the answer, its end-of-sequence token included."""
    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(default=0, ge=0)
    """Prompt tokens whose KV was reused from the turn before."""
    finish_reason: str
    forward_passes: int = Field(ge=1)
    """Passes that gave a token."""
    draft_lengths: tuple[int, ...] = ()
    """Tokens offered in each of these passes, in order."""
    accepted_lengths: tuple[int, ...] = ()
    """Tokens accepted in each of these passes, in order; each pass wrote one more, but where the answer ended."""
    accepted_by_source: dict[str, int] = Field(default_factory=dict)
    """Accepted tokens by where they were copied from, as `Copy.source`."""
    copies: tuple[dict[str, Any], ...] = ()
    """The copied spans of `text`, as `Explanation.to_list` gives them; `message` counts `messages`."""
    prefill_s: float | None = None
    """From the call to the first token; None, as the next one, where no model ran."""
    decode_s: float | None = None
    """From the first token to the last."""
    modelled_passes: float | None = None
    """Cost of the turn's passes, in passes of one token, under the run's cost model; only where no model ran."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_lengths)

    @property
    def num_copied(self) -> int:
        """Accepted tokens that were copied from a text."""
        return self.num_accepted - sum(self.accepted_by_source.get(source, 0) for source in NOT_COPIED)

    @property
    def seconds(self) -> float | None:
        """Prefill and decoding."""
        return None if self.prefill_s is None or self.decode_s is None else self.prefill_s + self.decode_s


class RunFacts(_Record):
    """What was run, on what: the content of `run.json`."""

    format: Literal[1] = 1
    benchmark: str
    drafter: str
    """Name of the writer that is measured; "none" for a run of plain decoding alone."""
    drafter_options: dict[str, Any] = Field(default_factory=dict)
    others: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Drafters that were measured in the same run, beside the same plain decoding: name and options of each."""
    writers: tuple[str, ...]
    """Who writes each task: the drafters, and what stands beside them."""
    model: str
    """Name of the checkpoint; "shape NAME" for random weights that write recorded answers; "" where no model ran."""
    device: str = ""
    dtype: str = ""
    data: str
    """File or hub name of the tasks, or of the recorded answers."""
    recorded: bool = False
    """The answers were recorded before, and forced through the logits: figures of speed count, texts say nothing."""
    num_tasks: int = Field(ge=0)
    max_new_tokens: int = Field(ge=1)
    execute_code: bool = False
    step_cost: tuple[tuple[int, float], ...] = ()
    """(tokens, seconds) of a verify pass, as measured at load; or the cost model, in passes of one token."""
    command: str
    date: str
    """When it began, ISO 8601."""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names of all drafters that were measured."""
        return (self.drafter, *self.others)

    def of(self, drafter: str) -> RunFacts:
        """The same run as one of this drafter alone: its summary, its plots and its column in a comparison.

        Args:
            drafter: one of `drafters`.
        """
        options = self.drafter_options if drafter == self.drafter else self.others[drafter]
        writers = tuple(writer for writer in self.writers if writer == drafter or writer not in self.drafters)
        changes = {"drafter": drafter, "drafter_options": options, "others": {}, "writers": writers}
        return self.model_copy(update=changes)

    def file(self, name: str, drafter: str) -> str:
        """What a file of one drafter is called in the run's folder: the drafter is in its name if there are several.

        Args:
            name: as it is called where there is one drafter.
            drafter: one of `drafters`.
        """
        stem, _, ending = name.rpartition(".")
        return f"{stem}_{drafter}.{ending}" if self.others else name

    def differences(self, other: RunFacts) -> list[str]:
        """Fields that decide about answers or speed and are not the same in `other`."""
        names = (
            "benchmark",
            "drafter_options",
            "others",
            "writers",
            "model",
            "device",
            "dtype",
            "data",
            "recorded",
            "max_new_tokens",
            "versions",
        )
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def read_turns(path: Path) -> Iterator[TurnRecord]:
    """The records of a `turns.jsonl`, without a last line that was cut off while it was written.

    Raises:
        ConfigError: there is no such file, or a line is no record.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith(b"\n"):
            return
        try:
            yield TurnRecord.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"])) or "the line"
            raise ConfigError(
                f"Got {path} line {number}, which is no record of a turn: {where}: {problem['msg']}"
            ) from None


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}") from None


class RunFolder:
    """The folder of one run.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(str(path / ".lock"))

    @property
    def turns_path(self) -> Path:
        return self.path / TURNS_FILE

    def facts(self) -> RunFacts:
        """What was run.

        Raises:
            ConfigError: the folder holds no run.
        """
        path = self.path / RUN_FILE
        try:
            return RunFacts.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"Got {self.path}, which holds no run: cannot read {path} ({error.strerror or error})"
            ) from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise ConfigError(f"Got {path}, which is no run: {problem['loc']}: {problem['msg']}") from None

    def turns(self) -> list[TurnRecord]:
        """All records.

        Raises:
            ConfigError: see `read_turns`.
        """
        return list(read_turns(self.turns_path))

    def begin(self, facts: RunFacts, turns_of: dict[str, int]) -> list[TurnRecord]:
        """Start the run, or go on with it: what is complete already stays, what is not is dropped.

        Until `close` no other process can begin one here.

        Tasks that are not asked this time stay too: a run with a smaller --limit loses nothing.

        Args:
            facts: of the run that starts.
            turns_of: how many turns each task has, by its id.

        Returns:
            The records of the complete ones among these tasks.

        Raises:
            ConfigError: the folder cannot be written, or holds another run, or one that is under way.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Cannot write --output {self.path}: {error.strerror or error}") from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"Got --output {self.path}, to which another run is writing: wait for it, or choose another folder"
            ) from None
        if not (self.path / RUN_FILE).exists():
            if self.turns_path.exists() and self.turns_path.stat().st_size:
                raise ConfigError(
                    f"Got --output {self.path} with {TURNS_FILE} but without {RUN_FILE}: choose another folder, or "
                    "delete it"
                )
            write_text(self.path / RUN_FILE, facts.model_dump_json(indent=1) + "\n", "--output")
            write_text(self.turns_path, "", "--output")
            return []
        before = self.facts()
        if different := facts.differences(before):
            name = different[0]
            raise ConfigError(
                f"Got --output {self.path}, which holds another run ({name} was {_shown(getattr(before, name))}, is "
                f"{_shown(getattr(facts, name))}): choose another folder, or delete this one"
            )
        done = self.turns() if self.turns_path.exists() else []
        complete = _complete_tasks(done, facts.writers, turns_of)
        kept = [record for record in done if record.task in complete or record.task not in turns_of]
        write_text(self.turns_path, "".join(f"{record.model_dump_json()}\n" for record in kept), "--output")
        again = facts.model_copy(update={"date": before.date})
        write_text(self.path / RUN_FILE, again.model_dump_json(indent=1) + "\n", "--output")
        return [record for record in kept if record.task in complete]

    def close(self) -> None:
        """Another process may write to the folder."""
        self._lock.release(force=True)

    def append(self, record: TurnRecord) -> None:
        """Add a record, in one piece and for good: it survives whatever happens to this process afterwards.

        Raises:
            ConfigError: it cannot be written.
        """
        line = f"{record.model_dump_json()}\n".encode()
        try:
            file = os.open(self.turns_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while line:  # a full disk takes a part of it, and gives its reason when asked again
                    line = line[os.write(file, line) :]
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.turns_path}: {error.strerror or error}. What was written before stays, and the "
                "same command goes on from there"
            ) from None

    def write(self, name: str, text: str) -> Path:
        """Write a file of the folder, as a whole or not at all."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_text(path, text, "--output")
        return path

    def write_json(self, name: str, value: Any) -> Path:  # noqa: ANN401 - whatever JSON holds
        return self.write(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _complete_tasks(records: Sequence[TurnRecord], writers: Sequence[str], turns_of: dict[str, int]) -> set[str]:
    written: dict[str, set[tuple[int, str]]] = {}
    for record in records:
        written.setdefault(record.task, set()).add((record.turn, record.writer))
    return {
        task
        for task, found in written.items()
        if found == {(turn, writer) for turn in range(1, turns_of.get(task, 0) + 1) for writer in writers}
    }


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
