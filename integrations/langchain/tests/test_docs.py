from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import Engine

MakeEngine = Callable[..., Engine]

PAGE = Path(__file__).parents[3] / "docs" / "langchain.md"


def test_the_snippets_run_as_they_stand(monkeypatch: pytest.MonkeyPatch, make_engine: MakeEngine) -> None:
    notes = "# Notes\n- Ann books the room\n- Bo brings the slides\n- Cy orders lunch\n"
    engine = make_engine(lambda prompt: notes)
    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", lambda *_: engine)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 5
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)


def test_every_row_of_the_table_names_a_test_of_ours() -> None:
    own = Path(__file__).parent
    files = (*own.glob("test_*.py"), *own.parents[2].glob("tests/adapters/test_*.py"))
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    text = PAGE.read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith("| |")]
    assert len(rows) >= 15
    for row in rows:
        named = re.search(r"`(test_\w+)` \|$", row)
        assert named is not None, row
        assert f"def {named[1]}(" in tests, row
