"""Run folders: what is appended stays, what is incomplete is dropped, another run is refused; figures by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from copyspec_engine import ConfigError
from copyspec_engine.evaluation.records import RunFacts, RunFolder, TurnRecord, read_turns
from copyspec_engine.evaluation.summary import identical, rows, summary

TURNS = {"a": 2, "b": 2}


def facts(**changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "benchmark": "mt-bench",
        "drafter": "adaptive",
        "writers": ("adaptive", "none"),
        "model": "m",
        "data": "d",
        "num_tasks": 2,
        "max_new_tokens": 64,
        "command": "copyspec eval mt-bench",
        "date": "2026-01-01T00:00:00+00:00",
    }
    return RunFacts(**{**values, **changes})


def record(task: str, turn: int, writer: str = "adaptive", **changes: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "task": task,
        "category": "stem",
        "turn": turn,
        "writer": writer,
        "messages": ({"role": "user", "content": "a\u2028b"},),
        "text": "x",
        "token_ids": (1, 2, 3, 4),
        "prompt_tokens": 5,
        "finish_reason": "stop",
        "forward_passes": 2,
        "draft_lengths": (3, 0),
        "accepted_lengths": (2, 0),
        "prefill_s": 0.5,
        "decode_s": 1.5,
    }
    return TurnRecord(**{**values, **changes})


def complete(task: str) -> list[TurnRecord]:
    return [record(task, turn, writer) for turn in (1, 2) for writer in ("adaptive", "none")]


def test_a_run_goes_on_behind_the_last_complete_task(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.begin(facts(), TURNS) == []
    for one in (*complete("a"), record("b", 1), record("b", 1, "none"), record("b", 2)):
        folder.append(one)
    with folder.turns_path.open("ab") as file:
        file.write(b'{"task": "b", "turn": 2, "wri')
    assert folder.begin(facts(date="2027-01-01T00:00:00+00:00"), TURNS) == complete("a")
    assert folder.turns() == complete("a")
    assert folder.facts().date == facts().date


def test_a_smaller_limit_loses_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(facts(), TURNS)
    for one in (*complete("a"), *complete("b")):
        folder.append(one)
    assert folder.begin(facts(num_tasks=1), {"b": 2}) == complete("b")
    assert folder.begin(facts(), TURNS) == [*complete("a"), *complete("b")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(facts(), TURNS)
    folder.turns_path.unlink()
    folder.turns_path.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"Cannot write .*turns\.jsonl: No space left"):
        folder.append(record("a", 1))


def test_a_record_that_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(facts(), TURNS)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:100]))
    folder.append(record("a", 1))
    assert folder.turns() == [record("a", 1)]


@pytest.mark.parametrize("change", [{"model": "n"}, {"benchmark": "gsm8k"}, {"max_new_tokens": 65}, {"data": "e"}])
def test_another_run_in_the_folder_is_refused_and_kept(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(facts(), TURNS)
    folder.append(record("a", 1))
    before = folder.turns_path.read_bytes()
    with pytest.raises(ConfigError, match=f"holds another run .{next(iter(change))} was"):
        folder.begin(facts(**change), TURNS)
    assert folder.turns_path.read_bytes() == before


def test_bad_folders_and_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder(tmp_path).facts()
    with pytest.raises(ConfigError, match="Cannot read"):
        list(read_turns(tmp_path / "turns.jsonl"))
    path = tmp_path / "turns.jsonl"
    path.write_text(record("a", 1).model_dump_json() + "\n" + json.dumps({"task": "a"}) + "\n")
    with pytest.raises(ConfigError, match="line 2, which is no record of a turn: category"):
        list(read_turns(path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="which is no run"):
        RunFolder(tmp_path).facts()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write --output"):
        RunFolder(tmp_path / "file").begin(facts(), TURNS)


def test_figures_counted_by_hand() -> None:
    records = [
        record("a", 1),
        record("a", 1, "none", forward_passes=4, prefill_s=1.0, decode_s=3.0),
        record("b", 1, category="math", token_ids=(1,) * 8, accepted_lengths=(6, 0), prefill_s=0.25, decode_s=0.75),
        record("b", 1, "none", category="math", token_ids=(1,) * 8, prefill_s=1.0, decode_s=3.0),
        record("a", 2, forward_passes=1, prefill_s=1.0, decode_s=0.0),
        record("a", 2, "none", token_ids=(1, 2, 3, 9), prefill_s=2.0, decode_s=2.0),
    ]
    found = {(row["turn"], row["category"]): row for row in rows(facts(), records)}
    assert list(found) == [
        (1, "stem"),
        (1, "math"),
        (1, "all"),
        (2, "stem"),
        ("all", "stem"),
        ("all", "math"),
        ("all", "all"),
    ]
    assert found[1, "stem"] == {
        "turn": 1,
        "category": "stem",
        "tokens": 4,
        "forward_passes": 2,
        "tokens_per_forward": 2.0,
        "tokens_per_s": 2.0,
        "copied_share": 0.5,
        "plain_tokens_per_s": 1.0,
        "speedup": 2.0,
        "modelled_speedup": None,
    }
    # 12 tokens in 3 s beside 12 tokens in 8 s
    assert (found[1, "all"]["tokens_per_s"], found[1, "all"]["speedup"]) == (4.0, round(4 / 1.5, 4))
    assert found[1, "all"]["copied_share"] == round(8 / 12, 4)
    assert identical(facts(), records) == {"same": 1, "of": 2}
    assert identical(facts(drafter="none", writers=("none",)), records) == {"same": 0, "of": 0}
    whole = summary(facts(), records, {"rouge1": 0.5})
    assert list(whole) == ["benchmark", "drafter", "model", "rows", "identical", "metrics", "facts"]


def test_runs_without_a_model_have_modelled_speed_only() -> None:
    records = [record("a", 1, prefill_s=None, decode_s=None, modelled_passes=2.5)]
    (row, _) = rows(facts(writers=("adaptive",)), records)
    assert (row["tokens_per_s"], row["speedup"], row["modelled_speedup"]) == (None, None, 1.6)
