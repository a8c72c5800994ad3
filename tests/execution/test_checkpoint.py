"""Reading checkpoints: quantised ones, several GPUs, and saying what is going on."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from copyspec_engine import CopySpecError, Engine, EngineConfig, LoadProgress, ModelLoadError, UnsupportedModelError
from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.engine.model_facts import read_model_facts
from copyspec_engine.execution import checkpoint
from copyspec_engine.execution.attention import KVBatch, KVRow, KVStore
from copyspec_engine.execution.checkpoint import load_failure, read_model
from copyspec_engine.execution.config_checks import refuse_impossible
from copyspec_engine.execution.loading import load_model
from tests.conftest import STEP_COST
from tests.execution.architectures import build_model
from tests.execution.test_runner import write_tokenizer
from tests.loop.test_lossless import PROMPT, run

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
    assert load_model(EngineConfig(model=folder + "-int8", step_cost=STEP_COST)).info.num_parameters > 0
    with pytest.raises(ModelLoadError, match=r"quantization='int8' but the weights of .* are quantized already"):
        read_model(folder + "-int8", CPU, EngineConfig(model=folder + "-int8", quantization="int8"))


def test_a_package_that_is_not_there_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CopySpecError, match=r'torchao is not installed\. Run: pip install "copyspec\[quantization\]"'):
        load_model(EngineConfig(model=folder, quantization="int8"))
    monkeypatch.setattr(checkpoint, "device_count", lambda _kind: 2)
    monkeypatch.setattr(checkpoint, "best_device", lambda: torch.device("cuda"))
    with pytest.raises(CopySpecError, match=r'accelerate is not installed\. Run: pip install "copyspec\[multi-gpu\]"'):
        load_model(EngineConfig(model=folder, device="all"))


def test_all_devices_without_gpus_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "device_count", lambda _kind: 0)
    with pytest.raises(ModelLoadError, match="device='all' but this machine shows no CUDA devices"):
        load_model(EngineConfig(model=folder, device="all"))


def test_each_layer_keeps_its_kv_and_looks_at_it_on_its_own_device() -> None:
    visible = torch.tensor([[True, False], [False, True]])
    row = KVRow(0, 2, torch.tensor([0, 2, 5]), torch.tensor([0, 1, 1]), visible)
    batch = KVBatch(KVStore(8), torch.tensor([2, 5]), 2, [row], device=CPU)
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
    said: list[LoadProgress] = []
    caplog.set_level(logging.INFO, logger="copyspec_engine")
    Engine(EngineConfig(model=folder, max_model_len=64), on_progress=said.append).close()
    words = [f"reading the weights of {folder}", f"checking {folder}", f"measuring {folder}"]
    begins = [progress for progress in said if progress.done is None and not progress.text.endswith(" s)")]
    assert [progress.phase for progress in begins] == ["read", "check", "measure", "compile"]
    assert [str(progress) for progress in begins[:3]] == words
    counts = [progress for progress in said if progress.phase == "read" and progress.done is not None]
    assert counts[-1].done == counts[-1].total == len(build_model("llama").state_dict())
    assert (counts[-1].unit, str(counts[-1])) == ("it", f"{words[0]}: {counts[-1].done} of {counts[-1].total}")
    for text in words:
        assert f"{text} took " in caplog.text


def test_an_error_in_on_progress_reaches_the_caller(folder: str) -> None:
    def explode(progress: LoadProgress) -> None:
        raise RuntimeError(f"no room for {progress.text[:7]}")

    with pytest.raises(RuntimeError, match=r"^no room for reading$"):
        Engine(EngineConfig(model=folder), on_progress=explode)


def test_an_image_is_refused_rather_than_overlooked(folder: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, chat_template="{{ messages[0]['content'] }}")
    image = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    with pytest.raises(UnsupportedModelError, match="part of type 'image_url' but only text"):
        HFTokenizer(tokenizer).render(messages, None)
    assert HFTokenizer(tokenizer).render([{"role": "user", "content": "hello"}], None)


# ---- what is no checkpoint, or not a whole one -----------------------------------------------------------------------


def change_config(folder: str, **values: object) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": 10**7}, "Got num_hidden_layers=10000000 in the config.json .* number from 1 to 10,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000"),
        ({"hidden_size": "48"}, "hidden_size='48'"),
        ({"hidden_size": 48.5}, "hidden_size=48.5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 .* expected a divisor of num_attention_heads=4"),
        ({"vocab_size": -258}, "vocab_size=-258"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta=nan"),
        ({"text_config": {"num_hidden_layers": -2}}, "text_config.num_hidden_layers=-2"),
        ({"hidden_size": 10**6, "intermediate_size": 10**7, "num_hidden_layers": 10**4}, r"GB at least, and this"),
    ],
)
def test_a_config_that_cannot_be_true_is_refused_by_name(folder: str, values: dict[str, Any], says: str) -> None:
    change_config(folder, **values)
    with pytest.raises(ModelLoadError, match=says):
        load_model(EngineConfig(model=folder))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "says"), [("{", "cannot be read"), ("[1]", "holds a list, not an object"), ("", "cannot")]
)
def test_a_file_that_is_no_json_object_is_named(folder: str, file: str, content: str, says: str) -> None:
    (Path(folder) / file).write_text(content)
    with pytest.raises(ModelLoadError, match=f"Got a {file} of .* {says}"):
        load_model(EngineConfig(model=folder))


def test_weights_of_another_shape_are_named(folder: str) -> None:
    change_config(folder, vocab_size=100)
    with pytest.raises(ModelLoadError, match=r"or has them in another shape .*embed_tokens|or has them .*lm_head"):
        load_model(EngineConfig(model=folder))


def test_configs_of_real_models_are_believed() -> None:
    refuse_impossible("a", {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128})
    refuse_impossible("b", {"max_position_embeddings": 10_485_760, "num_key_value_heads": [4, 8], "sliding_window": 0})
    refuse_impossible("c", {"time_step_limit": [0.0, float("inf")], "num_attention_heads": None, "text_config": None})


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_have_kernels_fetched_from_elsewhere(
    folder: str, key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers.integrations.hub_kernels as hub_kernels

    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", fetch)
    change_config(folder, **{key: "kernels-community/flash-attn"})
    model = read_model(folder, CPU, EngineConfig(model=folder))
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert "asks for attn_implementation='kernels-community/flash-attn', which is not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.gguf", None, "no.gguf' but there is no such file or folder, and"),
        ("model.safetensors", b"x", "model.safetensors', a file, but expected"),
    ],
)
def test_a_file_instead_of_a_folder_is_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=says):
        Engine(EngineConfig(model=str(tmp_path / name)))


def test_an_error_is_told_to_its_last_line(tmp_path: Path) -> None:
    said = load_failure("a/b", "", ValueError("the config is broken:\n  field hidden_size\n  expected int"))
    assert "field hidden_size" in said
    assert "expected int" in said


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder: str, tmp_path: Path) -> str:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": folder}))
    return str(path)


def test_an_adapter_is_refused_without_peft(adapter: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for path in (adapter, folder):
        (Path(path) / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
        with pytest.raises(ModelLoadError, match=r"a PEFT adapter .* peft is not installed\. .* \"copyspec\[peft\]\""):
            load_model(EngineConfig(model=path))


def test_an_adapter_that_cannot_be_used_is_refused(adapter: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ModelLoadError, match=r"a PEFT adapter .* with quantization='int8'"):
        load_model(EngineConfig(model=adapter, quantization="int8"))
    for path, says in (
        (folder, "with the weights of a whole model beside it"),
        (adapter, "whose base_model_name_or_path is None"),
    ):
        (Path(path) / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelLoadError, match=f"a PEFT adapter .* {says}"):
            load_model(EngineConfig(model=path))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_served_as_peft_computes_it(folder: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected, plain = adapted(ids).logits, build_model("llama")(ids).logits
    assert (expected - plain).abs().max() > 0.01
    path = str(tmp_path / "lora")
    with Engine(EngineConfig(model=path, step_cost=STEP_COST)) as engine:
        assert run(engine, PROMPT, "none").token_ids == run(engine, PROMPT, "adaptive").token_ids
        own = adapted.generate(ids, max_new_tokens=30, do_sample=False)[0, len(PROMPT) :].tolist()
        assert list(run(engine, PROMPT, "none").token_ids)[:30] == own


def test_a_model_in_the_home_folder_is_known_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(bundled_model_path())
    monkeypatch.setenv("HOME", str(tmp_path))
    facts, known = (read_model_facts(EngineConfig(model=name)) for name in ("~/model", "bundled"))
    assert facts is not None
    assert known is not None
    assert facts.max_model_len == known.max_model_len
