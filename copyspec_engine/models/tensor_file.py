"""Safetensors files, written and read a piece at a time: no more is in memory than a piece.

The safetensors package takes and gives whole tensors, and maps files into memory, where what was read stays counted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["StoredTensor", "TensorWriter", "read_header"]

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_METADATA = "__metadata__"
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is in a file."""

    path: Path
    dtype: str
    """As safetensors calls it: "F32", "BF16"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    num_bytes: int

    def read(self) -> npt.NDArray[np.uint8]:
        """Its bytes, shape (first dimension, bytes of a row)."""
        stored = np.fromfile(self.path, np.uint8, self.num_bytes, offset=self.offset)
        return stored.reshape(self.shape[0] if self.shape else 1, -1)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by their names, and its metadata.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    with open(path, "rb") as file:
        beginning = file.read(8)
        size = struct.unpack("<Q", beginning)[0] if len(beginning) == 8 else path.stat().st_size
        if size > path.stat().st_size - 8:
            raise ValueError(f"{path} is not a whole safetensors file")
        header: dict[str, Any] = json.loads(file.read(size))
    metadata = header.pop(_METADATA, {})
    tensors = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        tensors[name] = StoredTensor(path, about["dtype"], tuple(about["shape"]), 8 + size + begin, end - begin)
    return tensors, metadata


class TensorWriter:
    """Writes a file whose tensors are known beforehand by their shapes; their bytes follow in this order.

    Args:
        path: the file.
        tensors: (name, dtype as safetensors calls it, shape) of each; the wider types come first.
        metadata: what else the file says.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
    ) -> None:
        header: dict[str, Any] = {_METADATA: metadata}
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + prod(shape) * _ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._left = end
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, values: npt.NDArray[Any]) -> None:
        """The next values of the tensors, as their bytes lie in memory."""
        self._left -= values.nbytes
        self._file.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self._file.name} lacks {self._left} bytes of what its header says")
