"""A model in half precision decides in float32: its last norm, its head and what it does with its logits."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from copyspec_engine import DraftModel, EngineConfig
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.attention import KVStore
from copyspec_engine.execution.checkpoint import relative_difference
from copyspec_engine.execution.cuda_graphs import StaticPasses
from copyspec_engine.execution.float32_head import InFloat32, decide_in_float32
from copyspec_engine.execution.loading import ReadModel, prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST
from tests.execution.architectures import build_model

IDS = torch.arange(40, 70)[None]
CONFIG = EngineConfig(model="tiny", step_cost=STEP_COST)


@torch.inference_mode()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    return logits


def wrapped(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, InFloat32)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "granite", "cohere2", "gpt2", "opt", "gpt_oss"])
def test_what_decides_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    model = build_model(name).to(dtype)
    model.config.final_logit_softcapping = 3.0  # of Gemma 2; others do not look at it
    before = logits_of(model)
    decide_in_float32(model, name)
    after = logits_of(model)
    norm, head = wrapped(model)
    assert "norm" in norm or norm.endswith("ln_f")
    assert model.get_submodule(head) is model.get_output_embeddings()
    assert after.dtype == torch.float32
    assert relative_difference(after, before.float()) < 1e-2, "soft-capping and scaling are still applied"
    assert (after == after.to(dtype).float()).float().mean() < 0.05
    assert (before == before.to(dtype)).all()


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_the_logits_are_those_of_float32_weights_behind_the_same_layers(name: str) -> None:
    model = build_model(name).bfloat16()
    hidden: list[torch.Tensor] = []
    hook = model.get_submodule("model.norm").register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    logits_of(model)
    hook.remove()
    whole = copy.deepcopy(model).float()  # the same weights, rounded as they are
    hook = whole.get_submodule("model.norm").register_forward_pre_hook(lambda *_: (hidden[0].float(),))
    expected = logits_of(whole)
    decide_in_float32(model, name)
    assert relative_difference(logits_of(model), expected) < 1e-6


def test_a_tied_embedding_keeps_its_type() -> None:
    model = build_model("llama-tied").bfloat16()
    embedding = model.get_input_embeddings().weight.clone()
    decide_in_float32(model, "m")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.get_output_embeddings().weight, embedding.float())


def test_float32_models_and_other_heads_stay_as_they_are() -> None:
    class Quantized(torch.nn.Linear):
        pass

    model = build_model("llama")
    decide_in_float32(model, "m")
    assert not wrapped(model)
    model = model.bfloat16()
    model.lm_head.__class__ = Quantized
    before = logits_of(model)
    decide_in_float32(model, "m")
    assert not wrapped(model)
    assert torch.equal(logits_of(model), before)


def test_a_model_that_cannot_take_float32_there_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("llama").bfloat16()
    before = logits_of(model)
    forward = InFloat32.forward

    def norm_fails(self: InFloat32, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.module, torch.nn.Linear):
            raise RuntimeError("expected BFloat16")
        return forward(self, x)

    monkeypatch.setattr(InFloat32, "forward", norm_fails)
    decide_in_float32(model, "m")
    assert wrapped(model) == ["lm_head"]
    assert logits_of(model).dtype == torch.float32

    model = build_model("llama").bfloat16()
    monkeypatch.setattr(InFloat32, "forward", lambda self, x: forward(self, x) * 2)
    decide_in_float32(model, "m")
    assert not wrapped(model)
    assert torch.equal(logits_of(model), before)
    assert "m decides in torch.bfloat16" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2"])
def test_passes_of_all_kinds_give_float32_logits(name: str) -> None:
    model = build_model(name).bfloat16()
    loaded = prepare(model, ByteTokenizer(), CONFIG)
    assert isinstance(loaded.runner, ModelRunner)
    assert loaded.info.dtype == "bfloat16"
    slots = torch.arange(30).numpy()
    piece = Piece(slots, 0, IDS[0].tolist(), DraftTree(), 30)
    expected = loaded.runner.run([piece])
    static = StaticPasses(model, KVStore(40), use_graphs=False)
    with torch.inference_mode():
        got = static.run([piece])
    assert got.dtype == expected.dtype == torch.float32
    assert relative_difference(got, expected) < 2e-2


def test_a_recurrent_model_decides_in_float32_too() -> None:
    model = build_model("mamba").bfloat16()
    loaded = prepare(model, ByteTokenizer(), CONFIG)
    assert loaded.info.drafting_error is not None
    assert wrapped(model) == ["backbone.norm_f", "lm_head"]


def test_a_draft_model_decides_about_nothing() -> None:
    model, draft = build_model("llama").bfloat16(), build_model("llama", seed=2).bfloat16()
    config = CONFIG.model_copy(update={"draft_model": DraftModel("draft", step_cost=STEP_COST)})
    prepare(model, ByteTokenizer(), config, draft=ReadModel(draft, ByteTokenizer()))
    assert wrapped(model) == ["model.norm", "lm_head"]
    assert not wrapped(draft)
