"""Loading: what can be served is checked on the real weights, what cannot is refused by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, T5Config

from copyspec_engine import ConfigError, EngineConfig, ModelLoadError, UnsupportedModelError
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import checkpoint, loading, pass_cost
from copyspec_engine.execution.accelerator import memory_of
from copyspec_engine.execution.attention import KVStore
from copyspec_engine.execution.loading import load_model, prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.pass_cost import measure_pass_cost
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST, build_model


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, as a model folder holds one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"model='\./no/such/model' but there is no such file or folder"):
        load_model(EngineConfig(model="./no/such/model"))


def test_a_hub_name_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE is set"):
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


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="Got device='cuda:7'"):
        load_model(EngineConfig(model="bundled", device="cuda:7"))


def test_a_model_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def explode(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", explode)
    with pytest.raises(ModelLoadError, match="does not fit in the memory of cpu"):
        load_model(EngineConfig(model="bundled"))


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
        prepare(model, ByteTokenizer(), EngineConfig(model="odd"))


def test_unknown_attention_options_are_refused() -> None:
    model = build_model("llama")
    attention = model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, **kwargs, secret_bias=torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="unknown attention options: secret_bias"):
        prepare(model, ByteTokenizer(), EngineConfig(model="odd"))


def test_the_end_of_sequence_ids_are_those_of_generate() -> None:
    model = build_model("llama")
    config = EngineConfig(model="m", step_cost=STEP_COST)
    assert prepare(model, ByteTokenizer(), config).eos_token_ids == {257}
    model = build_model("llama")
    model.generation_config.eos_token_id = [3, 4]
    assert prepare(model, ByteTokenizer(), config).eos_token_ids == {3, 4}


def test_the_pool_never_takes_more_than_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "memory_of", lambda _device: (4_096_000, 4_096_000))
    assert loading.choose_num_slots(None, 8192, 1000, torch.device("cpu")) == 1024
    assert loading.choose_num_slots(None, 100, 10, torch.device("cpu")) == 400
    assert loading.choose_num_slots(5000, 8192, 500, torch.device("cpu")) == 5000


def test_a_pool_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="Got kv_cache_tokens=10000000000000"):
        prepare(build_model("llama"), ByteTokenizer(), EngineConfig(model="m", kv_cache_tokens=10**13))


def test_memory_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    known = memory_of(torch.device("cpu"))[0]
    monkeypatch.setattr(Path, "exists", lambda _self: False)
    assert min(known, memory_of(torch.device("cpu"))[0]) > 2**20


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_a_broken_chat_template_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("looked for the model")

    monkeypatch.setattr(loading, "locate_model", never)
    with pytest.raises(ConfigError, match="Got a chat template that is not Jinja: line 1"):
        load_model(EngineConfig(chat_template="{% if %}"))


def test_models_may_be_loaded_from_several_threads(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    config = EngineConfig(model=str(tmp_path), step_cost=STEP_COST)
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(load_model, [config] * 4))
    assert {model.info.num_parameters for model in loaded} == {
        sum(p.numel() for p in build_model("llama").parameters())
    }


def test_a_model_that_gives_the_logits_of_every_token_is_served_right() -> None:
    model = build_model("llama")
    original = model.forward
    model.forward = lambda *args, logits_to_keep=0, **kwargs: original(*args, **kwargs)
    loaded = prepare(model, ByteTokenizer(), EngineConfig(model="m", step_cost=STEP_COST))
    piece = Piece(np.arange(40), 0, list(range(20)), DraftTree(), 3)
    logits = loaded.runner.run([piece])  # type: ignore[attr-defined]
    whole = loaded.runner.run([replace(piece, num_logits=20)])  # type: ignore[attr-defined]
    assert torch.equal(logits, whole[-3:])


def test_chunked_attention_is_refused(tmp_path: Path) -> None:
    from transformers import Llama4TextConfig

    Llama4TextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="chunked_attention layers"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_long_rope_models_stay_below_the_switch_of_their_factors(caplog: pytest.LogCaptureFixture) -> None:
    """Past regression: drafts that crossed the switch were verified with other rotations than plain decoding uses."""
    config = LlamaConfig(
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 160,
            "short_factor": [1.0] * 64,
            "long_factor": [2.0] * 64,
        },
    )
    assert checkpoint.longest_context(config, "m") == 160
    assert "below the switch of its longrope" in caplog.text
    assert checkpoint.longest_context(LlamaConfig(max_position_embeddings=4096), "m") == 4096


def test_costs_are_measured_from_one_token_up() -> None:
    loaded = prepare(build_model("llama"), ByteTokenizer(), EngineConfig(model="m", max_model_len=300))
    widths = [width for width, _ in loaded.info.step_cost]
    assert widths[:4] == [1, 2, 4, 8]
    assert widths[-1] <= 150  # a pass never reaches beyond the context
    assert all(seconds > 0 for _, seconds in loaded.info.step_cost)


class SlowPasses:
    """Stands in for a runner's passes: each takes this many seconds, on a clock that only they move."""

    def __init__(self, seconds: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.widths: list[int] = []
        self._seconds = seconds
        monkeypatch.setattr(pass_cost, "_time_pass", lambda _runner, _slots, _context, width: self._pass(width))
        monkeypatch.setattr(pass_cost, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def _pass(self, width: int) -> float:
        seconds = self._seconds(width)
        self.widths.append(width)
        self.now += seconds
        return seconds


def bare_runner() -> ModelRunner:
    return ModelRunner(build_model("llama"), num_slots=512)


def test_a_slow_model_is_measured_at_a_few_widths_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past regression: a slope between passes of one and two tokens said nothing about drafts of dozens."""
    passes = SlowPasses(lambda width: 1.0 + 0.1 * width, monkeypatch)
    points = measure_pass_cost(bare_runner(), context=200, room=512)
    assert [width for width, _ in points] == [1, 2, 4, 16]
    assert passes.widths == [1, 1, 2, 16, 4], "nothing slow is run twice"


def test_a_quick_model_is_measured_over_and_over_for_as_long_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = SlowPasses(lambda width: 0.001 + 0.0001 * width, monkeypatch)
    points = measure_pass_cost(bare_runner(), context=200, room=512, budget_s=0.5)
    assert points == tuple((width, 0.001 + 0.0001 * width) for width in (1, 2, 4, 8, 16, 32, 64, 128, 256))
    assert 0.4 < passes.now < 0.51
    assert passes.widths.count(128) > 5


def test_the_least_of_several_passes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    SlowPasses(lambda width: 0.01 * (1 + 0.01 * width) * rng.choice([1.0, 1.0, 3.0]), monkeypatch)
    points = measure_pass_cost(bare_runner(), context=200, room=512, budget_s=5.0)
    assert dict(points) == pytest.approx({width: 0.01 * (1 + 0.01 * width) for width, _ in points})


@pytest.mark.skipif(os.name != "posix", reason="counts a thread's work too coarsely")
def test_time_that_other_programs_take_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past regression: costs measured on a busy machine kept everything from being drafted."""
    run = ModelRunner.run

    def interrupted(runner: ModelRunner, *args: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.05)
        return run(runner, *args, **options)

    monkeypatch.setattr(ModelRunner, "run", interrupted)
    points = measure_pass_cost(bare_runner(), context=200, room=512, widths=(1, 2), budget_s=0.0)
    assert all(0 < seconds < 0.05 for _, seconds in points)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The budgets of all measurements, which are faked and give another curve each time; the cache is empty."""
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path / "cache"))
    budgets: list[float] = []

    def measure(
        _runner: ModelRunner, _context: int, _room: int, widths: tuple[int, ...] = (1, 64), budget_s: float = 1.0
    ) -> tuple[tuple[int, float], ...]:
        budgets.append(budget_s)
        return tuple((width, 0.01 * len(budgets) * (1 + 0.01 * width)) for width in widths)

    monkeypatch.setattr(pass_cost, "measure_pass_cost", measure)
    return budgets


def step_cost(model: PreTrainedModel | None = None, **options: Any) -> tuple[tuple[int, float], ...]:
    config = EngineConfig(**{"model": "m", **options})
    return prepare(model or build_model("llama"), ByteTokenizer(), config).info.step_cost


def test_costs_are_measured_at_the_first_load_and_checked_at_later_ones(measured: list[float]) -> None:
    first = step_cost()
    assert step_cost() == step_cost() == first
    assert measured == [1.0, 0.1, 0.1]


def test_costs_are_measured_with_care_and_kept_if_asked_for(measured: list[float]) -> None:
    first, second = step_cost(), step_cost(step_cost="remeasure")
    assert first != second
    assert step_cost() == second
    assert measured == [1.0, 5.0, 0.1]


def test_given_costs_are_used_and_leave_the_cache_alone(measured: list[float], tmp_path: Path) -> None:
    assert step_cost(step_cost=STEP_COST) == STEP_COST
    assert not measured
    assert not (tmp_path / "cache").exists()


def test_another_size_type_or_thread_count_is_measured_by_itself(measured: list[float]) -> None:
    threads = torch.get_num_threads()
    try:
        step_cost()
        step_cost(build_model("llama").bfloat16())
        step_cost(build_model("qwen2"))
        step_cost(max_model_len=300)
        torch.set_num_threads(threads + 1)
        step_cost()
    finally:
        torch.set_num_threads(threads)
    assert measured == [1.0] * 5
    step_cost(build_model("llama", seed=7))  # other weights of the same shapes
    assert measured == [1.0] * 5 + [0.1]


def test_a_tree_node_sees_its_ancestors_only() -> None:
    seen = DraftTree((5, 6, 7, 8), (-1, 0, -1, 2)).visible(2)
    assert seen.astype(int).tolist() == [
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
    runner.run([Piece(slots, 0, prompt[:39], DraftTree(), 1)])
    got = runner.run([Piece(slots, 39, [prompt[39], *draft.tokens], draft, 5)])
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
    assert prepare(model, ByteTokenizer(), config).info.max_model_len == 512


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="tells no memory")
def test_slots_that_nobody_has_used_take_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    store, before = KVStore(2**20), resident()
    keys, values = store.layer(0, torch.ones(2, 1, 64), torch.ones(2, 1, 64))
    assert keys.numel() * keys.element_size() > 2**29
    assert resident() - before < 2**24
    store.write(0, slice(2**19, 2**19 + 3), torch.ones(2, 3, 64), torch.ones(2, 3, 64))
    assert keys[:, 2**19 - 1 : 2**19 + 4].sum() == 2 * 3 * 64
    assert values[:, -1].sum() == 0
    assert resident() - before < 2**24
