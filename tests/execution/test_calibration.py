"""Measured curves are kept per model and machine, used while they hold, and no state of the disk keeps a model away."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine.drafting.cost import Points
from copyspec_engine.execution.calibration import KeptCurve, PassCost, cpu_name, keep, kept_curves, kept_or_measured
from copyspec_engine.values import folders
from copyspec_engine.values.folders import cache_dir

FACTS = {"model": "Qwen/Qwen2.5-7B-Instruct", "device": "cpu of some kind", "dtype": "float32"}
CURVE = ((1, 0.01), (2, 0.012), (64, 0.03), (256, 0.1))
OTHER = ((1, 0.02), (2, 0.03), (64, 0.09), (256, 0.3))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "step_cost"


class Machine:
    """Measures what it is told, and counts how often it is asked."""

    def __init__(self, curve: Points) -> None:
        self.curve = curve
        self.num_measured = 0
        self.checked: list[tuple[int, ...]] = []

    def measure(self) -> PassCost:
        self.num_measured += 1
        return PassCost(self.curve)

    def check(self, widths: tuple[int, ...], narrow_tokens: int) -> Points:
        assert narrow_tokens == 0
        self.checked.append(widths)
        return tuple((width, seconds) for width, seconds in self.curve if width in widths)

    def load(self, **facts: str) -> Points:
        return kept_or_measured({**FACTS, **facts}, self.measure, self.check).points


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_curve_is_measured_once_and_then_read_back_exactly(folder: Path) -> None:
    machine = Machine(((1, 0.1), (64, 0.1 + 0.2)))
    assert machine.load() == machine.load() == machine.curve
    assert machine.num_measured == 1
    assert the_file(folder).name.startswith("Qwen_Qwen2.5-7B-Instruct-")


@pytest.mark.parametrize("fact", ["model", "device", "dtype"])
def test_another_model_device_or_dtype_has_a_curve_of_its_own(fact: str, folder: Path) -> None:
    first, second = Machine(CURVE), Machine(OTHER)
    assert first.load() == CURVE
    assert second.load(**{fact: "another"}) == OTHER
    assert first.load() == CURVE
    assert second.load(**{fact: "another"}) == OTHER
    assert (first.num_measured, second.num_measured, len(list(folder.iterdir()))) == (1, 1, 2)


def test_a_curve_that_no_longer_holds_is_measured_anew_and_replaced(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A curve measured on a busy machine would otherwise stay for ever."""
    caplog.set_level(logging.INFO)
    keep(FACTS, PassCost(((1, 0.01), (2, 0.012), (64, 0.16), (256, 0.64))))
    machine = Machine(CURVE)
    assert machine.load() == CURVE
    assert machine.checked == [(1, 64)]
    assert "of 64 tokens took as long as 16.0 of one token, and now as 3.0" in caplog.text
    assert machine.load() == CURVE
    assert machine.num_measured == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(("seconds", "num_measured"), [(0.019, 1), (0.021, 0), (0.044, 0), (0.046, 1)])
def test_a_curve_holds_within_a_factor_of_one_and_a_half(seconds: float, num_measured: int) -> None:
    keep(FACTS, PassCost(CURVE))
    machine = Machine(((1, 0.01), (2, 0.012), (64, seconds), (256, 0.1)))
    machine.load()
    assert machine.num_measured == num_measured


def test_a_machine_that_is_slower_in_all_widths_alike_keeps_its_curve() -> None:
    keep(FACTS, PassCost(CURVE))
    slow = Machine(tuple((width, 9 * seconds) for width, seconds in CURVE))
    assert slow.load() == CURVE


@pytest.mark.parametrize(
    ("curve", "checked"),
    [
        (((1, 0.2), (4, 0.25), (16, 0.29), (64, 0.9)), [(1, 16)]),
        (((1, 0.4), (4, 0.5), (16, 0.8)), []),
        (((1, 0.01), (128, 0.1)), []),
    ],
)
def test_the_check_never_takes_long_passes(curve: Points, checked: list[tuple[int, ...]]) -> None:
    keep(FACTS, PassCost(curve))
    machine = Machine(curve)
    assert machine.load() == curve
    assert (machine.checked, machine.num_measured) == (checked, 0)


def content(**changed: Any) -> bytes:
    full = {
        "format": 2,
        "facts": FACTS,
        "measured_at": "2026-01-01T00:00:00+00:00",
        "points": CURVE,
        "narrow_tokens": 0,
    }
    return json.dumps({**full, **changed}).encode()


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[" * 100_000,
        b"[]",
        b"null",
        content()[:-20],
        content(format=1),
        content(facts=[1]),
        content(facts={**FACTS, "model": "another"}),
        content(points=None),
        content(points=[]),
        content(points=[[1, 0.1]]),
        content(points=[[1, 0.1], [2, "slow"]]),
        content(points=[[1, 0.1], [2, 0.05]]),
        content(points=[[1, 0.1], [1, 0.1]]),
        content(points=[[1, -0.1], [2, 0.1]]),
        content(points=[[1, 0.1], [2, float("nan")]]),
        content(points=[[1, 0.1], [2, float("inf")]]),
        content(points={"1": 0.1}),
        content().replace(b"points", b"pints"),
        content(narrow_tokens=None),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_measured_over(
    bad: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(CURVE)
    machine.load()
    path = the_file(folder)
    path.write_bytes(bad)
    assert machine.load() == CURVE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert machine.num_measured == 2
    assert machine.load() == CURVE
    assert machine.num_measured == 2, "the measured curve replaces the damaged file"


def test_the_checked_damage_starts_from_a_file_that_is_read(folder: Path) -> None:
    machine = Machine(CURVE)
    machine.load()
    the_file(folder).write_bytes(content())
    machine.load()
    assert machine.num_measured == 1


def full_disk(*_args: object) -> None:
    raise OSError(28, "No space left on device")


def read_only(*_args: object, **_options: object) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(("owner", "name", "fails"), [(os, "replace", full_disk), (Path, "mkdir", read_only)])
def test_a_curve_that_cannot_be_kept_is_used_all_the_same(
    owner: object,
    name: str,
    fails: Callable[..., None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(owner, name, fails)
    assert Machine(CURVE).load() == CURVE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(folder) in record.getMessage()
    assert not folder.exists() or not list(folder.iterdir()), "nothing half-written stays behind"


def test_a_cache_folder_that_is_a_file_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert Machine(CURVE).load() == CURVE
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert (tmp_path / "cache").read_text() == "in the way"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    assert Machine(CURVE).load() == CURVE
    assert "Could not keep the measured cost curve" in caplog.text


def test_a_failed_write_leaves_the_old_file_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(FACTS, PassCost(CURVE))
    before = the_file(folder).read_bytes()
    monkeypatch.setattr(os, "replace", full_disk)
    keep(FACTS, PassCost(OTHER))
    assert the_file(folder).read_bytes() == before


def test_kept_curves_can_be_listed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list(kept_curves()) == []
    keep(FACTS, PassCost(CURVE))
    keep({**FACTS, "dtype": "bfloat16"}, PassCost(OTHER, 8))
    (folder / "broken.json").write_text("{")
    curves = list(kept_curves())
    assert {curve.cost for curve in curves} == {PassCost(CURVE), PassCost(OTHER, 8)}
    assert {curve.facts["dtype"] for curve in curves} == {"float32", "bfloat16"}
    assert all(isinstance(curve, KeptCurve) and curve.measured_at.endswith("+00:00") for curve in curves)
    assert "broken.json" in caplog.text


def test_names_of_local_folders_make_harmless_file_names(folder: Path) -> None:
    keep({**FACTS, "model": "../../some where/" + "x" * 300 + "/.."}, PassCost(CURVE))
    assert the_file(folder).name.isascii()
    assert len(the_file(folder).name) < 100


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("COPYSPEC_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(os.name == "nt", reason="the folders of other systems")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"COPYSPEC_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/a"}, "/own"),
        ({"COPYSPEC_CACHE_DIR": "~/own", "HOME": "/home/a"}, "/home/a/own"),
        ({"COPYSPEC_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/a"}, "/xdg/copyspec"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/a"}, "/home/a/.cache/copyspec"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/a"}, "/home/a/.cache/copyspec"),
        ({"LOCALAPPDATA": "/windows", "HOME": "/home/a"}, "/home/a/.cache/copyspec"),
    ],
)
def test_the_cache_is_where_the_system_keeps_caches(
    values: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, **values)
    assert cache_dir() == Path(expected)


@pytest.mark.skipif(os.name == "nt", reason="paths are of the system's own kind")
def test_on_windows_the_cache_is_in_the_local_application_data(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, LOCALAPPDATA="/local", XDG_CACHE_HOME="/xdg", HOME="/home/a")
    monkeypatch.setattr(folders, "_USERS_CACHES", "LOCALAPPDATA")
    assert cache_dir() == Path("/local/copyspec")


def test_without_a_home_the_cache_is_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_dir() == Path(tempfile.gettempdir()) / "copyspec"


def test_the_processor_has_a_name() -> None:
    assert cpu_name().strip()
