"""`copyspec bench peers`: all write the same turns, each in its process, and whoever cannot is told of; never times."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from copyspec_engine import CopySpecError, Engine, EngineConfig, shared_engine
from copyspec_engine.cli.demo.peer_process import PeerProcess
from copyspec_engine.cli.main import app
from copyspec_engine.lab.bench import peers as bench_peers
from copyspec_engine.lab.bench.peer_conversations import REWRITE, load_conversations
from tests.cli.llama_servers import is_running, put_stand_in, starts

NOT_ON_WINDOWS = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")
SHORT = ("--kind", "rewrite", "--limit", 1, "--max-tokens", 24, "--threads", 1)


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "peers", *map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def _no_server_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "find_llama_server", lambda: None)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return shared_engine(EngineConfig(model="bundled", device="cpu"))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Any:
    """stand_in(mode) -> (words that name the program, the file with its starts); the bundled model is a GGUF file."""
    monkeypatch.setattr(bench_peers, "gguf_file", lambda _: Path("m.gguf"))

    def put(mode: str) -> tuple[tuple[object, ...], Path]:
        record = put_stand_in(tmp_path, mode, engine.encode(bench_peers.WARM_UP))
        return ("--llama-server", tmp_path / "llama-server"), record

    return put


def test_every_peer_writes_every_turn_from_the_same_prompt(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ("--kind", "rewrite", "--kind", "gsm8k", *SHORT[2:], "--json", out)
    result = bench(*words)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    peers = {"ours", "ours-plain", "generate", "prompt-lookup", "ours-langchain"}
    rows = {(row["kind"], row["turn"], row["peer"]): row for row in written["results"]}
    turns = [(kind, turn) for kind in ("rewrite", "gsm8k") for turn in (1, 2, 3)]
    assert set(rows) == {(*turn, peer) for turn in turns for peer in peers}
    for turn in turns:
        own = [rows[(*turn, peer)] for peer in peers]
        assert len({(row["prompt_tokens"], row["tokens"], row["conversation"]) for row in own}) == 1
        assert all(row["same_as_plain"] for row in own)
        assert all(0 < row["ttft_s"] <= row["seconds"] for row in own)
    prompts = [rows[(*turn, "ours")]["prompt_tokens"] for turn in turns]
    assert prompts[:3] == sorted(set(prompts[:3])), "each turn goes on from the one before"
    assert (written["threads"], written["model"], written["dtype"]) == (1, "bundled", "float32")
    assert [process["peers"] for process in written["memory"]] == [
        ["ours", "ours-plain", "ours-langchain"],
        ["generate", "prompt-lookup"],
    ]
    if sys.platform == "linux":
        assert all(process["peak_bytes"] >= process["bytes"] > 10**7 for process in written["memory"])
    assert "there is no llama-server on the PATH" in written["left_out"]["llama-ngram-mod"]
    assert "identical to plain decoding: 6/6" in result.output
    assert "Left out llama, llama-ngram-mod, llama-ngram-simple, llama-langchain: there is no" in result.output


def test_a_run_that_was_killed_goes_on_behind_its_last_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    words = ("--kind", "rewrite", "--kind", "gsm8k", *SHORT[2:], "--peer", "ours", "--json", out)
    write = bench_peers._Running.write

    def dies_in_the_second(running: Any, conversation: Any, number: int) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return write(running, conversation, number)

    with monkeypatch.context() as patched:
        patched.setattr(bench_peers._Running, "write", dies_in_the_second)
        assert bench(*words).exit_code != 0
    first = json.loads(out.read_text())["results"]
    assert [(row["kind"], row["turn"], row["peer"]) for row in first] == [
        ("rewrite", turn, peer) for turn in (1, 2, 3) for peer in ("ours", "ours-plain")
    ]
    other = bench(*words, "--resume", "--max-tokens", 25)
    assert other.exit_code == 2
    assert "Got --resume of figures with max_tokens 24, but now it is 25" in other.output
    result = bench(*words, "--resume")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["results"]
    assert rows[: len(first)] == first
    assert {(row["kind"], row["turn"]) for row in rows[len(first) :]} == {("gsm8k", turn) for turn in (1, 2, 3)}
    out.write_text("{}")
    assert "it lacks cut_off" in bench(*words, "--resume").output


@NOT_ON_WINDOWS
def test_servers_are_asked_with_their_options_and_ended(stand_in: Any, tmp_path: Path) -> None:
    program, record = stand_in("answers")
    out = tmp_path / "out.json"
    peers = ("--peer", "ours", "--peer", "llama", "--peer", "llama-ngram-mod", "--peer", "llama-ngram-simple")
    result = bench(*SHORT, *program, *peers, "--json", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    rows = {(row["peer"], row["turn"]): row for row in written["results"]}
    names = ("ours", "ours-plain", "llama", "llama-ngram-mod", "llama-ngram-simple")
    assert set(rows) == {(name, turn) for name in names for turn in (1, 2, 3)}
    assert not any(rows["llama", turn]["same_as_plain"] for turn in (1, 2, 3)), "it says something else"
    assert [process["process"] for process in written["memory"]] == ["copyspec", *names[2:]]
    assert written["versions"]["llama-server"] == "7 (stand-in)"
    started = starts(record)
    assert [words[words.index("--spec-type") + 1 :] for _, words in started if "--spec-type" in words] == [
        ["ngram-mod"],
        ["ngram-simple"],
    ]
    assert all("-t 1 -c 8192 -np 1 --jinja" in " ".join(words) for _, words in started)
    assert not any(is_running(pid) for pid, _ in started)


@NOT_ON_WINDOWS
def test_a_server_that_runs_without_its_fastest_instructions_is_recorded_so(stand_in: Any, tmp_path: Path) -> None:
    program, _ = stand_in("no AMX")
    out = tmp_path / "out.json"
    result = bench(*SHORT, *program, "--peer", "llama", "--json", out)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["versions"]["llama-server"] == "7 (stand-in), --no-repack"


@NOT_ON_WINDOWS
def test_a_server_that_dies_on_the_way_is_left_out_from_then_on(stand_in: Any, tmp_path: Path) -> None:
    program, record = stand_in("dies")
    out = tmp_path / "out.json"
    result = bench(*SHORT, *program, "--peer", "llama", "--peer", "ours", "--json", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert {row["peer"] for row in written["results"]} == {"ours", "ours-plain"}
    assert "gave no answer" in written["left_out"]["llama"]
    assert not is_running(starts(record)[0][0])


@NOT_ON_WINDOWS
@pytest.mark.skipif(importlib.util.find_spec("langchain_openai") is None, reason="langchain-openai is not installed")
def test_langchain_asks_a_server_too(stand_in: Any, tmp_path: Path) -> None:
    program, _ = stand_in("answers")
    out = tmp_path / "out.json"
    result = bench(*SHORT, *program, "--peer", "llama-langchain", "--json", out)
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(out.read_text())["results"] if row["peer"] == "llama-langchain"]
    assert [row["tokens"] for row in rows] == [7, 7, 7]


@NOT_ON_WINDOWS
def test_without_its_package_langchain_is_left_out_with_what_to_install(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = stand_in("answers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = bench(*SHORT, *program, "--peer", "llama-langchain")
    assert result.exit_code == 2
    assert "cannot take part: langchain-openai is not installed: pip install langchain-openai" in result.output


@NOT_ON_WINDOWS
def test_ctrl_c_ends_everything_that_was_started(tmp_path: Path, engine: Engine) -> None:
    record = put_stand_in(tmp_path, "slow", engine.encode(bench_peers.WARM_UP))
    code = (
        "from pathlib import Path\n"
        "from copyspec_engine.cli.main import main\n"
        "from copyspec_engine.lab.bench import peers\n"
        "peers.gguf_file = lambda _: Path('m.gguf')\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    program = ("--llama-server", str(tmp_path / "llama-server"), "--peer", "llama")
    words = [sys.executable, str(script), "bench", "peers", *map(str, SHORT), *program]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            while not record.exists() and running.poll() is None:
                time.sleep(0.1)
            time.sleep(1.0)  # it waits for the server's answer, or is about to
            children = descendants(running.pid)
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (running.returncode, "Interrupted." in said) == (130, True), said
    (server,) = (pid for pid, _ in starts(record))
    assert not is_running(server)
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in children) and time.monotonic() < end:  # multiprocessing's own goes last
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in children)


def descendants(pid: int) -> list[int]:
    if sys.platform != "linux":
        return []
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in text.split()]


class Side:
    """Stands for what is made in a process."""

    def __init__(self, fails: bool = False) -> None:
        if fails:
            raise CopySpecError("no such model")

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def num_threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def fail(self) -> None:
        raise CopySpecError("not this time")

    def die(self) -> None:
        sys.exit(9)

    def close(self) -> None:
        pass


def test_a_process_computes_with_the_threads_that_it_is_given() -> None:
    with PeerProcess("the side", 3, Side) as process:
        assert process.call("num_threads") == 3
        assert [process.call("environment", f"{name}_NUM_THREADS") for name in ("OMP", "MKL", "NUMBA")] == ["3"] * 3
        with pytest.raises(CopySpecError, match="not this time"):
            process.call("fail")
        assert process.call("num_threads") == 3, "it goes on"
        pid = process.pid
        assert is_running(pid)
    assert not is_running(pid)


def test_a_process_that_cannot_begin_or_ends_is_told_of() -> None:
    with pytest.raises(CopySpecError, match="no such model"):
        PeerProcess("the side", 1, Side, fails=True)
    with (
        PeerProcess("the side", 1, Side) as process,
        pytest.raises(CopySpecError, match="The process of the side ended with exit code 9"),
    ):
        process.call("die")


def test_a_rewrite_is_a_talk_that_grows_in_the_words_that_the_model_knows() -> None:
    (chat,) = load_conversations([REWRITE], {}, ["letter.txt", "article.txt"], "smollm2", 1)
    first, second = chat.messages([]), chat.messages(["Dear Sir"])
    assert first[0]["role"] == "system"
    assert first[-1]["content"].startswith("Correct the spelling mistakes.\n\n")
    assert second[:-2] == first
    assert [message["content"] for message in second[-2:]] == ["Dear Sir", chat.requests[1]]
    (copier,) = load_conversations([REWRITE], {}, ["meeting_notes.md"], "bundled", 1)
    document, request = copier.messages([])
    assert document["content"].startswith("#")
    assert request["content"].startswith("Append this line:")
    assert len(chat.requests) == len(copier.requests) == 3


def test_tasks_come_from_the_files_that_are_named(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    rows = [{"question_id": number, "category": "x", "turns": [f"Say {number}.", "Again."]} for number in range(5)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = load_conversations(["mt-redundant", "gsm8k"], {"mt-redundant": str(file)}, [], "bundled", 2)
    assert [conversation.kind for conversation in found] == ["mt-redundant", "gsm8k", "mt-redundant", "gsm8k"]
    assert all(conversation.requests[1] == "Again." for conversation in found[::2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--limit", 0), "--limit 0"),
        (("--max-tokens", 0), "--max-tokens 0"),
        (("--threads", 0), "--threads 0"),
        (("--file", "nowhere.txt"), "nowhere.txt"),
        (("--data", "gsm8k"), "--data gsm8k but expected KIND=FILE"),
        (("--data", "rewrite=x.jsonl"), "--data rewrite=x.jsonl but expected KIND=FILE"),
        (("--data", "humaneval=x.jsonl"), "--data humaneval=x.jsonl without --kind humaneval"),
        (("--data", "gsm8k=nowhere.jsonl"), "nowhere.jsonl"),
        (("--json", "nowhere/out.json"), "nowhere"),
        (("--llama-server", "nowhere/llama-server"), "--llama-server nowhere/llama-server but there is no such file"),
        (("--peer", "llama"), "--peer llama, which cannot take part: there is no llama-server on the PATH"),
        (("--peer", "llama", "--llama-server", __file__), "bundled is no GGUF file"),
        ((*SHORT, "--model", "no/such/folder"), "no/such/folder"),
    ],
)
def test_what_cannot_work_is_said(words: tuple[Any, ...], said: str) -> None:
    result = bench(*words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_the_guides_commands_name_options_that_there_are() -> None:
    """They take a real model for as long as it writes, so they are not run as they stand."""
    guide = Path("docs/measuring.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^copyspec bench peers (.*)$", guide, flags=re.MULTILINE)
    assert len(commands) == 2
    known = bench("--help").output
    for option in {word for command in commands for word in command.split() if word.startswith("--")}:
        assert option in known
