"""The notebooks of examples: what is stored is small and tells of no machine; with --slow, they are run again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
DOCS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))


def cells_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return found


def test_there_is_one_for_each_main_job() -> None:
    assert NOTEBOOKS == ["agent_with_tools", "corrective_rag", "refine_chain", "rewrite_chain"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored_is_small_and_of_no_machine(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert not re.search(r"/(home|root|tmp|work|Users)/|image/png|traceback|\\u001b|execution\"|Warning", text)
    cells = cells_of(name)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert 6 <= len(cells) <= 12
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert cells[0]["cell_type"] == "markdown"
    assert any("text/html" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert not [output for cell in code for output in cell["outputs"] if output.get("name") == "stderr"]
    assert f"`{name}.ipynb`" in DOCS


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.enable_socket
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs_to_its_end(name: str, tmp_path: Path) -> None:
    """All cells run, with the claims that they assert; a kernel is a process of its own."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install nbclient ipykernel")
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in shown)
