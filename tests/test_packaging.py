"""What the wheel and the source archive hold, so that an installed package works like a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import policy
from email.message import Message
from email.parser import BytesParser
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scripts.build_packages import build_all

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "copyspec_engine": ROOT / "copyspec_engine",
    "langchain_copyspec": ROOT / "integrations" / "langchain" / "langchain_copyspec",
    "llama_index": ROOT / "integrations" / "llama_index" / "llama_index",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_all(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    with zipfile.ZipFile(next(built.glob("copyspec-*.whl"))) as archive:
        return set(archive.namelist())


def metadata(built: Path, name: str) -> Message:
    with zipfile.ZipFile(next(built.glob(f"{name}-*.whl"))) as archive:
        files = {path.rpartition("/")[2]: path for path in archive.namelist()}
        return BytesParser(policy=policy.default).parsebytes(archive.read(files["METADATA"]))


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
    assert "copyspec_engine/values/look.css" in wheel


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


@pytest.mark.parametrize("name", ["copyspec", "langchain_copyspec", "llama_index_llms_copyspec"])
def test_the_page_of_a_package_links_to_what_is_there(built: Path, name: str) -> None:
    told = metadata(built, name)
    source = dict(line.split(", ") for line in told.get_all("Project-URL", []))["Source"]
    text = told.get_payload()
    assert isinstance(text, str)
    links = re.findall(r"\]\(([^)]+)\)|src(?:set)?=\"([^\"]+)\"", text)
    assert links
    for link in (target or picture for target, picture in links):
        kind, version, path = link.removeprefix(f"{source}/").split("/", 2)
        assert (kind, version) in {(kind, f"v{told['Version']}") for kind in ("blob", "raw", "tree")}, link
        assert (ROOT / path.partition("#")[0]).exists(), link


@pytest.mark.parametrize(
    ("name", "extra"), [("langchain_copyspec", "langchain"), ("llama_index_llms_copyspec", "llama-index")]
)
def test_a_package_without_files_brings_the_same_version_with_its_extra(built: Path, name: str, extra: str) -> None:
    whole, told = metadata(built, "copyspec"), metadata(built, name)
    assert told.get_all("Requires-Dist") == [f"copyspec[{extra}]=={whole['Version']}"]
    assert extra in whole.get_all("Provides-Extra", [])
    for shared in ("Version", "Requires-Python", "License-Expression", "Project-URL", "Classifier"):
        assert told.get_all(shared) == whole.get_all(shared)
    with zipfile.ZipFile(next(built.glob(f"{name}-*.whl"))) as archive:
        assert all(".dist-info/" in path for path in archive.namelist())


CALL = """
import copyspec_engine, llama_index.llms.copyspec, langchain_copyspec
from copyspec_engine.sampling.gumbel import warm_up_noise
warm_up_noise()
print(copyspec_engine.__file__)
"""


def test_an_uninstallation_leaves_nothing_behind(built: Path, tmp_path: Path) -> None:
    """Neither files beside others' nor compiled code; what was kept is in the cache folder."""
    venv.create(tmp_path / "venv")
    prefix = str(tmp_path / "venv")
    scheme = "nt" if os.name == "nt" else "posix_prefix"  # the one of environments has no name before Python 3.11
    site = Path(sysconfig.get_path("purelib", scheme, {"base": prefix, "platbase": prefix}))
    scripts = Path(sysconfig.get_path("scripts", scheme, {"base": prefix, "platbase": prefix}))
    python = str(scripts / "python")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    def files() -> set[Path]:
        return {path for folder in (site, scripts) for path in folder.rglob("*")}

    def pip(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "pip", "--python", python, *words], check=True, capture_output=True)

    before = files()
    pip("install", "--no-deps", "--no-index", str(next(built.glob("copyspec-*.whl"))))
    environment = {**os.environ, "COPYSPEC_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    called = subprocess.run(
        [python, "-c", CALL], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert Path(called.stdout.strip()).is_relative_to(site)
    assert list((tmp_path / "cache" / "compiled").rglob("*.nbc"))
    pip("uninstall", "--yes", "copyspec")
    namespace = site / "llama_index"  # pip leaves its empty folders, since other packages may be in it
    assert files() - {namespace, namespace / "llms"} == before


def test_the_citation_is_of_this_version(built: Path) -> None:
    cited, told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")), metadata(built, "copyspec")
    assert [cited[key] for key in ("title", "version", "license")] == ["copyspec", told["Version"], "MIT"]
    assert f"Source, {cited['repository-code']}" in told.get_all("Project-URL", [])


def test_what_the_makefile_runs_of_the_package_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    imports = re.findall(r"from copyspec_engine\S* import \w+", makefile)
    assert imports
    subprocess.run([sys.executable, "-c", "\n".join(imports)], check=True)


def test_the_oldest_python_can_install_every_version_that_is_pinned_for_it() -> None:
    oldest = re.search(r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert oldest
    python = {"python_version": oldest[1], "python_full_version": f"{oldest[1]}.0"}
    lines = (ROOT / "constraints" / "cpu.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    supported = {
        (re.sub("[-_.]+", "-", one.name).lower(), one.version.partition("+")[0]): one.metadata.get("Requires-Python")
        for one in distributions()
    }
    installed = []
    for pin in pins:
        key = (re.sub("[-_.]+", "-", pin.name).lower(), str(pin.specifier).removeprefix("=="))
        if (pin.marker is None or pin.marker.evaluate(python)) and key in supported:
            installed.append((pin, supported[key]))
    assert len(installed) > len(pins) // 2
    assert not [f"{pin} needs Python {needs}" for pin, needs in installed if oldest[1] not in SpecifierSet(needs or "")]


def test_the_bundled_model_is_at_most_24_megabytes() -> None:
    folder = ROOT / "copyspec_engine" / "bundled" / "model"
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= 24_000_000
