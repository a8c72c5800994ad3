"""`copyspec cache` shows what is kept and removes it: nothing that is not copyspec's, or that is being made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from copyspec_engine.cli.main import app

KINDS = {
    "compiled code": "compiled/0123456789abcdef/memory/index.nbc",
    "models": "models/gguf/0123456789abcdef-a-model/model.safetensors",
    "downloads": "models/.smollm2.abc.part/got",
    "calibration": "step_cost/bundled.json",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with one file of each kind, of 1000, 2000, ... bytes, and one that is not ours."""
    root = tmp_path / "cache"
    for number, name in enumerate(KINDS.values(), start=1):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(bytes(1000 * number))
    (root / "models" / ".smollm2.lock").touch()
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(root))
    return root


def run(*words: str, answer: str = "", code: int = 0) -> str:
    result = CliRunner().invoke(app, ["cache", *words], input=answer, terminal_width=80)
    assert result.exit_code == code, result.output
    return result.output


def left(folder: Path) -> set[str]:
    return {kind for kind, name in KINDS.items() if (folder / name).exists()}


def test_it_shows_each_kind_with_its_size(folder: Path) -> None:
    told = json.loads(run("--json"))
    assert told["path"] == str(folder)
    assert {kind: part["num_bytes"] for kind, part in told["kinds"].items()} == {
        kind: 1000 * number for number, kind in enumerate(KINDS, start=1)
    }
    shown = run()
    for kind in KINDS:
        assert kind in shown
    assert "a GGUF file is there twice" in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_named_is_removed_alone(folder: Path, kind: str) -> None:
    assert "Removed" in run("clear", f"--{kind.split()[0]}", "--yes")
    assert left(folder) == KINDS.keys() - {kind}


@pytest.mark.parametrize("words", [("clear",), ("clear", "--models", "--compiled")])
def test_models_are_asked_for(folder: Path, words: tuple[str, ...]) -> None:
    assert "Nothing was removed" in run(*words, answer="n\n", code=1)
    assert left(folder) == KINDS.keys()
    run(*words, answer="y\n")
    assert "models" not in left(folder)


def test_all_that_is_ours_is_removed_and_nothing_else(folder: Path) -> None:
    run("clear", "--yes")
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("not ours")
    assert "Removed 0 kB" in run("clear", "--yes")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_what_another_process_fetches_just_now_stays(folder: Path) -> None:
    with FileLock(folder / "models" / ".smollm2.lock"):
        assert "smollm2 is being made just now" in run("clear", "--yes")
    assert left(folder) == {"downloads"}
