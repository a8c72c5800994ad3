"""The README's snippets run as they stand, its files exist, and its commands are those of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from copyspec_engine.cli.documents import shipped_names
from copyspec_engine.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^## ([^\n]+)\n+```python\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
DEMO_OPTIONS = sorted(set(re.findall(r"--[a-z]+", " ".join(re.findall(r"copyspec demo[^`]*", README)))))
EXPECTED = {
    "Use it in LangChain": "# Notes\n- Ann books the room\n- Bo brings the slides\n",
    "Use it in LlamaIndex": "DRAFT\n# Notes\n- Ann books the room ",
    "Use the engine": "# Notes\n- Ann books the room",
    "Structured output": '{"title": "Notes"}',
}


def test_every_python_snippet_is_run_here() -> None:
    assert [title for title, _ in SNIPPETS] == list(EXPECTED)
    assert README.count("```python") == len(SNIPPETS)


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_the_snippet_runs_and_prints_the_edited_text(title: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, title, "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.startswith(EXPECTED[title])


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_two_commands_are_make_targets(name: str) -> None:
    assert f"make {name} " in README
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("option", DEMO_OPTIONS)
def test_every_option_of_the_demo_in_the_readme_exists(option: str) -> None:
    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"})
    assert option in result.output


def test_the_figures_stand_with_their_command_and_hardware() -> None:
    measured = README.split("<!-- measured: begin -->\n")[1].split("<!-- measured: end -->")[0]
    rows = [line for line in measured.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(shipped_names())
    assert all(row.endswith("| yes |") for row in rows)
    for text in ("`python scripts/measure_demo.py`", "CPU cores", "torch", "load average"):
        assert text in measured
