"""GGUF files as models: their weights are dequantised once and kept as a folder in transformers' form.

The folder is in the cache folder, under the hash of the files' content; which content a path had is remembered by its
size and time of change. It appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from copyspec_engine.calibration import cache_dir
from copyspec_engine.errors import ModelLoadError, missing_extra
from copyspec_engine.models.gguf_config import config_of
from copyspec_engine.models.gguf_file import GgufFile, find_files, is_gguf, read_file
from copyspec_engine.models.gguf_tokenizer import build_tokenizer, end_tokens
from copyspec_engine.progress import LoadProgress, OnProgress

__all__ = ["Converted", "convert", "is_gguf"]

_FORMAT = 1
"""Goes up when the same file would be converted otherwise: what was kept before is then not used any more."""
_NOTE = "copyspec.json"
_CHUNK = 2**24
_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class Converted:
    """A GGUF file's model as a folder."""

    folder: Path
    quantization: str
    """The types of its weights, as "Q4_K_M"."""


def convert(path: str, on_progress: OnProgress | None = None) -> Converted:
    """The folder that holds the model of a GGUF file, made now unless it is kept from before.

    Args:
        path: a file, any one of a model's parts, or a folder that holds one model.
        on_progress: told of bytes hashed and of tensors converted.

    Raises:
        ModelLoadError: the file is missing, broken or incomplete, is no model, or there is no room for the folder.
        UnsupportedModelError: an architecture or tokenizer that is not known here.
        CopySpecError: the gguf package is not installed, and the model is not kept.
    """
    paths = find_files(Path(path).expanduser().absolute())
    root = cache_dir() / "models" / "gguf"
    with _disk_errors(root):
        folder = root / _folder_name(paths, _digest(paths, root, on_progress))
        note = _kept(folder)
        if note is None:
            if importlib.util.find_spec("gguf") is None:
                raise missing_extra("gguf", "gguf")
            _make(read_file(paths[0]), folder, on_progress)
            note = _kept(folder)
        if note is None:
            raise ModelLoadError(f"{folder} was made from {paths[0]} and is gone: try again")
        return Converted(folder, note["quantization"])


def _folder_name(paths: tuple[Path, ...], digest: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", paths[0].stem).strip("._")[-60:]
    return f"{stem}-{digest[:16]}-{_FORMAT}"


def _kept(folder: Path) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return note


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelLoadError(f"{_no_room(root)}") from error
        raise ModelLoadError(f"The model cannot be converted to a folder in {root}: {error}") from error


def _no_room(root: Path, needed: int | None = None) -> str:
    size = "" if needed is None else f" {needed / 1e9:,.1f} GB are needed and {_free(root) / 1e9:,.1f} GB are free:"
    return f"There is no room in {root} for the dequantised weights:{size} free some, or set COPYSPEC_CACHE_DIR"


def _free(root: Path) -> int:
    return shutil.disk_usage(root).free


# ---- which content a path has ----------------------------------------------------------------------------------------


def _digest(paths: tuple[Path, ...], root: Path, on_progress: OnProgress | None) -> str:
    """The hash of the files' content, remembered while their sizes and times of change are the same."""
    stats = [path.stat() for path in paths]
    state = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]
    memo = root / "seen" / f"{hashlib.sha256(str(paths[0]).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        seen = json.loads(memo.read_text(encoding="utf-8"))
        if seen["state"] == state:
            return str(seen["digest"])
    total, done, digest = sum(stat.st_size for stat in stats), 0, hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if on_progress is not None:
                    on_progress(LoadProgress("convert", f"reading {path.name}", done, total, "B"))
    _write_whole(memo, json.dumps({"state": state, "digest": digest.hexdigest()}))
    return digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


# ---- making the folder -----------------------------------------------------------------------------------------------


def _make(file: GgufFile, folder: Path, on_progress: OnProgress | None) -> None:
    """Write the folder under another name, then give it its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write(file, temporary, folder.parent, on_progress)
        try:
            os.rename(temporary, folder)
        except OSError:
            if _kept(folder) is None:  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Folders of processes that ended in the middle: nothing was written to them for an hour."""
    for other in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            latest = max(path.stat().st_mtime for path in (other, *other.iterdir()))
            if time.time() - latest > _ABANDONED_S:
                shutil.rmtree(other, ignore_errors=True)


def _write(file: GgufFile, folder: Path, root: Path, on_progress: OnProgress | None) -> None:
    """The whole model into an empty folder; what can be refused is refused before weights are written."""
    from copyspec_engine.models import gguf_weights

    gguf_weights.check_tensors(file)
    config = gguf_weights.resolve_config(config_of(file, gguf_weights.read_factors(file)), file)
    tokenizer = build_tokenizer(file)
    needed = gguf_weights.num_bytes(file)
    if needed > _free(root):
        raise ModelLoadError(_no_room(root, needed))

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(LoadProgress("convert", f"dequantising {file.paths[0].name}", done, total, "it"))

    gguf_weights.write_weights(file, config, folder, tell)
    config.save_pretrained(folder)
    ends = end_tokens(file)
    build: Any = GenerationConfig
    build(
        bos_token_id=config.bos_token_id, eos_token_id=ends or None, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {
        "made_from": [str(path) for path in file.paths],
        "quantization": gguf_weights.quantization(file),
        "format": _FORMAT,
    }
    (folder / _NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb+") as written:
            os.fsync(written.fileno())
