from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import Engine
from copyspec_engine.models import find_model

MakeEngine = Callable[..., Engine]

PAGE = Path(__file__).parents[3] / "docs" / "llama_index.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's workflows list pydantic's old names
def test_the_snippets_run_as_they_stand(monkeypatch: pytest.MonkeyPatch, bundled: Engine) -> None:
    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", lambda *_: bundled)
    monkeypatch.setattr("copyspec_engine.models.find._find_known", lambda known: find_model("bundled"))
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 8
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec", dont_inherit=True), names)


def test_every_row_of_the_table_names_a_test_of_ours() -> None:
    own = Path(__file__).parent
    files = (*own.glob("test_*.py"), *own.parents[2].glob("tests/adapters/test_*.py"))
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    named = re.findall(r"`(test_\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) >= 15
    for name in named:
        assert f"def {name}(" in tests, name
