"""Run folders: what is appended stays, what is incomplete is dropped, another run is refused; figures by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copyspec_engine import ConfigError
from copyspec_engine.lab.evaluation.differences import differences
from copyspec_engine.lab.evaluation.intervals import interval
from copyspec_engine.lab.evaluation.loops import before_loop, loop_tokens
from copyspec_engine.lab.evaluation.records import RunFacts, RunFolder, TurnRecord, read_turns
from copyspec_engine.lab.evaluation.summary import identical, rows, summary

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
        "tokens_per_forward_interval": None,
        "tokens_per_s": 2.0,
        "copied_share": 0.5,
        "plain_tokens_per_s": 1.0,
        "speedup": 2.0,
        "speedup_interval": None,
        "modelled_speedup": None,
    }
    # 12 tokens in 3 s beside 12 tokens in 8 s
    assert (found[1, "all"]["tokens_per_s"], found[1, "all"]["speedup"]) == (4.0, round(4 / 1.5, 4))
    assert found[1, "all"]["copied_share"] == round(8 / 12, 4)
    # task a alone is 2 times as fast, task b alone 4 times: of draws of two tasks these are the ends
    assert found[1, "all"]["speedup_interval"] == [2.0, 4.0]
    assert found[1, "all"]["tokens_per_forward_interval"] == [2.0, 4.0]
    assert identical(facts(), records) == {"same": 1, "of": 2}
    assert identical(facts(drafter="none", writers=("none",)), records) == {"same": 0, "of": 0}
    whole = summary(facts(), records, {"rouge1": 0.5})
    assert (whole["num_tasks"], whole["metrics"], whole["plain_metrics"]) == (2, {"rouge1": 0.5}, {})


def test_runs_without_a_model_have_modelled_speed_only() -> None:
    records = [record("a", 1, prefill_s=None, decode_s=None, modelled_passes=2.5)]
    (row, _) = rows(facts(writers=("adaptive",)), records)
    assert (row["tokens_per_s"], row["speedup"], row["modelled_speedup"]) == (None, None, 1.6)


def test_answers_that_loop_are_counted_and_left_out() -> None:
    loop, straight = (7, 8) * 12, tuple(range(24))
    records = [
        record("a", 1, token_ids=loop, forward_passes=4, accepted_lengths=(0, 21, 0, 0)),
        record("a", 1, "none", token_ids=loop, forward_passes=24),
        record("b", 1, token_ids=straight, forward_passes=12),
        record("b", 1, "none", token_ids=straight, forward_passes=24),
    ]
    (row, _) = rows(facts(), records)
    assert (row["answers"], row["looping_answers"]) == (2, 1)
    # a run of 8 ends at 17 places, at two of which each of the two runs is new or has been there once only
    assert row["loop_share"] == round(13 / 48, 4)
    assert row["tokens_per_forward"] == 3.0
    assert row["without_loops"]["tokens_per_forward"] == 2.0
    assert row["without_loops"]["tokens"] == 24
    # the twelfth token is the first in a loop, behind one pass and 10 of the 22 tokens of the next one
    assert row["tokens_per_forward_before_loops"] == round((11 + 24) / (1 + 10 / 22 + 12), 4)
    (row, _) = rows(facts(), records[:2])
    assert row["without_loops"] is None


def test_what_stands_before_a_loop_has_its_own_passes() -> None:
    loop = (1, 2, 3, *(7,) * 30)  # the tenth 7 is the first token in a loop
    one = record("a", 1, token_ids=loop, forward_passes=7, accepted_lengths=(2, 0, 4, 0, 1, 9, 11))
    assert before_loop(one) == (12, 5)
    one = record("a", 1, token_ids=loop, forward_passes=4, accepted_lengths=(2, 0, 15, 12))
    assert before_loop(one) == (12, 2.5), "half of the third pass stands in front of it"
    assert before_loop(record("a", 1, "none", token_ids=loop, forward_passes=33, accepted_lengths=())) == (12, 12)
    assert before_loop(record("a", 1)) == (4, 2)


@pytest.mark.parametrize(
    ("token_ids", "found"),
    [(tuple(range(8)) * 2, 0), (tuple(range(8)) * 3, 1), ((5,) * 10, 1), ((5,) * 9, 0), ((), 0)],
)
def test_a_loop_begins_where_eight_tokens_are_there_a_third_time(token_ids: tuple[int, ...], found: int) -> None:
    assert loop_tokens(token_ids) == found


def test_other_writers_of_the_run_are_figures_of_their_own() -> None:
    records = [
        record("a", 1),
        record("a", 1, "generate", forward_passes=4, prefill_s=1.0, decode_s=5.0),
        record("b", 1),
        record("b", 1, "generate", token_ids=(1, 2), forward_passes=2, prefill_s=1.0, decode_s=0.0),
    ]
    (row, _) = rows(facts(writers=("adaptive", "generate")), records)
    assert row["speedup"] is None
    assert row["peers"]["generate"] == {
        "tokens": 6,
        "tokens_per_forward": 1.0,
        "tokens_per_s": round(6 / 7, 4),
        "speedup": round(2 / (6 / 7), 4),
        "speedup_interval": [1.0, 3.0],
        "identical": {"same": 1, "of": 2},
    }


def test_the_first_difference_of_each_task_has_its_gap() -> None:
    told: list[tuple[str, int, int]] = []

    def gap(plain: TurnRecord, position: int, other: int) -> float:
        told.append((plain.writer, position, other))
        return 0.25

    records = [
        *complete("a"),
        record("b", 1),
        record("b", 1, "none", token_ids=(1, 2, 9, 4)),
        record("b", 2),
        record("b", 2, "none", token_ids=(7, 7)),
        record("c", 1),
        record("c", 1, "none", token_ids=(1, 2)),
    ]
    assert differences(facts(), records, gap) == [
        {"task": "b", "turn": 1, "position": 2, "gap": 0.25},
        {"task": "c", "turn": 1, "position": 2, "gap": None},
    ]
    assert told == [("none", 2, 3)]


def test_a_run_of_several_drafters_is_one_of_each() -> None:
    run = facts(
        drafter_options={"a": 1},
        others={"copyspec": {"block": 10}},
        writers=("adaptive", "copyspec", "none", "generate"),
    )
    paper = run.of("copyspec")
    assert (paper.drafter, paper.drafter_options, paper.others) == ("copyspec", {"block": 10}, {})
    assert paper.writers == ("copyspec", "none", "generate")
    assert run.of("adaptive").writers == ("adaptive", "none", "generate")
    assert [run.file("summary.json", name) for name in run.drafters] == [
        "summary_adaptive.json",
        "summary_copyspec.json",
    ]
    assert paper.file("summary.json", "copyspec") == "summary.json"


def test_intervals_cover_a_known_ratio() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(40):
        sizes = random.integers(50, 200, 40)
        speeds = random.normal(2.0, 0.5, 40).clip(0.5)
        lower, upper = interval([(float(n), float(n / speed)) for n, speed in zip(sizes, speeds, strict=True)]) or (
            0,
            0,
        )
        covered += lower < 1.855 < upper  # the ratio in a very large sample
    assert covered >= 33
    assert interval([(1.0, 2.0)]) is None
    assert interval([(1.0, 0.0), (1.0, 0.0)]) is None
