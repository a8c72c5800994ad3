"""A run: every task written by its writers side by side, each answer on disk before the next one begins.

Who writes is drafters and plain decoding, on the same decoder, turn by turn, each time another one first, so that a
machine that slows down slows all of them down alike. Each has a session of its own, and its own answers in its prompts.

Not covered: what the answers are worth (scoring), figures (summary.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer

from copyspec_engine import (
    ConfigError,
    ContextOverflowError,
    DrafterConfig,
    Engine,
    GenerationOutput,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
)
from copyspec_engine.lab.contestants import Contestant, ours
from copyspec_engine.lab.evaluation.benchmarks import Task
from copyspec_engine.lab.evaluation.records import PLAIN, RunFacts, RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.turns import turn_record
from copyspec_engine.lab.replay import (
    END_OF_MESSAGE,
    MAX_CONTEXT,
    Begin,
    RecordedCall,
    Tally,
    calls_of,
    end_token,
    in_tokens,
    load_cost_curve,
    replay,
)

if TYPE_CHECKING:
    from copyspec_engine.lab.recorded.engine import RecordedEngine

__all__ = ["EngineSubject", "Messages", "ReplaySubject", "Subject", "Writer", "run_tasks", "session_of", "writers_of"]

_WARM_UP_TOKENS = 16
_TOP = 20
"""Tokens whose logits are looked at where answers differ."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Writer:
    """One way of writing answers on the run's decoder."""

    name: str
    drafter: DrafterConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else a `GenerationRequest` is to have."""


class Subject(Protocol):
    """What answers."""

    def warm_up(self, task: Task, writers: Sequence[Writer]) -> None:
        """Do once what the first call of a process does, so that nobody's time counts it."""

    def write(self, task: Task, turn: int, messages: Messages, writer: Writer) -> TurnRecord:
        """The answer to turn `turn` (from 1) of a task."""

    def forget(self, task: Task, writers: Sequence[Writer]) -> None:
        """The task is over."""

    def gap(self, plain: TurnRecord, position: int, other: int) -> float | None:
        """See `Gap`."""


def writers_of(measured: Sequence[Writer], *, plain: bool) -> tuple[Writer, ...]:
    """Who writes a task: the writers that are measured, and plain decoding beside them unless it is one of them."""
    alone = plain and all(writer.name != PLAIN for writer in measured)
    return (*measured, Writer(PLAIN, NoDrafter())) if alone else tuple(measured)


def run_tasks(
    subject: Subject,
    tasks: Sequence[Task],
    writers: Sequence[Writer],
    folder: RunFolder,
    facts: RunFacts,
    on_turn: Callable[[TurnRecord], None],
) -> tuple[list[TurnRecord], dict[str, str]]:
    """Writes what the folder does not hold yet.

    Args:
        subject: what answers.
        tasks: all of the run.
        writers: with different names.
        folder: where the records go.
        facts: of the run, for the folder.
        on_turn: told of each record, of those that were there already too.

    Returns:
        The records of all tasks, and why there is none of some of them, by their ids: those that do not fit in the
        model's context.

    Raises:
        ConfigError: the folder holds another run, or cannot be written.
        CopySpecError: an answer failed. What was written before stays in the folder.
    """
    records = folder.begin(facts, {task.id: len(task.prompts) for task in tasks})
    _check_asked(tasks, records, folder)
    for record in records:
        on_turn(record)
    done = {record.task for record in records}
    left = [(number, task) for number, task in enumerate(tasks) if task.id not in done]
    left_out: dict[str, str] = {}
    if left:
        subject.warm_up(left[0][1], writers)
    for number, task in left:
        written: list[TurnRecord] = []
        try:
            for record in _write_task(subject, task, number, writers):
                folder.append(record)
                written.append(record)
                on_turn(record)
        except ContextOverflowError as error:
            left_out[task.id] = str(error)
        else:
            records += written
        subject.forget(task, writers)
    return records, left_out


def _check_asked(tasks: Sequence[Task], records: Sequence[TurnRecord], folder: RunFolder) -> None:
    """Raises `ConfigError` if the folder holds answers to other words than the tasks have now."""
    prompts = {(task.id, turn): prompt for task in tasks for turn, prompt in enumerate(task.prompts, 1)}
    for record in records:
        if record.messages[-1]["content"] != prompts[record.task, record.turn]:
            raise ConfigError(
                f"Got --output {folder.path}, where turn {record.turn} of task {record.task} was asked in other words: "
                "the data has changed; choose another folder"
            )


def _write_task(subject: Subject, task: Task, number: int, writers: Sequence[Writer]) -> Iterator[TurnRecord]:
    """The records of a task, as they are written."""
    histories: dict[str, list[dict[str, Any]]] = {writer.name: [] for writer in writers}
    for turn, prompt in enumerate(task.prompts, 1):
        first = (number + turn) % len(writers)
        for writer in (*writers[first:], *writers[:first]):
            messages = histories[writer.name]
            messages.append({"role": "user", "content": prompt})
            record = subject.write(task, turn, messages, writer)
            messages.append({"role": "assistant", "content": record.text})
            yield record


@dataclass(frozen=True, slots=True)
class EngineSubject:
    """An engine; with `recorded`, one that is told what to answer."""

    engine: Engine
    max_new_tokens: int
    recorded: RecordedEngine | None = None

    def warm_up(self, task: Task, writers: Sequence[Writer]) -> None:
        short = replace(self, max_new_tokens=min(self.max_new_tokens, _WARM_UP_TOKENS))
        with contextlib.suppress(ContextOverflowError):  # it is left out when its turn comes
            for writer in writers:
                short.write(task, 1, [{"role": "user", "content": task.prompts[0]}], writer)
        self.forget(task, writers)

    def write(self, task: Task, turn: int, messages: Messages, writer: Writer) -> TurnRecord:
        try:
            output = self._answer(task, turn, messages, writer, self.max_new_tokens)
        except ContextOverflowError as error:  # write as much as there is room for
            room = self.max_new_tokens - (error.num_tokens - error.max_tokens)
            if room < 1:
                raise
            output = self._answer(task, turn, messages, writer, room)
        return turn_record(task.id, task.category, turn, writer.name, messages, output)

    def _answer(self, task: Task, turn: int, messages: Messages, writer: Writer, max_tokens: int) -> GenerationOutput:
        request = GenerationRequest(
            messages=[dict(message) for message in messages],
            sampling=SamplingParams(max_tokens=max_tokens),
            drafter=writer.drafter,
            session_id=session_of(task, writer.name),
            explain=True,
            **writer.options,
        )
        return self._generate(task, turn, request)

    def _generate(self, task: Task, turn: int, request: GenerationRequest) -> GenerationOutput:
        if self.recorded is None:
            return self.engine.generate(request)
        if task.recorded is None:
            raise ConfigError(f"Got task {task.id} without recorded answers")
        self.recorded.prescribe(request.request_id, task.recorded[turn - 1])
        try:
            output = self.engine.generate(request)
            self.recorded.check(output)
            return output
        finally:
            self.recorded.forget(request.request_id)

    def forget(self, task: Task, writers: Sequence[Writer]) -> None:
        for writer in writers:
            self.engine.forget(session_of(task, writer.name))

    def gap(self, plain: TurnRecord, position: int, other: int) -> float | None:
        messages = tuple(dict(message) for message in plain.messages)
        prompt_ids = self.engine.tokenize(GenerationRequest(messages=messages))
        if self.recorded is not None or len(prompt_ids) != plain.prompt_tokens:  # earlier answers had other tokens
            return None
        request = GenerationRequest(
            prompt_token_ids=(*prompt_ids, *plain.token_ids[:position]),
            sampling=SamplingParams(max_tokens=1, logprobs=True, top_logprobs=_TOP),
            drafter=NoDrafter(),
        )
        (found,) = self.engine.generate(request).logprobs or ()
        logprobs = dict(found.top)
        token = plain.token_ids[position]
        return logprobs[token] - logprobs[other] if {token, other} <= logprobs.keys() else None


def session_of(task: Task, writer: str) -> str:
    """The session in which a writer of that name has a task's conversation."""
    return f"{writer} {task.id}"


class ReplaySubject:
    """Recorded answers through a drafter alone, without a model: passes are counted, and their cost is modelled.

    Args:
        tokenizer: of the model whose answers they are.
        cost_model: see `load_cost_curve`.
        max_new_tokens: longer answers are cut.

    Raises:
        ConfigError: no such cost model, or the tokenizer has no token that ends a message.
    """

    def __init__(self, tokenizer: Tokenizer, cost_model: str, max_new_tokens: int) -> None:
        self._tokenizer, self._most = tokenizer, max_new_tokens
        self.cost = load_cost_curve(cost_model)
        self._end = end_token(tokenizer)
        if self._end is None:
            raise ConfigError(f"Got a tokenizer without {END_OF_MESSAGE} but answers have to end: name another one")
        self._contestants: dict[str, Contestant] = {}
        """What a drafter learns over conversations lives here."""
        self._calls: dict[str, Begin] = {}
        """The conversation of each writer that is under way."""

    def warm_up(self, task: Task, writers: Sequence[Writer]) -> None:
        """Nothing is timed."""

    def write(self, task: Task, turn: int, messages: Messages, writer: Writer) -> TurnRecord:
        if task.recorded is None:
            raise ConfigError(f"Got task {task.id} without recorded answers")
        talk = [*map(dict, messages), {"role": "assistant", "content": task.recorded[turn - 1]}]
        messages_in_tokens = tuple(in_tokens(talk, self._tokenizer))
        if len(messages_in_tokens) < len(talk):
            raise ConfigError(
                f"Got turn {turn} of task {task.id} behind more than {MAX_CONTEXT} tokens: take it out of --replay"
            )
        *_, call = calls_of(messages_in_tokens, "full")
        answer, tally = call.answer_ids[: self._most], Tally()
        begin = self._calls.get(writer.name)
        if begin is None:
            contestant = self._contestants.setdefault(writer.name, ours(writer.drafter, self.cost, self._end))
            begin = self._calls[writer.name] = contestant()
        replay(begin, [RecordedCall(call.prompt_ids, answer)], tally)
        return TurnRecord(
            task=task.id,
            category=task.category,
            turn=turn,
            writer=writer.name,
            messages=tuple(dict(message) for message in messages),
            text=self._tokenizer.decode(answer),
            token_ids=answer,
            prompt_tokens=len(call.prompt_ids),
            finish_reason="stop" if len(answer) == len(call.answer_ids) else "length",
            forward_passes=tally.num_passes,
            draft_lengths=tuple(tally.draft_lengths),
            accepted_lengths=tuple(tally.accepted_lengths),
            modelled_passes=round(tally.modelled_passes(self.cost), 6),
        )

    def forget(self, task: Task, writers: Sequence[Writer]) -> None:  # noqa: ARG002 - one conversation at a time
        self._calls.clear()

    def gap(self, plain: TurnRecord, position: int, other: int) -> None:
        """Nobody computes logits."""
