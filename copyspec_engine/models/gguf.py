"""GGUF files as models: their weights are dequantised once and kept as a folder in transformers' form.

Their blocks are kept beside them as they are (`gguf_weights.AS_STORED`). The folder is in the cache folder, under the
hash of the files' content; which content a path had is remembered by its size and time of change. It appears whole or
not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from copyspec_engine.models.gguf_config import config_of
from copyspec_engine.models.gguf_file import GgufFile, find_files, read_file
from copyspec_engine.models.gguf_tokenizer import build_tokenizer, end_tokens
from copyspec_engine.models.store import converted_folders, gguf_folder, place, putting, ready, write_whole
from copyspec_engine.values.errors import ModelLoadError
from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["Converted", "convert", "is_converted"]

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Goes up when the same file would be converted otherwise: what was kept before is then not used any more."""
_NOTE = "copyspec.json"
_CHUNK = 2**24


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
    """
    tell = _Teller(on_progress, Path(path).name)
    paths = find_files(Path(path).expanduser().absolute())
    root = gguf_folder()
    state = _state(paths)
    digest = _remembered(state, root)
    kept = None if digest is None else _kept(digest)
    if kept is not None:
        return kept
    tell("reading the header of")
    model = _Model.of(read_file(paths[0]))  # what can be refused is refused before gigabytes are read
    ready(root)
    with _disk_errors(root):
        digest = digest or _digest(paths, tell)
        kept = _kept(digest)
        if kept is None:
            with putting(digest[:16], root, on_progress, phase="convert") as filling, _disk_errors(root):
                if _kept(digest) is None:  # else another process was faster
                    _write(model, filling, tell)
                    place(filling / "model", _folder(paths, digest, root))
            kept = _kept(digest)
        write_whole(_memo(state, root), json.dumps({"state": state, "digest": digest}))
    if kept is None:
        raise ModelLoadError(f"A folder was made from {paths[0]} in {root} and is gone: try again")
    return kept


def is_converted(folder: str) -> bool:
    """Whether a folder was made from a GGUF file."""
    return Path(folder, _NOTE).is_file()


@dataclass(frozen=True, slots=True)
class _Teller:
    """Tells of the steps of one file."""

    on_progress: OnProgress | None
    name: str

    def __call__(
        self, doing: str, done: int | None = None, total: int | None = None, unit: Literal["B", "it"] | None = None
    ) -> None:
        if self.on_progress is not None:
            self.on_progress(LoadProgress("convert", f"{doing} {self.name}", done, total, unit))


def _folder(paths: tuple[Path, ...], digest: str, root: Path) -> Path:
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", paths[0].stem)[-60:].strip("._") or "model"
    return root / f"{stem}-{digest[:16]}-{_FORMAT}"


def _kept(digest: str) -> Converted | None:
    """What was made of a content, by whatever name its file had then."""
    for folder in (folder for folder in converted_folders(digest) if folder.name.endswith(f"-{_FORMAT}")):
        note = folder / _NOTE
        try:
            return Converted(folder, str(json.loads(note.read_text(encoding="utf-8"))["quantization"]))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): the GGUF file is converted anew", note, error)
    return None


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelLoadError(_no_room(root)) from error
        raise ModelLoadError(f"The model cannot be converted to a folder in {root}: {error}") from error


def _no_room(root: Path, needed: int | None = None) -> str:
    size = "" if needed is None else f" {needed / 1e9:,.1f} GB are needed and {_free(root) / 1e9:,.1f} GB are free:"
    return f"There is no room in {root} for the dequantised weights:{size} free some, or set COPYSPEC_CACHE_DIR"


def _free(root: Path) -> int:
    return shutil.disk_usage(root).free


# ---- which content a path has ----------------------------------------------------------------------------------------


_State = list[list[Any]]
"""Of each file: its path, size in bytes and time of change."""


def _state(paths: tuple[Path, ...]) -> _State:
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _memo(state: _State, root: Path) -> Path:
    return root / "seen" / f"{hashlib.sha256(str(state[0][0]).encode()).hexdigest()[:32]}.json"


def _remembered(state: _State, root: Path) -> str | None:
    """The hash of the content of files that have not changed since it was taken."""
    try:
        seen = json.loads(_memo(state, root).read_text(encoding="utf-8"))
        return str(seen["digest"]) if seen["state"] == state else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("Ignored %s: %s: %s", _memo(state, root), type(error).__name__, error)
        return None


def _digest(paths: tuple[Path, ...], tell: _Teller) -> str:
    """The hash of the files' content."""
    total, done, digest = sum(path.stat().st_size for path in paths), 0, hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                tell("reading", done, total, "B")
    return digest.hexdigest()


# ---- making the folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    """A file's model but for its weights."""

    file: GgufFile
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def of(cls, file: GgufFile) -> _Model:
        from copyspec_engine.models import gguf_weights

        gguf_weights.check_tensors(file)
        config = gguf_weights.resolve_config(config_of(file, gguf_weights.read_factors(file)), file)
        return cls(file, config, build_tokenizer(file))


def _write(model: _Model, filling: Path, tell: _Teller) -> None:
    """The whole model into "model" in an empty folder, until it is on the disk."""
    from copyspec_engine.models import gguf_weights

    file, config = model.file, model.config
    needed = gguf_weights.num_bytes(file)
    if needed > _free(filling):
        raise ModelLoadError(_no_room(filling.parent, needed))
    folder = filling / "model"
    folder.mkdir()
    gguf_weights.write_weights(
        file, config, folder, lambda done, total: tell("dequantising the weights of", done, total, "it")
    )
    config.save_pretrained(folder)
    build: Any = GenerationConfig
    build(
        bos_token_id=config.bos_token_id, eos_token_id=end_tokens(file) or None, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    note = {"made_from": [str(path) for path in file.paths], "quantization": gguf_weights.quantization(file)}
    (folder / _NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
    for path in sorted(folder.iterdir()):
        tell("writing the weights of")
        with open(path, "rb+") as written:
            os.fsync(written.fileno())
