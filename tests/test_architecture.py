"""The house: which rooms the engine has, which way imports go between them, and what its lists of exceptions hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "copyspec_engine"

ROOT_MODULES = {"__init__", "__main__", "compiled", "testing"}
"""What may lie beside the rooms. A new module belongs into a room."""

_LOOP = {
    "values",
    "compiled",
    "chat",
    "models",
    "kv",
    "memory",
    "drafting",
    "sampling",
    "grammar",
    "provenance",
    "execution",
}
FRONT = "the public names"
"""What `copyspec_engine` itself exports."""
ALLOWED: dict[str, set[str]] = {
    "values": set(),
    "compiled": {"values"},
    "bundled": set(),
    "chat": {"values"},
    "models": {"values", "bundled"},
    "kv": {"values"},
    "memory": {"values", "compiled"},
    "drafting": {"values", "memory", "compiled"},
    "sampling": {"values", "memory", "drafting", "compiled"},
    "grammar": {"values", "chat", "drafting"},
    "provenance": {"values", "chat", "memory", "drafting", "compiled"},
    "execution": {"values", "chat", "models", "drafting", "compiled"},
    "loop": _LOOP,
    "engine": {*_LOOP, "loop"},
    "adapters": {"values", "chat", "memory", "execution", "engine", FRONT},
    "serve": {"values", "chat", "engine", "adapters", FRONT},
    "testing": {*_LOOP, "loop", "engine"},
    "scale": {"values", "engine", "serve"},
    "cli": {"values", "models", "bundled", "adapters", "serve", "scale", "execution", "testing", "lab", FRONT},
    "lab": {*_LOOP, "loop", "engine", "adapters", "serve", "scale", "bundled", "cli", "testing", FRONT},
    "__main__": {"cli"},
}
"""What each room may import of the others."""

WITHOUT_TORCH = {"values", "compiled", "memory", "drafting", "kv"}
MAY_IMPORT_TRANSFORMERS = {
    "chat/reply.py",
    "chat/tokenizer.py",
    "cli/demo/transformers_lanes.py",
    "execution/attention.py",
    "execution/checkpoint.py",
    "execution/cuda_graphs.py",
    "execution/float32_head.py",
    "execution/narrow_loading.py",
    "execution/ordered_experts.py",
    "execution/peft_adapter.py",
    "execution/loading.py",
    "execution/pass_cost.py",
    "execution/runner.py",
    "execution/self_check.py",
    "execution/stateful.py",
    "execution/weight_counts.py",
    "models/",
    "lab/recorded/",
}
MAY_IMPORT_INSIDES = {
    *("adapters", "bundled", "lab", "models", "scale", "serve", "testing"),
    *("values.folders", "values.html", "values.outputs", "execution.calibration"),
}
"""What the command line, the integrations and the evaluation import beside the public names."""


HELP = """
from typer.testing import CliRunner
from copyspec_engine.cli.main import app
assert CliRunner().invoke(app, [*[], '--help']).exit_code == 0
"""


def modules_imported(path: Path) -> set[str]:
    """Full dotted names of everything that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files() -> list[tuple[str, str, Path]]:
    """(room, path within the package, file) of the engine package but its front page."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.as_posix() != "__init__.py":
            found.append((name.parts[0].removesuffix(".py"), name.as_posix(), path))
    return found


def test_the_root_gains_no_module() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES


def test_every_room_is_in_the_table_and_says_what_it_is() -> None:
    assert {room for room, _, _ in files()} == set(ALLOWED)
    for room in sorted(set(ALLOWED) - ROOT_MODULES):
        docs = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        said = re.search(r"May import: (.*?)[.;]", docs or "", flags=re.DOTALL)
        assert said, room
        assert "Nouns: " in (docs or ""), room
        if room not in ("cli", "lab"):  # nearly everything
            named = set(re.split(r",? and |,\s+", said[1])) - {"nothing of ours"}
            assert named == ALLOWED[room] - {FRONT}, room


def test_the_docs_name_every_room() -> None:
    table = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").split("## Rooms")[1].split("\n## ")[0]
    assert {*re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE), "bundled"} == set(ALLOWED) - ROOT_MODULES


def test_rooms_import_only_what_they_may() -> None:
    upward = set()
    for room, name, path in files():
        for imported in modules_imported(path):
            pieces = imported.split(".")
            if pieces[0] == "copyspec_engine" and len(pieces) > 1:
                target = pieces[1] if pieces[1] in ALLOWED else FRONT
                if target not in {*ALLOWED[room], room}:
                    upward.add((name, imported))
    assert not upward


def test_nothing_loads_the_lab_before_a_command_needs_it() -> None:
    """Only the options of `bench` and `eval` are known to the command line; what they do is imported when they run."""
    for room, name, path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_import = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        loaded = {module for module in at_import if module.startswith("copyspec_engine.lab")}
        if room != "lab":
            assert not loaded or name in LOADS_LAB, f"{name} imports {loaded}"


LOADS_LAB = {"cli/main.py"}
"""Registers `bench` and `eval`."""


@pytest.mark.parametrize("code", ["import copyspec_engine.cli.main", HELP, HELP.replace("[]", "['bench', 'drafts']")])
def test_the_command_line_is_there_before_anything_heavy_is_loaded(code: str) -> None:
    heavy = {"torch", "transformers", "numba", "matplotlib", "tokenizers", "numpy", "langchain_core", "llama_index"}
    code = f"import sys\n{code}\nprint(*{heavy} & {{name.split('.')[0] for name in sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == ""


def test_the_lower_rooms_know_neither_torch_nor_transformers() -> None:
    for room, name, path in files():
        tops = {imported.split(".")[0] for imported in modules_imported(path)}
        if room in WITHOUT_TORCH:
            assert not tops & {"torch", "transformers", "tokenizers"}, name
        if "transformers" in tops:
            assert name.startswith(tuple(MAY_IMPORT_TRANSFORMERS)), name


def test_only_what_cuda_alone_has_asks_torch_cuda() -> None:
    asking = {name for _, name, path in files() if "torch.cuda" in path.read_text(encoding="utf-8")}
    served = {name for name in asking if not name.startswith("lab/")}
    cuda = {"execution/cuda_graphs.py", "execution/paged_attention.py", "execution/paged_kernels.py"}
    assert served <= cuda, "ask accelerator.py"


def test_outer_code_uses_public_names_only() -> None:
    import copyspec_engine

    outer = [PACKAGE / "cli", PACKAGE / "lab" / "evaluation", ROOT / "integrations", ROOT / "examples"]
    public = {f"copyspec_engine.{name}" for name in copyspec_engine.__all__} | {"copyspec_engine"}
    for path in (file for folder in outer for file in sorted(folder.rglob("*.py")) if "tests" not in file.parts):
        for imported in modules_imported(path):
            inside = imported.removeprefix("copyspec_engine.")
            if inside == imported or imported in public or inside.split(".")[0] == path.parent.name:
                continue
            if inside.split(".")[0] == "cli" and path.is_relative_to(PACKAGE):
                continue
            assert re.match(f"({'|'.join(MAY_IMPORT_INSIDES)})([.]|$)", inside), f"{path} imports {imported}"


def test_the_integrations_do_not_import_each_other() -> None:
    for name, other in (("langchain", "llama_index.llms.copyspec"), ("llama_index", "langchain_copyspec")):
        for path in (ROOT / "integrations" / name).rglob("*.py"):
            assert not any(imported.startswith(other) for imported in modules_imported(path)), path


MOST_PRIVATE = 40
"""Uses of private attributes of other objects in tests, other libraries' included. It only shrinks: see `testing`."""


def test_tests_ask_for_little_that_is_private() -> None:
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "integrations").rglob("tests/*.py"), ROOT / "conftest.py"]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    private = [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    assert len(private) <= MOST_PRIVATE, private


def test_the_list_of_too_long_and_too_wide_functions_only_shrinks() -> None:
    """A file that is on the list in pyproject.toml without a need is taken off it; no other file needs it."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    listed = {name for name, rules in config["per-file-ignores"].items() if {"PLR0913", "PLR0915"} & set(rules)}
    most = config["pylint"]["max-args"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "PLR0913,PLR0915", "--quiet"]
    command += ["--config", f"lint.pylint.max-args={most}", "--output-format", "concise", "copyspec_engine", "scripts"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert listed == {line.split(":")[0] for line in shown.splitlines() if ":" in line}
