"""`copyspec scale up`: what it says where it cannot begin."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from copyspec_engine import CopySpecError
from copyspec_engine.cli.main import app
from copyspec_engine.scale.up import APPLICATION, UpOptions, reason_of, run_up


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    told = CliRunner().invoke(app, ["scale", "up", "smollm2"])
    assert told.exit_code == 2
    assert 'pip install "copyspec[scale]"' in told.stderr
    with pytest.raises(CopySpecError, match=r"copyspec\[scale\]"):
        run_up(UpOptions({}, 0))


def test_of_replicas_that_do_not_start_the_reason_is_told_without_a_traceback() -> None:
    message = (
        "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
        "\x1b[36mray::ServeReplica:copyspec:Replica.initialize_and_get_metadata()\x1b[39m (pid=1)\n"
        '  File "replica.py", line 1, in initialize\n'
        "RuntimeError: Traceback (most recent call last):\n"
        "    raise ConfigError(said)\n"
        "copyspec_engine.values.errors.ConfigError: Got engine='nowhere:x' but there is no such function\n"
    )
    deployments = {"Front": SimpleNamespace(message=""), "Replica": SimpleNamespace(message=message)}
    status = SimpleNamespace(applications={APPLICATION: SimpleNamespace(deployments=deployments)})
    assert reason_of(status) == "Got engine='nowhere:x' but there is no such function"
    deployments["Replica"].message = "It is being scheduled"
    assert reason_of(status) is None


def test_a_model_that_is_not_to_be_had_is_told_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[UpOptions] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name == "ray" else find(name))
    monkeypatch.setattr("copyspec_engine.scale.up.run_up", lambda options, _started: begun.append(options) or 0)
    told = CliRunner().invoke(app, ["scale", "up", "no such/model"])
    assert told.exit_code == 2
    assert "no such/model" in told.stderr
    assert not begun
    for elsewhere in (["--address", "auto"], ["--engine", "of.a.test:made"]):  # what is there is for others to say
        assert CliRunner().invoke(app, ["scale", "up", "no such/model", *elsewhere]).exit_code == 0
    assert CliRunner().invoke(app, ["scale", "up", "bundled", "--replicas", "2"]).exit_code == 0
    assert [options.args["model"] for options in begun] == ["no such/model", "no such/model", "bundled"]
