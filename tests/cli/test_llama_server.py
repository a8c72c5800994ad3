"""llama.cpp as a peer of the demo, played by a small HTTP server that can also fail in each way a real one can."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from copyspec_engine import Engine, EngineConfig, shared_engine
from copyspec_engine.cli.demo import peers as demo_peers
from copyspec_engine.cli.demo.figures import GENERATE, LLAMA, LLAMA_NGRAM, LOOKUP
from copyspec_engine.cli.demo.llama_server import LlamaServer, LlamaServerError, find_llama_server
from copyspec_engine.cli.demo.peers import Peers
from copyspec_engine.cli.main import app
from tests.cli.llama_servers import is_running, put_stand_in, starts

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")

PROBE = "one two three"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return shared_engine(EngineConfig(model="bundled", device="cpu"))


@pytest.fixture
def put_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Callable[[str], Path]:
    """put_on_path("crash") -> the file that each start of the stand-in adds its process and command line to."""

    def put(mode: str) -> Path:
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return put_stand_in(tmp_path, mode, engine.encode(PROBE))

    return put


def run_server(**options: Any) -> LlamaServer:
    binary = find_llama_server()
    assert binary is not None
    return LlamaServer(binary, Path("m.gguf"), threads=2, **options)


def test_a_server_answers_and_is_ended(put_on_path: Callable[[str], Path]) -> None:
    record = put_on_path("answers")
    with run_server(options=("--spec-type", "ngram-mod")) as server:
        answer = server.answer([1, 2, 3], 7)
        ((pid, words),) = starts(record)
        assert is_running(pid)
    assert (answer.text, answer.tokens, answer.write_s) == ("said", 7, 0.002)
    assert answer.ttft_s is not None
    assert 0 < answer.ttft_s < answer.seconds - 0.04, "the first piece comes before the others"
    assert not is_running(pid)
    for pair in ("-m m.gguf", "--host 127.0.0.1", "-t 2", "-c 8192 -np 1 --jinja", "--spec-type ngram-mod"):
        assert pair in " ".join(words)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("crash", "ended with exit code 1 at its start: cannot read the file"),
        ("never ready", "was not ready after 1 s: it said nothing"),
    ],
)
def test_a_server_that_does_not_start_is_told_and_ended(
    put_on_path: Callable[[str], Path], mode: str, expected: str
) -> None:
    record = put_on_path(mode)
    with pytest.raises(LlamaServerError, match=expected):
        run_server(start_timeout_s=1.0 if mode == "never ready" else 30.0)
    assert not is_running(starts(record)[0][0])


def test_a_server_that_a_signal_kills_at_its_start_is_started_without_what_its_machine_cannot_do(
    put_on_path: Callable[[str], Path],
) -> None:
    record = put_on_path("no AMX")
    with run_server() as server:
        assert server.answer([1, 2, 3], 7).text == "said"
        (first, words), (second, others) = starts(record)
        assert not is_running(first)
        assert is_running(second)
        assert others[-1] == "--no-repack"
        assert others[-2:-1] == words[-1:]


def test_a_program_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(LlamaServerError, match="cannot be run: No such file"):
        LlamaServer(str(tmp_path / "none"), Path("m.gguf"), threads=1)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("slow", "gave no answer in 1 s"),
        ("refuses", "answered /completion with status 400"),
        ("fails on the way", 'answered /completion with an error: {"message": "out of memory"}'),
        ("other version", "lacks tokens_predicted, timings"),
    ],
)
def test_an_answer_that_does_not_come_is_told(put_on_path: Callable[[str], Path], mode: str, expected: str) -> None:
    record = put_on_path(mode)
    started = time.monotonic()
    with (
        run_server(answer_timeout_s=1.0 if mode == "slow" else 30.0) as server,
        pytest.raises(LlamaServerError, match=expected),
    ):
        server.answer([1], 4)
    assert time.monotonic() - started < 30
    assert not is_running(starts(record)[0][0])


@pytest.fixture
def peers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(demo_peers, "gguf_file", lambda _: Path("m.gguf"))
    started = Peers(engine)
    yield started
    started.close()


def test_both_kinds_of_server_answer_beside_generate(put_on_path: Callable[[str], Path], peers: Peers) -> None:
    record = put_on_path("answers")
    peers.start_servers(PROBE)
    found = peers.answer([5, 6, 7], 3, backwards=True)
    assert list(found) == [GENERATE, LOOKUP, LLAMA, LLAMA_NGRAM]
    assert peers.notes == []
    assert (found[LLAMA].text, found[LLAMA].write_s) == ("said", 0.002)
    peers.close()
    assert not any(is_running(pid) for pid, _ in starts(record))


@pytest.mark.parametrize(
    ("mode", "expected"), [("other model", "it serves another model"), ("crash", "cannot read the file")]
)
def test_a_server_that_cannot_take_part_is_left_out_with_a_line(
    put_on_path: Callable[[str], Path], peers: Peers, mode: str, expected: str
) -> None:
    record = put_on_path(mode)
    peers.start_servers(PROBE)
    assert [note.split(" is left out: ")[0] for note in peers.notes] == [LLAMA, LLAMA_NGRAM]
    assert all(expected in note for note in peers.notes)
    assert list(peers.answer([5, 6], 2)) == [GENERATE, LOOKUP]
    assert not any(is_running(pid) for pid, _ in starts(record))


def test_a_server_that_dies_on_the_way_is_asked_no_more(put_on_path: Callable[[str], Path], peers: Peers) -> None:
    put_on_path("dies")
    peers.start_servers(PROBE)
    assert LLAMA in peers.answer([5, 6], 2)
    for _ in range(2):
        assert list(peers.answer([5, 6], 2)) == [GENERATE, LOOKUP]
    assert len(peers.notes) == 2
    assert all("gave no answer" in note for note in peers.notes)


def test_without_a_gguf_file_no_server_is_started(put_on_path: Callable[[str], Path], engine: Engine) -> None:
    record = put_on_path("answers")
    peers = Peers(engine)
    peers.start_servers(PROBE)
    assert list(peers.answer([5, 6], 2)) == [GENERATE, LOOKUP]
    assert not record.exists()


def test_the_demo_shows_the_figures_of_llama_cpp(
    put_on_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = put_on_path("answers")
    monkeypatch.setattr(demo_peers, "gguf_file", lambda _: Path("m.gguf"))
    own, path = tmp_path / "own.txt", tmp_path / "figures.json"
    own.write_text(PROBE)
    words = ["demo", "--model", "bundled", "--device", "cpu", "--compare", "--file", str(own), "--json", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for turn in json.loads(path.read_text())["turns"]:
        assert turn["llama_cpp_same_answer"] is turn["llama_cpp_ngram_same_answer"] is False
        assert turn["llama_cpp_tokens"] > 0 < turn["llama_cpp_seconds"]
    assert "llama.cpp, ngram" in result.output
    assert not any(is_running(pid) for pid, _ in starts(record))
