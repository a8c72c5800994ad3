"""Scores of whole runs: which answers count, and that no program runs unless it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from copyspec_engine.cli.main import app
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS
from copyspec_engine.lab.evaluation.data import SAMPLE, load_tasks
from copyspec_engine.lab.evaluation.records import RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.scoring.sandbox import CodeResult
from copyspec_engine.lab.evaluation.scoring.scores import score


def record(task: str, turn: int, text: str) -> TurnRecord:
    return TurnRecord(
        task=task,
        category="x",
        turn=turn,
        writer="adaptive",
        messages=(),
        text=text,
        token_ids=(1,),
        prompt_tokens=1,
        finish_reason="stop",
        forward_passes=1,
    )


def never(_: str) -> CodeResult:
    raise AssertionError("no program may run")


def scored(tmp_path: Path, name: str, answers: list[list[str]], **options: Any) -> dict[str, float]:
    tasks = load_tasks(BENCHMARKS[name], SAMPLE)
    records = [
        record(task.id, turn, text)
        for task, texts in zip(tasks, answers, strict=True)
        for turn, text in enumerate(texts, 1)
    ]
    return score(name, tasks, records, RunFolder(tmp_path), **{"execute_code": True, **options})


def test_the_first_and_the_third_round_count(tmp_path: Path) -> None:
    right, wrong = "```python\nprint(5 * 24 - 87)\n```", "```python\nprint(7)\n```"
    other = "```python\nprint('km:', 34.0)\n```"
    found = scored(tmp_path, "gsm8k", [[wrong, right, right], [other, wrong, other]])
    assert found == {"accuracy_round_1": 0.5, "accuracy_round_3": 1.0}


def test_programs_pass_their_tests_or_do_not(tmp_path: Path) -> None:
    tasks = load_tasks(BENCHMARKS["humaneval"], SAMPLE)
    gap = f"```python\ndef largest_gap(numbers):\n{tasks[0].data['canonical_solution']}```"
    found = scored(tmp_path, "humaneval", [[gap], ["I cannot do that."]])
    assert found == {"pass@1": 0.5}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["task_id"] for sample in samples] == [task.id for task in tasks]
    assert "largest_gap" in samples[0]["solution"]


def test_summaries_that_are_the_reference_are_perfect(tmp_path: Path) -> None:
    tasks = load_tasks(BENCHMARKS["cnndm"], SAMPLE)
    found = scored(tmp_path, "cnndm", [[task.data["reference"]] for task in tasks], execute_code=False)
    assert found == pytest.approx(dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 1.0))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_program_runs_unless_it_was_asked_for(tmp_path: Path, name: str) -> None:
    texts = [["```python\nprint(1)\n```"] * BENCHMARKS[name].num_turns for _ in load_tasks(BENCHMARKS[name], SAMPLE)]
    found = scored(tmp_path, name, texts, execute_code=False, run=never)
    assert set(found) <= {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_the_command_scores_and_says_so(tmp_path: Path) -> None:
    words = ["eval", "gsm8k", "--data", "sample", "--limit", "1", "--max-new-token", "32", "--execute-code"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "accuracy_round_1: 0.0000" in result.output
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == {
        "accuracy_round_1": 0.0,
        "accuracy_round_3": 0.0,
    }
