"""The bar of a load: in notebooks and terminals, unless it is switched off."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import pytest

from copyspec_engine.values import progress

LOAD = """
import sys, time, types
if {in_notebook}:
    sys.modules["ipykernel"] = types.ModuleType("ipykernel")
from copyspec_engine.values import progress
progress._APPEARS_AFTER_S = 0.0
with progress.progress_bar() as tell:
    tell(progress.LoadProgress("read", "reading the weights", 1, 2, "it"))
    tell(progress.LoadProgress("check", "checking"))
"""


@pytest.mark.parametrize(
    ("in_notebook", "variables", "is_shown"),
    [(True, {}, True), (True, {"TQDM_DISABLE": "1"}, False), (False, {}, False)],
)
def test_a_load_shows_a_bar_where_somebody_looks(in_notebook: bool, variables: dict[str, str], is_shown: bool) -> None:
    code = LOAD.format(in_notebook=in_notebook)
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | variables
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ("reading the weights" in ran.stderr) == is_shown
    assert ("checking" in ran.stderr) == is_shown
    assert ran.stdout == ""


class _HungUp(io.StringIO):
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stderr", [None, closed(), object(), _HungUp()], ids=["none", "closed", "other", "hung up"])
def test_a_load_goes_on_wherever_standard_error_leads(stderr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_APPEARS_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.progress_bar() as tell:
        tell(progress.LoadProgress("read", "reading the weights", 1, 2, "it"))
        tell(progress.LoadProgress("check", "checking"))
