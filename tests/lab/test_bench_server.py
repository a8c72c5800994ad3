"""`copyspec bench serve`: the same answers in process and over a real socket, in as many sessions; never times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from copyspec_engine import CopySpecError, Engine, EngineConfig, SessionInfo
from copyspec_engine.cli.main import app
from copyspec_engine.lab import measuring
from copyspec_engine.lab.bench import server as bench_server
from copyspec_engine.lab.bench.server_client import read_answer
from copyspec_engine.lab.bench.server_process import ServerSide
from copyspec_engine.testing import scripted_engine


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *map(str, words)], env={"COLUMNS": "200"})


class Here:
    """A side in this process, in place of `PeerProcess`."""

    def __init__(self, name: str, threads: int, make: type[ServerSide], **arguments: Any) -> None:
        self._side = make(**arguments)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self._side.close()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._side, method)(*arguments)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[SessionInfo]:
    """Measurements have an engine that answers with what it was asked; what it remembers when they are over."""
    left: list[SessionInfo] = []

    @contextmanager
    def drafting_engine(config: EngineConfig) -> Iterator[Engine]:
        with scripted_engine(lambda prompt: prompt * 2, config) as engine:
            yield engine
            left.extend(engine.sessions())

    monkeypatch.setattr(bench_server, "PeerProcess", Here)
    monkeypatch.setattr(measuring, "drafting_engine", drafting_engine)
    return left


def test_both_ways_make_the_same_calls(scripted: list[SessionInfo], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = bench("--clients", 1, 3, "--rounds", 2, "--max-tokens", 10, "--json", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text(encoding="utf-8"))
    ways = ("in-process", "http")
    rows = {(row["clients"], row["batch"], row["way"]): row for row in written["results"]}
    batches = {1: (range(8), range(8, 16)), 3: (range(3), range(3, 6))}
    expected = [
        (at_once, number, way) for i in (0, 1) for at_once in (1, 3) for number in batches[at_once][i] for way in ways
    ]
    assert list(rows) == expected
    for (clients, _, _), row in rows.items():
        assert (row["tokens"], len(row["ttft_s"])) == (10 * clients, clients)
        assert clients <= row["chunks"] <= row["tokens"]
        assert all(0 < ttft_s <= row["seconds"] for ttft_s in row["ttft_s"])
        assert row["loop_s"] <= row["process_s"]
        assert (row["client_cpu_s"] > 0) == (row["way"] == "http")
    assert (written["different"], written["model"], written["max_tokens"]) == (0, "smollm2", 10)
    assert not scripted, "all was forgotten"
    assert "over HTTP by in process" in result.output


def test_a_process_of_its_own_holds_the_engine() -> None:
    result = bench("--model", "bundled", "--clients", 2, "--rounds", 1, "--max-tokens", 2, "--threads", 1)
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("scripted")
def test_another_answer_over_http_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server, "read_answer", lambda *came: replace(read_answer(*came), text="else"))
    result = bench("--clients", 1, "--rounds", 1, "--max-tokens", 2)
    assert result.exit_code == 1
    assert "Other answers over HTTP than in process: 8" in result.output


@pytest.mark.usefixtures("scripted")
def test_an_answer_that_is_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_server, "request_bytes", lambda *_: b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    result = bench("--clients", 1, "--rounds", 1, "--max-tokens", 2)
    assert result.exit_code == 2
    assert "The server answered HTTP/1.1 404" in result.output


def body(*chunks: str) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk.encode()), chunk.encode()) for chunk in (*chunks, ""))


def event(text: str | None, **fields: Any) -> str:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return f"data: {json.dumps({'choices': choices, **fields})}\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = event(None, usage={"completion_tokens": 5}) + "data: [DONE]\n\n"


def test_a_stream_is_read_from_its_bytes_however_they_came() -> None:
    raw = HEAD + body(event(""), ": ping\n\n", event("The ") + event("sea"), event(" is salt"), END)
    first = len(HEAD + body(event(""), ": ping\n\n")) - 5  # without the end of a whole body
    for cut in (1, 7, 50, len(raw)):
        pieces = [(float(stop), raw[stop - cut : stop]) for stop in range(cut, len(raw) + cut, cut)]
        answer = read_answer(0.0, pieces)
        assert (answer.text, answer.tokens, answer.num_chunks) == ("The sea is salt", 5, 2)
        assert answer.seconds == pieces[-1][0]
        whole = first + len(body(event("The ") + event("sea"))) - 5
        assert answer.ttft_s == -(-whole // cut) * cut, "a chunk counts once it is there"


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ((event("The "), 'data: {"error": {"message": "too late"}}\n\n'), "too late"),
        ((event("The "), event(None, usage={"completion_tokens": 5})), "without text or end"),
        ((event("The "), "data: [DONE]\n\n"), "without text or end"),
        ((END,), "without text or end"),
    ],
)
def test_a_stream_that_is_none_is_an_error(chunks: tuple[str, ...], said: str) -> None:
    with pytest.raises(CopySpecError, match=said):
        read_answer(0.0, [(1.0, HEAD + body(*chunks))])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--clients", 0), "--clients 0"),
        (("--rounds", 0), "--rounds 0"),
        (("--max-tokens", 0), "--max-tokens 0"),
        (("--threads", 0), "--threads 0"),
        (("--json", "nowhere/out.json"), "nowhere"),
    ],
)
def test_what_cannot_work_is_said(words: tuple[Any, ...], said: str) -> None:
    result = bench(*words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
