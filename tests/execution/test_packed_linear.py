"""Packed weights compute what ordinary ones do, and are left out where they cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from copyspec_engine import EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.execution import packed_linear, self_check
from copyspec_engine.execution.checkpoint import relative_difference
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.packed_linear import PackedLinear, pack_linears, unpack_linears, why_not_packed
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.execution.self_check import check_equivalence
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST, build_model

CONFIG = EngineConfig(model="tiny", step_cost=STEP_COST)
pytestmark = pytest.mark.skipif(why_not_packed(nn.Linear(1024, 1024)) is not None, reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_LEAST_WEIGHTS", 1)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 7), (64, 48), (96, 1000)])
def test_a_packed_layer_computes_the_same(inputs: int, outputs: int, *, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    packed = PackedLinear(linear)
    for shape in [(0,), (1,), (2,), (1, 5), (3, 2), (300,)]:
        x = torch.randn(*shape, inputs)
        expected, got = linear(x), packed(x)
        assert got.shape == expected.shape
        assert not got.numel() or relative_difference(got, expected) < 1e-5
    strided = torch.randn(inputs, 9).t()
    assert relative_difference(packed(strided), linear(strided)) < 1e-5


def test_onednn_is_shown_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps code for each of them: memory grew with every new width of a pass."""
    linear = nn.Linear(8, 16)
    packed, shown = PackedLinear(linear), []
    compute = torch.ops.mkldnn._linear_pointwise

    def noted(x: torch.Tensor, *others: Any) -> torch.Tensor:
        shown.append(x.shape[:-1].numel())
        return compute(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    with torch.inference_mode():
        for rows in range(1, 1025):
            x = torch.randn(1, rows, 8)
            torch.testing.assert_close(packed(x), linear(x))
    assert shown[:64] == list(range(1, 65))
    assert all(rows <= padded <= rows * 9 / 8 for rows, padded in enumerate(shown, 1))
    assert shown[511] == 512
    assert len(set(shown)) <= 104


def test_what_was_packed_can_be_unpacked_bit_by_bit() -> None:
    linear = nn.Linear(13, 29)
    model = nn.Sequential(nn.Sequential(copy.deepcopy(linear)), nn.ReLU())
    pack_linears(model)
    assert isinstance(model[0][0], PackedLinear)
    unpack_linears(model)
    assert type(model[0][0]) is nn.Linear
    assert torch.equal(model[0][0].weight, linear.weight)
    assert torch.equal(model[0][0].bias, linear.bias)


def test_layers_that_compute_something_else_stay() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    others = [Scaled(2, 2), hooked, nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 2, device="meta")]
    model = nn.Sequential(*others)
    pack_linears(model)
    assert list(model) == others
    assert why_not_packed(model) == "no linear layer is large and holds float32 on a CPU"


def test_a_model_on_a_cpu_is_served_packed_and_others_keep_their_weights(make_engine: Any) -> None:
    info = make_engine("llama").info
    assert (info.execution, info.execution_error) == ("packed", None)
    model = build_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    loaded = prepare(model, ByteTokenizer(), CONFIG)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert loaded.info.num_parameters == twin.num_parameters()
    assert loaded.runner.vocab_size == twin.config.vocab_size
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.named_parameters())


def test_packing_that_goes_wrong_is_undone_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    model = build_model("llama")
    plain = {name: tensor.clone() for name, tensor in model.named_parameters()}
    checked = check_equivalence(model, CONFIG, lambda **options: ModelRunner(model, **options))
    assert checked.execution == "eager"
    assert "gives other logits" in (checked.error or "")
    assert "passes run slower" in caplog.text
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.named_parameters())


def test_a_model_that_cannot_be_packed_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "why_not_packed", lambda _: "this build of torch has no oneDNN")
    loaded = prepare(build_model("llama"), ByteTokenizer(), CONFIG)
    assert (loaded.info.execution, loaded.info.execution_error) == ("eager", "this build of torch has no oneDNN")
    monkeypatch.setattr(packed_linear.torch.backends.mkldnn, "is_available", lambda: False)
    assert why_not_packed(nn.Linear(2, 2)) == "this build of torch has no oneDNN"


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_a_packed_model_writes_the_tokens_of_plain_decoding(make_engine: Any, name: str) -> None:
    engine = make_engine(name)
    assert engine.info.execution == "packed"
    prompt = tuple(b"the cat sat on the mat; the cat sat on the rat; the cat")
    answers = [
        engine.generate(
            GenerationRequest(
                prompt_token_ids=prompt, drafter=drafter, sampling=SamplingParams(max_tokens=80, ignore_eos=True)
            )
        )
        for drafter in ("none", "adaptive", "copyspec")
    ]
    assert {answer.token_ids for answer in answers} == {answers[0].token_ids}
    assert answers[1].draft_stats.num_draft_tokens > 0


def test_small_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(1024, 1024))
    pack_linears(model)
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear]
