"""What the answers of a run are worth, by the metric of its benchmark."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from copyspec_engine.lab.evaluation.benchmarks import Task
from copyspec_engine.lab.evaluation.records import RunFolder, TurnRecord
from copyspec_engine.lab.evaluation.scoring.metrics import (
    Run,
    evalplus_sample,
    gsm8k_correct,
    humaneval_correct,
    pass_at_1,
    rouge,
)
from copyspec_engine.lab.evaluation.scoring.sandbox import check_sandbox, run_code

__all__ = ["RUNS_CODE", "check_scoring", "score"]

RUNS_CODE = ("humaneval", "gsm8k")
"""The benchmarks whose answers are programs."""

Metrics = dict[str, float]


def check_scoring(benchmark: str, *, execute_code: bool) -> None:
    """Make sure before a long run that its answers can be scored afterwards.

    Raises:
        ConfigError: programs cannot be confined on this machine.
        CopySpecError: a package is not installed.
    """
    if benchmark == "cnndm":
        rouge(["a"], ["a"])
    if execute_code:
        check_sandbox()


def score(
    benchmark: str,
    tasks: Sequence[Task],
    records: Sequence[TurnRecord],
    folder: RunFolder,
    *,
    execute_code: bool,
    samples: str = "samples.jsonl",
    run: Run = run_code,
) -> Metrics:
    """The metrics of one writer's answers, by name; none for benchmarks that need a judge.

    Args:
        benchmark: its name.
        tasks: of the run.
        records: of one writer, each turn of each task.
        folder: gets the answers of a HumanEval run in a file, which the package evalplus scores as well.
        execute_code: run the programs in the answers; without, what needs that is left out.
        samples: name of that file.
        run: runs a program.

    Raises:
        ConfigError: programs cannot be confined on this machine.
        CopySpecError: a package is not installed.
    """
    answers = {(record.task, record.turn): record.text for record in records}
    if benchmark == "cnndm":
        return rouge([answers[task.id, 1] for task in tasks], [task.data["reference"] for task in tasks])
    if benchmark == "humaneval":
        lines = (json.dumps(evalplus_sample(task.data, answers[task.id, 1])) for task in tasks)
        folder.write(samples, "".join(f"{line}\n" for line in lines))
    if not execute_code:
        return {}
    if benchmark == "humaneval":
        return {"pass@1": _share(tasks, lambda task: humaneval_correct(task.data, answers[task.id, 1], run))}
    if benchmark == "gsm8k":
        return {
            f"accuracy_round_{turn}": _share(tasks, _solved(answers, turn, run))
            for turn in (1, 3)  # the second one only criticises
        }
    return {}


def _solved(answers: dict[tuple[str, int], str], turn: int, run: Run) -> Callable[[Task], bool]:
    return lambda task: gsm8k_correct(answers[task.id, turn], task.data["answer"], run)


def _share(tasks: Sequence[Task], is_right: Callable[[Task], bool]) -> float:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return pass_at_1(list(pool.map(is_right, tasks)))
