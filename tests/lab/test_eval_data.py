"""Tasks of the five benchmarks: what is asked word for word, every layout of data, and errors that name the line."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import ConfigError, CopySpecError
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS, Task
from copyspec_engine.lab.evaluation.data import SAMPLE, load_recorded, load_tasks, sampled

ROWS: dict[str, dict[str, Any]] = {
    "cnndm": {"id": "a1", "article": "It rained. The river rose.", "highlights": "Rain raised the river ."},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "\ndef one() -> int:\n    '''One.'''\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "mt-bench": {"question_id": 81, "category": "writing", "turns": ["Write.", "Write it again."]},
    "mt-redundant": {"question_id": 81, "category": "writing", "turns": ["Write.", "Write it in capitals."]},
    "gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def load(name: str, path: Path | str) -> list[Task]:
    return load_tasks(BENCHMARKS[name], str(path))


GOLDEN = {
    "cnndm": (
        "Please produce an *extractive* summary of the article below by choosing 2 or 3 key sentences from the "
        "original text:\n\nIt rained. The river rose.\n\nReturn only sentences from the original text that best "
        "capture the main ideas. Only write the summary and nothing else",
    ),
    "humaneval": (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        "```python\ndef one() -> int:\n    '''One.'''\n```",
    ),
    "mt-bench": ("Write.", "Write it again."),
    "mt-redundant": ("Write.", "Write it in capitals."),
    "gsm8k": (
        'Write a Python program formatted in a code block (using triple backticks with the "python" specifier) that '
        "solves the following problem and prints the solution:\nWhat is 2 + 2?\nOnly provide the Python code that "
        "prints the output directly without any input from the user. Do not include the question or comments.\n",
        "Reiterate over the code and evaluate it to identify potential issues that could lead to an incorrect final "
        "answer.\nIf there are none, do not make any modifications.\n",
        "Provide the python code of the solution that you consider to be correct.\nKeep the initial version if you "
        "consider it to be correct.\n",
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_prompts_are_those_of_the_protocol_word_for_word(tmp_path: Path, name: str) -> None:
    (task,) = load(name, jsonl(tmp_path / "data.jsonl", ROWS[name]))
    assert task.prompts == GOLDEN[name]
    assert len(task.prompts) == BENCHMARKS[name].num_turns


def test_ids_categories_and_what_scoring_needs(tmp_path: Path) -> None:
    tasks = {name: load(name, jsonl(tmp_path / f"{name}.jsonl", row))[0] for name, row in ROWS.items()}
    assert [(task.id, task.category) for task in tasks.values()] == [
        ("a1", "summarization"),
        ("HumanEval/0", "code"),
        ("81", "writing"),
        ("81", "writing"),
        ("1", "math"),
    ]
    assert tasks["cnndm"].data == {"reference": "Rain raised the river ."}
    assert tasks["gsm8k"].data == {"answer": ROWS["gsm8k"]["answer"]}
    assert tasks["humaneval"].data["entry_point"] == "one"


def test_spec_bench_and_hub_layouts(tmp_path: Path) -> None:
    spec = {"question_id": 241, "turns": ["Summarize: It rained."], "reference": ["Rain.", "More rain."]}
    (task,) = load("cnndm", jsonl(tmp_path / "spec.jsonl", spec))
    assert task.id == "241"
    assert "\n\nIt rained.\n\n" in task.prompts[0]
    assert task.data["reference"] == "Rain.\nMore rain."
    hub = {"prompt_id": 5, "category": "stem", "prompt": ["One?", "Two?"], "reference": []}
    (task,) = load("mt-bench", jsonl(tmp_path / "hub.jsonl", hub))
    assert (task.id, task.prompts) == ("5", ("One?", "Two?"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_comes_with_a_few_tasks(name: str) -> None:
    tasks = load(name, SAMPLE)
    assert len(tasks) >= 2
    assert all(len(task.prompts) == BENCHMARKS[name].num_turns for task in tasks)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("saved", ["to_disk", "parquet"])
def test_folders_of_the_datasets_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, saved: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = datasets.Dataset.from_list([ROWS[name]])
    if saved == "to_disk":
        datasets.DatasetDict({"train": found, "test": found}).save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        for split in ("train", "test"):
            found.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    (task,) = load(name, tmp_path / "data")
    assert task.prompts == GOLDEN[name]


def test_gzip_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(json.dumps({**ROWS["mt-bench"], "question_id": i}) for i in range(5)) + "\n\n")
    assert [task.id for task in load("mt-bench", path)] == ["0", "1", "2", "3", "4"]


def without(name: str, key: str) -> dict[str, Any]:
    return {field: value for field, value in ROWS[name].items() if field != key}


BAD: list[tuple[str, Sequence[object], str]] = [
    ("cnndm", [ROWS["cnndm"], without("cnndm", "highlights")], "line 2 with highlights=nothing but expected a text"),
    ("cnndm", [{**ROWS["cnndm"], "article": 3}], "line 1 with article=3 but expected a text"),
    ("humaneval", [without("humaneval", "test")], "line 1 with test=nothing"),
    (
        "mt-bench",
        [{**ROWS["mt-bench"], "turns": ["One?"]}],
        "line 1 with turns=['One?'] but expected a list of 2 texts",
    ),
    ("mt-bench", [{**ROWS["mt-bench"], "turns": "One?"}], "line 1 with turns='One?'"),
    ("mt-bench", [{**ROWS["mt-bench"], "question_id": None}], "line 1 with question_id=nothing"),
    ("mt-bench", [without("mt-bench", "category")], "line 1 with category=nothing"),
    ("gsm8k", [{"question": "Why?", "answer": "4"}], "line 1 with answer='4' but expected #### and a number"),
    ("gsm8k", [ROWS["gsm8k"], '{"question": "Wh'], "line 2, which is not JSON"),
    ("gsm8k", [["question", "answer"]], "line 1, which is not an object"),
    ("gsm8k", [], "which holds no tasks"),
    ("mt-bench", [ROWS["mt-bench"], ROWS["mt-bench"]], "more than one task '81'"),
    ("mt-bench", [{**ROWS["mt-bench"], "category": "all"}], "a category 'all'"),
    ("gsm8k", ['{"question": "half \\ud83d", "answer": "#### 1"}'], "line 1, which is not JSON"),
]


@pytest.mark.parametrize(("name", "rows", "problem"), BAD, ids=[case[2] for case in BAD])
def test_bad_data_is_named_by_its_line(tmp_path: Path, name: str, rows: Sequence[object], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(name, jsonl(tmp_path / "data.jsonl", *rows))
    assert problem in str(error.value)
    assert str(tmp_path / "data.jsonl") in str(error.value)


def test_a_truncated_gzip_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS["gsm8k"]).encode())[:-12])
    with pytest.raises(ConfigError, match="Cannot read --data"):
        load("gsm8k", path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        load("gsm8k", tmp_path / "other.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"Cannot load --data .*datasets"):
        load("gsm8k", tmp_path / "empty")


def test_mt_redundant_is_on_no_hub() -> None:
    with pytest.raises(ConfigError, match="mt-redundant is not on the hub"):
        load_tasks(BENCHMARKS["mt-redundant"], None)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CopySpecError, match=r'pip install "copyspec\[eval\]"'):
        load_tasks(BENCHMARKS["gsm8k"], None)


TALK = [
    {"role": "user", "content": "Write."},
    {"role": "assistant", "content": "Once."},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "Once upon."},
]


def test_recorded_conversations(tmp_path: Path) -> None:
    rows = [{"id": name, "model": model, "category": "stem", "messages": TALK} for name, model in ("aX", "bY", "cX")]
    path = jsonl(tmp_path / "talk.jsonl", *rows)
    tasks = load_recorded(BENCHMARKS["mt-bench"], path, "X")
    assert [task.id for task in tasks] == ["a", "c"]
    assert tasks[0].prompts == ("Write.", "Again.")
    assert tasks[0].recorded == ("Once.", "Once upon.")
    with pytest.raises(ConfigError, match="with answers of X, Y: name one of them with --replay-model"):
        load_recorded(BENCHMARKS["mt-bench"], path, None)
    with pytest.raises(ConfigError, match="without a conversation of --replay-model Z but with X, Y"):
        load_recorded(BENCHMARKS["mt-bench"], path, "Z")
    with pytest.raises(ConfigError, match="line 1, whose messages are of user, assistant, user, assistant but gsm8k"):
        load_recorded(BENCHMARKS["gsm8k"], path, None)


@pytest.mark.parametrize(
    "messages",
    [[{"role": "system", "content": "Be."}, *TALK], [*TALK[:3], {"role": "assistant", "content": None}], TALK[:2]],
)
def test_conversations_of_another_form_are_refused(tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    path = jsonl(tmp_path / "talk.jsonl", {"messages": messages})
    with pytest.raises(ConfigError, match="line 1, whose messages"):
        load_recorded(BENCHMARKS["mt-bench"], path, None)


def test_every_beginning_of_a_run_is_a_fair_sample() -> None:
    tasks = [Task(f"{category} {i}", category, ("Hello.",)) for category in ("a", "b", "c") for i in range(30)]
    order = sampled(tasks)
    assert sorted(task.id for task in order) == sorted(task.id for task in tasks)
    for count in range(1, 91):
        seen = Counter(task.category for task in order[:count])
        assert max(seen.values()) - min(seen[name] for name in "abc") <= 1
    places = [int(task.id.split()[1]) for task in order[:30]]
    assert 10 < sum(places) / len(places) < 20, "not the first ones of the file"
    assert sampled(tasks[::-1]) != order
    assert {task.id for task in sampled(tasks[::-1], 30)} == {task.id for task in order[:30]}
    assert sampled(tasks, 12) == order[:12], "a higher limit adds to a lower one"
    assert Counter(task.category for task in sampled(tasks, None, 4)) == {"a": 4, "b": 4, "c": 4}
    assert len(sampled(tasks, 5, 4)) == 5
