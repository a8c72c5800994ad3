"""Reports of a load: never far apart, told in the thread that waits, and a way to end the load."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from copyspec_engine import LoadProgress
from copyspec_engine.engine import reports as reports_module
from copyspec_engine.engine.reports import LoadAbandoned, Reports

READ = LoadProgress("read", "reading the weights of m")


def told(work: Callable[[Reports], object]) -> list[LoadProgress]:
    """What is told of a load that does `work`."""
    said: list[LoadProgress] = []
    with Reports(said.append) as reports:
        reports.run(lambda: work(reports))
    return said


def test_a_load_that_says_nothing_is_told_of_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reports_module._LONGEST_SILENCE_S <= 2.0
    monkeypatch.setattr(reports_module, "_LONGEST_SILENCE_S", 0.01)
    check = LoadProgress("check", "checking m")
    said: list[LoadProgress] = []
    many = {phase: threading.Event() for phase in ("read", "check")}

    def listen(progress: LoadProgress) -> None:
        said.append(progress)
        if [earlier.phase for earlier in said].count(progress.phase) == 4:
            many[progress.phase].set()

    def work() -> None:
        for progress in (READ, check):
            reports(progress)
            assert many[progress.phase].wait(60), "silent all along"

    with Reports(listen) as reports:
        reports.run(work)
    again = [progress for progress in said if progress not in (READ, check)]
    assert all(str(progress).startswith((READ.text, check.text)) for progress in again)
    assert all(str(progress).endswith(" s)") for progress in again)


def test_counts_that_come_fast_are_thinned_out_but_the_last_is_told() -> None:
    def work(reports: Reports) -> None:
        for done in range(10_001):
            reports(LoadProgress("read", READ.text, done=done, total=10_000, unit="it"))

    said = told(work)
    assert said[0].done == 0
    assert said[-1].done == 10_000
    assert len(said) < 1000


def test_reports_are_told_in_the_thread_that_waits() -> None:
    threads: list[int] = []

    def work() -> int:
        reports(READ)
        return threading.get_ident()

    with Reports(lambda _: threads.append(threading.get_ident())) as reports:
        assert reports.run(work) != threading.get_ident()
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()])
def test_an_error_of_who_is_told_comes_out_as_it_is_and_ends_the_load(error: BaseException) -> None:
    ended: list[BaseException] = []

    def explode(_progress: LoadProgress) -> None:
        raise error

    def work() -> None:
        try:
            while True:
                reports(READ)
                time.sleep(0.01)
        except BaseException as why:
            ended.append(why)
            raise

    with pytest.raises(type(error)) as raised, Reports(explode) as reports:
        reports.run(work)
    assert raised.value is error
    assert isinstance(ended[0], LoadAbandoned), "waited for"


def test_an_error_of_the_load_comes_out_as_it_is() -> None:
    def work(reports: Reports) -> None:
        reports(READ)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        told(work)


def test_phases_are_timed() -> None:
    with Reports(lambda _: None) as reports:

        def work() -> None:
            for phase in ("read", "check", "read"):
                reports(LoadProgress(phase, phase))
                time.sleep(0.02)
            reports.end()

        reports.run(work)
    assert list(reports.seconds) == ["read", "check"]
    assert reports.seconds["read"] >= 0.04
    assert reports.seconds["check"] >= 0.02


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Reports() as reports:
        reports.run(lambda: reports(READ))
    assert capsys.readouterr() == ("", "")


def test_progress_in_words() -> None:
    assert str(READ) == "reading the weights of m"
    assert str(LoadProgress("read", "reading", done=3, total=4, unit="it")) == "reading: 3 of 4"
    assert (
        str(LoadProgress("download", "fetching", done=2_500_000, total=10_000_000, unit="B")) == "fetching: 2 of 10 MB"
    )
    assert str(LoadProgress("compile", "compiling", done=7, unit="it")) == "compiling: 7"


@pytest.mark.parametrize("module", ["langchain_copyspec", "llama_index.llms.copyspec", "copyspec_engine.engine.engine"])
def test_importing_a_front_door_imports_nothing_that_takes_long(module: str) -> None:
    heavy = {"torch", "torch._dynamo", "transformers", "transformers.modeling_utils", "numba", "llguidance"}
    heavy |= {"llama_index" if module == "langchain_copyspec" else "langchain_core"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""
