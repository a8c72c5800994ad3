"""How a server ends: by a signal, by the death of its engine, or before it began."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from copyspec_engine import ConfigError
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import listen
from copyspec_engine.serve.tenants import KEY_VARIABLE
from tests.serve.conftest import CHAT, body
from tests.serve.test_tenants import key

ROOT = Path(__file__).parents[2]
ENDLESS = 20_000
"""Words, which no test waits for."""
Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(words, **options) -> a server whose answers have so many words, and its address or what it said instead.

    What it logs is in the file "log".
    """
    processes: list[subprocess.Popen[str]] = []

    def begin(
        words: int = 3, own_key: str = "", memory: str | None = None, **options: str
    ) -> tuple[subprocess.Popen[str], str]:
        memory = str(tmp_path / "memory.db") if memory is None else memory
        command = [sys.executable, "-m", "tests.serve.server", memory, str(words)]
        command += [f"{name}={value}" for name, value in options.items()]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {KEY_VARIABLE: own_key},
            )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    CHAT: ({"messages": body()["messages"], "stream": True}, '"finish_reason": "length"'),
    "/v1/completions": ({"prompt": "hi", "max_tokens": 5 * ENDLESS, "stream": True}, '"finish_reason": "length"'),
    "/v1/responses": ({"input": "hi", "stream": True}, '"type": "response.incomplete"'),
    "/api/chat": ({"messages": body()["messages"]}, '"done_reason": "length"'),
    "/api/generate": ({"prompt": "hi"}, '"done_reason": "length"'),
}
"""What is asked of each endpoint, and what the last event of an answer that was cut says."""


def test_sigterm_ends_streams_with_a_last_event_and_a_second_server_is_refused_the_memory(start: Start) -> None:
    process, url = start(ENDLESS)
    second, said = start()
    assert (second.wait(60), "memory" in said) == (2, True)
    with httpx.Client(base_url=url, timeout=60) as http, ExitStack() as stack:
        streams = {}
        for path, (asked, _) in STREAMS.items():
            stream = stack.enter_context(http.stream("POST", path, json={"model": "scripted", **asked}))
            streams[path] = stream.iter_lines()
            next(streams[path])
        process.send_signal(signal.SIGTERM)
        told = {path: [line for line in lines if line and line != "data: [DONE]"] for path, lines in streams.items()}
    for path, (_, last) in STREAMS.items():
        assert last in told[path][-1], path
    assert process.wait(60) == 0


def test_what_was_said_is_there_after_a_server_was_killed_in_the_middle_of_an_answer(start: Start) -> None:
    process, url = start(ENDLESS)
    named = {"X-Session-ID": "a"}
    with httpx.Client(base_url=url, timeout=60) as http:
        http.post(CHAT, json=body("said once", max_tokens=40), headers=named)
        before = http.get("/v1/copyspec/conversations/a/export").json()["texts"]
        with http.stream("POST", CHAT, json=body("never told whole", stream=True), headers=named) as stream:
            next(stream.iter_lines())
            process.kill()
    _, url = start()
    with httpx.Client(base_url=url, timeout=60) as http:
        assert [told["id"] for told in http.get("/v1/copyspec/conversations").json()["data"]] == ["a"]
        assert http.get("/v1/copyspec/conversations/a/export").json()["texts"] == before
        http.post(CHAT, json=body("said again"), headers=named)
        texts = http.get("/v1/copyspec/conversations/a/export").json()["texts"]
    assert texts[: len(before)] == before
    assert "said again" in str(texts[len(before) :])


@pytest.fixture
def database_url() -> Iterator[str]:
    pytest.importorskip("psycopg", reason='needs psycopg: pip install "copyspec[scale]"')
    pytest.importorskip("pwd", reason="needs a POSIX system")
    from tests.memory.postgres import a_server

    with a_server() as server:
        yield server.new_database()


def test_a_server_that_is_stopped_hands_its_conversations_over_to_another_one(start: Start, database_url: str) -> None:
    stopped, url = start(1500, memory=database_url)
    _, other = start(memory=database_url)
    named, export = {"X-Session-ID": "a"}, "/v1/copyspec/conversations/a/export"
    with httpx.Client(base_url=url, timeout=60) as http:
        http.post(CHAT, json=body("said once", max_tokens=40), headers=named)
        before = http.get(export).json()["texts"]
        with http.stream("POST", CHAT, json=body("cut short", stream=True), headers=named) as stream:
            lines = stream.iter_lines()
            next(lines)
            stopped.send_signal(signal.SIGTERM)
            assert '"finish_reason": "length"' in [line for line in lines if line][-2]
    assert stopped.wait(60) == 0
    with httpx.Client(base_url=other, timeout=60) as http:
        assert [told["id"] for told in http.get("/v1/copyspec/conversations").json()["data"]] == ["a"]
        texts = http.get(export).json()["texts"]
        assert texts[: len(before)] == before
        assert "cut short" in str(texts[len(before) :])
        http.post(CHAT, json=body("said again"), headers=named)
        assert "said again" in str(http.get(export).json()["texts"][len(texts) :])


def test_new_calls_are_refused_while_a_server_drains_and_a_second_signal_ends_it_at_once(start: Start) -> None:
    process, url = start(ENDLESS, drain_s="60")
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


def test_a_second_sigterm_ends_a_server_at_once(start: Start, tmp_path: Path) -> None:
    stall = tmp_path / "stall"
    process, url = start(ENDLESS, drain_s="60", drain_notice_s="60", stall=str(stall))
    with (
        httpx.Client(base_url=url, timeout=60) as http,
        ThreadPoolExecutor(1) as threads,
        http.stream("POST", CHAT, json=body(stream=True)) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        stalled = threads.submit(http.post, CHAT, json=body("stall"))
        while not stall.exists():
            pass
        process.send_signal(signal.SIGTERM)
        while http.get("/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # which a step of a large model may take
        stall.unlink()
        rest = [line for line in lines if line]
        whole = stalled.result().json()["choices"][0]
    assert '"finish_reason": "length"' in rest[-2], "a stream that is cut has a last event all the same"
    assert whole["finish_reason"] == "length"
    assert process.wait(60) == 143


def test_keys_are_read_again_on_sighup(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"

    def allow(name: str) -> None:
        keys.write_text(f"{name} {hashlib.sha256(name.encode()).hexdigest()}")
        keys.chmod(0o600)

    def code(http: httpx.Client, name: str) -> int:
        return http.get("/v1/models", headers=key(name)).status_code

    allow("ann")
    process, url = start(ENDLESS, api_keys=json.dumps(str(keys)))
    asked = {"json": body(stream=True, max_tokens=400), "headers": key("ann")}
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("POST", CHAT, **asked) as stream:
        lines = stream.iter_lines()
        next(lines)
        allow("bob")
        assert (code(http, "ann"), code(http, "bob")) == (200, 401)
        process.send_signal(signal.SIGHUP)
        while code(http, "bob") == 401:
            pass
        assert code(http, "ann") == 401
        rest = [line for line in lines if line]
        keys.write_text("nobody")
        process.send_signal(signal.SIGHUP)
        assert code(http, "bob") == 200, "keys that cannot be read leave the old ones"
    assert len(rest) > 300, "who was let in is answered to the end"
    assert rest[-1] == "data: [DONE]"


def test_a_server_lives_and_is_not_ready_while_its_engine_is_loaded(start: Start, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    process, url = start(hold=str(hold))
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/health").status_code == 200
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        for path in (CHAT, "/api/chat", "/", "/metrics"):
            refused = http.post(path, json=body())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
        assert http.post(CHAT, json=body()).json()["error"]["code"] == "loading"
        process.send_signal(signal.SIGHUP)
        hold.unlink()
        assert process.stdout is not None
        assert process.stdout.readline().strip() == url
        assert http.get("/ready").status_code == 200
        assert http.post(CHAT, json=body()).json()["choices"][0]["message"]["content"] == "word word word "


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_server_whose_engine_is_still_loaded(
    start: Start, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "hold").touch()
    process, _ = start(hold=str(tmp_path / "hold"))
    process.send_signal(number)
    assert process.wait(60) == code


def test_a_load_that_fails_ends_the_server(start: Start, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    process, url = start(hold=str(hold))
    assert httpx.get(f"{url}/health").status_code == 200
    hold.write_text("there is no such model")
    assert process.wait(60) == 2
    assert process.stdout is not None
    assert process.stdout.read().strip() == "there is no such model"


def test_a_server_whose_engine_has_died_says_so(start: Start) -> None:
    process, url = start(ENDLESS)
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("POST", CHAT, json=body(stream=True)) as stream:
        lines = stream.iter_lines()
        next(lines)
        died = http.post(CHAT, json=body("die"))
        rest = [line for line in lines if line]
    assert (died.status_code, died.json()["error"]["code"]) == (503, "engine_stopped")
    assert '"code": "engine_stopped"' in rest[-1]
    assert process.wait(60) == 70


def test_no_key_and_no_text_is_ever_logged(start: Start, tmp_path: Path) -> None:
    good, own, bad, text = "good-4711", "own-4712", "bad-4713", "said-4714"
    file = tmp_path / "keys"
    file.write_text(f"ann {hashlib.sha256(good.encode()).hexdigest()}")
    file.chmod(0o600)
    process, url = start(own_key=own, api_keys=json.dumps(str(file)))
    with httpx.Client(base_url=url, timeout=60) as http:
        for key in (good, own, bad, f"{bad}\xe9 {bad}"):
            for name, value in (
                ("Authorization", f"Bearer {key}"),
                ("Authorization", f"Basic {key}"),
                ("Authorization", key),
                ("X-API-Key", key),
                ("X-Session-ID", key),
            ):
                given = {name: value.encode("latin-1")}
                http.get("/v1/models", headers=given, params={"api_key": key})
                http.get("/metrics", headers=given)
                http.post(CHAT, headers=given, json=body(key, api_key=key))
                http.post(CHAT, headers=given, content=f"{{{key}".encode())
            http.post(CHAT, headers={"Authorization": f"Bearer {good}"}, json=body(text, session_id=text, user=text))
        http.get("/nothing%0Aforged 500")
        with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as raw:
            raw.sendall(f"GET /v1/models HTTP/1.1\r\nAuthorization Bearer {bad}\r\n\r\n".encode())
            raw.recv(100)
        file.write_text(f"ann {good}")  # as somebody would who has not read how
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    assert all(
        part in log for part in (f"POST {CHAT} 200 tenant=ann", f"POST {CHAT} 401 tenant=-", "stay as they were")
    )
    told = re.sub("req_[0-9a-f]+", "", log + said)  # made at random: one may hold any digits
    assert not [line for line in told.splitlines() if re.search("471[1-4]", line)]
    assert [line for line in log.splitlines() if "forged" in line and "GET /nothing%0Aforged" not in line] == []


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
