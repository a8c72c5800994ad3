"""GGUF files as they stand on disk: which files make a model, their metadata and where their tensors are.

Read here rather than with the gguf package's reader, which takes seconds for a large vocabulary and does not say what
is wrong with a broken file. Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError

__all__ = ["GgufFile", "GgufTensor", "find_files", "is_gguf", "read_file"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct`, by GGUF's number of the type."""
_STRING, _ARRAY = 8, 9
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""GGUF's names of them, by those of transformers."""
_OTHER_KINDS = {
    "mmproj": "a vision projector: give the file of its text model",
    "adapter": "a LoRA adapter: give a model, or merge the adapter into its base model",
    "imatrix": "statistics for quantising: give a model",
    "vocab": "a vocabulary without weights: give a model",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch's order: the dimension whose elements lie side by side comes last."""
    type_number: int
    """ggml's number of its type."""
    path: Path
    offset: int
    """Bytes from the beginning of the file."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model in one or several GGUF files."""

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    """Of the first file."""
    tensors: tuple[GgufTensor, ...]
    """Of all files."""

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def chat_template(self) -> str | None:
        """Jinja; None for a base model."""
        return self.metadata.get("tokenizer.chat_template") or None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Those that the file tells of, by transformers' names of them ("eos_token")."""
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        numbers = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
        return {name: tokens[number] for name, number in numbers.items() if number is not None and number < len(tokens)}

    @property
    def max_model_len(self) -> int | None:
        """Tokens up to which it reads a text in pieces as it reads it whole; None: it does not say."""
        context: int | None = self.metadata.get(f"{self.architecture}.context_length")
        if context is None or all(tensor.name != "rope_factors_long.weight" for tensor in self.tensors):
            return context
        original: int = self.metadata.get(f"{self.architecture}.rope.scaling.original_context_length", context)
        return min(context, original)


def is_gguf(path: str) -> bool:
    """Whether a model is to be read from GGUF: a file of that kind, or a folder that holds such and no config.json."""
    if os.path.isdir(path):
        has_config = os.path.exists(os.path.join(path, "config.json"))
        return not has_config and any(name.lower().endswith(".gguf") for name in os.listdir(path))
    return path.lower().endswith(".gguf") or (os.path.isfile(path) and _begins_with_magic(path))


def _begins_with_magic(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise ModelLoadError(f"Got model={path!r} but the file cannot be read: {error}") from error


def find_files(path: Path) -> tuple[Path, ...]:
    """The files of the model at `path`, which is one of them or a folder that holds no other model.

    Raises:
        ModelLoadError: there is no such file, one of its parts is missing, or the folder holds several models.
    """
    if path.is_dir():
        path = _only_model(path)
    elif not path.exists():
        raise ModelLoadError(f"Got model={str(path)!r}, a GGUF file that is not there: check the path")
    shard = _SHARD.match(path.name)
    if shard is None:
        return (path,)
    count = int(shard["count"])
    paths = tuple(path.with_name(f"{shard['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise ModelLoadError(f"{path} is one of {count} parts and {', '.join(missing)} is not beside it: fetch all")
    return paths


def _only_model(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(".gguf"))
    models: dict[str, Path] = {}
    for file in files:
        shard = _SHARD.match(file.name)
        models.setdefault(shard["stem"] if shard else file.name, file)
    text = {name: file for name, file in models.items() if not name.lower().startswith("mmproj")} or models
    if len(text) > 1:
        raise ModelLoadError(
            f"Got model={str(folder)!r}, a folder of {len(text)} GGUF models, but expected one: give one of the files "
            f"{', '.join(file.name for file in text.values())}"
        )
    return next(iter(text.values()))


def read_file(path: Path) -> GgufFile:
    """The metadata and the tensors' places of the model at `path` (see `find_files`); no weights are read.

    Raises:
        ModelLoadError: a file cannot be read, is broken or incomplete, or is not a model.
        UnsupportedModelError: it is of another version or byte order.
    """
    paths = find_files(path)
    headers = [_read_header(part) for part in paths]
    metadata = headers[0][0]
    kind = str(metadata.get("general.type", "model"))
    if metadata.get("general.architecture") == "clip":
        kind = "mmproj"
    if kind in _OTHER_KINDS:
        raise ModelLoadError(f"Got {paths[0]}, {_OTHER_KINDS[kind]}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelLoadError(f"{paths[0]} is broken: it does not say its general.architecture. Fetch it again")
    if int(metadata.get("split.count", 1) or 1) != len(paths):
        raise ModelLoadError(
            f"{paths[0]} says that it is one of {metadata['split.count']} parts, but its name does not: give the parts "
            f"the names they came with, as NAME-00001-of-{int(metadata['split.count']):05}.gguf"
        )
    tensors = tuple(tensor for _, those in headers for tensor in those)
    if not tensors:
        raise ModelLoadError(f"Got {paths[0]}, {_OTHER_KINDS['vocab']}")
    return GgufFile(paths, metadata, tensors)


def _read_header(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """A file's metadata, and its tensors."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()
    except (struct.error, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise ModelLoadError(
            f"{path} is broken or incomplete: its header ends in the middle or says what cannot be. Fetch it again"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


class _Header:
    """Reads one file's header from its beginning."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        num_tensors, num_keys = self._begin()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        places = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise struct.error("an alignment that is no number of bytes")
        start = -(-self._at // alignment) * alignment
        return metadata, [
            GgufTensor(name, shape, kind, self._path, start + offset) for name, shape, kind, offset in places
        ]

    def _begin(self) -> tuple[int, int]:
        if self._data[:4] != _MAGIC:
            raise ModelLoadError(f"{self._path} is not a GGUF file: it does not begin with the letters GGUF")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise UnsupportedModelError(
                    f"{self._path} is a big-endian GGUF file, but only little-endian ones are read: fetch that one"
                )
            raise UnsupportedModelError(
                f"{self._path} is of GGUF version {version}, but only versions 2 and 3 are read: convert it again"
            )
        return self._number("Q"), self._number("Q")

    def _number(self, format_: str) -> Any:  # noqa: ANN401 - int, float or bool by the format
        (value,) = struct.unpack_from("<" + format_, self._data, self._at)
        self._at += struct.calcsize("<" + format_)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        end = self._at + length
        if end > len(self._data):
            raise struct.error("a string beyond the end")
        text = self._data[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._number("I"), self._number("Q")
            if count > len(self._data):
                raise struct.error("an array beyond the end")
            if element in _SCALARS:
                values = struct.unpack_from(f"<{count}{_SCALARS[element]}", self._data, self._at)
                self._at += struct.calcsize(f"<{count}{_SCALARS[element]}")
                return list(values)
            return [self._value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"a value of type {kind}")
        return self._number(_SCALARS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number("I")
        if num_dimensions > 4:
            raise struct.error("a tensor of more than four dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(num_dimensions)]))
        if prod(shape) == 0:
            raise struct.error("an empty tensor")
        return name, shape, self._number("I"), self._number("Q")
