"""`copyspec bench lossless`: what it compares, what it finds, and what stands in its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from copyspec_engine import Engine, EngineConfig, EngineInfo, GenerationOutput, NoDrafter
from copyspec_engine.cli.main import app
from copyspec_engine.drafting.drafter import DraftingPolicy
from copyspec_engine.lab.bench.lossless_rounds import ROUND, Outcome, ability_of, crowded, run_round
from copyspec_engine.lab.recorded.tiny import write_tiny_model
from copyspec_engine.loop import step
from copyspec_engine.testing import scripted_engine


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    with Engine(crowded(EngineConfig(model=str(folder)))) as engine:
        yield engine


def lossless(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "lossless", *map(str, words)])


def record(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(("model", "cases"), [("bundled", 70), ("tiny", 110)])
def test_no_answer_of_random_conversations_differs_in_float32(tmp_path: Path, model: str, cases: int) -> None:
    """With those of tests/loop/test_lossless.py there are 500 of them."""
    out = tmp_path / "out.json"
    result = lossless("--model", model, "--cases", cases, "--json", out)
    assert result.exit_code == 0, result.output
    found = record(out)
    assert (found["cases"], found["differences"], found["differing_cases"], found["described"]) == (cases, 0, [], [])
    assert (found["model"], found["dtype"], found["exact"]) == (model, "float32", False)
    assert found["tokens"] > 5 * cases
    assert min(found["accepted_tokens"], found["cached_tokens"]) > cases
    features = found["by_feature"]
    assert all(row["differences"] == 0 < row["cases"] <= cases for row in features.values())
    assert features["greedy"]["cases"] + features["seeded"]["cases"] == cases
    assert {"trees", "blocks", "grammar", "stop", "penalties", "reused KV", "cancel", "prediction"} <= set(features)
    assert found["command"].startswith("copyspec bench lossless") or "bench lossless" in found["command"]
    assert f"0 of {cases} answers differ" in result.output
    assert "the tokens of plain decoding" in result.output


def break_answers(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[int], bool]) -> None:
    """Let a wrong token be sampled where drafts are verified, in some passes."""
    real, number = step.sample, iter(range(10**9))

    def wrong(logits: torch.Tensor, rows: Any) -> list[list[int]]:
        tokens = real(logits, rows)
        if any(row.num_nodes > 1 for row in rows) and breaks(next(number)):
            tokens = [[(token + 1) % 4096 for token in row] for row in tokens]
        return tokens

    monkeypatch.setattr(step, "sample", wrong)


def test_a_wrong_token_is_found_told_and_found_again_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_answers(monkeypatch, lambda _: True)
    out = tmp_path / "out.json"
    result = lossless("--model", "tiny", "--cases", ROUND, "--json", out)
    assert result.exit_code == 1, result.output
    found = record(out)
    assert found["differences"] == len(found["differing_cases"]) > 0
    assert found["differences_per_1000_tokens"] > 0
    first = found["described"][0]
    assert first["case"] == found["differing_cases"][0]
    assert f"case {first['case']} from token {first['position']}" in result.output
    # Rounding cannot have decided: the wrong token was nowhere near a tie.
    ties = [row["tie"] for row in found["described"] if row["tie"]]
    assert all(tie["nudge"] is None or tie["nudge"] > 10 * tie["rounding"] for tie in ties)
    assert 0 < max(tie["rounding"] for tie in ties) < 1e-4
    assert "the other token's logit lacks" in result.output
    assert sum(row["differences"] for row in found["by_feature"].values()) > found["differences"]
    again = lossless("--model", "tiny", "--case", first["case"], "--json", out)
    assert again.exit_code == 1, again.output
    assert "plain decoding" in again.output
    assert record(out)["differing_cases"] == [first["case"]]


def test_the_same_seed_asks_the_same(tiny: Engine) -> None:
    one, same, other = (
        [(o.turn.number, o.turn.prompt_ids, o.turn.sampling, o.turn.features) for o in run_round(tiny, *options)]
        for options in ((ability_of(tiny), 5, 1), (ability_of(tiny), 5, 1), (ability_of(tiny), 6, 1))
    )
    assert one == same
    assert one != other
    assert [number for number, *_ in one] == list(range(ROUND, 2 * ROUND))


def test_nothing_is_left_for_the_next_round(tiny: Engine) -> None:
    run_round(tiny, ability_of(tiny), 3, 0)
    assert tiny.metrics().num_sessions == 0


def test_a_request_that_fails_is_a_difference(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, number = DraftingPolicy.begin, iter(range(10**9))

    def failing(*arguments: Any, **named: Any) -> Any:
        if not isinstance(arguments[1], NoDrafter) and next(number) % 10 == 9:
            raise RuntimeError("no drafter today")
        return real(*arguments, **named)

    monkeypatch.setattr(DraftingPolicy, "begin", failing)
    failed = [outcome for outcome in run_round(tiny, ability_of(tiny), 1, 0) if outcome.got is None]
    assert failed
    assert not any(outcome.is_same for outcome in failed)
    assert all("no drafter today" in outcome.described()["ends"][1] for outcome in failed)


def test_a_cancelled_answer_must_be_the_beginning_of_the_plain_one(tiny: Engine) -> None:
    outcomes = [outcome for number in range(3) for outcome in run_round(tiny, ability_of(tiny), 2, number)]
    cancelled = [o for o in outcomes if o.got and o.got.finish_reason == "cancelled" and o.got.token_ids]
    assert cancelled
    for outcome in cancelled:
        assert outcome.is_same
        assert isinstance(outcome.got, GenerationOutput)
        ids = outcome.got.token_ids
        changed = replace(outcome.got, token_ids=(*ids[:-1], ids[-1] ^ 1))
        assert not Outcome(outcome.turn, outcome.expected, changed).is_same


def test_what_is_promised_depends_on_the_dtype_and_on_exact() -> None:
    with scripted_engine(["hi"]) as engine:
        assert engine.info.is_lossless
        assert engine.info.lossless.startswith("the tokens of plain decoding")
    assert "near ties" in EngineInfo.promised("bfloat16", exact=False)
    assert "bfloat16" in EngineInfo.promised("bfloat16", exact=False)
    assert "near ties" not in EngineInfo.promised("bfloat16", exact=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cases", 0), "Got --cases 0 but expected 1"),
        (("--case", -1), "Got --case -1 but expected a number from 0"),
        (("--json", "no/such/folder/out.json"), "there is no folder"),
        (("--model", "no-such-folder/at-all"), "no-such-folder/at-all"),
    ],
)
def test_bad_options_are_refused_by_name(words: tuple[object, ...], message: str) -> None:
    result = lossless(*words)
    assert result.exit_code == 2
    assert message in result.output
