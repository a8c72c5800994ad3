"""Passes of few tokens as one compiled function: the model's own logits, and the same bits however a token is read."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from copyspec_engine import (
    CopySpecDrafter,
    Engine,
    EngineConfig,
    GenerationRequest,
    LoadProgress,
    SamplingParams,
    compiled,
)
from copyspec_engine.drafting.cost import undisturbed
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import lane_products, narrow_kernels, pass_cost
from copyspec_engine.execution.checkpoint import relative_difference
from copyspec_engine.execution.lane_attention import CHUNK
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.narrow_decoder import MOST_TOKENS, NarrowPasses
from copyspec_engine.execution.narrow_kernels import Own, Shared, Work, run_pass
from copyspec_engine.execution.narrow_weights import NarrowWeight, narrow_weight
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.execution.self_check import Checked, check_equivalence
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import STEP_COST
from tests.execution.architectures import build_model

MATCHED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3",
    "phi3",
    "llama-tied",
    "qwen2-sliding",
    "qwen2-tied",
    "seed_oss",
    "smollm3",
)
UNMATCHED = {
    "gemma2": "capped scores or sinks|caps its logits",
    "mixtral": "built of other parts",
    "olmo2": "which is not known here|spans|built of other parts",
    "granite": "gives other logits",
    "phi": "built of other parts",
}
CONFIG = EngineConfig(model="tiny")


def rounded(name: str) -> PreTrainedModel:
    """A tiny model whose weights bfloat16 holds exactly."""
    model = build_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def narrow_of(model: PreTrainedModel) -> dict[str, NarrowWeight]:
    found = {name: narrow_weight(module.weight) for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: weight for name, weight in found.items() if weight is not None}


def checked(model: PreTrainedModel) -> Checked:
    return check_equivalence(model, CONFIG, partial(ModelRunner, model), narrow_of(model))


def passes_of(
    model: PreTrainedModel, num_slots: int, kv_dtype: torch.dtype | None = None
) -> tuple[ModelRunner, NarrowPasses]:
    """The model's own way over KV, and narrow passes over the same KV."""
    found = checked(model)
    assert found.narrow is not None, found.error
    wide = ModelRunner(model, num_slots, kv_dtype=kv_dtype)
    return wide, NarrowPasses(found.narrow, wide.store)


@pytest.mark.parametrize("name", MATCHED)
def test_known_parts_give_the_models_own_logits(name: str) -> None:
    """Behind a text that is longer than the window of those that have one, chains, branches and two rows."""
    model = rounded(name)
    wide, narrow = passes_of(model, 400)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, 300).tolist()
    slots, other = rng.permutation(400).reshape(2, 200)
    wide.run([Piece(slots, 0, ids[: CHUNK + 9], DraftTree(), 0), Piece(other, 0, ids[:30], DraftTree(), 0)])
    tree = DraftTree(tuple(ids[200:206]), (-1, 0, 0, -1, 3, 1))
    for pieces in (
        [Piece(slots, CHUNK + 9, ids[:1], DraftTree(), 1)],
        [Piece(slots, CHUNK + 9, ids[:7], DraftTree(), 3)],
        [Piece(slots, CHUNK + 9, [ids[0], *tree.tokens], tree, 7)],
        [
            Piece(slots, CHUNK + 9, ids[:2], DraftTree(), 2),
            Piece(other, 30, [7, *tree.tokens[:3]], DraftTree(tree.tokens[:3], (-1, 0, 0)), 4),
        ],
    ):
        expected = wide.run(pieces).clone()
        assert relative_difference(narrow.run(pieces), expected) < 3e-6


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_narrow_and_wide_passes_read_the_same_rounded_kv(name: str) -> None:
    ids, slots = np.random.default_rng(0).integers(0, 256, 200).tolist(), np.arange(200)
    found = []
    for kv_dtype in (None, torch.bfloat16):
        wide, narrow = passes_of(rounded(name), 200, kv_dtype)
        wide.run([Piece(slots, 0, ids[:150], DraftTree(), 0)])
        pieces = [Piece(slots, 150, ids[150:157], DraftTree(), 7)]
        found += [wide.run(pieces).clone(), narrow.run(pieces)]
    of_float32, _, of_wide, of_narrow = found
    lost = relative_difference(of_wide, of_float32)
    assert 1e-5 < lost < 1e-2
    assert relative_difference(of_narrow, of_wide) < lost / 5  # what rounds to another bfloat16 here and there


@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_tokens_bits_are_its_own(name: str, kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a chain, on the second branch of a tree, beside another row, across a chunk's end, on any threads."""
    wide, narrow = passes_of(rounded(name), 2 * CHUNK, kv_dtype)
    rng = np.random.default_rng(0)
    ids, slots = rng.integers(0, 256, CHUNK + 20).tolist(), rng.permutation(2 * CHUNK)
    base = CHUNK - 3
    wide.run([Piece(slots, 0, ids[:base], DraftTree(), 0)])
    alone = torch.cat([narrow.run([Piece(slots, base + i, [ids[base + i]], DraftTree(), 1)]) for i in range(6)])
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        chain = narrow.run([Piece(slots, base, ids[base : base + 6], DraftTree(), 6)])
        assert torch.equal(chain, alone)
        path = ids[base + 1 : base + 6]
        branch = DraftTree((1, 2, *path), (-1, 0, -1, 2, 3, 4, 5))
        drafted = narrow.run([Piece(slots, base, [ids[base], *branch.tokens], branch, 8)])
        assert torch.equal(drafted[[0, 3, 4, 5, 6, 7]], alone)
        others = [
            Piece(slots[CHUNK + 20 :], 0, [9, 8, 7], DraftTree(), 2),
            Piece(slots, base, ids[base : base + 3], DraftTree(), 3),
        ]
        assert torch.equal(narrow.run(others)[2:], alone[:3])


def test_an_interrupted_pass_leaves_no_thread_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in one thread while the other has begun: later passes are as before it, also those of another model."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    narrow, other = passes_of(rounded("llama"), 40)[1], passes_of(rounded("llama"), 40)[1]
    pieces = [Piece(np.arange(40), 0, [1, 2, 3], DraftTree(), 3)]
    expected = narrow.run(pieces)

    def interrupted(work: Work, shared: Shared, own: Own) -> None:
        if threading.current_thread() is not threading.main_thread():
            return run_pass(work, shared, own)
        while shared.counters[0] == work.arrivals:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(narrow_kernels, "run_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        narrow.run([Piece(np.arange(40), 0, [7, 8, 9], DraftTree(), 3)])
    monkeypatch.setattr(narrow_kernels, "run_pass", run_pass)
    for _ in range(3):
        assert torch.equal(narrow.run(pieces), expected)
    assert torch.equal(other.run(pieces), expected)


@pytest.mark.parametrize("name", UNMATCHED)
def test_what_is_not_known_runs_as_before_and_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = rounded(name)
    with caplog.at_level(logging.WARNING):
        found = checked(model)
    assert (found.execution, found.narrow) == ("eager", None)
    assert any(part in caplog.text for part in UNMATCHED[name].split("|")), caplog.text


def spoil_hook(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def spoil_rotary(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def spoil_weight(model: Any) -> None:
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)


def spoil_class(model: Any) -> None:
    class Other(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj.__class__ = Other


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_hook, "has hooks"),
        (spoil_rotary, "change with the text's length"),
        (spoil_weight, "extra.weight, which is not known here"),
        (spoil_class, "other parts|is a Other"),
    ],
)
def test_what_would_be_left_out_is_seen(spoil: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = rounded("llama")
    weights = narrow_of(model)
    spoil(model)
    if spoil is spoil_class:
        del weights["model.layers.1.mlp.up_proj"]
    found = check_equivalence(model, CONFIG, partial(ModelRunner, model), weights)
    assert found.execution == "eager"
    assert any(part in caplog.text for part in why.split("|")), caplog.text


def test_a_cap_on_logits_is_seen_though_small_ones_hardly_show_it(caplog: pytest.LogCaptureFixture) -> None:
    model = rounded("gemma3")
    model.config.final_logit_softcapping = 30.0
    assert checked(model).execution == "eager"
    assert "caps its logits at 30.0" in caplog.text


def test_a_wrong_weight_is_found_by_the_models_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    model = rounded("llama")
    weights = narrow_of(model)
    weights["model.layers.0.mlp.up_proj"] = weights["model.layers.1.mlp.up_proj"]
    assert check_equivalence(model, CONFIG, partial(ModelRunner, model), weights).execution == "eager"
    assert "gives other logits over our KV" in caplog.text


def test_float32_weights_among_narrow_ones() -> None:
    """What has no narrower form is read as float32."""
    model = rounded("qwen2")
    weights = narrow_of(model)
    del weights["model.layers.0.self_attn.q_proj"]
    model.model.layers[0].self_attn.q_proj.weight.data += 1e-4
    found = check_equivalence(model, CONFIG, partial(ModelRunner, model), weights)
    assert found.execution == "narrow"


def test_wider_passes_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded("llama")
    runner = ModelRunner(model, 80, execution="narrow", narrow=checked(model).narrow)
    narrow: list[int] = []
    run = NarrowPasses.run
    monkeypatch.setattr(
        NarrowPasses, "run", lambda self, pieces: narrow.append(len(pieces[0].ids)) or run(self, pieces)
    )
    for width in (1, MOST_TOKENS, MOST_TOKENS + 1):
        runner.run([Piece(np.arange(80), 0, [1] * width, DraftTree(), 1)])
    assert narrow == [1, MOST_TOKENS]


@pytest.mark.parametrize(("wide_s", "most"), [(1.0, MOST_TOKENS), (0.25, 16), (1e-9, 0)])
def test_the_faster_way_is_taken_as_far_as_it_is_faster(
    wide_s: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow passes take as long as they have tokens here, wide ones always as long."""
    model = rounded("llama")
    decoder = checked(model).narrow
    runner = ModelRunner(model, 600, execution="narrow", narrow=decoder)

    def measure(runner: ModelRunner, *_: Any, **__: Any) -> Any:
        widths = (1, 2, 4, 8, 16, 32, 64)
        return tuple((width, width / 64 if width <= runner.narrow_tokens else wide_s) for width in widths)

    monkeypatch.setattr(pass_cost, "measure_pass_cost", measure)
    config = EngineConfig(model="tiny", step_cost="remeasure")
    points = dict(pass_cost.find_pass_cost(runner, model, config, 600, "narrow"))
    assert runner.narrow_tokens == most
    assert points[64] == wide_s or most == MOST_TOKENS

    def measure_a_little(runner: ModelRunner, *_: Any, **options: Any) -> Any:
        assert options["budget_s"] < 1, "what is kept still holds"
        return undisturbed(measure(runner))

    monkeypatch.setattr(pass_cost, "measure_pass_cost", measure_a_little)
    later = ModelRunner(model, 600, execution="narrow", narrow=decoder)
    assert dict(pass_cost.find_pass_cost(later, model, EngineConfig(model="tiny"), 600, "narrow")) == points
    assert later.narrow_tokens == most


def test_what_loading_compiles_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[LoadProgress] = []
    config = EngineConfig(model="tiny", step_cost=STEP_COST)
    prepare(rounded("llama"), ByteTokenizer(), config)  # all else is compiled
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)  # where nothing is kept yet
    lane_products.kernel.cache_clear()
    prepare(rounded("llama"), ByteTokenizer(), config, told.append)
    compiling = [progress for progress in told if progress.text.startswith("compiling what tiny needs")]
    assert [progress.done for progress in compiling] == [1]
    assert {progress.phase for progress in told} == {"check"}
    lane_products.kernel.cache_clear()
    prepare(rounded("llama"), ByteTokenizer(), config, told.append)
    assert told[-1] == LoadProgress("check", "checking tiny"), "what is kept is not compiled"


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "mistral"])
@pytest.mark.parametrize("drafter", ["adaptive", CopySpecDrafter(min_match_tokens=1, block=6)])
@pytest.mark.parametrize(("exact", "kv_dtype"), [(False, "auto"), (True, "auto"), (False, "bfloat16")])
def test_engine_drafts_without_loss(name: str, drafter: Any, exact: bool, kv_dtype: Any) -> None:
    """A whole engine on narrow passes: drafted and plain, two requests at a time, over turns of a conversation."""
    config = EngineConfig(model=name, step_cost=STEP_COST, exact=exact, kv_dtype=kv_dtype)
    prompts = [[i % 251 for i in range(start, start + 40)] * 2 for start in (3, 90)]
    with Engine(config, model=prepare(rounded(name), ByteTokenizer(), config)) as engine:
        assert engine.info.execution == "narrow"
        assert engine.info.narrow_weight_bytes > 0
        assert loop_of(engine).model.exact_widths == ((MOST_TOKENS,) if exact else None)
        answers = {}
        for way in ("none", drafter):
            for turn in range(2):
                handles = [
                    engine.stream(
                        GenerationRequest(
                            prompt_token_ids=[*prompt, *answers.get((turn - 1, number, "none"), [])],
                            session_id=f"{way}-{number}",
                            drafter=way,
                            sampling=SamplingParams(max_tokens=40, ignore_eos=True),
                        ),
                        wait=False,
                    )
                    for number, prompt in enumerate(prompts)
                ]
                for number, handle in enumerate(handles):
                    answers[turn, number, "none" if way == "none" else "drafted"] = list(handle.result().token_ids)
    for turn in range(2):
        for number in range(2):
            assert answers[turn, number, "drafted"] == answers[turn, number, "none"]
