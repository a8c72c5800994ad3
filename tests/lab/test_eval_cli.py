"""`copyspec eval` from end to end: on the bundled model, on recorded answers, killed and resumed; never times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.cli.main import app
from copyspec_engine.lab.evaluation.benchmarks import BENCHMARKS
from copyspec_engine.lab.evaluation.data import SAMPLE, load_tasks
from copyspec_engine.lab.evaluation.records import RunFolder, TurnRecord, read_turns
from copyspec_engine.lab.recorded.records import RecordMismatchError
from copyspec_engine.lab.recorded.runner import RecordedRunner
from copyspec_engine.lab.recorded.shapes import SHAPES
from tests.lab.test_bench_engine import TINY

POEM = "The bell rings twice.\nThe boats turn home.\nNobody counts the gulls."
TALK = [
    {"role": "user", "content": "Write a poem."},
    {"role": "assistant", "content": POEM},
    {"role": "user", "content": "Vary it."},
    {"role": "assistant", "content": POEM.replace("gulls", "terns")},
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setenv("COLUMNS", "160")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def passed(*words: str | Path) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.output


def written(folder: Path) -> list[TurnRecord]:
    return list(read_turns(folder / "turns.jsonl"))


def answers(records: list[TurnRecord]) -> dict[tuple[str, int, str], tuple[int, ...]]:
    return {(record.task, record.turn, record.writer): record.token_ids for record in records}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "talk.jsonl"
    rows = [{"id": f"{i}", "category": ("stem", "math")[i % 2], "model": "M", "messages": TALK} for i in range(4)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_on_the_bundled_model(tmp_path: Path, name: str) -> None:
    output = passed(name, "--data", "sample", "--max-new-token", "24", "--output", tmp_path)
    tasks, turns = load_tasks(BENCHMARKS[name], SAMPLE), BENCHMARKS[name].num_turns
    assert f"identical outputs: {len(tasks)}/{len(tasks)}" in output
    records = written(tmp_path)
    assert len(records) == len(tasks) * turns * 2
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["benchmark"], found["drafter"], found["model"]) == (name, "adaptive", "bundled")
    assert found["identical"] == {"same": len(tasks), "of": len(tasks)}
    assert {row["turn"] for row in found["rows"]} == {*range(1, turns + 1), "all"}
    assert all(row["tokens_per_forward"] >= 1 and row["tokens_per_s"] > 0 for row in found["rows"])
    for record in records:
        assert len(record.draft_lengths) == len(record.accepted_lengths) == record.forward_passes
        assert sum(record.accepted_by_source.values()) == record.num_accepted
        assert [message["role"] for message in record.messages] == ["user", "assistant"] * (record.turn - 1) + ["user"]
        assert record.writer == "adaptive" or record.num_accepted == 0


def test_the_second_turn_has_the_first_answer_in_its_prompt(tmp_path: Path) -> None:
    passed("mt-redundant", "--data", "sample", "--limit", "1", "--output", tmp_path)
    first, second = [record for record in written(tmp_path) if record.writer == "adaptive"]
    assert second.messages[:2] == (*first.messages, {"role": "assistant", "content": first.text})
    assert second.cached_tokens > 0
    assert sum(copy["stop"] - copy["start"] for copy in second.copies) > len(second.text) / 2


def test_the_flags_of_the_paper(tmp_path: Path) -> None:
    passed(
        *("mt-bench", "--use-redundant", "--model-path", "bundled", "--model-id", "mine", "--use-copy", "--gamma", "4"),
        *("--number-copy", "7", "--max-new-token", "40", "--limit", "1", "--data", "sample", "--output", tmp_path),
    )
    facts = RunFolder(tmp_path).facts()
    assert (facts.benchmark, facts.model, facts.drafter, facts.max_new_tokens) == (
        "mt-redundant",
        "mine",
        "copyspec",
        40,
    )
    assert facts.drafter_options == {"min_match_tokens": 4, "block": 7}
    assert max(length for record in written(tmp_path) for length in record.draft_lengths) == 7


def test_several_drafters_write_beside_the_same_plain_decoding(tmp_path: Path) -> None:
    words = ("mt-redundant", "--data", "sample", "--limit", "2", "--max-new-token", "40", "--number-copy", "7")
    output = passed(*words, "--drafter", "adaptive", "copyspec", "--output", tmp_path)
    assert output.count("identical outputs: 2/2") == 2
    records = written(tmp_path)
    assert sorted(record.writer for record in records) == sorted(["adaptive", "copyspec", "none"] * 4)
    for drafter, options in (("adaptive", {}), ("copyspec", {"min_match_tokens": 3, "block": 7})):
        found = json.loads((tmp_path / f"summary_{drafter}.json").read_text())
        assert (found["drafter"], found["facts"]["writers"]) == (drafter, [drafter, "none"])
        assert options.items() <= found["facts"]["drafter_options"].items()
        assert found["identical"] == {"same": 2, "of": 2}
        passes = sum(record.forward_passes for record in records if record.writer == drafter)
        assert found["rows"][-1]["forward_passes"] == passes
        assert (tmp_path / f"summary_{drafter}.md").exists()
        assert list((tmp_path / "plots" / drafter).glob("*.svg"))
    again = (tmp_path / "turns.jsonl").read_bytes()
    assert run(*words, "--drafter", "adaptive", "--output", tmp_path).exit_code == 2, "another run"
    assert (tmp_path / "turns.jsonl").read_bytes() == again


def test_transformers_answers_the_same_prompts(tmp_path: Path) -> None:
    words = ("mt-redundant", "--data", "sample", "--limit", "1", "--max-new-token", "48", "--no-plain")
    passed(*words, "--peer", "generate", "--peer", "prompt-lookup", "--output", tmp_path)
    records = {(record.writer, record.turn): record for record in written(tmp_path)}
    assert len(records) == 6
    for (writer, turn), record in records.items():
        ours = records["adaptive", turn]
        assert (record.token_ids, record.prompt_tokens) == (ours.token_ids, ours.prompt_tokens), writer
        assert record.text == ours.text
        assert record.prefill_s is not None
        assert record.prefill_s > 0
    assert records["generate", 2].forward_passes == records["generate", 2].num_tokens
    assert records["prompt-lookup", 2].forward_passes < records["generate", 2].forward_passes
    found = json.loads((tmp_path / "summary.json").read_text())["rows"][-1]["peers"]
    assert found["generate"]["identical"] == found["prompt-lookup"]["identical"] == {"same": 2, "of": 2}


def test_answers_that_differ_are_named_with_the_gap_of_their_logits(tmp_path: Path) -> None:
    words = ("mt-bench", "--data", "sample", "--limit", "1", "--max-new-token", "12", "--output", tmp_path)
    passed(*words)
    records = written(tmp_path)
    changed = next(record for record in records if record.writer == "adaptive" and record.turn == 1)
    other = (*changed.token_ids[:3], changed.token_ids[0], *changed.token_ids[4:])
    lines = [
        record.model_copy(update={"token_ids": other} if record is changed else {}).model_dump_json()
        for record in records
    ]
    (tmp_path / "turns.jsonl").write_text("".join(f"{line}\n" for line in lines))
    result = run(*words)
    assert result.exit_code == 1
    (found,) = json.loads((tmp_path / "summary.json").read_text())["differences"]
    assert (found["turn"], found["position"]) == (1, 3)
    assert found["gap"] is None or found["gap"] > 0


def test_plain_decoding_alone(tmp_path: Path) -> None:
    output = passed("mt-bench", "--data", "sample", "--limit", "1", "--no-use-copy", "--output", tmp_path)
    assert "identical" not in output
    assert {record.writer for record in written(tmp_path)} == {"none"}
    assert json.loads((tmp_path / "summary.json").read_text())["identical"] == {"same": 0, "of": 0}


def test_tasks_of_each_category(recorded: Path, tmp_path: Path) -> None:
    passed("mt-redundant", "--replay", recorded, "--per-category", "1", "--output", tmp_path)
    assert [(r.task, r.category) for r in written(tmp_path) if r.turn == 1] == [("0", "stem"), ("3", "math")]


def test_recorded_answers_without_a_model(recorded: Path, tmp_path: Path) -> None:
    output = passed("mt-redundant", "--replay", recorded, "--drafter", "copyspec", "--output", tmp_path)
    assert "modelled" in output
    records = written(tmp_path)
    assert {record.writer for record in records} == {"copyspec"}
    assert all(record.seconds is None and record.modelled_passes for record in records)
    assert [record.text.removesuffix("<|im_end|>") for record in records[:2]] == [
        TALK[1]["content"],
        TALK[3]["content"],
    ]
    assert records[1].forward_passes < records[0].forward_passes
    assert max(map(max, (record.draft_lengths for record in records))) == 10


def test_recorded_answers_through_a_shape(recorded: Path, tmp_path: Path) -> None:
    for drafter in ("adaptive", "copyspec"):
        folder = tmp_path / drafter
        output = passed(
            "mt-redundant", "--replay", recorded, "--shape", "tiny", "--drafter", drafter, "--output", folder
        )
        assert "identical outputs: 4/4" in output
        texts = {(record.task, record.turn, record.writer): record.text for record in written(folder)}
        assert all(text == TALK[2 * turn - 1]["content"] for (_, turn, _), text in texts.items())
        assert RunFolder(folder).facts().model == "shape tiny"
        second = next(r for r in written(folder) if r.writer == drafter and r.task == "3" and r.turn == 2)
        assert second.num_accepted > 0.7 * second.num_tokens
        assert second.cached_tokens > 0


def test_a_shape_that_writes_anything_else_is_an_error(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = RecordedRunner._tokens

    def wrong(self: RecordedRunner, piece: Any) -> list[int]:
        return [token ^ (len(piece.text) % 7 == 0) for token in honest(self, piece)]

    monkeypatch.setattr(RecordedRunner, "_tokens", wrong)
    result = run("mt-redundant", "--replay", recorded, "--shape", "tiny", "--limit", "1")
    assert isinstance(result.exception, RecordMismatchError)


def test_a_record_that_is_too_long_is_an_error_rather_than_another_turn(tmp_path: Path) -> None:
    messages = [*TALK[:2], {"role": "user", "content": "more and more " * 12000}, TALK[3]]
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"id": "7", "messages": messages}))
    result = run("mt-redundant", "--replay", data)
    assert result.exit_code == 2
    assert "turn 2 of task 7 behind more than 24000 tokens" in result.output


def test_a_task_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"id": name, "article": "The cat sat. " * count, "highlights": "x"}
        for name, count in (("a", 1), ("b", 9000), ("c", 2))
    ]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = run("cnndm", "--data", data, "--max-new-token", "4", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Left out task b: Got a request of" in result.output
    assert "identical outputs: 2/2" in result.output
    assert {record.task for record in written(tmp_path / "run")} == {"a", "c"}
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["left_out"]) == ["b"]


def test_an_answer_is_as_long_as_there_is_room_for(tmp_path: Path) -> None:
    passed("mt-bench", "--data", "sample", "--limit", "1", "--max-new-token", "8191", "--output", tmp_path)
    assert len(written(tmp_path)) == 4


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    passed("mt-bench", "--data", "sample", "--limit", "1", "--max-new-token", "8", "--output", tmp_path)
    with FileLock(tmp_path / ".lock"):
        result = run("mt-bench", "--data", "sample", "--max-new-token", "8", "--output", tmp_path)
    assert result.exit_code == 2
    assert "to which another run is writing" in result.output


def test_answers_to_other_words_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    data, row = tmp_path / "data.jsonl", {"question_id": 1, "category": "x", "turns": ["Hello.", "Again."]}
    words = ("mt-bench", "--data", data, "--max-new-token", "4", "--output", tmp_path / "run")
    data.write_text(json.dumps(row))
    passed(*words)
    data.write_text(json.dumps({**row, "turns": ["Hello!", "Again."]}))
    result = run(*words)
    assert result.exit_code == 2
    assert "turn 1 of task 1 was asked in other words" in result.output


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the bundled one's vocabulary."""
    folder = tmp_path_factory.mktemp("draft")
    end = AutoTokenizer.from_pretrained(bundled_model_path()).eos_token_id
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, eos_token_id=end, pad_token_id=end))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "writer", "use"),
    [
        ((), "adaptive", "in-tree"),
        (("--gamma", "3"), "copyspec", "after-copies"),
        (("--no-use-copy",), "draft-model", None),
        (("--draft-use", "never"), "adaptive", "never"),
    ],
)
@pytest.mark.usefixtures("fixed_pass_cost")
def test_a_draft_model_takes_part(
    draft_model: Path, tmp_path: Path, words: tuple[str, ...], writer: str, use: str | None
) -> None:
    options = ("--draft-path", draft_model, "--delta", "3", "--data", "sample", "--limit", "1", "--max-new-token", "24")
    output = passed("mt-redundant", *options, *words, "--output", tmp_path)
    assert "identical outputs: 1/1" in output
    facts = RunFolder(tmp_path).facts()
    assert (facts.drafter, facts.drafter_options.get("draft_model_use"), facts.drafter_options["delta"]) == (
        writer,
        use,
        3,
    )
    records = written(tmp_path)
    assert {record.writer for record in records} == {writer, "none"}
    (row,) = [r for r in json.loads((tmp_path / "summary.json").read_text())["rows"] if r["turn"] == "all"]
    if writer == "draft-model":
        assert row["copied_share"] == 0
        assert max(length for record in records for length in record.draft_lengths) == 3
    else:
        assert row["copied_share"] > 0.5


BAD = [
    (("mt-bench", "--gamma", "3", "--drafter", "adaptive"), "options of the paper's algorithm"),
    (("mt-bench", "--no-use-copy", "--gamma", "3"), "--no-use-copy with a drafter that copies"),
    (("mt-bench", "--gamma", "0"), "min_match_tokens=0"),
    (("gsm8k", "--use-redundant"), "option of mt-bench"),
    (("gsm8k", "--drafter", "adaptive", "adaptive"), "--drafter adaptive adaptive"),
    (("gsm8k", "--drafter", "adaptive", "none"), "plain decoding stands beside them"),
    (("gsm8k", "--drafter", "draft-model"), "--drafter draft-model without a draft model"),
    (("gsm8k", "--replay", "x", "--peer", "generate"), "--peer with --replay"),
    (("gsm8k", "--delta", "3"), "--delta 3 without a draft model"),
    (("gsm8k", "--draft-use", "in-tree"), "--draft-use in-tree without a draft model"),
    (("gsm8k", "--draft-path", "m", "--drafter", "none"), "--draft-path with --drafter none"),
    (
        ("gsm8k", "--draft-path", "m", "--no-use-copy", "--draft-use", "in-tree"),
        "--no-use-copy with a drafter that copies",
    ),
    (("mt-bench", "--replay", "x", "--draft-path", "m"), "--draft-path with --replay"),
    (("mt-bench", "--replay", "x", "--device", "cpu"), "--device or --dtype with --replay"),
    (("mt-bench", "--no-use-copy", "--plain"), "--plain with plain decoding"),
    (("gsm8k", "--limit", "0"), "--limit 0"),
    (("gsm8k", "--max-new-token", "0"), "--max-new-token 0"),
    (("gsm8k", "--shape", "tiny"), "--shape tiny without --replay"),
    (("gsm8k", "--cost-model", "cpu"), "--cost-model cpu without --replay"),
    (("gsm8k", "--replay-model", "M"), "--replay-model M without --replay"),
    (("mt-bench", "--replay", "x", "--data", "sample"), "--data sample with --replay x"),
    (("mt-bench", "--replay", "x", "--model-path", "m"), "--model-path m with --replay"),
    (("humaneval", "--replay", "x", "--execute-code"), "--execute-code with --replay"),
    (("cnndm", "--data", "sample", "--execute-code"), "--execute-code with cnndm"),
    (("gsm8k", "--data", "sample", "--tokenizer", "t"), "--tokenizer t without --replay"),
    (("mt-bench", "--replay", "x", "--plain"), "--plain with --replay"),
    (("mt-bench", "--replay", "x", "--shape", "tiny", "--cost-model", "cpu"), "--cost-model cpu with --shape"),
    (("mt-bench", "--replay", "missing.jsonl"), "no such file"),
    (("mt-bench", "--data", "missing.jsonl"), "no such file"),
]


@pytest.mark.parametrize(("words", "problem"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_options_that_cannot_work_are_one_line(words: tuple[str, ...], problem: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert problem in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_value_for_a_flag_is_refused() -> None:
    assert run("mt-bench", "--data", "sample", "--use-copy", "False").exit_code == 2


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = [
        {"question_id": i, "category": "x", "turns": [f"Repeat this text:\nline {i} of many", "Repeat the document."]}
        for i in range(8)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["mt-bench", "--data", str(data), "--max-new-token", "16", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "copyspec_engine", "eval", *words, str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        turns = killed / "turns.jsonl"
        while not (turns.exists() and turns.read_bytes().count(b"\n") >= 6):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    before = turns.read_bytes()
    complete = before[: len(b"".join(before.splitlines(keepends=True)[: before.count(b"\n") // 4 * 4]))]
    assert 4 <= complete.count(b"\n") < 4 * 8
    passed(*words, killed)
    assert turns.read_bytes().startswith(complete), "what was complete is not written again"
    passed(*words, whole)
    assert answers(written(killed)) == answers(written(whole))
    rewritten = turns.read_bytes()
    passed(*words, killed)
    assert turns.read_bytes() == rewritten, "a run that is complete writes nothing"


def test_a_limit_can_be_raised_later(tmp_path: Path) -> None:
    words = ("mt-bench", "--data", "sample", "--max-new-token", "8", "--output", tmp_path)
    passed(*words, "--limit", "1")
    first = (tmp_path / "turns.jsonl").read_bytes()
    passed(*words)
    assert (tmp_path / "turns.jsonl").read_bytes().startswith(first)
    assert len({record.task for record in written(tmp_path)}) == 3


def test_without_a_folder_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    passed("mt-bench", "--data", "sample", "--limit", "1", "--max-new-token", "8")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("copyspec")] == []
