"""Losses of all kinds on a real Ray cluster; see `scripts.scale_drill`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SKIPPED = 77
DRILLS = ("sticky", "lost", "lost-direct", "front", "proxy", "scale", "rolling", "stuck", "together")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'copyspec[scale]'")
@pytest.mark.parametrize("name", DRILLS)
def test_no_conversation_is_lost_or_led_astray(name: str, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "scripts.scale_drill", name, "--conversations", "40", "--calls", "2000"]
    done = subprocess.run([*command, "--json", str(record)], capture_output=True, text=True, check=False)
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert record.is_file(), done.stderr[-4000:]
    drill = json.loads(record.read_text())["drills"][name]
    assert not drill["broken"]
