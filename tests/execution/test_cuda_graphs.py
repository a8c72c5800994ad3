"""Passes out of static buffers against ordinary ones: the same code that a GPU captures, run here as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams, UnsupportedModelError
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import self_check
from copyspec_engine.execution.checkpoint import relative_difference
from copyspec_engine.execution.cuda_graphs import StaticPasses, compile_layers, undo_compile
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.execution.self_check import check_equivalence
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST, build_model

NUM_SLOTS = 200
PROMPT = tuple(b"the cat sat on the mat; the cat ate the rat; ")
CONFIG = EngineConfig(model="tiny", step_cost=STEP_COST)


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    built = build_model(architecture)
    built.set_attn_implementation("copyspec")
    return built


def steps() -> list[list[Piece]]:
    """Prompts in pieces, then trees and chains of several rows beside a prompt, on scattered slots."""
    slots = np.random.default_rng(3).permutation(NUM_SLOTS).reshape(4, 50)
    ids = np.random.default_rng(4).integers(0, 256, (4, 50)).tolist()
    tree = DraftTree((5, 6, 7, 8, 9), (-1, 0, 0, -1, 2))
    chain = DraftTree.chain((1, 2, 3))
    none = DraftTree()
    return [
        [Piece(slots[0], 0, ids[0][:31], none, 0), Piece(slots[1], 0, ids[1][:3], none, 1)],
        [Piece(slots[2], 0, ids[2][:40], none, 0)],
        [
            Piece(slots[0], 31, [ids[0][31], *tree.tokens], tree, 6),
            Piece(slots[1], 3, [ids[1][3], *chain.tokens], chain, 4),
            Piece(slots[3], 0, ids[3][:20], none, 20),
            Piece(slots[2], 40, ids[2][40:42], none, 1),
        ],
        [Piece(slots[0], 32, ids[0][32:33], none, 1)],
        [Piece(slots[2], 42, ids[2][42:43], none, 1), Piece(slots[1], 4, ids[1][4:5], none, 1)],
    ]


def logits_of(runner: ModelRunner) -> list[torch.Tensor]:
    return [runner.run(pieces).clone() for pieces in steps()]


def test_static_buffers_give_what_ordinary_passes_give(model: PreTrainedModel) -> None:
    expected = logits_of(ModelRunner(model, NUM_SLOTS))
    got = logits_of(ModelRunner(model, NUM_SLOTS, execution="paged"))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_row_reads_what_padding_wrote() -> None:
    model = build_model("llama")
    model.set_attn_implementation("copyspec")
    runner = ModelRunner(model, NUM_SLOTS, execution="paged")
    expected = logits_of(runner)
    for keys, values in runner.store.layers.values():
        with torch.inference_mode():
            keys[:, NUM_SLOTS] = values[:, NUM_SLOTS] = torch.nan
    for ours, theirs in zip(logits_of(runner), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_buffers_grow_for_a_long_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copyspec_engine.execution.cuda_graphs._FIRST_CAPACITY", 16)
    model = build_model("llama")
    model.set_attn_implementation("copyspec")
    expected = logits_of(ModelRunner(model, NUM_SLOTS))
    runner = ModelRunner(model, NUM_SLOTS, execution="paged")
    for ours, theirs in zip(logits_of(runner), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert isinstance(runner.passes, StaticPasses)
    assert len(runner.passes.host) == len(runner.passes.buffer) > 16


def paged_engine(name: str, **options: Any) -> Engine:
    config = EngineConfig(model=f"tiny-{name}", step_cost=STEP_COST, max_prefill_tokens=37, **options)
    model = build_model(name)
    loaded = prepare(model, ByteTokenizer(), config)
    loaded.runner = ModelRunner(model, loaded.info.num_kv_slots, execution="paged")
    return Engine(config, model=loaded)


def answers(engine: Engine, drafter: str) -> list[tuple[int, ...]]:
    """Four requests at once, then a second turn."""
    requests = [
        GenerationRequest(
            prompt_token_ids=PROMPT * (1 + place),
            sampling=SamplingParams(max_tokens=24, temperature=0.8 * (place == 3), seed=1),
            drafter=drafter,  # type: ignore[arg-type]
            session_id=f"{drafter}-{place}",
        )
        for place in range(4)
    ]
    first = [handle.result().token_ids for handle in [engine.stream(request) for request in requests]]
    again = GenerationRequest(
        prompt_token_ids=(*PROMPT, *first[0], *PROMPT),
        sampling=SamplingParams(max_tokens=24),
        drafter=drafter,  # type: ignore[arg-type]
        session_id=f"{drafter}-0",
    )
    return [*first, engine.generate(again).token_ids]


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss"])
def test_an_engine_over_static_buffers_writes_the_same(name: str, make_engine: Any) -> None:
    expected = answers(make_engine(name, max_prefill_tokens=37), "none")
    with paged_engine(name) as engine:
        assert answers(engine, "none") == expected
        assert answers(engine, "adaptive") == expected
        assert engine.metrics().tokens_per_forward > 1.1


# What is taken at load time


class Failing(ModelRunner):
    """Passes that never get captured."""

    @property
    def capture_error(self) -> str | None:
        return "RuntimeError: not while capturing"


def choose(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, runner_class: Any = ModelRunner) -> Any:
    """What `check_equivalence` finds if it may try everything; on a CPU all of it runs without graphs."""
    monkeypatch.setattr(self_check, "_candidates", lambda *_: (("compiled", "graphs"), None))

    def make(num_slots: int, execution: Any = "eager") -> ModelRunner:
        runner: ModelRunner = runner_class(model, num_slots, execution="eager" if execution == "eager" else "paged")
        return runner

    return check_equivalence(model, CONFIG, make)


def with_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(self_check, "compile_layers", lambda model: compile_layers(model, backend))


def test_compiled_layers_are_taken_where_they_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backend(monkeypatch, "eager")
    model = build_model("gemma3")
    plain = build_model("gemma3")
    plain.set_attn_implementation("copyspec")
    checked = choose(monkeypatch, model)
    assert (checked.execution, checked.error) == ("compiled", None)
    got = logits_of(ModelRunner(model, NUM_SLOTS, execution="paged"))
    for ours, theirs in zip(got, logits_of(ModelRunner(plain, NUM_SLOTS)), strict=True):
        assert not len(ours) or relative_difference(ours, theirs) < 1e-5


def test_layers_that_do_not_compile_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    with_backend(monkeypatch, broken)  # type: ignore[arg-type]
    model = build_model("llama")
    checked = choose(monkeypatch, model)
    assert checked.execution == "graphs"
    assert "no compiler" in checked.error
    assert "no compiler" in caplog.text
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_what_cannot_be_captured_runs_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backend(monkeypatch, "eager")
    checked = choose(monkeypatch, build_model("llama"), Failing)
    assert (checked.execution, checked.error) == ("paged", "RuntimeError: not while capturing")


def test_kernels_that_are_wrong_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backend(monkeypatch, "eager")
    monkeypatch.setattr(
        "copyspec_engine.execution.paged_attention.attend", lambda query, *_, **__: query.transpose(0, 1)
    )
    model = build_model("llama")
    checked = choose(monkeypatch, model)
    assert checked.execution == "eager"
    assert "gives other logits over our KV" in checked.error
    assert checked.bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_a_model_of_other_layers_is_not_compiled() -> None:
    with pytest.raises(UnsupportedModelError, match="no layers that are known"):
        compile_layers(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_undoing_a_compilation_leaves_the_layers_as_they_were() -> None:
    model = build_model("llama")
    compile_layers(model, "eager")
    assert any(module._compiled_call_impl is not None for module in model.modules())
    undo_compile(model)
    assert all(module._compiled_call_impl is None for module in model.modules())
