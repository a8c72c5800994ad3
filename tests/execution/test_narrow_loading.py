"""Weights that stay as they came: the same model from fewer bytes, and what has none is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from copyspec_engine import ConfigError, DraftModel, Engine, EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.execution.checkpoint import read_model
from copyspec_engine.execution.loading import load_model
from copyspec_engine.execution.narrow_linear import NarrowEmbedding, NarrowLinear
from copyspec_engine.execution.narrow_loading import narrow_weights, weight_bytes
from copyspec_engine.models.find import find_model
from copyspec_engine.models.gguf import convert
from copyspec_engine.values.errors import ModelLoadError
from tests.conftest import STEP_COST
from tests.models.gguf_files import TOKENS, build, write_model

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 64,
    },
    "phi3": {},
}
"""Biases, a tied head, an embedding that scales what it looks up, and fused layers."""
PROMPT = [TOKENS.index(letter) for letter in "the same words, the same words, and once more: ".replace(" ", "Ġ")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path / "cache"))


def read(path: Path, **options: Any) -> PreTrainedModel:
    return read_model(str(path), CPU, EngineConfig(model=str(path), **options))


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: list[int] = PROMPT) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


def assert_the_same(narrow: PreTrainedModel, wide: PreTrainedModel) -> None:
    """A whole text, and one token."""
    for ids in (PROMPT, PROMPT[:1]):
        got, expected = logits(narrow, ids), logits(wide, ids)
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def assert_no_weight_is_wide(model: PreTrainedModel) -> None:
    assert not any(type(module) in (nn.Linear, nn.Embedding) and module.weight.is_cpu for module in model.modules())
    assert all(parameter.dim() == 1 for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """A checkpoint of this type; the model is changed to it."""
    model.to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q6_K, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", SIZES)
def test_a_gguf_file_is_the_same_model_in_its_own_bytes(name: str, kind: Kind, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build(name, **SIZES[name]), kind)
    folder = convert(str(tmp_path / "m.gguf")).folder
    narrow, wide = read(folder, memory="narrow"), read(folder)
    assert_no_weight_is_wide(narrow)
    assert_the_same(narrow, wide)
    wide_bytes, narrow_bytes = weight_bytes(narrow)
    assert wide_bytes < 20_000
    assert narrow_bytes < (tmp_path / "m.gguf").stat().st_size * (1.6 if kind == Kind.Q6_K else 1.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_in_half_precision_keeps_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(build(name, **SIZES[name]), tmp_path, dtype, max_shard_size="700KB" if name == "llama" else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (name == "llama")
    narrow, wide = read(folder, memory="narrow"), read(folder)
    assert_no_weight_is_wide(narrow)
    assert_the_same(narrow, wide)
    assert {module.narrow.kind for module in narrow.modules() if isinstance(module, NarrowLinear)} == {
        str(dtype).removeprefix("torch.")
    }


def test_a_checkpoint_that_was_upcast_is_narrow_again(tmp_path: Path) -> None:
    folder = save(build("qwen2").to(torch.bfloat16), tmp_path, torch.float32)
    assert_the_same(read(folder, memory="narrow"), read(folder))


def test_a_checkpoint_may_leave_out_the_prefix_of_its_names(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, torch.bfloat16)
    weights = {name.removeprefix("model."): weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_the_same(read(folder, memory="narrow"), read(folder))


def test_a_head_that_is_tied_has_the_embedding_s_weight(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("qwen2", tie_word_embeddings=True), Kind.Q4_0)
    narrow = read(convert(str(tmp_path / "m.gguf")).folder, memory="narrow")
    head, embedding = narrow.lm_head, narrow.model.embed_tokens
    assert isinstance(head, NarrowLinear)
    assert isinstance(embedding, NarrowEmbedding)
    assert head.narrow is embedding.narrow


def test_a_head_beside_an_embedding_of_other_values_is_its_own_though_the_config_ties_them(tmp_path: Path) -> None:
    folder = save(build("qwen2", tie_word_embeddings=False), tmp_path, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    assert_the_same(read(folder, memory="narrow"), read(folder))


# ---- what is kept beside a wide model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_wide_model_can_be_asked_for_its_narrow_weights(name: str, tmp_path: Path) -> None:
    model = build(name, **SIZES[name])
    write_model(tmp_path / "m.gguf", model, Kind.Q4_0)
    folder = convert(str(tmp_path / "m.gguf")).folder
    wide = read(folder)
    found = narrow_weights(wide, folder)
    layers = {name: module for name, module in wide.named_modules() if isinstance(module, nn.Linear)}
    is_tied = wide.config.tie_word_embeddings
    assert found.keys() == layers.keys() | ({"model.embed_tokens"} if is_tied else set())
    for layer, narrow in found.items():
        weight: Any = wide.get_submodule(layer).weight.detach()
        assert narrow.kind == "4-bit"
        assert np.array_equal(narrow.dequantised(0, narrow.out_features), weight.numpy())
    if is_tied:
        assert found["lm_head"] is found["model.embed_tokens"]
    wide_bytes, narrow_bytes = weight_bytes(wide, found.values())
    assert wide_bytes == 4 * wide.num_parameters()
    assert narrow_bytes == sum(weight.nbytes for weight in set(found.values()))


def test_values_of_half_precision_are_found_without_a_folder_and_others_are_left_out() -> None:
    model = build("llama").to(torch.bfloat16).float()
    assert narrow_weights(model, None).keys() == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    assert narrow_weights(build("llama"), None) == {}
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-6
    model.model.layers[1].mlp = model.model.layers[1].mlp.to(torch.bfloat16)
    missing = {name for name in narrow_weights(model, None) if "mlp" in name}
    assert missing == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"}


def test_a_narrow_model_gives_its_own(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("llama"), Kind.Q8_0)
    folder = convert(str(tmp_path / "m.gguf")).folder
    narrow = read(folder, memory="narrow")
    found = narrow_weights(narrow, folder)
    assert found["model.layers.1.mlp.up_proj"] is narrow.model.layers[1].mlp.up_proj.narrow
    assert len(found) == 2 * 7 + 2


# ---- the engine ------------------------------------------------------------------------------------------------------


def answers(config: EngineConfig) -> tuple[list[tuple[int, ...]], Any]:
    """Drafted, and plain."""
    request = GenerationRequest(
        prompt_token_ids=PROMPT * 2, sampling=SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    )
    with Engine(config) as engine:
        drafted = engine.generate(request)
        plain = engine.generate(request.model_copy(update={"drafter": "none"}))
        return [drafted.token_ids, plain.token_ids], engine.info


@pytest.mark.parametrize("exact", [False, True])
def test_an_engine_answers_the_same_from_fewer_bytes(exact: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, build("llama"), Kind.Q4_1)
    (drafted, plain), info = answers(EngineConfig(model=str(path), memory="narrow", step_cost=STEP_COST, exact=exact))
    (of_wide, _), wide = answers(EngineConfig(model=str(path), step_cost=STEP_COST))
    assert drafted == plain == of_wide
    assert info.num_parameters == wide.num_parameters
    assert info.weight_bytes < 20_000
    assert wide.weight_bytes == 4 * wide.num_parameters
    assert 0.9 < info.narrow_weight_bytes / path.stat().st_size < 1.0
    assert info.check_difference is not None
    assert info.check_difference < 1e-4


def test_a_draft_model_is_narrow_too(tmp_path: Path) -> None:
    for name, layers in (("large", 2), ("small", 1)):
        write_model(tmp_path / f"{name}.gguf", build("llama", num_hidden_layers=layers), Kind.Q8_0)
    draft = DraftModel(str(tmp_path / "small.gguf"), step_cost=STEP_COST)
    config = EngineConfig(model=str(tmp_path / "large.gguf"), draft_model=draft, memory="narrow", step_cost=STEP_COST)
    loaded = load_model(config)
    assert loaded.draft is not None
    assert loaded.draft.info.narrow_weight_bytes > 0


def test_the_weights_are_never_all_in_float32(tmp_path: Path) -> None:
    """Loading takes little more than the file: 1.5 times its size at most, where float32 weights are 3.8 times."""
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    write_model(small, build("llama", num_hidden_layers=1), Kind.Q8_0)
    write_model(large, build("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4), Kind.Q8_0)
    code = (
        "import resource, sys\n"
        "import torch\n"
        "from copyspec_engine import EngineConfig\n"
        "from copyspec_engine.execution.checkpoint import read_model\n"
        "def peak(path):\n"
        "    model = read_model(path, torch.device('cpu'), EngineConfig(model=path, memory='narrow'))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "base = peak(sys.argv[1])\n"
        "print(peak(sys.argv[2]) - base)"
    )
    folders = [str(convert(str(path)).folder) for path in (small, large)]
    shown = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True).stdout
    assert large.stat().st_size > 50_000_000
    assert 1024 * int(shown.split()[-1]) < 1.5 * large.stat().st_size


MEASURED = """
import json, os
from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.execution.loading import read_tokenizer
from copyspec_engine.loop.warm_up import compile_ahead
from copyspec_engine.testing import scripted_engine

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

sampling = SamplingParams(temperature=0.0, max_tokens=40)
compile_ahead()  # whatever the model, this code is there
with scripted_engine(lambda _: "a word and a word and " * 9) as engine:
    engine.generate(GenerationRequest(prompt="a word and a word and ", sampling=sampling))
tokenizer, slots = read_tokenizer(EngineConfig(model="smollm2")), 2048
base = resident()
config = EngineConfig(model="smollm2", memory="narrow", kv_cache_tokens=slots, generation_config="ignore")
with Engine(config) as engine:
    messages = [{"role": "user", "content": "Repeat this: The lake was calm, and we walked along the lake."}]
    request = GenerationRequest(messages=messages, sampling=sampling)
    answers = [engine.generate(request.model_copy(update={"drafter": name})) for name in (None, "none")]
    taken = resident() - base - slots * engine.info.kv_bytes_per_token
    print(json.dumps([taken, engine.info.check_difference, *(answer.token_ids for answer in answers)]))
"""


@pytest.mark.real_model
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_real_model_takes_its_file_s_size_and_answers_the_same(
    smollm2: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # its converted weights are in the cache of all tests
    # What MKL keeps for products of several threads is no memory of a model: this has it given back after each.
    environment = os.environ | {"MKL_DISABLE_FAST_MM": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True, env=environment
    ).stdout
    taken, difference, drafted, plain = json.loads(shown.splitlines()[-1])
    messages = [{"role": "user", "content": "Repeat this: The lake was calm, and we walked along the lake."}]
    sampling = SamplingParams(temperature=0.0, max_tokens=40)
    wide = smollm2.generate(GenerationRequest(messages=messages, sampling=sampling))
    assert drafted == plain == list(wide.token_ids)
    assert difference < 1e-4
    file = find_model("smollm2")
    assert file is not None
    if file.path.is_file():  # else the hub's checkpoint in bfloat16
        assert taken < 1.3 * file.path.stat().st_size


# ---- what has no narrow form -----------------------------------------------------------------------------------------


def test_what_computes_otherwise_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="memory='narrow' with dtype='bfloat16'"):
        EngineConfig(memory="narrow", dtype="bfloat16")
    with pytest.raises(ConfigError, match="memory='narrow' with quantization='int8'"):
        EngineConfig(memory="narrow", quantization="int8")


def test_a_device_that_is_no_cpu_is_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, torch.bfloat16)
    with pytest.raises(ModelLoadError, match=r"Got memory='narrow' but .* goes to cuda: leave it out, or use the CPU"):
        read_model(str(folder), torch.device("cuda"), EngineConfig(model="m", memory="narrow"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: save(build("llama"), folder, torch.float32),
            r"embed_tokens\.weight as F32, which has no narrow",
        ),
        (
            lambda folder: save(build("qwen3_moe", num_experts=4, moe_intermediate_size=256), folder, torch.bfloat16),
            r"weights of .* are in no linear layer \(the largest: .*experts",
        ),
        (lambda folder: save(build("llama"), folder, torch.bfloat16, max_shard_size="1MB"), "lacks"),
    ],
)
def test_what_has_no_narrow_form_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        whole = json.loads(index.read_text(encoding="utf-8"))
        del whole["weight_map"]["model.layers.0.mlp.up_proj.weight"]
        weights = {name: w for file in folder.glob("model-*.safetensors") for name, w in load_file(file).items()}
        del weights["model.layers.0.mlp.up_proj.weight"]
        index.unlink()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        read(folder, memory="narrow")


def test_a_gguf_file_of_another_type_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build("llama"), Kind.Q3_K)
    with pytest.raises(ModelLoadError, match="as Q3_K, which has no narrow form: leave it out"):
        read(convert(str(tmp_path / "m.gguf")).folder, memory="narrow")


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 480}), encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"gate_proj\.weight in the shape \(512, 256\), but its config asks"):
        read(folder, memory="narrow")


def test_a_checkpoint_of_another_file_format_is_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, torch.bfloat16)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no model\.safetensors: leave it out"):
        read(folder, memory="narrow")
