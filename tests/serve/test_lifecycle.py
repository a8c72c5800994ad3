"""How a server ends: by a signal, by the death of its engine, or before it began."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from copyspec_engine import ConfigError
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import listen
from copyspec_engine.serve.tenants import KEY_VARIABLE
from tests.serve.conftest import CHAT, body

ROOT = Path(__file__).parents[2]
Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(words) -> a server whose answers have so many words, and its address or what it said instead."""
    processes: list[subprocess.Popen[str]] = []

    def begin(words: int = 3) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "tests.serve.server", str(tmp_path / "memory.db"), str(words)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {KEY_VARIABLE: ""}
        )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_ends_streams_with_a_last_event_and_a_second_server_is_refused_the_memory(start: Start) -> None:
    process, url = start(1500)
    second, said = start()
    assert (second.wait(60), "memory" in said) == (2, True)
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("POST", CHAT, json=body(stream=True)) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"finish_reason": "length"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert process.wait(60) == 0


def test_new_calls_are_refused_while_a_server_drains_and_a_second_signal_ends_it_at_once(start: Start) -> None:
    process, url = start(1500)
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("POST", CHAT, json=body(stream=True)) as stream:
        next(stream.iter_lines())
        process.send_signal(signal.SIGINT)
        while (ready := http.get("/ready")).status_code == 200:
            pass
        refused = http.post(CHAT, json=body())
        process.send_signal(signal.SIGINT)
    assert ready.json()["status"] == "draining"
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert process.wait(60) == 130


def test_a_server_whose_engine_has_died_says_so(start: Start) -> None:
    process, url = start(1500)
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("POST", CHAT, json=body(stream=True)) as stream:
        lines = stream.iter_lines()
        next(lines)
        died = http.post(CHAT, json=body("die"))
        rest = [line for line in lines if line]
    assert (died.status_code, died.json()["error"]["code"]) == (503, "engine_stopped")
    assert '"code": "engine_stopped"' in rest[-1]
    assert process.wait(60) == 70


def test_only_this_machine_may_ask_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="without any key"):
        listen(ServeConfig(host="0.0.0.0", port=0))
    with listen(ServeConfig(port=0)) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            listen(ServeConfig(port=taken.getsockname()[1]))
    monkeypatch.setenv(KEY_VARIABLE, "key")
    listen(ServeConfig(host="0.0.0.0", port=0)).close()
