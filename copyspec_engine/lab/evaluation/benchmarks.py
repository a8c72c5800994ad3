"""The five benchmarks of the paper (arXiv 2502.08923, section 4): what is asked, turn by turn, of each row of data.

A row is read in the layout of the published file or of the data set on the hub; `Task` is what both become.

Not covered: reading files and data sets (data.py), scoring answers (scoring).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from copyspec_engine import ConfigError

__all__ = ["BENCHMARKS", "GSM8K_ROUNDS", "Benchmark", "Hub", "Task"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One conversation of a benchmark."""

    id: str
    category: str
    prompts: tuple[str, ...]
    """What the user says, turn by turn; each answer is in front of the next one."""
    data: Row = field(default_factory=dict)
    """The row, for scoring."""
    recorded: tuple[str, ...] | None = None
    """Answers that another model gave before, one a turn; None: the model is to answer."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the Hugging Face hub."""

    path: str
    config: str | None
    split: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark's name, where its data is, and what is made of a row."""

    name: str
    title: str
    num_turns: int
    hub: Hub | None
    """None: it is on no hub."""
    task: Callable[[Row, str], Task]
    """Makes a task of a row; the text says where the row stands, for errors."""


_CNNDM_PROMPT = (
    "Please produce an *extractive* summary of the article below by choosing 2 or 3 key sentences from the original "
    "text:\n\n{article}\n\nReturn only sentences from the original text that best capture the main ideas. Only write "
    "the summary and nothing else"
)
_HUMANEVAL_PROMPT = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{prompt}\n```"
)
"""EvalPlus' instruction for chat models."""
GSM8K_ROUNDS = (
    'Write a Python program formatted in a code block (using triple backticks with the "python" specifier) that solves '
    "the following problem and prints the solution:\n{question}\nOnly provide the Python code that prints the output "
    "directly without any input from the user. Do not include the question or comments.\n",
    "Reiterate over the code and evaluate it to identify potential issues that could lead to an incorrect final "
    "answer.\nIf there are none, do not make any modifications.\n",
    "Provide the python code of the solution that you consider to be correct.\nKeep the initial version if you "
    "consider it to be correct.\n",
)
"""What is asked in the three rounds of self-correction; the first one names the problem."""
_SPEC_BENCH_START = "Summarize: "


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"Got {where} with {name}={_shown(value)} but expected a text")
    return value


def _texts(row: Row, name: str, where: str, count: int | None = None) -> tuple[str, ...]:
    value = row.get(name)
    right = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(text, str) for text in value)
    if not right or value is None or len(value) != (count or len(value)) or not value:
        raise ConfigError(f"Got {where} with {name}={_shown(value)} but expected a list of {count or 'some'} texts")
    return tuple(value)


def _id(row: Row, names: Sequence[str], where: str) -> str:
    value = next((row[name] for name in names if name in row), None)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ConfigError(f"Got {where} with {names[0]}={_shown(value)} but expected a number or a text")
    return str(value)


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cnndm(row: Row, where: str) -> Task:
    """The hub's {"article", "highlights", "id"}, or Spec-Bench's {"question_id", "turns", "reference"}."""
    if "article" in row or "turns" not in row:
        article, reference = _text(row, "article", where), _text(row, "highlights", where)
    else:
        article = _texts(row, "turns", where, 1)[0].removeprefix(_SPEC_BENCH_START)
        reference = "\n".join(_texts(row, "reference", where))
    prompt = _CNNDM_PROMPT.format(article=article)
    return Task(_id(row, ("id", "question_id"), where), "summarization", (prompt,), {"reference": reference})


def _humaneval(row: Row, where: str) -> Task:
    """OpenAI's {"task_id", "prompt", "entry_point", "test", ...}; HumanEval+ has the same with more tests."""
    data = {name: _text(row, name, where) for name in ("task_id", "prompt", "entry_point", "test")}
    data["canonical_solution"] = str(row.get("canonical_solution", ""))
    return Task(data["task_id"], "code", (_HUMANEVAL_PROMPT.format(prompt=data["prompt"].strip()),), data)


def _mt_bench(row: Row, where: str) -> Task:
    """FastChat's {"question_id", "category", "turns"}, or the hub's {"prompt_id", "category", "prompt"}."""
    name = "prompt" if "prompt" in row and "turns" not in row else "turns"
    prompts = _texts(row, name, where, 2)
    return Task(_id(row, ("question_id", "prompt_id"), where), _text(row, "category", where), prompts)


def _gsm8k(row: Row, where: str) -> Task:
    """{"question", "answer"}, whose answer ends with #### and the number."""
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    if "####" not in answer:
        raise ConfigError(f"Got {where} with answer={_shown(answer)} but expected #### and a number at its end")
    first, *others = GSM8K_ROUNDS
    number = str(row["id"]) if "id" in row else where.rsplit(" ", 1)[-1]
    return Task(number, "math", (first.format(question=question), *others), {"answer": answer})


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "cnndm", "CNN/DailyMail: extractive summaries", 1, Hub("abisee/cnn_dailymail", "3.0.0", "test"), _cnndm
        ),
        Benchmark("humaneval", "HumanEval: programs", 1, Hub("openai/openai_humaneval", None, "test"), _humaneval),
        Benchmark(
            "mt-bench", "MT-Bench: two turns", 2, Hub("HuggingFaceH4/mt_bench_prompts", None, "train"), _mt_bench
        ),
        Benchmark("mt-redundant", "MT-Redundant: the second turn varies the first answer", 2, None, _mt_bench),
        Benchmark("gsm8k", "GSM8K: three rounds of self-correction", 3, Hub("openai/gsm8k", "main", "test"), _gsm8k),
    )
}
"""By name."""
