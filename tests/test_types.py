"""A user's program passes mypy --strict, with pydantic's plugin at its strictest and without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "data" / "typed_program.py"
PLAIN = """
[mypy]
strict = True
namespace_packages = True
explicit_package_bases = True
follow_imports = silent

[mypy-torch.*,transformers.*,numba.*,tokenizers.*,huggingface_hub.*,openai.*,langsmith.*,sqlalchemy.*,aiohttp.*,nltk.*]
follow_imports = skip
"""
PLUGIN = f"""{PLAIN.replace("strict = True", "strict = True" + chr(10) + "plugins = pydantic.mypy")}
[pydantic-mypy]
init_typed = True
init_forbid_extra = True
"""


@pytest.mark.parametrize("config", [PLAIN, PLUGIN], ids=["without the plugin", "with the plugin"])
def test_a_users_program_is_typed(config: str, tmp_path: Path) -> None:
    """Also that a drafter's name is checked: the program says which of its lines are wrong."""
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(config, encoding="utf-8")
    places = (ROOT, ROOT / "integrations" / "langchain", ROOT / "integrations" / "llama_index")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), str(PROGRAM)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
