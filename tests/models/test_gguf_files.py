"""GGUF files on disk: parts, folders, broken files, and the folder that a model is kept in."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from transformers import PreTrainedModel

from copyspec_engine import Engine, EngineConfig, LoadProgress
from copyspec_engine.models import gguf_weights
from copyspec_engine.models.gguf import convert
from copyspec_engine.models.gguf_file import read_file
from copyspec_engine.models.tensor_file import read_header
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError
from tests.models.gguf_files import build, metadata_of, split, write, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(folder))
    return folder / "models" / "gguf"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama", hidden_size=64, intermediate_size=96, head_dim=16)


@pytest.fixture
def file(model: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_model(path, model, Kind.Q8_0)
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ---- which files -----------------------------------------------------------------------------------------------------


def test_a_model_in_parts_is_read_from_any_of_them(file: Path) -> None:
    whole = weights_of(convert(str(file)).folder)
    parts = split(file, 3)
    for path in (parts[2], parts[0]):
        again = weights_of(convert(str(path)).folder)
        assert all(torch.equal(again[name], whole[name]) for name in whole)
        assert again.keys() == whole.keys()


def test_a_part_that_is_missing_is_named(file: Path) -> None:
    parts = split(file, 3)
    parts[1].unlink()
    with pytest.raises(ModelLoadError, match=r"one of 3 parts and model-00002-of-00003\.gguf is not beside it"):
        convert(str(parts[0]))


def test_a_part_under_another_name_is_told_from_a_whole_model(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "renamed.gguf"
    split(file, 3)[0].rename(other)
    with pytest.raises(ModelLoadError, match="says that it is one of 3 parts, but its name does not"):
        convert(str(other))


def test_a_folder_of_several_models_is_refused_and_its_projector_is_passed_over(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "a.gguf")
    (folder / "mmproj-a.gguf").write_bytes(b"GGUF")
    assert convert(str(folder)).quantization == "Q8_0"
    shutil.copy(file, folder / "b.gguf")
    with pytest.raises(ModelLoadError, match=r"a folder of 2 GGUF models, but expected one: .* a\.gguf, b\.gguf"):
        Engine(EngineConfig(model=str(folder)))


# ---- what is wrong with a file ---------------------------------------------------------------------------------------


def header(version: int = 3, tensors: int = 0, keys: int = 0, order: str = "<") -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, keys)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", ModelLoadError, "cannot be read"),
        (b"nothing of the kind", ModelLoadError, "is not a GGUF file: it does not begin with the letters GGUF"),
        (b"GGUF\3", ModelLoadError, "is broken or incomplete: its header ends in the middle"),
        (header(keys=4), ModelLoadError, "its header ends in the middle"),
        (header(keys=1) + struct.pack("<Q", 2**60), ModelLoadError, "its header ends in the middle"),
        (header(keys=1) + struct.pack("<Q", 1) + b"\xff" + bytes(64), ModelLoadError, "or says what cannot be"),
        (header(keys=1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60), ModelLoadError, "its header ends"),
        (header(keys=1) + struct.pack("<Q1sI", 1, b"a", 77) + bytes(64), ModelLoadError, "or says what cannot be"),
        (header(tensors=1) + struct.pack("<Q1sI", 1, b"a", 99) + bytes(64), ModelLoadError, "or says what cannot be"),
        (header(version=1), UnsupportedModelError, "is of GGUF version 1, but only versions 2 and 3"),
        (header(version=3, order=">"), UnsupportedModelError, "is a big-endian GGUF file"),
        (header(), ModelLoadError, "does not say its general.architecture"),
    ],
)
def test_a_broken_file_is_named(content: bytes, error: type[Exception], says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=rf"broken\.gguf.* {says}|broken\.gguf {says}"):
        Engine(EngineConfig(model=str(path)))


def test_a_file_that_ends_early_is_named_at_any_length(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    path = tmp_path / "early.gguf"
    for length in (30, 200, 3000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"early\.gguf is (broken or )?incomplete: .* Fetch it again"):
            convert(str(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.gguf"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(ModelLoadError, match=r"secret\.gguf cannot be read"):
        convert(str(path))


@pytest.mark.parametrize(
    ("metadata", "error", "says"),
    [
        (
            {"general.architecture": "bert"},
            UnsupportedModelError,
            "architecture 'bert', but GGUF files are read of gemma3",
        ),
        ({"general.architecture": "clip"}, ModelLoadError, "a vision projector: give the file of its text model"),
        ({"general.type": "mmproj"}, ModelLoadError, "a vision projector: give the file of its text model"),
        ({"general.type": "adapter"}, ModelLoadError, "a LoRA adapter: give a model"),
        ({"general.type": "imatrix"}, ModelLoadError, "statistics for quantising"),
        ({"tokenizer.ggml.tokens": []}, ModelLoadError, "has no tokenizer"),
        ({"llama.expert_count": 8}, UnsupportedModelError, r"sets llama\.expert_count=8, which is not understood"),
        ({"llama.logit_scale": 0.5}, UnsupportedModelError, r"sets llama\.logit_scale=0\.5"),
        ({"llama.block_count": "two"}, ModelLoadError, r"is broken: it has llama\.block_count='two'"),
        ({"llama.attention.head_count_kv": [2, 1]}, UnsupportedModelError, "has layers of several kinds"),
        ({"llama.rope.scaling.type": "other"}, UnsupportedModelError, "scales positions by 'other'"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "turns only a part of each head"),
        ({"llama.block_count": 3}, ModelLoadError, r"has no tensor blk\.2\."),
        ({"llama.block_count": 1}, UnsupportedModelError, r"holds blk\.1\.\S+, which LlamaConfig has no place for"),
        ({"llama.feed_forward_length": 64}, ModelLoadError, r"is broken: \S+ is of shape"),
    ],
)
def test_what_is_no_model_or_not_known_is_refused(
    metadata: dict[str, Any], error: type[Exception], says: str, model: PreTrainedModel, tmp_path: Path, cache: Path
) -> None:
    tensors = {name: (weight.numpy(), Kind.F32) for name, weight in gguf_names(model).items()}
    write(tmp_path / "m.gguf", metadata_of(model) | metadata, tensors)
    with pytest.raises(error, match=says):
        convert(str(tmp_path / "m.gguf"))
    assert not list(cache.glob("m-*"))


def gguf_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    return {f"{names.get_name(name[:-7])}.weight": weight for name, weight in model.state_dict().items()}


def made(cache: Path) -> set[str]:
    """What lies in the folder of converted files but for locks."""
    return {path.name for path in cache.iterdir() if not path.name.endswith(".lock")}


# ---- the folder that is kept -----------------------------------------------------------------------------------------


def test_a_model_is_converted_once_and_found_again_by_its_content(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[LoadProgress] = []
    first = convert(str(file), told.append)
    assert {(progress.phase, progress.unit) for progress in told} >= {("convert", "B"), ("convert", "it")}

    def never(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_weights, "write_weights", never)
    told.clear()
    assert convert(str(file), told.append) == first
    assert not told
    elsewhere = tmp_path / "elsewhere" / file.name
    elsewhere.parent.mkdir()
    shutil.copy(file, elsewhere)
    assert convert(str(elsewhere), told.append) == first
    assert {progress.unit for progress in told} == {None, "B"}


@pytest.mark.parametrize("note", ["{", "[]", "{}"])
def test_a_folder_with_a_damaged_note_is_made_anew(file: Path, note: str, caplog: pytest.LogCaptureFixture) -> None:
    first = convert(str(file))
    (first.folder / "copyspec.json").write_text(note)
    assert convert(str(file)) == first
    assert "copyspec.json is damaged" in caplog.text
    caplog.clear()
    assert convert(str(file)) == first
    assert not caplog.text


def test_a_file_under_another_name_is_not_converted_again(file: Path, cache: Path) -> None:
    first = convert(str(file))
    other = file.with_name("other.gguf")
    shutil.copy(file, other)
    assert convert(str(other)) == first
    assert made(cache) == {"seen", first.folder.name}


@pytest.mark.parametrize("name", ["模型", "___", "x" * 5 + "." + "y" * 59, "...", "-"])
def test_any_name_of_a_file_makes_a_folder_that_is_found(file: Path, name: str) -> None:
    other = file.with_name(name + ".gguf")
    shutil.copy(file, other)
    assert convert(str(other)) == convert(str(other))


def test_a_cache_that_cannot_be_written_is_told_before_the_file_is_read(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[LoadProgress] = []
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(ModelLoadError, match=f"Models are kept in {cache}, where this went wrong"):
        convert(str(file), told.append)
    assert not [progress for progress in told if progress.unit == "B"]


def test_a_file_that_changed_is_converted_again(file: Path, model: PreTrainedModel) -> None:
    first = convert(str(file))
    write_model(file, model, Kind.F16)
    os.utime(file, ns=(1, 1))
    second = convert(str(file))
    assert (first.quantization, second.quantization) == ("Q8_0", "F16")
    assert {weight.dtype for weight in weights_of(second.folder).values()} == {torch.float16, torch.float32}


def test_two_processes_at_once_make_one_folder(file: Path, cache: Path) -> None:
    code = f"from copyspec_engine.models.gguf import convert; print(convert({str(file)!r}).folder)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip().splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert folders == {str(convert(str(file)).folder)}
    assert made(cache) == {"seen", Path(folders.pop()).name}


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_that_is_taken_for_the_model(
    file: Path, cache: Path
) -> None:
    code = (
        "import os, signal, sys\n"
        "from copyspec_engine.models.gguf import convert\n"
        "def tell(progress):\n"
        "    if progress.unit == 'it' and progress.done == 12: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert({str(file)!r}, tell)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = made(cache)
    assert left.startswith(".")
    folder = convert(str(file)).folder
    assert len(weights_of(folder)) == 21
    assert made(cache) == {"seen", folder.name}


def test_a_disk_without_room_is_told_before_and_while_writing(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_weights.TensorWriter, "write", full)
        with pytest.raises(ModelLoadError, match=r"There is no room in .*: free some, or set COPYSPEC_CACHE_DIR"):
            convert(str(file))
    with monkeypatch.context() as patch:
        patch.setattr("copyspec_engine.models.gguf._free", lambda _: 1000)
        with pytest.raises(ModelLoadError, match=r"no room in .* 0\.0 GB are needed and 0\.0 GB are free"):
            convert(str(file))
    assert not made(cache)
    assert convert(str(file)).folder.exists()


def test_room_is_asked_for_values_and_blocks(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convert(str(file)).folder
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shutil.rmtree(cache)
    needed = gguf_weights.num_bytes(read_file(file))
    assert weights - 10_000 < needed < weights
    with monkeypatch.context() as patch:
        patch.setattr("copyspec_engine.models.gguf._free", lambda _: needed - 1)
        with pytest.raises(ModelLoadError, match="no room in"):
            convert(str(file))
    monkeypatch.setattr("copyspec_engine.models.gguf._free", lambda _: needed)
    assert convert(str(file)).folder.exists()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q6_K, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_blocks_are_kept_as_they_are_with_rows_where_transformers_has_them(
    name: str, kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    expected = write_model(path, build(name), kind).state_dict()
    folder = convert(str(path)).folder
    tensors, types = read_header(folder / gguf_weights.AS_STORED)
    matrices = {name for name, weight in expected.items() if weight.dim() == 2}
    assert tensors.keys() == types.keys() == matrices
    assert set(types.values()) == {kind.name}
    for name, stored in tensors.items():
        assert np.array_equal(dequantize(stored.read(), kind), expected[name].numpy())
    assert weights_of(folder).keys() == expected.keys()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_what_is_not_quantised_is_kept_once(kind: Kind, model: PreTrainedModel, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", model, kind)
    assert [path.name for path in convert(str(tmp_path / "m.gguf")).folder.glob("*.safetensors")] == [
        "model.safetensors"
    ]


def test_what_was_converted_in_an_earlier_form_is_converted_anew(file: Path) -> None:
    now = convert(str(file)).folder
    earlier = now.with_name(now.name[: now.name.rindex("-")] + "-1")
    now.rename(earlier)
    (earlier / gguf_weights.AS_STORED).unlink()
    assert convert(str(file)).folder == now
    assert (now / gguf_weights.AS_STORED).is_file()


def test_little_more_than_a_tensor_is_in_memory_while_a_file_is_converted(model: PreTrainedModel, file: Path) -> None:
    large = file.with_name("large.gguf")
    write_model(large, build("llama", intermediate_size=4096, num_hidden_layers=8), Kind.Q8_0)
    code = (
        "import resource\n"
        "from copyspec_engine.models.gguf import convert\n"
        f"convert({str(file)!r})\n"  # whatever is imported is there now
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"folder = convert({str(large)!r}).folder\n"
        "print((folder / 'model.safetensors').stat().st_size // 1024)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    weights, taken = map(int, shown.split()[-2:])
    assert weights > 100_000
    assert taken < weights / 2
