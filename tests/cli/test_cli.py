"""The `copyspec` command: figures, colours, files and exit codes, on a scripted model."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

from copyspec_engine import ConfigError, Engine, EngineConfig, EngineInfo, SamplingParams, Segment, shared_engine
from copyspec_engine.cli import chat, info
from copyspec_engine.cli.demo import frameworks
from copyspec_engine.cli.demo import run as demo
from copyspec_engine.cli.demo.chain import chain_for, steps_for
from copyspec_engine.cli.demo.edits import EditStep, Outcome
from copyspec_engine.cli.demo.figures import GENERATE, LLAMA, LOOKUP, DemoTurn, PeerAnswer, figures
from copyspec_engine.cli.demo.frameworks import FRAMEWORKS, FrameworkAnswer
from copyspec_engine.cli.documents import Document, load_document, shipped_names
from copyspec_engine.cli.files import write_text
from copyspec_engine.cli.main import app
from copyspec_engine.cli.printing import AnswerPrinter
from copyspec_engine.testing import scripted_engine
from tests.serve.servers import serving

TURN_KEYS = ["edit", "tokens", "forward_passes", "copied_share", "ttft_s", "seconds", "plain_seconds"]
PEER_KEYS = ["generate_seconds", "prompt_lookup_seconds"]
LAST_KEYS = ["edit_made", "words_off", "identical"]


def rewriter(prompt: str) -> str:
    """A perfect model: applies the last instruction to the text below it, or else to the last text of the talk."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt, flags=re.DOTALL)
    answers = [text for role, text in turns if role == "assistant"]
    asked = [text for role, text in turns if role == "user"]
    documents = [load_document(name) for name in shipped_names()]
    for step in (step for document in documents for step in steps_for(document, "chat")):
        if asked[-1].startswith(f"{step.instruction}\n\n"):
            return step.apply(asked[-1].removeprefix(f"{step.instruction}\n\n"))
    text = answers[-1] if answers else asked[0]
    for step in (step for document in documents for step in steps_for(document)):
        if step.instruction == asked[-1]:
            return step.apply(text)
    return text


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(rewriter, EngineConfig(model="scripted", max_model_len=32_000)) as scripted:
        yield scripted


@pytest.fixture
def run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """run("demo", "--compare") -> the command's result, on the scripted engine."""
    for module in (demo, chat):
        monkeypatch.setattr(module, "shared_engine", lambda *_: engine)
    monkeypatch.setattr(info, "inspect_model", lambda *_: engine.info)
    return lambda *words, **options: CliRunner().invoke(app, words, **options)


# Documents and chains


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_document_is_neither_short_nor_long(name: str) -> None:
    assert 60 <= len(re.findall(r"\w+", load_document(name).text)) <= 300


def test_a_file_of_the_same_name_as_a_shipped_document_gets_the_steps_for_any_text(tmp_path: Path) -> None:
    own = tmp_path / "article.txt"
    own.write_text("One line.\n")
    assert steps_for(load_document(str(own))) == steps_for(Document("other.txt", "x"))
    assert steps_for(load_document(str(own))) != steps_for(load_document("article.txt"))


# Demo


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_demo_writes_the_figures_of_every_turn_through_each_framework(
    run: Callable[..., Result], tmp_path: Path, framework: str
) -> None:
    path = tmp_path / "figures.json"
    result = run("demo", "--framework", framework, "--file", "service.ini", "--json", str(path))
    assert result.exit_code == 0, result.output
    figures_read = json.loads(path.read_text())
    assert list(figures_read) == [
        *("turns", "framework", "model", "device", "dtype", "versions", "command", "date", "machine")
    ]
    assert (figures_read["framework"], figures_read["model"], figures_read["device"]) == (framework, "scripted", "cpu")
    assert len(figures_read["turns"]) >= 5
    for turn in figures_read["turns"]:
        assert list(turn) == [*TURN_KEYS, *LAST_KEYS]
        assert turn["edit_made"] is True
        assert turn["words_off"] == 0
        assert turn["identical"] is True
        assert turn["tokens"] / turn["forward_passes"] > 10
        assert 0.9 < turn["copied_share"] <= 1
        assert 0 < turn["ttft_s"] <= turn["seconds"]
    assert os.listdir(tmp_path) == ["figures.json"]
    assert "identical to plain decoding" in result.output


def test_the_demo_shows_each_answer_with_copied_text_in_colour(engine: Engine) -> None:
    document = load_document("stock_table.csv")
    console = Console(record=True, width=100, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    chain = demo.Chain(engine, frameworks.ask_engine(engine), chain_for(document, "bundled"), document, compare=False)
    turns = chain.run(console)
    shown = console.export_text(styles=True)
    assert turns[0].answer.text in re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert re.search(r"\x1b\[32m[^\x1b]*kettle,red,14,A3", shown)
    console.file.close()


def test_the_demo_exits_with_1_and_says_which_turn_differs(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = frameworks.ask_engine
    calls = iter(range(100))

    def sometimes_wrong(engine: Engine, drafter: Any = None) -> Any:
        ask = real(engine, drafter)

        def wrong(*arguments: Any) -> FrameworkAnswer:
            answer = ask(*arguments)
            return answer if next(calls) != 3 else FrameworkAnswer("other", 1, 1, 0.0, 0.1, 0.1, (1,))

        return wrong if drafter else ask

    monkeypatch.setattr(demo, "ask_engine", sometimes_wrong)
    result = run("demo", "--framework", "engine")
    assert result.exit_code == 1
    assert "Turns [3] differ from plain decoding" in result.output
    assert "Promised in float32: the tokens of plain decoding" in result.output


@pytest.mark.parametrize(
    ("dtype", "exact", "code"), [("float32", False, 1), ("bfloat16", False, 0), ("bfloat16", True, 1)]
)
def test_the_demo_says_what_the_dtype_promises_where_a_turn_differs(
    capsys: pytest.CaptureFixture[str], dtype: str, exact: bool, code: int
) -> None:
    """Where near ties may fall the other way, it is explained and is no failure."""
    info = EngineInfo("m", "M", "cpu", dtype, 64, 0, 64, 0, (), exact=exact)
    turns: Any = [SimpleNamespace(identical=identical, equals_generate=None) for identical in (True, False)]
    assert demo._verdict(turns, info, Console(width=300)) == code
    said = capsys.readouterr().out
    assert "Turns [2] differ from plain decoding." in said
    assert f"Promised in {dtype}: the tokens of plain decoding" in said
    assert ("near ties" in said) == (code == 0)


def test_the_demo_writes_a_picture_of_what_it_showed(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("demo", "--framework", "engine", "--svg", str(tmp_path / "demo.svg"))
    assert result.exit_code == 0
    picture = (tmp_path / "demo.svg").read_text()
    assert picture.startswith("<svg")
    for text in ("over&#160;plain", "Dear&#160;Mrs.&#160;Berger", "Edit&#160;made", "identical"):
        assert text in picture
    assert "url(http" not in picture
    assert "@font-face" not in picture


def test_brackets_in_a_file_or_model_name_are_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "notes[bold].txt"
    path.write_text("one\ntwo\n")
    with scripted_engine(rewriter, EngineConfig(model="my[/model]")) as engine:
        for module in (demo, chat):
            monkeypatch.setattr(module, "shared_engine", lambda *_: engine)
        monkeypatch.setattr(info, "inspect_model", lambda *_: engine.info)
        for words in (["demo", "--file", str(path)], ["info"], ["chat"]):
            result = CliRunner().invoke(app, [*words, "--model", "my[/model]"], input="/quit")
            assert result.exit_code == 0, result.output
            assert "my[/model]" in result.output
            assert ("notes[bold].txt" in result.output) == ("demo" in words)


def test_the_table_sums_tokens_and_times_and_divides_the_sums() -> None:
    fast = FrameworkAnswer("x", tokens=90, forward_passes=3, copied_share=1.0, ttft_s=0.01, seconds=0.1, token_ids=(1,))
    slow = FrameworkAnswer("x", tokens=10, forward_passes=2, copied_share=0.0, ttft_s=0.03, seconds=0.4, token_ids=(1,))
    plain = FrameworkAnswer(
        "x", tokens=90, forward_passes=90, copied_share=0.0, ttft_s=0.1, seconds=2.0, token_ids=(1,)
    )

    def peers(generate_s: float, lookup_s: float, same: bool) -> dict[str, PeerAnswer]:
        return {
            GENERATE: PeerAnswer(90, generate_s, token_ids=(1,) if same else (2,)),
            LOOKUP: PeerAnswer(90, lookup_s, token_ids=(1,)),
            LLAMA: PeerAnswer(50, 2.0, text="x" if same else "y", write_s=1.0),
        }

    cells = figures(
        [
            DemoTurn(
                EditStep("append", {}), (), fast, plain, Outcome(made=True, words_off=1), peers(3.0, 1.0, same=True)
            ),
            DemoTurn(
                EditStep("repeat", {}), (), slow, plain, Outcome(made=False, words_off=3), peers(2.0, 0.5, same=False)
            ),
        ]
    )
    assert cells == {
        "edit made": "1 of 2",
        "words off": "4",
        "tokens": "100",
        "forward passes": "5",
        "tokens per pass": "20.0",
        "copied": "90%",
        "first token after": "20 ms",
        "tokens per second": "200",
        "after the prompt": "213",
        "time": "500 ms",
        "plain decoding": "4.00 s",
        "over plain": "8.0x",
        "generate": "5.00 s",
        "over generate": "10.0x",
        "prompt lookup": "1.50 s",
        "over lookup": "3.0x",
        "llama.cpp": "4.00 s",
        "tokens/s, plain": "25",
        "after the prompt, plain": "50",
        "same answer, plain": "1 of 2",
        "identical to plain": "[green]yes[/]",
        "identical to generate": "[bold red]NO[/]",
    }


def test_a_peer_that_dropped_out_has_no_cell_for_all_turns() -> None:
    answer = FrameworkAnswer(
        "x", tokens=90, forward_passes=3, copied_share=1.0, ttft_s=0.01, seconds=0.1, token_ids=(1,)
    )
    turns = [
        DemoTurn(EditStep("repeat", {}), (), answer, answer, Outcome(made=True, words_off=0), peers)
        for peers in ({LLAMA: PeerAnswer(50, 2.0, text="x", write_s=1.0)}, {})
    ]
    assert figures(turns[:1])["llama.cpp"] == "2.00 s"
    assert "llama.cpp" not in figures(turns)


def test_equal_texts_of_different_tokens_are_not_the_same_answer() -> None:
    one = FrameworkAnswer("x", 2, 1, 0.0, 0.1, 0.1, token_ids=(1, 2))
    assert not one.same_as(FrameworkAnswer("x", 2, 1, 0.0, 0.1, 0.1, token_ids=(3, 2)))
    assert one.same_as(FrameworkAnswer("x", 2, 2, 0.5, 0.2, 0.3, token_ids=(1, 2)))


# On the bundled model

CPU_COST = ((1, 1.0), (16, 1.4), (64, 2.7), (256, 9.0))
"""A quiet CPU's curve: drafts must not depend on how busy the test machine is."""


@pytest.mark.parametrize("name", [*shipped_names(), "own.txt"])
def test_the_bundled_model_does_every_step_of_the_shipped_chains_exactly(name: str) -> None:
    document = load_document(name) if name in shipped_names() else Document(name, load_document("article.txt").text)
    ask = frameworks.ask_engine(shared_engine(EngineConfig(model="bundled", device="cpu", step_cost=CPU_COST)))
    text, messages, answers = document.text, [{"role": "user", "content": document.text}], []
    for step in steps_for(document):
        messages.append({"role": "user", "content": step.instruction})
        answers.append(ask(messages, name, 800, lambda _: None))
        text = step.apply(text)
        assert answers[-1].text == text
        messages.append({"role": "assistant", "content": text})
    assert sum(a.tokens for a in answers) / sum(a.forward_passes for a in answers) >= 10


def test_the_demo_beside_its_peers_gives_the_tokens_of_generate(tmp_path: Path) -> None:
    own, path = tmp_path / "own.txt", tmp_path / "figures.json"
    own.write_text("red apples\ngreen pears\nblue plums\n")
    words = ["demo", "--model", "bundled", "--device", "cpu", "--compare", "--file", str(own), "--json", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for turn in json.loads(path.read_text())["turns"]:
        assert list(turn) == [*TURN_KEYS, *PEER_KEYS, *LAST_KEYS]
        assert turn["generate_seconds"] > 0 < turn["prompt_lookup_seconds"]
    assert "identical to plain decoding and to generate" in result.output


# Bad input


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--file", "missing.txt"], "Cannot read --file missing.txt: No such file"),
        (["--file", "."], "Got --file ., which is a folder"),
        (["--file", "binary.bin"], "binary.bin with a byte that is not UTF-8 at offset 1"),
        (["--file", "zero.bin"], "zero.bin with a zero byte at offset 2"),
        (["--file", "empty.txt"], "empty.txt, which holds no text"),
        (["--file", "huge.txt"], "huge.txt of more than 1,000,000 bytes"),
        (["--framework", "haystack"], "Got --framework haystack but expected one of engine, langchain, llama-index"),
        (["--json", "no/such/folder.json"], "there is no folder no/such: create it first"),
        (["--json", "."], "Got --json ., which is not a file"),
        (["--svg", "no/such.svg"], "Got --svg no/such.svg but there is no folder no"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--device", "tpu"], "Got device='tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.bin").write_bytes(b"a\xff\x00")
    (tmp_path / "zero.bin").write_bytes(b"ab\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "huge.txt").write_text("a" * 1_000_001)
    before = sorted(os.listdir())
    result = CliRunner().invoke(app, ["demo", *words])
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(os.listdir()) == before


def test_help_shows_brackets() -> None:
    for command in (("calibrate",), ("bench", "drafts")):
        shown = CliRunner().invoke(app, [*command, "--help"]).output
        assert "[[tokens, seconds], ...]" in " ".join(re.sub("[│\\n]", " ", shown).split())


def test_help_cuts_no_name_in_a_terminal_of_80_columns() -> None:
    def walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk((*words, name), inner)

    for words, command in walk((), get_command(app)):
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown, words
        for option in command.params:
            assert all(name in shown for name in (*option.opts, *option.secondary_opts) if name.startswith("-")), words


def test_an_unknown_option_is_exit_code_2() -> None:
    result = CliRunner().invoke(app, ["demo", "--bogus"])
    assert result.exit_code == 2
    assert "--bogus" in result.stderr


@pytest.mark.parametrize("package", ["langchain_core", "llama_index.core"])
def test_a_missing_framework_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    extra = {"langchain_core": "langchain", "llama_index.core": "llama-index"}[package]
    monkeypatch.setattr(frameworks, "find_spec", lambda name: None if name == package else object())
    result = CliRunner().invoke(app, ["demo", "--framework", extra])
    assert result.exit_code == 2
    assert f'pip install "copyspec[{extra}]"' in result.stderr


def test_an_interrupted_demo_exits_with_130_and_writes_nothing(
    run: Callable[..., Result], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shown = AnswerPrinter.__call__, iter(range(100))

    def interrupt_later(printer: AnswerPrinter, segments: Any) -> None:
        if next(shown) == 4:
            raise KeyboardInterrupt
        real(printer, segments)

    monkeypatch.setattr(AnswerPrinter, "__call__", interrupt_later)
    result = run("demo", "--framework", "engine", "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_the_real_command_with_130_and_no_traceback(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "copyspec_engine",
        "demo",
        "--model",
        "bundled",
        "--framework",
        "engine",
        "--json",
        str(tmp_path / "x.json"),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        next(line for line in process.stdout if line.startswith("1. "))
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half\ud800", "--json")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(ConfigError, match="Cannot write --json"):
        write_text(tmp_path / "gone" / "x.json", "text", "--json")


# Chat and info


def test_chat_answers_shows_its_figures_and_saves_the_conversation(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "talk.md"
    lines = [
        "/stats",
        "/why",
        "/load service.ini",
        "Append this line:\\",
        "checksum = yes",
        "again, all of it please",
        "/stats",
        "/why",
    ]
    result = run(
        "chat", input="\n".join([*lines, f"/save {path}", "/help", "/load nowhere", "/load", "/undo", "/quit"])
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("No answer yet.") == 2
    for text in (
        "Loaded service.ini",
        "per pass",
        "message 2, from character",
        "/save PATH",
        "Cannot read /load nowhere",
        "/load needs a PATH:",
        "There is no /undo:",
    ):
        assert text in result.output
    said = path.read_text()
    roles = [line.removeprefix("## ") for line in said.splitlines() if line.startswith("## ")]
    assert roles == ["user", "user", "assistant", "user", "assistant"]
    assert said.count("checksum = yes") == 3


def test_chat_ends_with_its_input_and_refuses_a_bad_temperature(run: Callable[..., Result]) -> None:
    assert run("chat", input="hello").exit_code == 0
    result = run("chat", "--temperature", "-1")
    assert result.exit_code == 2
    assert "Got temperature=-1.0" in result.stderr


def test_chat_keeps_going_after_a_message_that_does_not_fit(tmp_path: Path) -> None:
    with scripted_engine(rewriter, EngineConfig(model="scripted", max_model_len=200)) as engine:
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        talk = chat.Chat(engine, SamplingParams(), console)
        talk.say("x" * 300)
        assert talk.messages == []
        talk.say("short")
        assert [message["content"] for message in talk.messages] == ["short", "short"]
        talk.save(str(tmp_path))
        shown = console.export_text()
        console.file.close()
    assert "holds 200" in shown
    assert "is not a file" in shown


def test_an_interrupted_answer_stays_as_far_as_it_came(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: AnswerPrinter, __: list[Segment]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerPrinter, "__call__", interrupt)
    talk = chat.Chat(engine, SamplingParams(), Console(quiet=True))
    talk.say("hello")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_ctrl_c_at_the_prompt_keeps_the_conversation_and_leaves_only_when_it_is_said_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str | type[BaseException]] = [
        "hello",
        KeyboardInterrupt,
        "/stats",
        KeyboardInterrupt,
        KeyboardInterrupt,
    ]

    def read_line(_: str) -> str:
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(chat, "shared_engine", lambda *_: engine)
    console = Console(record=True, width=100, file=io.StringIO())
    assert chat.run_chat(engine.config, SamplingParams(), console, read_line) == 0
    shown = console.export_text()
    assert lines == []
    assert shown.count("The conversation is still here") == 2
    assert "per pass" in shown


@pytest.mark.enable_socket
def test_a_chat_can_be_had_with_a_server(engine: Engine) -> None:
    lines = iter(["/load service.ini", "Append this line:\\", "checksum = yes", "/why", "/clear", "/quit"])
    console = Console(record=True, width=100, file=io.StringIO())
    with serving(engine) as address:
        assert chat.run_remote_chat(address, None, SamplingParams(), console, lambda _: next(lines)) == 0
        assert not engine.sessions()
    shown = console.export_text()
    assert "scripted at http://127.0.0.1" in shown
    assert "checksum = yes" in shown
    assert "[1] message 0, from character" in shown
    refused = CliRunner().invoke(app, ["chat", "--url", address, "--device", "cuda"])
    assert refused.exit_code == 2
    assert "--device cuda with --url" in refused.stderr
    gone = CliRunner().invoke(app, ["chat", "--url", address])
    assert gone.exit_code == 2
    assert "is `copyspec serve` running" in gone.stderr


def test_a_chat_can_be_told_how_to_answer_and_begun_anew() -> None:
    seen: list[str] = []

    def answer(prompt: str) -> str:
        seen.append(prompt)
        return "yes"

    with scripted_engine(answer) as engine:
        talk = chat.Chat(engine, SamplingParams(), Console(quiet=True))
        talk.instruct("Be short.")
        talk.say("first")
        assert "system\nBe short." in seen[-1]
        assert len(engine.memory(talk.session_id))
        talk.clear()
        assert not len(engine.memory(talk.session_id))
        talk.say("second")
        assert "system\nBe short." in seen[-1]
        assert "first" not in seen[-1]
        talk.instruct("")
        talk.say("third")
        assert "system" not in seen[-1]


def written(console: Console) -> str:
    """What a console over a StringIO has printed."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_no_word_is_broken_at_the_edge_of_a_terminal(size: int) -> None:
    text = "The quick brown fox\n\n  jumps over the  lazy dog, a_word_that_is_longer_than_the_line and on"
    console = Console(width=16, file=io.StringIO(), force_terminal=True, color_system=None)
    printer = AnswerPrinter(console)
    for start in range(0, len(text), size):
        printer([Segment(text[start : start + size], "prompt" if start % 2 == 0 else None)])
    printer.end()
    lines = written(console).split("\n")
    assert [line.rstrip() for line in lines] == [
        "The quick brown",
        "fox",
        "",
        "  jumps over the",
        "lazy dog, a_word",
        "_that_is_longer_",
        "than_the_line",
        "and on",
    ]


def test_scripts_without_blanks_fill_the_line_and_files_get_the_text_as_it_is() -> None:
    terminal = Console(width=10, file=io.StringIO(), force_terminal=True, color_system=None)
    plain = Console(width=10, file=io.StringIO())
    for console in (terminal, plain):
        printer = AnswerPrinter(console)
        printer([Segment("狐狸跳过"), Segment("了懒狗", "prompt")])
        printer.end()
    assert written(terminal) == "狐狸跳过了\n懒狗"
    assert written(plain) == "狐狸跳过了懒狗"


def test_info_names_the_model_its_memory_and_the_versions(run: Callable[..., Result]) -> None:
    result = run("info")
    assert result.exit_code == 0
    for text in (
        "scripted",
        "cpu",
        "32,000 tokens",
        "transformers version",
        "CPU threads",
        "tool calling",
        "the tokens of plain decoding",
    ):
        assert text in result.output


def test_info_for_a_bug_report_has_no_folders(run: Callable[..., Result], engine: Engine) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["model"] == "scripted"
    assert {"python", "torch", "transformers", "numba", "llguidance", "langchain-core", "llama-index-core"} <= set(
        facts["versions"]
    )
    for name in ("system", "cpu_features", "cpu_threads", "device_name", "device_memory", "execution", "load_seconds"):
        assert facts[name], name
    assert "check_difference" in facts
    assert facts["answers"]
    folder = str(Path.home() / "models" / "my-model")
    broken = replace(engine.info, model=folder, execution_error=f"no kernel in {folder}", memory_path="/home/me/x")
    broken = replace(broken, model_source=folder)
    report = json.dumps(info.for_a_report(broken))
    assert "my-model" in report
    assert str(Path.home()) not in report
    assert "/home" not in report


def test_the_command_says_its_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"copyspec \d+\.\d+\.\d+\n", result.stdout)


def test_the_help_of_the_chat_fits_a_terminal() -> None:
    assert max(map(len, chat.HELP.splitlines())) <= 80
