"""`copyspec bench` from the command line to the file: names, tables, counts and errors; never how long it took."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from copyspec_engine import Engine, GenerationOutput
from copyspec_engine.cli.main import app
from copyspec_engine.lab.bench import drafts as bench_drafts
from copyspec_engine.lab.bench import free_text as bench_free_text
from copyspec_engine.lab.bench.drafts_tables import comparison
from copyspec_engine.lab.contestants import INGREDIENTS, OURS, PEERS, installed
from copyspec_engine.lab.recorded.shapes import SHAPES
from tests.lab.test_bench_engine import TINY

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^copyspec bench ((?!peers).*)$", GUIDE, flags=re.MULTILINE)
"""Those on a real model are in test_bench_peers.py."""
RESULT_KEYS = {
    *("source", "drafter", "tokens", "tokens_per_forward", "draft_nodes", "accepted_share", "modelled_speedup"),
    *("propose_us_p50", "propose_us_p99", "index_ms", "observe_us_p50"),
}
DEFAULT = [name for name in ("none", *PEERS, OURS) if installed(name)]
QUICK = ("--drafters", "none,copyspec,prompt-lookup,adaptive")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def drafts(*words: object) -> Result:
    return bench("drafts", "--tokenizer", "bundled", *words)


def record(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def test_drafts_replays_every_drafter_over_every_file(tmp_path: Path) -> None:
    zipped, out = tmp_path / "zipped.jsonl.gz", tmp_path / "out.json"
    zipped.write_bytes(gzip.compress(CHATS.read_bytes()))
    result = drafts("--transcripts", CHATS, zipped, "--json", out)
    assert result.exit_code == 0, result.output
    written = record(out)
    rows = written["results"]
    assert [(row["source"], row["drafter"]) for row in rows] == [
        (source, name) for source in ("chats", "zipped") for name in DEFAULT
    ]
    assert all(set(row) == RESULT_KEYS for row in rows)
    assert len({row["tokens"] for row in rows}) == 1
    plain = rows[0]
    assert (plain["tokens_per_forward"], plain["draft_nodes"], plain["modelled_speedup"]) == (1.0, 0.0, 1.0)
    assert all(row["tokens_per_forward"] > 1.5 for row in rows if row["drafter"] != "none")
    assert all(0 <= row["accepted_share"] <= 1 for row in rows)
    assert written["cost_model"] == "gpu"
    assert "bench drafts" in written["command"]
    assert "--transcripts" in written["command"]
    assert written["versions"]["copyspec"]
    assert {"history": "full", "max_tokens": 15_000, "tokenizer": "bundled"}.items() <= written.items()
    assert written["machine"]["cpu_cores"] > 0
    for name in (*DEFAULT, "chats", "zipped", "tokens/", "adaptive over the best peer, cost model gpu"):
        assert name in result.output


def test_the_same_files_give_the_same_counts(tmp_path: Path) -> None:
    counted = []
    for out in (tmp_path / "a.json", tmp_path / "b.json"):
        assert drafts("--transcripts", CHATS, *QUICK, "--json", out).exit_code == 0
        counted.append(
            [{k: v for k, v in row.items() if not k.endswith(("p50", "p99", "_ms"))} for row in record(out)["results"]]
        )
    assert counted[0] == counted[1]


def test_the_cost_model_changes_the_modelled_speed(tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    curve.write_text("[[1, 0.5], [101, 0.5]]", encoding="utf-8")
    speeds = {}
    for model in ("gpu", "cpu", curve):
        out = tmp_path / "out.json"
        drafted = drafts("--transcripts", CHATS, "--drafters", "copyspec", "--cost-model", model, "--json", out)
        assert drafted.exit_code == 0, drafted.output
        (row,) = record(out)["results"]
        speeds[str(model)] = row["modelled_speedup"]
        assert record(out)["cost_model"] == str(model)
    assert speeds["cpu"] < speeds["gpu"] < speeds[str(curve)] == row["tokens_per_forward"]


def test_max_tokens_limits_the_conversations(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert drafts("--transcripts", CHATS, "--drafters", "none", "--max-tokens", "1", "--json", out).exit_code == 0
    (row,) = record(out)["results"]
    assert row["tokens"] == 552


def test_ingredients_are_switched_off_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = drafts("--transcripts", CHATS, "--ingredients", "--json", out)
    assert result.exit_code == 0, result.output
    assert [row["drafter"] for row in record(out)["results"]] == [OURS, *INGREDIENTS]
    for figure in ("tokens per forward", "modelled speed"):
        assert f"{figure} of adaptive, and the change without each ingredient" in result.output
    for name in INGREDIENTS:
        assert name.removeprefix("adaptive-no-") in result.output


@pytest.mark.parametrize("history", ["last-turn", "evaluator-optimizer"])
def test_a_shorter_history_compares_memory_with_none(history: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = drafts("--transcripts", CHATS, "--history", history, "--json", out)
    assert result.exit_code == 0, result.output
    by_name = {row["drafter"]: row["tokens_per_forward"] for row in record(out)["results"]}
    assert list(by_name) == [*DEFAULT, "adaptive-no-memory"]
    assert by_name[OURS] > 1.2 * by_name["adaptive-no-memory"]
    assert record(out)["history"] == history
    assert "the change without each ingredient" in result.output


def test_the_best_peer_is_marked_and_compared() -> None:
    rows = [
        {"source": "s", "drafter": name, "tokens_per_forward": tpf, "modelled_speedup": speed}
        for name, tpf, speed in [("none", 9.0, 9.0), ("copyspec", 2.0, 1.9), ("arctic", 2.5, 1.8), (OURS, 3.0, 1.71)]
    ]
    assert comparison(rows) == [
        {
            "source": "s",
            "tokens_per_forward": {"ours": 3.0, "best_peer": "arctic", "peer": 2.5, "ratio": 1.2},
            "modelled_speedup": {"ours": 1.71, "best_peer": "copyspec", "peer": 1.9, "ratio": 0.9},
        }
    ]
    assert comparison(rows[:3]) == []
    assert comparison([rows[0], rows[3]]) == []


def test_the_star_stands_beside_the_best_peer() -> None:
    output = drafts("--transcripts", CHATS, *QUICK).output
    assert output.count("*") == 2
    assert "*" not in drafts("--transcripts", CHATS, "--drafters", "none,adaptive").output


def test_peers_that_are_not_installed_are_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_drafts, "installed", lambda name: not name.startswith("arctic"))
    out = tmp_path / "out.json"
    result = drafts("--transcripts", CHATS, "--json", out)
    assert result.exit_code == 0, result.output
    for name in ("arctic", "arctic-tuned"):
        note = f'Left out {name}: arctic-inference is not installed. Run: pip install "copyspec[bench]"'
        assert note in result.output
    assert [row["drafter"] for row in record(out)["results"]] == [n for n in DEFAULT if not n.startswith("arctic")]


def test_files_that_share_a_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    copies = [tmp_path / "chats.jsonl", tmp_path / "other" / "chats.jsonl"]
    for copy in copies:
        copy.write_bytes(CHATS.read_bytes())
    out = tmp_path / "out.json"
    assert drafts("--transcripts", *copies, "--drafters", "none", "--json", out).exit_code == 0
    assert [row["source"] for row in record(out)["results"]] == [str(copy) for copy in copies]


def test_an_option_may_also_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_bytes(CHATS.read_bytes())
    out = tmp_path / "out.json"
    words = ("--transcripts", CHATS, "--drafters", "none", "--transcripts", tmp_path / "more.jsonl", "--json", out)
    assert drafts(*words).exit_code == 0
    assert [row["source"] for row in record(out)["results"]] == ["chats", "more"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--transcripts", "gone.jsonl"), "Got transcript gone.jsonl but there is no such file"),
        (("--transcripts", CHATS, CHATS), "twice but expected each file once"),
        (("--transcripts", CHATS, "--drafters", "eagle"), "Got drafter 'eagle' but expected one of none, copyspec"),
        (("--transcripts", CHATS, "--drafters", "none,,copyspec"), "Got drafter '' but expected one of"),
        (("--transcripts", CHATS, "--cost-model", "tpu"), "Got cost model tpu but expected gpu, cpu or a JSON file"),
        (
            ("--transcripts", CHATS, "--tokenizer", "gone"),
            "Got tokenizer gone but there is no file gone/tokenizer.json",
        ),
        (("--transcripts", CHATS, "--max-tokens", "0"), "Got --max-tokens 0 but expected 1 to"),
        (("--transcripts", CHATS, "--json", "gone/out.json"), "Got --json gone/out.json but there is no folder gone"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(words: tuple[object, ...], message: str) -> None:
    result = drafts(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--transcripts", CHATS, "extra", "--history", "some"), "some"),
        (("--drafters", "none"), "--transcripts"),
        (("--transcripts", CHATS, "--drafters", "none", "extra"), "extra"),
    ],
)
def test_options_that_cannot_be_read_are_refused(words: tuple[object, ...], message: str) -> None:
    result = drafts(*words)
    assert result.exit_code == 2
    assert message in result.output


def test_a_named_peer_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    result = drafts("--transcripts", CHATS, "--drafters", "none,arctic-tuned")
    assert result.exit_code == 2
    assert 'arctic-inference is not installed. Run: pip install "copyspec[bench]"' in result.output


def test_propose_measures_each_memory_size(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ("--memory-tokens", "500", "3000", "--transcripts", CHATS, "--max-tokens", "100", "--json", out)
    result = bench("propose", "--tokenizer", "bundled", *words)
    assert result.exit_code == 0, result.output
    rows = record(out)["results"]
    for row, size in zip(rows, (500, 3000), strict=True):
        assert size <= row["memory_tokens"] < size + 100
        assert set(row) == {
            *("memory_tokens", "bytes_per_token", "index_ms", "propose_us_p50", "propose_us_p99"),
            *("tokens", "tokens_per_forward"),
        }
        assert row["bytes_per_token"] > 4  # a token takes four bytes at the least
        assert row["index_ms"] > 0
        assert row["tokens"] >= 100
        assert f"{row['memory_tokens']:,}" in result.output
    assert record(out)["indexed_tokens"] == 100_000


def test_propose_refuses_sizes_that_cannot_be_filled() -> None:
    for size in ("0", "20000001"):
        result = bench("propose", "--tokenizer", "bundled", "--transcripts", CHATS, "--memory-tokens", "500", size)
        assert result.exit_code == 2
        assert f"Got --memory-tokens {size} but expected 1 to 20000000" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_guides_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, in a folder that holds the files they name, but for sizes that take long to fill or to run."""
    monkeypatch.chdir(tmp_path)
    Path("tests/data").mkdir(parents=True)
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        Path(name).write_bytes(gzip.compress(CHATS.read_bytes()))
    Path("tests/data/chats.jsonl").write_bytes(CHATS.read_bytes())
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    command = command.replace("--shape bundled", "--shape tiny").replace("--max-tokens 100", "--max-tokens 30")
    command = command.replace("smollm2 --clients 1 16 --rounds 12", "bundled --clients 1 2 --rounds 1 --max-tokens 2")
    words = ["bundled" if word == "DIR" else word.replace("000", "00") for word in command.split()]
    result = bench(*words)
    assert result.exit_code == 0, result.output


def test_the_guide_explains_every_figure_and_every_drafter() -> None:
    assert len(COMMANDS) == 9
    for key in RESULT_KEYS - {"source", "drafter"}:
        assert f"`{key}`" in GUIDE
    for name in ("none", *PEERS, OURS, *(name.removeprefix(OURS) for name in INGREDIENTS)):
        assert name in GUIDE


def test_no_torch_is_loaded() -> None:
    """A bench of drafts must run where torch would take seconds to load, or memory that is not there."""
    code = (
        "import sys; from typer.testing import CliRunner; from copyspec_engine.cli.main import app\n"
        f"files = ['--transcripts', {str(CHATS)!r}, '--tokenizer', 'bundled']\n"
        "words = ['bench', 'drafts', *files, '--drafters', 'adaptive']\n"
        "result = CliRunner().invoke(app, words)\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "COLUMNS": "120"})


# ---- free text -----------------------------------------------------------------------------------------------------


def test_a_model_writes_freely_every_way(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ("--cost-model", "gpu", "--temperature", 0, 0.8, "--max-tokens", 20, "--rounds", 1, "--json", out)
    result = bench("free-text", *words)
    assert result.exit_code == 0, result.output
    written = record(out)
    ways = ("plain", "copies", "copies and recycled")
    rows = {(row["temperature"], row["way"]): row for row in written["results"]}
    assert list(rows) == [(temperature, way) for temperature in (0.0, 0.8) for way in ways]
    assert {row["tokens"] for row in rows.values()} == {6 * 20}
    for (temperature, way), row in rows.items():
        plain = rows[temperature, "plain"]
        assert row["tokens_per_forward"] == pytest.approx(120 / row["forward_passes"], rel=1e-3)
        assert row["over_plain"] == pytest.approx(plain["seconds"] / row["seconds"], rel=1e-2)
        assert row["forward_passes"] == 120 if way == "plain" else row["forward_passes"] <= 120
    assert rows[0.0, "copies"]["tokens_per_forward"] > 1.05
    assert {"identical": True, "cost_model": "gpu", "model": "bundled", "rounds": 1}.items() <= written.items()
    assert "bench free-text" in written["command"]
    for text in (*ways, "tokens per", "0.8"):
        assert text in result.output


def test_ways_that_write_something_else_end_with_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = bench_free_text._write

    def spoilt(engine: Engine, way: str, *others: Any) -> GenerationOutput:
        output = write(engine, way, *others)
        return replace(output, token_ids=output.token_ids[:-1]) if way == "copies" else output

    monkeypatch.setattr(bench_free_text, "_write", spoilt)
    out = tmp_path / "out.json"
    result = bench(
        "free-text", "--temperature", 0, "--max-tokens", 4, "--rounds", 1, "--cost-model", "gpu", "--json", out
    )
    assert result.exit_code == 1
    assert "wrote different tokens" in result.output
    assert record(out)["identical"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rounds", 0), "--rounds 0"),
        (("--max-tokens", 0), "--max-tokens 0"),
        (("--cost-model", "tpu"), "cost model tpu"),
        (("--temperature", -1), "temperature=-1"),
        (("--json", "nowhere/out.json"), "nowhere"),
        (("no/such/folder",), "no/such/folder"),
    ],
)
def test_free_text_says_what_is_wrong(words: tuple[object, ...], said: str) -> None:
    result = bench("free-text", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
