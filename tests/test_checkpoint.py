"""Reading checkpoints: quantised ones, several GPUs, and saying what is going on."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from copyspec_engine import ConfigError, CopySpecError, Engine, EngineConfig, ModelLoadError, UnsupportedModelError
from copyspec_engine.attention import KVBatch, KVRow, KVStore
from copyspec_engine.checkpoint import read_model
from copyspec_engine.model_runner import load_model
from copyspec_engine.tokenizer import HFTokenizer
from tests.architectures import build_model
from tests.conftest import STEP_COST
from tests.test_lossless import PROMPT, run
from tests.test_model_runner import write_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    build_model("llama").save_pretrained(tmp_path / "tiny")
    write_tokenizer(tmp_path / "tiny")
    return str(tmp_path / "tiny")


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_weights_in_8_bits_draft_without_changing_a_token(folder: str) -> None:
    with Engine(EngineConfig(model=folder, quantization="int8", step_cost=STEP_COST)) as engine:
        plain = run(engine, PROMPT, "none")
        drafted = run(engine, PROMPT, "adaptive")
        assert plain.token_ids == drafted.token_ids
        assert drafted.draft_stats.num_accepted_tokens > 0


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_is_quantized_is_served_as_it_is(folder: str) -> None:
    config = EngineConfig(model=folder, quantization="int8")
    rounded = read_model(folder, CPU, config)
    rounded.save_pretrained(folder + "-int8")
    write_tokenizer(Path(folder + "-int8"))
    loaded = read_model(folder + "-int8", CPU, EngineConfig(model=folder + "-int8"))
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.equal(rounded(ids).logits, loaded(ids).logits)
        difference = (loaded(ids).logits - build_model("llama")(ids).logits).abs().max()
    assert 0 < difference < 0.1
    assert load_model(EngineConfig(model=folder + "-int8", step_cost=STEP_COST)).num_parameters > 0
    with pytest.raises(ModelLoadError, match=r"quantization='int8' but the weights of .* are quantized already"):
        read_model(folder + "-int8", CPU, EngineConfig(model=folder + "-int8", quantization="int8"))


def test_a_package_that_is_not_there_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CopySpecError, match=r'torchao is not installed\. Run: pip install "copyspec\[quantization\]"'):
        load_model(EngineConfig(model=folder, quantization="int8"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CopySpecError, match=r'accelerate is not installed\. Run: pip install "copyspec\[multi-gpu\]"'):
        load_model(EngineConfig(model=folder, device_map="auto"))


def test_a_device_map_without_gpus_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="device_map='auto' but this machine shows no CUDA devices"):
        load_model(EngineConfig(model=folder, device_map="auto"))


def test_a_device_map_and_a_device_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="Got device='cuda:1' with device_map='auto'"):
        EngineConfig(device="cuda:1", device_map="auto")


def test_each_layer_keeps_its_kv_and_looks_at_it_on_its_own_device() -> None:
    visible = torch.tensor([[True, False], [False, True]])
    row = KVRow(0, 2, torch.tensor([0, 2, 5]), torch.tensor([0, 1, 1]), visible)
    batch = KVBatch(KVStore(8), torch.tensor([2, 5]), 2, [row])
    other = batch.on(torch.device("meta"))
    assert batch.on(CPU) is batch
    assert batch.on(torch.device("meta")) is other, "made once a pass"
    assert other.store is batch.store
    mask = other.rows[0].mask(None, torch.float32)
    assert mask is not None
    for tensor in (other.write, other.rows[0].read, other.rows[0].positions, other.rows[0].visible, mask):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.device.type == "meta"
    keys, _ = batch.store.write(0, other.write, *torch.ones(2, 1, 2, 4, device="meta"))
    assert keys.device.type == "meta"
    keys, _ = batch.store.write(1, batch.write, *torch.ones(2, 1, 2, 4))
    assert keys.device.type == "cpu"


def test_loading_says_what_it_does(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    phases: list[str] = []
    caplog.set_level(logging.INFO, logger="copyspec_engine")
    Engine(EngineConfig(model=folder, max_model_len=64), on_progress=phases.append).close()
    assert phases == [f"reading the weights of {folder}", f"checking {folder}", f"measuring {folder}"]
    for phase in ("reading the weights", "checking", "measuring"):
        assert f"{folder}: {phase} took " in caplog.text


def test_an_error_in_on_progress_reaches_the_caller(folder: str) -> None:
    def explode(text: str) -> None:
        raise RuntimeError(f"no room for {text[:7]}")

    with pytest.raises(ModelLoadError, match="no room for reading"):
        Engine(EngineConfig(model=folder), on_progress=explode)


def test_an_image_is_refused_rather_than_overlooked(folder: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, chat_template="{{ messages[0]['content'] }}")
    image = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    with pytest.raises(UnsupportedModelError, match="part of type 'image_url' but only text"):
        HFTokenizer(tokenizer).render(messages, None)
    assert HFTokenizer(tokenizer).render([{"role": "user", "content": "hello"}], None)
