"""Metrics against values worked out by hand, and programs that are right and wrong in the sandbox."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from copyspec_engine import ConfigError, CopySpecError
from copyspec_engine.lab.evaluation.scoring.metrics import (
    evalplus_sample,
    final_number,
    gsm8k_answer,
    gsm8k_correct,
    humaneval_correct,
    humaneval_program,
    humaneval_solution,
    last_code_block,
    pass_at_1,
    rouge,
)
from copyspec_engine.lab.evaluation.scoring.sandbox import CodeResult, Limits, run_code
from tests.lab.test_sandbox import CAN_CONFINE, WHY_NOT


@pytest.fixture(scope="module")
def sandboxed() -> Callable[[str], CodeResult]:
    """The sandbox, which does not wait long for a program that does not end."""
    if not CAN_CONFINE:
        pytest.skip(WHY_NOT)
    return lambda source: run_code(source, Limits(cpu_s=1))


def printing(stdout: str, status: Any = "ok") -> Callable[[str], CodeResult]:
    """Stands for the sandbox: any program prints this."""
    return lambda source: CodeResult(status, stdout, "", 0.0)


def saying(words: str, status: Any = "ok") -> Callable[[str], CodeResult]:
    """Stands for the sandbox: the last line is `words`, {} in them what the program would say if all tests passed."""

    def run(source: str) -> CodeResult:
        passed = re.findall(r'print\("\\n(.*)"\)', source)[-1]
        return CodeResult(status, f"\n{words.format(passed)}\n", "", 0.0)

    return run


# ROUGE


@pytest.mark.parametrize(
    ("prediction", "reference", "scores"),
    [
        ("the cat sat", "the cat sat", (1, 1, 1, 1)),
        ("a dog", "the cat", (0, 0, 0, 0)),
        # Words: 2 of 3 and 2 of 2 match, F1 = 2 * 2 / (3 + 2). Pairs: 1 of 2 and 1 of 1, F1 = 2 * 1 / (2 + 1).
        ("the cat sat", "the cat", (4 / 5, 2 / 3, 4 / 5, 4 / 5)),
        # The same words in another order: no pair, and the longest common subsequence has 1 word of 2.
        ("sat cat", "cat sat", (1, 0, 1 / 2, 1 / 2)),
        # Stemmed, "cats" is "cat" and "running" is "run".
        ("cats running", "cat run", (1, 1, 1, 1)),
        # Sentences swapped. As one text: pairs "a b" and "c d" of 3 each, 2 of 4 words in common order. By sentences:
        # each sentence of the reference is in the prediction, so all 4 words count.
        ("a b. c d.", "c d. a b.", (1, 2 / 3, 1 / 2, 1)),
        ("a b.\nc d.", "c d.) a b.", (1, 2 / 3, 1 / 2, 1)),
        ("a b c d", "c d a b", (1, 2 / 3, 1 / 2, 1 / 2)),
        ("", "the cat", (0, 0, 0, 0)),
    ],
)
def test_rouge_is_what_is_counted_by_hand(prediction: str, reference: str, scores: tuple[float, ...]) -> None:
    found = rouge([prediction], [reference])
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert tuple(found.values()) == pytest.approx(scores)


def test_rouge_is_the_mean_over_texts() -> None:
    found = rouge(["the cat sat", "a dog", "one"], ["the cat", "the cat", "one"])
    assert found["rouge1"] == pytest.approx((4 / 5 + 0 + 1) / 3)
    assert found["rouge2"] == pytest.approx((2 / 3 + 0 + 0) / 3)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_rouge_needs_a_reference_for_each_text(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"Got {len(predictions)} predictions and {len(references)} references"):
        rouge(predictions, references)


def test_rouge_says_which_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def without_rouge(name: str, *rest: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ModuleNotFoundError(name)
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rouge)
    with pytest.raises(CopySpecError, match=r'rouge-score is not installed. Run: pip install "copyspec\[eval\]"'):
        rouge(["a"], ["a"])


# Blocks and numbers


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", None),
        ("an `inline` piece and ```three``` ticks", None),
        ("```python\nprint(1)\n```", "print(1)"),
        ("```py\nprint(1)\n```", "print(1)"),
        ("``` Python3 \nprint(1)\n```  ", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ('```python title="a.py"\nprint(1)\n```', "print(1)"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)"),
        ("First\n```python\n1\n```\nthen\n```python\n2\n\n3\n```\ndone", "2\n\n3"),
        ("```python\nprint(18)\n```\nprints\n```\n18\n```", "print(18)"),
        ("```\nfirst\n```\n```\nlast\n```", "last"),
        ("```bash\npython a.py\n```", None),
        ("```python\n1\n```\n```bash\npython a.py\n```", "1"),
        ("```python\nwhile True:\n    pass", "while True:\n    pass"),
        ("```python\n1\n```\nNow:\n```python\n2", "2"),
        ("```python\n```", ""),
        ("1. Do\n   ```python\n   if x:\n       y\n\n   z\n   ```\n2. Go", "if x:\n    y\n\nz"),
        ("\t```python\n\tif x:\n\t\ty\n\t```", "if x:\n\ty"),
        ("  ```python\n  a\nb\n    c\n  ```", "a\nb\n  c"),
        ("```python\n    return x\n```", "    return x"),
        ("````python\ntext = '''\n```\n'''\n````", "text = '''\n```\n'''"),
        ("```python\ns = '```'\n```", "s = '```'"),
    ],
)
def test_the_last_python_block_is_found(text: str, code: str | None) -> None:
    assert last_code_block(text) == code


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("18.0\n", "18"),
        ("The answer is 18.", "18"),
        ("1\n2\n3\n", "3"),
        ("$18", "18"),
        ("She makes $1,234,567.50 a year", "1234567.5"),
        ("-5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("US$5", "5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("+5", "5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("10 -5", "-5"),
        ("x=-5", "-5"),
        (".5", "0.5"),
        ("0.1%", "0.1"),
        ("1e3", "1000"),
        ("1.5E-05", "0.000015"),
        ("5 eggs", "5"),
        ("5eggs", "5"),
        ("(1, 2)", "2"),
        ("[1,2]", "2"),
        ("[18]", "18"),
        ("1,2345", "2345"),
        ("{x: 18}", "18"),
        ("3/4", "4"),
        ("x2 is 7 in H2O", "7"),
        ("version 1.2.3", "1.2"),
        ("no number", None),
        ("nan inf None True", None),
        ("", None),
        ("1e99999", "1"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number_is_read(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_the_reference_is_behind_four_hashes() -> None:
    assert gsm8k_answer("16 - 3 = <<16-3=13>>13\n#### 18") == 18
    assert gsm8k_answer("...\n#### 2,880,000") == 2_880_000
    assert gsm8k_answer("#### -10") == -10
    for field in ("18", "####", "#### none"):
        with pytest.raises(ConfigError, match='but expected "#### NUMBER" at its end'):
            gsm8k_answer(field)


# GSM8K


@pytest.mark.parametrize(
    ("printed", "reference", "correct"),
    [
        ("18", "18", True),
        ("18.0000001", "18", True),
        ("18.001", "18", False),
        ("2880000.5", "2880000", True),  # 1e-6 of it is 2.88
        ("2880003", "2880000", False),
        ("0.0000001", "0", True),
        ("-18", "18", False),
        ("1e9999", "18", False),
        ("9" * 500, "18", False),
        ("nothing", "18", False),
    ],
)
def test_the_printed_number_is_compared_within_the_tolerance(printed: str, reference: str, correct: bool) -> None:
    assert gsm8k_correct("```python\n...\n```", f"#### {reference}", printing(printed)) is correct


def test_an_answer_without_a_program_that_ends_well_is_wrong() -> None:
    assert gsm8k_correct("```python\n...\n```", "#### 18", printing("18"))
    assert not gsm8k_correct("The answer is 18.", "#### 18", printing("18"))
    for status in ("error", "timeout", "memory", "disk"):
        assert not gsm8k_correct("```python\n...\n```", "#### 18", printing("18", status))


@pytest.mark.parametrize(
    ("code", "correct"),
    [
        ("eggs = 16 - 3 - 4\nprint(f'She makes ${eggs * 2:,.2f}')", True),
        ("def main():\n    print(18)\n\nif __name__ == '__main__':\n    main()", True),
        ("print(16 - 3 * 2)", False),
        ("print(18)\nundefined", False),
        ("open('/etc/passwd'); print(18)", False),
        ("while True: print(18)", False),
    ],
)
def test_programs_of_answers_are_run(code: str, correct: bool, sandboxed: Callable[[str], CodeResult]) -> None:
    assert gsm8k_correct(f"So:\n```python\n{code}\n```\nDone.", "#### 18", sandboxed) is correct


# HumanEval

PROBLEMS: dict[str, dict[str, str]] = {
    "a sum": {
        "task_id": "Own/0",
        "prompt": 'def add(a: int, b: int) -> int:\n    """The sum.\n    >>> add(1, 2)\n    3\n    """\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "wrong": "    return a - b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n",
    },
    "a helper in the prompt": {
        "task_id": "Own/1",
        "prompt": (
            "from typing import List\nimport math\n\n\ndef double(x: float) -> float:\n    return 2 * x\n\n\n"
            "def largest(xs: List[float]) -> float:\n    ''' Twice the largest. '''\n"
        ),
        "entry_point": "largest",
        "canonical_solution": "    ordered = sorted([-math.inf, *xs])\n\n    return double(ordered[-1])\n",
        "wrong": "    return double(xs[0])\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 3, 2]) == double(3)\n",
    },
    "NumPy in the test": {
        "task_id": "Own/2",
        "prompt": "def halves(n):\n    # The numbers from 0 to n, halved.\n",
        "entry_point": "halves",
        "canonical_solution": "    return [i / 2 for i in range(n + 1)]\n",
        "wrong": "    return [i // 2 for i in range(n + 1)]\n",
        "test": (
            "import numpy as np\n\ndef check(candidate):\n"
            "    assert np.allclose(candidate(3), np.arange(4) / 2, atol=1e-6)\n"
        ),
    },
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    "answer",
    [
        "{body}",
        "```python\n{prompt}{body}```",
        "Sure!\n\n```python\n{prompt}{body}\n```\n\nIt works so:\n\n```python\nprint({entry_point}(undefined))\n```\n",
        "{prompt}{body}",
        "```python\n{body}```\nThis goes on.",
        "{body}\nThis answers the question.\n",
        "```python\nfrom __future__ import annotations\n\n{prompt}{body}\nif __name__ == '__main__':\n    exit()\n```",
    ],
    ids=["continuation", "block", "chat", "whole text", "body in a block", "continuation, then prose", "script"],
)
def test_right_solutions_pass_and_wrong_ones_fail(
    name: str, answer: str, sandboxed: Callable[[str], CodeResult]
) -> None:
    problem = PROBLEMS[name]
    right = answer.format(**problem, body=problem["canonical_solution"])
    wrong = answer.format(**problem, body=problem["wrong"])
    assert humaneval_correct(problem, right, sandboxed)
    assert not humaneval_correct(problem, wrong, sandboxed)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot do that.",
        "```python\ndef sub(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return a +\n```",
        "```python\ndef add(a, b):\n    exit()\n```",
        "```python\nimport os\ndef add(a, b):\n    os._exit(0)\n```",
        "```python\ndef add(a, b):\n    while True: pass\n```",
    ],
)
def test_answers_that_do_not_reach_the_end_of_the_tests_fail(
    answer: str, sandboxed: Callable[[str], CodeResult]
) -> None:
    assert not humaneval_correct(PROBLEMS["a sum"], answer, sandboxed)


def test_a_function_alone_has_the_imports_and_helpers_of_its_prompt(sandboxed: Callable[[str], CodeResult]) -> None:
    alone = "```python\ndef largest(xs: List[float]) -> float:\n    return double(max(xs))\n```"
    assert humaneval_correct(PROBLEMS["a helper in the prompt"], alone, sandboxed)


def test_the_solution_is_a_module_of_its_own() -> None:
    problem = PROBLEMS["a sum"]
    whole = problem["prompt"] + problem["canonical_solution"]
    assert humaneval_solution(problem, problem["canonical_solution"]) == whole
    assert humaneval_solution(problem, "    return 1\n\n\nprint(2)") == problem["prompt"] + "    return 1\n\n\n"
    first, second = "def add(a, b):\n    return 1", "def add(a, b):\n    return 2"
    assert (
        humaneval_solution(problem, f"```python\n{first}\n```\n```python\n{second}\n```\n```python\n1\n```") == second
    )
    assert humaneval_solution(problem, f"```python\ndef add_more():\n    pass\n```\n```\n{first}\n```") != first
    assert evalplus_sample(problem, f"```python\n{first}\n```") == {"task_id": "Own/0", "solution": first}
    compile(humaneval_program(problem, first, "passed"), "program.py", "exec")


def test_a_program_that_fails_is_no_pass_whatever_it_prints() -> None:
    problem, answer = PROBLEMS["a sum"], "    return a + b"
    assert humaneval_correct(problem, answer, saying("{}"))
    assert not humaneval_correct(problem, answer, saying("{}", "error"))
    assert not humaneval_correct(problem, answer, saying("{}x"))
    assert not humaneval_correct(problem, answer, saying("all tests passed"))
    assert not humaneval_correct(problem, answer, saying(""))


def test_pass_at_1_is_the_share_that_passed() -> None:
    assert pass_at_1([True, False, True, True]) == 0.75
    assert pass_at_1([False]) == 0.0
    with pytest.raises(ConfigError, match="Got no outcomes but expected at least one"):
        pass_at_1([])
