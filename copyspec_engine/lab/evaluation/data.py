"""Tasks from files, local data sets and the hub, and recorded answers from transcripts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from copyspec_engine import ConfigError, missing_extra
from copyspec_engine.lab.evaluation.benchmarks import Benchmark, Hub, Task
from copyspec_engine.lab.evaluation.summary import ALL
from copyspec_engine.lab.replay import messages_of, read_json_lines

__all__ = ["SAMPLE", "load_recorded", "load_tasks", "sampled"]

SAMPLE = "sample"
"""Names the few tasks that come with the package, instead of a file."""
_WHAT = "--data"


def load_tasks(benchmark: Benchmark, data: str | None) -> list[Task]:
    """The tasks of a benchmark.

    Args:
        benchmark: one of `BENCHMARKS`.
        data: a JSON Lines file (gzipped if named .gz), a folder or hub name for the package `datasets`, `SAMPLE`, or
            None for the benchmark's own data set on the hub.

    Raises:
        ConfigError: there is no such data, a row is not of the benchmark's form, or two rows have the same id.
        CopySpecError: `datasets` is needed, but not installed.
    """
    rows = _rows(benchmark, data)
    tasks = [benchmark.task(row, where) for where, row in rows]
    return _checked(tasks, f"{_WHAT} {data or benchmark.name}")


def sampled(tasks: Sequence[Task], limit: int | None = None, per_category: int | None = None) -> list[Task]:
    """The tasks in an order of which every beginning is a fair sample: each category in turn, drawn by chance.

    The draw hangs on a task's id alone: it is the same each time, so that a run with a higher limit goes on with it.

    Args:
        tasks: with different ids.
        limit: keep the first ones only.
        per_category: keep the first ones of each category only.
    """
    drawn = sorted(tasks, key=lambda task: hashlib.sha256(task.id.encode()).digest())
    places = {category: [task for task in drawn if task.category == category] for category in _categories(tasks)}
    turns = zip_longest(*(own[:per_category] for own in places.values()))
    return list(islice((task for turn in turns for task in turn if task is not None), limit))


def _categories(tasks: Iterable[Task]) -> list[str]:
    return list(dict.fromkeys(task.category for task in tasks))


def _checked(tasks: list[Task], source: str) -> list[Task]:
    if not tasks:
        raise ConfigError(f"Got {source}, which holds no tasks")
    twice = next((name for name, count in Counter(task.id for task in tasks).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"Got {source} with more than one task {twice!r}: give each its own id")
    if any(task.category == ALL for task in tasks):
        raise ConfigError(f"Got {source} with a category {ALL!r}, which means all of them: give it another name")
    return tasks


def _rows(benchmark: Benchmark, data: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if data is None:
        if benchmark.hub is None:
            raise ConfigError(
                f"Got no {_WHAT} but {benchmark.name} is not on the hub: name its file of questions, or {SAMPLE!r}"
            )
        return _from_datasets(benchmark.hub, benchmark.hub.path)
    path = Path(__file__).parent / "samples" / f"{benchmark.name}.jsonl" if data == SAMPLE else Path(data).expanduser()
    if path.is_file():
        return _objects(read_json_lines(path, _WHAT))
    if path.is_dir():
        split = benchmark.hub.split if benchmark.hub else "train"
        return _from_datasets(Hub(str(path), None, split), data)
    if path.suffix in (".jsonl", ".json", ".gz") or path.is_absolute() or data.startswith((".", "~")):
        raise ConfigError(f"Got {_WHAT} {data} but there is no such file or folder")
    name, _, config = data.partition(":")
    return _from_datasets(Hub(name, config or None, benchmark.hub.split if benchmark.hub else "train"), data)


def _objects(lines: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, row in lines:
        if not isinstance(row, dict):
            raise ConfigError(f"Got {where}, which is not an object but expected one with the benchmark's fields")
        yield where, row


def _from_datasets(source: Hub, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a data set on the hub, or of a folder, saved by `datasets` or with files that it reads."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "eval") from None
    folder = Path(source.path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found: Any = datasets.load_from_disk(source.path)
        else:
            found = datasets.load_dataset(source.path, source.config)
        if isinstance(found, datasets.DatasetDict):
            split = source.split if source.split in found else next(iter(found))
            found = found[split]
    except Exception as error:  # of the network, of the file formats, of the library
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"Cannot load {_WHAT} {name} with datasets: {problem}. Name a JSON Lines file, or {SAMPLE!r} for the few "
            "tasks that come along"
        ) from None
    return ((f"{name} row {number}", row) for number, row in enumerate(found, 1))


def load_recorded(benchmark: Benchmark, path: Path, model: str | None) -> list[Task]:
    """Conversations of a benchmark that a model had before, with its answers.

    Args:
        benchmark: gives the number of turns.
        path: a transcript: {"id", "category", "model", "messages"} a line; user and assistant in turns.
        model: keep the conversations of this one only.

    Raises:
        ConfigError: the file cannot be read, a line is no such conversation, or none is of `model`.
    """
    models: Counter[str] = Counter()
    tasks: list[Task] = []
    for where, record in read_json_lines(path, "--replay"):
        messages = messages_of(record, where)
        models[str(record.get("model", ""))] += 1
        if model is None or record.get("model") == model:
            tasks.append(_recorded_task(benchmark, record, messages, where))
    known = ", ".join(sorted(models))
    if models and not tasks:
        raise ConfigError(f"Got --replay {path} without a conversation of --replay-model {model} but with {known}")
    if model is None and len(models) > 1:
        raise ConfigError(f"Got --replay {path} with answers of {known}: name one of them with --replay-model")
    return _checked(tasks, f"--replay {path}")


def _recorded_task(benchmark: Benchmark, record: Mapping[str, Any], messages: list[dict[str, Any]], where: str) -> Task:
    talk = [message for message in messages if message["role"] != "system"]
    asked, answered = talk[::2], talk[1::2]
    in_turns = [message["role"] for message in talk] == ["user", "assistant"] * benchmark.num_turns
    if not in_turns or len(talk) < len(messages) or not all(isinstance(m.get("content"), str) for m in messages):
        raise ConfigError(
            f"Got {where}, whose messages are of {', '.join(str(message['role']) for message in messages)} but "
            f"{benchmark.name} has {benchmark.num_turns} of user and assistant in turn, with text"
        )
    return Task(
        id=str(record.get("id", where.rsplit(" ", 1)[-1])),
        category=str(record.get("category", benchmark.name)),
        prompts=tuple(message["content"] for message in asked),
        recorded=tuple(message["content"] for message in answered),
    )
