"""What an answer is worth: ROUGE of summaries, correctness of programs; functions of texts alone.

Programs are run by whoever calls: `run` is `sandbox.run_code`, or anything with its signature.

Not covered: speed and copied tokens (evaluation/summary.py), where tasks come from, running code (sandbox.py).
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from copyspec_engine import ConfigError, missing_extra
from copyspec_engine.lab.evaluation.scoring.sandbox import CodeResult

__all__ = [
    "evalplus_sample",
    "final_number",
    "gsm8k_answer",
    "gsm8k_correct",
    "humaneval_correct",
    "humaneval_program",
    "humaneval_solution",
    "last_code_block",
    "pass_at_1",
    "rouge",
]

Run = Callable[[str], CodeResult]

_ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])([\"'\u201d\u2019)\]]*)\s+")
_PYTHON = ("python", "python3", "py")
_FENCE = re.compile(r"([ \t]*)(`{3,})[ \t]*([\w+-]*)[^`]*")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?"  # not within a word or another number; the minus of 10-5 is no sign
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"  # 1,234,567 or 1234567 or nothing before .5
    r"(?:\.\d+)?(?:[eE][-+]?\d{1,4}(?!\d))?"
)
_TOLERANCE = 1e-6


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of the F1 scores ROUGE-1, -2, -L and -Lsum, 0 to 1, of the package rouge-score with its Porter stemmer.

    ROUGE-Lsum compares sentence by sentence. A sentence ends at a line break, and behind ".", "!" or "?" (with closing
    quotes and brackets) where white space follows, so also behind abbreviations.

    Returns:
        "rouge1", "rouge2", "rougeL", "rougeLsum".

    Raises:
        ConfigError: there are no texts, or not as many predictions as references.
        CopySpecError: rouge-score is not installed.
    """
    if not predictions or len(predictions) != len(references):
        raise ConfigError(
            f"Got {len(predictions)} predictions and {len(references)} references but expected as many of both, "
            "at least one"
        )
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing_extra("rouge-score", "eval") from None
    scorer = RougeScorer(_ROUGE_TYPES, use_stemmer=True)
    scores = [
        scorer.score(_sentence_lines(reference), _sentence_lines(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: math.fsum(score[name].fmeasure for score in scores) / len(scores) for name in _ROUGE_TYPES}


def _sentence_lines(text: str) -> str:
    return _SENTENCE_END.sub(r"\1\n", text)


def last_code_block(text: str) -> str | None:
    """The code of the last Markdown block that is marked python, python3 or py; None if there is none.

    Where no block is marked with any of these, the last one without a mark counts: beside a marked one it usually holds
    what the program prints. A block that is not closed ends with the text. As much indentation as the opening fence
    has (in a list, say) is removed from each line.
    """
    blocks = _python_blocks(text)
    return blocks[-1] if blocks else None


def _python_blocks(text: str) -> list[str]:
    """All marked blocks, or if there are none, all without a mark."""
    marked: list[str] = []
    unmarked: list[str] = []
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        if not (fence := _FENCE.fullmatch(line)):
            continue
        indent, ticks, language = fence.groups()
        code = []
        for inner in lines:
            if inner.strip().startswith(ticks) and not inner.strip().strip("`"):
                break
            shared = len(inner) - len(inner.lstrip(" \t"))
            code.append(inner[min(shared, len(indent)) :])
        if not language or language.lower() in _PYTHON:
            (marked if language else unmarked).append("\n".join(code))
    return marked or unmarked


def final_number(stdout: str) -> Decimal | None:
    """The last number in a text; None if there is none.

    "$1,234.50" is 1234.5, "-$3" is -3, "18.0" is 18, "5%" is 5, "1.5e3" is 1500 and "3/4" is 4: signs, thousands
    commas and exponents are read, currencies and units are not. Digits within a word ("x2") are no number.
    """
    numbers = _NUMBER.findall(stdout.replace("\N{MINUS SIGN}", "-").replace("-$", "-").replace("$", " "))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def gsm8k_answer(answer_field: str) -> Decimal:
    """The number behind "####" in the `answer` of a GSM8K task.

    Raises:
        ConfigError: there is none.
    """
    number = final_number(answer_field.rpartition("####")[2]) if "####" in answer_field else None
    if number is None:
        raise ConfigError(f'Got the GSM8K answer {answer_field[-80:]!r} but expected "#### NUMBER" at its end')
    return number


def gsm8k_correct(answer_text: str, reference_answer: str, run: Run) -> bool:
    """Whether the program in an answer prints the reference's number, as in rounds 1 and 3 of the self-correction.

    The last Python block is run. It is right if it ends without an error and the last number that it prints is within
    1e-6 of the reference, relative to it where it is larger than 1. An answer without a block, though it may say that
    an earlier one was right, is wrong.

    Args:
        answer_text: of the model.
        reference_answer: the task's `answer`, see `gsm8k_answer`.
        run: runs a program.

    Raises:
        ConfigError: the reference has no number.
    """
    expected = gsm8k_answer(reference_answer)
    code = last_code_block(answer_text)
    if code is None:
        return False
    result = run(code)
    number = final_number(result.stdout)
    if result.status != "ok" or number is None:
        return False
    return abs(float(number) - float(expected)) <= _TOLERANCE * max(1.0, abs(float(expected)))


def humaneval_solution(problem: Mapping[str, Any], answer_text: str) -> str:
    """The module that an answer to a HumanEval task amounts to.

    That is the last Python block that defines the entry point, or the whole text if it defines it without a block.
    Else the last block, or the text, is read as what follows the prompt: its lines up to the first without indentation.
    """
    definition = re.compile(rf"^def {re.escape(problem['entry_point'])}\b", re.MULTILINE)
    candidates = _python_blocks(answer_text) or [answer_text]
    for code in reversed(candidates):
        if definition.search(code):
            return code
    body = []
    for line in candidates[-1].splitlines():
        if line and not line[0].isspace():
            break
        body.append(line)
    return "\n".join([problem["prompt"].rstrip(), *body, ""])


def humaneval_program(problem: Mapping[str, Any], answer_text: str, passed: str) -> str:
    """A program that tests an answer to a HumanEval task, and prints the line `passed` last if every test passed.

    The prompt (with an empty function, for its imports and helper functions), the solution and the tests run one after
    the other in one module that is not `__main__`; then `check(entry_point)` is called. The package evalplus is not
    used: HumanEval+ (`evalplus/humanevalplus` on the hub) has the same columns with larger tests in `test`, so the same
    program gives its score. It is lenient in one point beside evalplus: an import of the prompt need not be repeated.

    Args:
        problem: a row of the data set: "prompt", "entry_point" and "test".
        answer_text: of the model.
        passed: what the answer cannot know.
    """
    parts = (problem["prompt"].rstrip() + "\n    pass\n", humaneval_solution(problem, answer_text), problem["test"])
    return f"""import sys, types
module = sys.modules["solution"] = types.ModuleType("solution")
for name, part in zip(("prompt", "solution", "test"), {parts!r}):
    exec(compile(part, name + ".py", "exec"), vars(module))
module.check(module.{problem["entry_point"]})
print("\\n{passed}")
"""


def humaneval_correct(problem: Mapping[str, Any], answer_text: str, run: Run) -> bool:
    """Whether an answer to a HumanEval task passes all its tests; one that ends the program before does not."""
    passed = f"all tests passed {secrets.token_hex(8)}"
    result = run(humaneval_program(problem, answer_text, passed))
    return result.status == "ok" and result.stdout.endswith(f"\n{passed}\n")


def pass_at_1(outcomes: Sequence[bool]) -> float:
    """Share of tasks whose one answer passed, 0 to 1.

    Raises:
        ConfigError: there are none.
    """
    if not outcomes:
        raise ConfigError("Got no outcomes but expected at least one")
    return sum(outcomes) / len(outcomes)


def evalplus_sample(problem: Mapping[str, Any], answer_text: str) -> dict[str, str]:
    """A line of the `samples.jsonl` that evalplus reads, to score the same answers with that package."""
    return {"task_id": problem["task_id"], "solution": humaneval_solution(problem, answer_text)}
