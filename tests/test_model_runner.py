"""Loading: what can be served is checked on the real weights, what cannot is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, T5Config

from copyspec_engine import EngineConfig, ModelLoadError, UnsupportedModelError
from copyspec_engine.attention import KVStore, visibility
from copyspec_engine.drafter import DraftTree
from copyspec_engine.model_runner import ModelRunner, load_model, prepare
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST, build_model


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"model='\./no/such/model' but there is no such folder"):
        load_model(EngineConfig(model="./no/such/model"))


def test_a_hub_name_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ModelLoadError, match="from the hub"):
        load_model(EngineConfig(model="nobody/no-such-model"))


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    from copyspec_engine.bundled import bundled_model_path

    for file in bundled_model_path().iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelLoadError, match=r"Could not load model=.* from the folder"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_layers_that_cannot_roll_back_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig

    Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="linear_attention layers, whose state cannot be rolled back"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="Got device='cuda:7'"):
        load_model(EngineConfig(device="cuda:7"))


def test_a_model_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def explode(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", explode)
    with pytest.raises(ModelLoadError, match="does not fit in the memory of cpu"):
        load_model(EngineConfig())


def test_a_model_whose_attention_goes_elsewhere_is_refused() -> None:
    """Attention that looks at something else than keys and values of the row gives other logits: noticed at load."""
    model = build_model("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def scaled(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        out, weights = original(hidden_states, *args, **kwargs)
        return out * hidden_states.shape[1], weights  # depends on how many tokens are read at once

    attention.forward = scaled
    with pytest.raises(UnsupportedModelError, match="gives other logits over our KV"):
        prepare(model, ByteTokenizer(), EngineConfig(model="odd"))  # type: ignore[arg-type]


def test_unknown_attention_options_are_refused() -> None:
    model = build_model("llama")
    attention = model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, **kwargs, secret_bias=torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="unknown attention options: secret_bias"):
        prepare(model, ByteTokenizer(), EngineConfig(model="odd"))  # type: ignore[arg-type]


def test_the_end_of_sequence_ids_are_those_of_generate() -> None:
    model = build_model("llama")
    config = EngineConfig(model="m", step_cost=STEP_COST)
    assert prepare(model, ByteTokenizer(), config).eos_token_ids == {257}  # type: ignore[arg-type]
    model = build_model("llama")
    model.generation_config.eos_token_id = [3, 4]
    assert prepare(model, ByteTokenizer(), config).eos_token_ids == {3, 4}  # type: ignore[arg-type]


def test_the_pool_never_takes_more_than_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from copyspec_engine.model_runner import _default_slots

    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert _default_slots(8192, 1000, torch.device("cpu")) == 1000 * 4096 // 4 // 1000
    assert _default_slots(100, 10, torch.device("cpu")) == 400


def test_costs_are_measured_from_one_token_up() -> None:
    loaded = prepare(build_model("llama"), ByteTokenizer(), EngineConfig(model="m"))  # type: ignore[arg-type]
    widths = [width for width, _ in loaded.step_cost]
    assert widths[:4] == [1, 2, 4, 8]
    assert all(seconds > 0 for _, seconds in loaded.step_cost)


def test_a_tree_node_sees_its_ancestors_only() -> None:
    seen = visibility((-1, 0, -1, 2), num_before=2, device=torch.device("cpu"))
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_a_tree_pass_gives_each_node_the_logits_of_its_own_path(architecture: str) -> None:
    model = build_model(architecture)
    prompt, draft = list(range(40, 80)), DraftTree((5, 6, 7, 8), (-1, 0, -1, 2))
    paths = [[], [5], [5, 6], [7], [7, 8]]
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt + path]), use_cache=False).logits[0, -1] for path in paths]
    model.set_attn_implementation("copyspec")
    runner = ModelRunner(model, num_slots=64)
    slots = np.random.default_rng(0).permutation(64)
    runner.run(slots, 0, prompt[:39], DraftTree(), 1)
    got = runner.run(slots, 39, [prompt[39], *draft.tokens], draft, 5)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_kv_bytes_count_every_layer() -> None:
    store = KVStore(8)
    for layer in range(3):
        store.write(layer, slice(0, 1), torch.ones(2, 1, 16), torch.ones(2, 1, 8))
    assert store.bytes_per_token == 3 * 2 * (16 + 8) * 4


def test_a_position_beyond_the_context_is_never_allowed() -> None:
    model = build_model("llama")
    assert isinstance(model.config, LlamaConfig)
    config = EngineConfig(model="m", max_model_len=4096, step_cost=STEP_COST)
    assert prepare(model, ByteTokenizer(), config).max_model_len == 512  # type: ignore[arg-type]
