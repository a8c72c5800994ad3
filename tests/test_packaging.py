"""What the wheel and the source archive hold, so that an installed package works like a checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "copyspec_engine": ROOT / "copyspec_engine",
    "langchain_copyspec": ROOT / "integrations" / "langchain" / "langchain_copyspec",
    "llama_index": ROOT / "integrations" / "llama_index" / "llama_index",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    code = "import sys; from hatchling.build import *; build_wheel(sys.argv[1]); build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_under_its_import_name(wheel: set[str]) -> None:
    for name, folder in PACKAGES.items():
        modules = {f"{name}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert modules <= wheel
        assert any(file.startswith(f"{name}/") and file.endswith("/py.typed") for file in wheel)


def test_the_wheel_leaves_the_namespace_of_llama_index_open(wheel: set[str]) -> None:
    assert "llama_index/__init__.py" not in wheel
    assert "llama_index/llms/__init__.py" not in wheel


def test_the_wheel_holds_the_provenance_page(wheel: set[str]) -> None:
    for name in ("page.html.jinja", "page.css", "page.js"):
        assert f"copyspec_engine/lab/page/{name}" in wheel


def test_the_wheel_holds_the_documents_the_bundled_model_and_the_fitted_weights(wheel: set[str]) -> None:
    for path in (ROOT / "examples" / "documents").iterdir():
        assert f"copyspec_engine/cli/shipped_documents/{path.name}" in wheel
    assert "copyspec_engine/memory/acceptance.json" in wheel
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert f"copyspec_engine/bundled/model/{name}" in wheel


def test_the_wheel_leaves_out_how_the_bundled_model_was_made(wheel: set[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if "dist-info" not in name} == set(PACKAGES)
    modules = {name for name in wheel if name.startswith("copyspec_engine/bundled/") and name.endswith(".py")}
    assert modules == {"copyspec_engine/bundled/__init__.py"}


def test_the_source_archive_can_build_the_wheel_and_run_the_tests(built: Path, wheel: set[str]) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "LICENSE", "Makefile", "constraints/cpu.txt", "conftest.py", "tests/conftest.py"}
    assert needed | {"copyspec_engine/memory/acceptance.json"} <= files
    assert {name for name in wheel if name.startswith("copyspec_engine/bundled/model/")} <= files


def test_what_the_makefile_runs_of_the_package_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    imports = re.findall(r"from copyspec_engine\S* import \w+", makefile)
    assert imports
    subprocess.run([sys.executable, "-c", "\n".join(imports)], check=True)


def test_the_bundled_model_is_at_most_24_megabytes() -> None:
    folder = ROOT / "copyspec_engine" / "bundled" / "model"
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= 24_000_000
