"""`copyspec bench context`: a conversation grows, every way writes the same turn; never times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from copyspec_engine import Engine, GenerationOutput, GenerationRequest
from copyspec_engine.cli.main import app
from copyspec_engine.lab.bench import context as bench_context

WORDS = ("--file", "meeting_notes.md", "--max-tokens", 40)


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "context", *map(str, words)], env={"COLUMNS": "200"})


def test_a_turn_is_measured_at_each_length_by_every_way(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = bench(*WORDS, "--length", 200, 350, "--json", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    ways = {"ours", "plain", "generate", "prompt-lookup"}
    rows = {(row["length"], row["way"]): row for row in written["results"]}
    assert set(rows) == {(length, way) for length in (200, 350) for way in ways}
    for (length, way), row in rows.items():
        assert length <= row["prompt_tokens"] < length + 150
        assert row["turns"] == 1
        assert row["tokens"] == rows[length, "plain"]["tokens"]
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["forward_passes"], abs=1e-4)
        if way in ("plain", "generate"):
            assert row["forward_passes"] == row["tokens"]
    assert rows[350, "ours"]["tokens_per_forward"] > 1.5, "earlier turns are copied"
    assert written["identical"] == {"same": 2, "of": 2}
    assert [turn["turn"] for turn in written["turns"]] == sorted(turn["turn"] for turn in written["turns"])
    assert all(turn["identical"] for turn in written["turns"])
    assert "identical to plain decoding: 2/2" in result.output


def test_a_way_that_writes_something_else_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Engine.generate

    def spoilt(self: Engine, request: GenerationRequest) -> GenerationOutput:
        output = generate(self, request)
        plain = request.session_id is not None and request.session_id.startswith(bench_context.PLAIN)
        return replace(output, token_ids=output.token_ids[:-1]) if plain else output

    monkeypatch.setattr(Engine, "generate", spoilt)
    result = bench(*WORDS, "--length", 100, "--peer", "ours-plain")
    assert result.exit_code == 1
    assert "identical to plain decoding: 0/1" in result.output
    assert "generate" not in result.output.split("identical")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--length", 0), "--length 0"),
        (("--length", 9000), "--length 9000 but the model holds 8192 tokens"),
        (("--max-tokens", 0), "--max-tokens 0"),
        (("--file", "nowhere.txt"), "nowhere.txt"),
        (("--json", "nowhere/out.json"), "nowhere"),
        (("--model", "no/such/folder"), "no/such/folder"),
    ],
)
def test_what_cannot_work_is_said(words: tuple[Any, ...], said: str) -> None:
    result = bench(*words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
