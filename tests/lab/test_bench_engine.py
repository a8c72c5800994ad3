"""`copyspec bench engine`: every peer writes the record on the same weights; names, counts and errors, never times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from copyspec_engine.cli.main import app
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.lab.bench import engine as bench_engine
from copyspec_engine.lab.bench.command import EngineOptions
from copyspec_engine.lab.bench.engine_tables import limit_line, summary
from copyspec_engine.lab.contestants import OURS, contestant
from copyspec_engine.lab.measuring import Measured
from copyspec_engine.lab.recorded import generate, runner, shapes
from copyspec_engine.lab.recorded.batch import BatchPeer
from copyspec_engine.lab.recorded.records import Turn, _cap, load_turns, renumbered
from copyspec_engine.lab.recorded.setup import SetupOptions, open_setup, take_turns
from copyspec_engine.lab.recorded.shapes import SHAPES, random_model, shape_config
from copyspec_engine.lab.replay import RecordedCall, Tally, end_token, load_tokenizer, replay
from copyspec_engine.values.errors import ConfigError, ModelLoadError

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
TINY = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
COST = ((1, 1.0), (1001, 3.0))
CHEAP = ((1, 0.1), (1001, 0.3))
PUBLIC = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
}
ROW_KEYS = {
    *("source", "conversation", "turn", "peer", "concurrency", "prompt_tokens", "cached_tokens", "tokens"),
    *("forward_passes", "seconds", "ttft_s", "tokens_per_s", "tokens_per_forward"),
}
TOKENIZER = load_tokenizer("bundled")
END = end_token(TOKENIZER) or -1
QUICK = SetupOptions(shape="tiny", curve_s=0.1, step_cost=COST)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setenv("COLUMNS", "160")
    measure = bench_engine.measure_engine

    def quickly(options: EngineOptions, console: Console) -> Measured:
        costs = {"step_cost": COST, "draft_step_cost": CHEAP if options.draft_shape else None}
        return measure(replace(options, curve_s=0.5, **costs), console)

    monkeypatch.setattr(bench_engine, "measure_engine", quickly)


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "engine", "--shape", "tiny", *map(str, words)])


def record(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def chats(max_tokens: int = 10_000, **options: Any) -> list[list[Turn]]:
    defaults: dict[str, Any] = {"max_context": 10_000, "turns": None, "conversations": None}
    return load_turns(CHATS, "chats", TOKENIZER, max_tokens=max_tokens, **{**defaults, **options})


def test_every_peer_writes_every_turn(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = bench("--transcripts", CHATS, "--max-tokens", 300, "--json", out)
    assert result.exit_code == 0, result.output
    written = record(out)
    rows = written["results"]
    names = {"ours", "ours-plain", "generate", "generate-kv", "prompt-lookup"}
    turns = {(row["conversation"], row["turn"]) for row in rows}
    assert len(turns) >= 3
    assert len(rows) == len(names) * len(turns)
    for place in turns:
        of_turn = [row for row in rows if (row["conversation"], row["turn"]) == place]
        assert {row["peer"] for row in of_turn} == names
        assert len({(row["tokens"], row["prompt_tokens"]) for row in of_turn}) == 1
    assert sum(row["tokens"] for row in rows) == len(names) * 300
    for row in rows:
        assert set(row) - {"prefill_s"} == ROW_KEYS
        assert row["tokens_per_forward"] == round(row["tokens"] / row["forward_passes"], 4)
        assert 0 < row["ttft_s"] <= row["seconds"]
        plain = row["peer"] in ("ours-plain", "generate", "generate-kv")
        assert (row["tokens_per_forward"] == 1) == plain or row["tokens"] < 20
        reuses = row["turn"] > 1 and row["peer"] in ("ours", "ours-plain", "generate-kv")
        assert (row["cached_tokens"] > 0) == reuses
        assert ("prefill_s" in row) == (reuses and row["peer"].startswith("ours"))
    assert {"rows": 1, "nodes": 1, "context": 256}.items() <= written["curve"][0].items()
    assert all(point["seconds"] > 0 for point in written["curve"])
    assert written["limit"]["bytes_per_step"] > 4 * 4096 * 32
    assert written["limit"]["bandwidth_bytes_per_s"] > 1e8
    assert "bench engine" in written["command"]
    assert {"shape": "tiny", "device": "cpu", "dtype": "float32", "renumbered_tokens": 0}.items() <= written.items()
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["threads"] > 0
    for name in (*names, "chats", "over", "A step reads"):
        assert name in result.output


def test_peers_with_a_draft_model_write_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tinier", {**TINY, "num_hidden_layers": 1})
    out = tmp_path / "out.json"
    names = ("ours-plain", "ours-draft", "ours-copy-first", "ours-tree")
    words = ("--draft-shape", "tinier", "--agreement", 0.8, "--draft-tokens", 3, "--peer", *names)
    result = bench("--transcripts", CHATS, "--max-tokens", 200, *words, "--json", out)
    assert result.exit_code == 0, result.output
    written = record(out)
    facts = {"draft_shape": "tinier", "agreement": 0.8, "draft_tokens": 3, "draft_step_cost": [list(p) for p in CHEAP]}
    assert facts.items() <= written.items()
    passes = {name: sum(row["forward_passes"] for row in written["results"] if row["peer"] == name) for name in names}
    # With 0.8 a chain of 3 gives 2.95 tokens a pass, where there are so many left to write.
    assert passes["ours-plain"] / 3 < passes["ours-draft"] < passes["ours-plain"] / 2.2
    assert max(passes["ours-tree"], passes["ours-copy-first"]) < passes["ours-plain"] / 1.8


def test_all_peers_run_the_same_model_on_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the weights themselves say in each pass, before it is overruled: a wrong cache would show here."""
    seen: list[int] = []

    def spying(logits: torch.Tensor, tokens: Sequence[int]) -> None:
        if len(tokens) == 1:
            seen.append(int(logits.argmax()))
        force(logits, tokens)

    force = runner.force
    monkeypatch.setattr(runner, "force", spying)
    monkeypatch.setattr(generate, "force", spying)
    conversation = chats(150)[0]
    said: dict[tuple[str, int], list[int]] = {}
    names = ("generate", "generate-kv", "ours-plain")
    with open_setup(QUICK, TOKENIZER, END, [conversation], names) as setup:
        seen.clear()
        for entry, (turn,), _, _ in take_turns(setup.entries, [conversation]):
            said[entry.name, turn.number] = seen[: len(turn.answer_ids)]
            seen.clear()
    for turn in conversation:
        expected = said["generate", turn.number]
        assert len(expected) == len(turn.answer_ids)
        assert len(set(expected)) > 3
        assert said["generate-kv", turn.number] == said["ours-plain", turn.number] == expected


@pytest.mark.parametrize(("peer", "drafter"), [("ours", OURS), ("prompt-lookup", "prompt-lookup")])
def test_drafts_are_accepted_as_in_a_replay(peer: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of the whole engine and of `bench drafts` under the same costs, warm-up included."""
    monkeypatch.setattr(
        "copyspec_engine.drafting.drafter._MOST_DELAY", float("inf")
    )  # a replay has no prompt to wait for
    conversations = chats()
    with open_setup(QUICK, TOKENIZER, END, conversations, [peer]) as setup:
        passes = sum(
            written.passes
            for conversation in conversations
            for _, _, (written,), _ in take_turns(setup.entries, [conversation])
        )
    policy, tally = contestant(drafter, CostCurve(COST), END), Tally()
    first = conversations[0][0]
    warm_up = RecordedCall(first.prompt_ids[:64], (*first.answer_ids[:16], END))
    replay(policy(), [warm_up], Tally())
    for conversation in conversations:
        replay(policy(), [RecordedCall(turn.prompt_ids, turn.answer_ids) for turn in conversation], tally)
    # Behind a prompt a pass is wider to begin with, which a replay does not know.
    assert passes == pytest.approx(tally.num_passes, rel=0.02)
    assert tally.tokens / passes > 2


def test_logits_are_forced() -> None:
    logits = torch.zeros((3, 5))
    runner.force(logits, [4, 0, 2])
    assert logits.argmax(-1).tolist() == [4, 0, 2]


def test_conversations_at_the_same_time(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ("--transcripts", CHATS, "--concurrency", 2, "--max-tokens", 160, "--turns", 2, "--json", out)
    result = bench(*words)
    assert result.exit_code == 0, result.output
    written = record(out)
    totals = {(row["peer"], row["concurrency"]): row for row in written["concurrency"]}
    assert set(totals) == {("ours", 1), ("ours", 2), ("ours-plain", 1), ("ours-plain", 2), ("generate-batch", 2)}
    assert {row["tokens"] for row in totals.values()} == {160}
    for row in totals.values():
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"], rel=1e-3)
    batch = [row for row in written["results"] if row["peer"] == "generate-batch"]
    assert {(row["conversation"], row["turn"]) for row in batch} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert all(row["tokens_per_forward"] == 1 for row in batch)
    assert written["left_out"] == {}
    assert "over one by one" in result.output


def test_a_batch_peer_that_cannot_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: BatchPeer, _turns: Sequence[Turn]) -> None:
        raise RuntimeError("no pages\nhere")

    monkeypatch.setattr(BatchPeer, "write", fail)
    out = tmp_path / "out.json"
    words = ("--concurrency", 2, "--max-tokens", 80, "--turns", 1, "--peer", "ours-plain", "generate-batch")
    result = bench("--transcripts", CHATS, *words, "--json", out)
    assert result.exit_code == 0, result.output
    assert "Left out generate-batch: RuntimeError: no pages here" in result.output
    assert record(out)["left_out"] == {"generate-batch": "RuntimeError: no pages here"}
    assert {row["peer"] for row in record(out)["results"]} == {"ours-plain"}


@pytest.mark.parametrize(("peer", "module"), [("generate", generate), ("ours", runner)])
def test_a_peer_that_writes_something_else_fails(
    peer: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "force", lambda logits, _tokens: logits[:, END].fill_(1e4))
    out = tmp_path / "out.json"
    result = bench("--transcripts", CHATS, "--max-tokens", 60, "--peer", peer, "--json", out)
    assert result.exit_code == 1
    assert f"{peer} did not write the record of warm-up conversation 0 turn 1: token 0" in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "gpt-2"), "Got --shape gpt-2 but expected one of bundled, qwen2.5-0.5b"),
        (("--peer", "ours", "vllm"), "Got --peer vllm but expected some of ours, ours-plain, ours-draft, "),
        (("--peer", "generate-batch"), "add --concurrency 2 or more"),
        (("--peer", "ours-tree"), "Got --peer ours-tree but some need a draft model: add --draft-shape NAME"),
        (("--draft-shape", "gone"), "Got --draft-shape gone but expected one of bundled, qwen2.5-0.5b"),
        (("--draft-shape", "qwen2.5-7b"), "with 152064 tokens but --shape tiny has 4096: take shapes of one family"),
        (
            ("--draft-shape", "tiny", "--agreement", "1"),
            "Got --agreement 1.0 but expected a number above 0 and below 1",
        ),
        (("--draft-tokens", "0"), "Got --draft-tokens 0 but expected 1 to 64"),
        (("--max-tokens", "0"), "Got --max-tokens 0 but expected 1 to"),
        (("--turns", "0"), "Got --turns 0 but expected 1 to"),
        (("--conversations", "0"), "Got --conversations 0 but expected 1 to"),
        (("--concurrency", "300"), "Got --concurrency 300 but expected 1 to 256"),
        (("--concurrency", "9"), "Got --concurrency 9 but chats holds 3 conversations"),
        (("--concurrency", "2", "--max-tokens", "20"), "in a context of 1024 tokens and in --max-tokens 20"),
        (("--device", "cuda:77"), "Got device='cuda:77'"),
        (("--device", "tpu"), "Got device='tpu' but expected auto, all, cpu, cuda, cuda:N, mps, xpu or xpu:N"),
        (("--tokenizer", "gone"), "Got tokenizer gone but there is no file"),
        (("--json", "gone/out.json"), "Got --json gone/out.json but there is no folder gone"),
        (("--transcripts", "gone.jsonl"), "Got transcript gone.jsonl but there is no such file"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(words: tuple[str, ...], message: str) -> None:
    result = bench(*(() if "--transcripts" in words else ("--transcripts", CHATS)), *words)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("shape", PUBLIC)
def test_shapes_have_the_parameters_of_the_checkpoints(shape: str) -> None:
    model = shapes._empty(shape_config(shape, END), torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLIC[shape]


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "memory_of", lambda _device: (2**30, 2**30))
    with pytest.raises(ModelLoadError, match=r"Got --shape llama-3.1-8b but its weights take 32.1 GB in float32"):
        random_model("llama-3.1-8b", END, "cpu", "auto")


def test_answers_are_cut_in_later_prompts_too() -> None:
    whole, cut = chats()[0], chats(90)
    assert len(cut) == 1
    assert sum(len(turn.answer_ids) for turn in cut[0]) == 90
    assert {len(turn.answer_ids) for turn in cut[0]} == {30}
    for before, turn in zip(cut[0], cut[0][1:], strict=False):
        assert turn.prompt_ids[: len(before.prompt_ids) + 30] == before.prompt_ids + before.answer_ids
    for turn, uncut in zip(cut[0], whole, strict=True):
        assert turn.answer_ids == (*uncut.answer_ids[:29], END)
    shared = chats(120, conversations=2, turns=2)
    assert [len(turn.answer_ids) for turns in shared for turn in turns] == [30, 30, 30, 30]


def test_a_conversation_ends_before_a_turn_that_does_not_fit() -> None:
    whole = chats()[0]
    longest = len(whole[1].prompt_ids) + len(whole[1].answer_ids)
    assert len(chats(max_context=longest)[0]) == 2
    assert len(chats(max_context=longest - 1)[0]) == 1
    with pytest.raises(ConfigError, match="without an answer that fits in a context of 10 tokens"):
        chats(max_context=10)


@pytest.mark.parametrize(
    ("lengths", "share", "cap"), [((5, 5), 10, 5), ((2, 9, 9), 12, 5), ((9, 1), 4, 3), ((3, 4), 99, 4), ((7,), 3, 3)]
)
def test_answers_share_their_tokens(lengths: tuple[int, ...], share: int, cap: int) -> None:
    assert _cap(lengths, share) == cap
    assert sum(min(length, cap) for length in lengths) <= share


def test_ids_that_a_shape_lacks_are_renumbered() -> None:
    turns = [[Turn("s", 1, 1, (0, 9, 7), (9, 8)), Turn("s", 1, 2, (0, 9, 7, 9, 8, 1), (7, 8))]]
    new, changed = renumbered(turns, 5)
    assert changed.keys() == {7, 8, 9}
    old_ids = [token for turn in turns[0] for token in (*turn.prompt_ids, *turn.answer_ids)]
    new_ids = [token for turn in new[0] for token in (*turn.prompt_ids, *turn.answer_ids)]
    assert max(new_ids) < 5
    assert [changed.get(token, token) for token in old_ids] == new_ids
    assert len(set(zip(old_ids, new_ids, strict=True))) == len(set(old_ids)) == len(set(new_ids))
    assert renumbered(turns, 10) == (turns, {})
    with pytest.raises(ConfigError, match="5 different tokens but the shape has 4"):
        renumbered(turns, 4)


def test_the_summary_takes_rates_of_sums() -> None:
    def row(peer: str, turn: int, tokens: int, seconds: float) -> dict[str, Any]:
        place = {"source": "s", "conversation": 1, "turn": turn, "peer": peer, "concurrency": 1}
        counts = {"tokens": tokens, "forward_passes": tokens, "seconds": seconds, "ttft_s": seconds / 2}
        return {**place, **counts, "tokens_per_s": tokens / seconds}

    rows = summary([row("ours", 1, 10, 1.0), row("generate", 1, 10, 2.0), row("ours", 2, 30, 1.0)])
    cells = {(cell["turn"], cell["peer"]): cell for cell in rows}
    assert [*cells] == [(1, "ours"), (1, "generate"), (2, "ours"), ("all", "ours"), ("all", "generate")]
    assert (cells[1, "ours"]["over_generate"], cells[2, "ours"]["over_generate"]) == (2.0, None)
    assert (cells["all", "ours"]["tokens_per_s"], cells["all", "ours"]["tokens_per_s_median"]) == (20.0, 20.0)


def test_the_limit_is_compared_with_the_measured_step() -> None:
    limit = {"bytes_per_step": 2e9, "bandwidth_bytes_per_s": 4e9, "context": 256}
    curve = [{"rows": 1, "nodes": 1, "context": 256, "seconds": 0.75}]
    assert limit_line(limit, curve).endswith("a big copy 500 ms; measured: 750 ms, 1.50x.")
    assert limit_line(limit, []).endswith("a big copy 500 ms.")
