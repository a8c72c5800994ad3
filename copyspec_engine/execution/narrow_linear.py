"""Layers that have no other weights than narrow ones: wide passes make float32 of some rows at a time."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from copyspec_engine.execution.narrow_panels import dequantise_across
from copyspec_engine.execution.narrow_weights import LANES, NarrowWeight

__all__ = ["NarrowEmbedding", "NarrowLinear"]

_PANEL = 1 << 19
"""Weights that are dequantised at a time: they stay in the cache until they are multiplied."""


class _Scratch(threading.local):
    """Memory for one panel, of each thread: it is written over and over, and stays in the cache."""

    _room: npt.NDArray[np.float32] = np.empty(0, np.float32)

    def panel(self, height: int, width: int) -> npt.NDArray[np.float32]:
        """Shape (height, width), whatever it holds; good until the next one is asked for."""
        if height * width > len(self._room):
            self._room = np.empty(height * width, np.float32)
        return self._room[: height * width].reshape(height, width)


_scratch = _Scratch()


class NarrowLinear(nn.Module):
    """`nn.Linear` of float32 activations on a CPU whose weight is narrow.

    Args:
        linear: a layer without memory for its weight (on the device "meta"); its bias is used.
        weight_names: under which names a checkpoint may have the weight.
    """

    narrow: NarrowWeight
    """Set before the first pass."""

    def __init__(self, linear: nn.Linear, weight_names: tuple[str, ...]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight_names = weight_names
        self.weight = _shape_only(linear)
        """What models and checks look at: shape, type, and no memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (..., in_features) to (..., out_features)."""
        rows = x.reshape(-1, self.in_features)
        result = torch.empty(len(rows), self.out_features)
        step = max(_PANEL // self.in_features // LANES, 1)
        for first in range(0, len(self.narrow.codes), step):
            blocks = slice(first, min(first + step, len(self.narrow.codes)))
            panel = _scratch.panel(self.in_features, LANES * (blocks.stop - first))
            dequantise_across(self.narrow, blocks, panel)
            columns = slice(LANES * first, min(LANES * blocks.stop, self.out_features))
            torch.mm(rows, torch.from_numpy(panel[:, : columns.stop - columns.start]), out=result[:, columns])
        if self.bias is not None:
            result += self.bias
        return result.reshape(*x.shape[:-1], self.out_features)


class NarrowEmbedding(nn.Module):
    """`nn.Embedding`, or a subclass that does something to the rows it has looked up, whose weight is narrow.

    Args:
        embedding: without memory for its weight.
        weight_names: as for `NarrowLinear`.
    """

    narrow: NarrowWeight
    """Set before the first pass."""

    def __init__(self, embedding: nn.Embedding, weight_names: tuple[str, ...]) -> None:
        super().__init__()
        self.weight_names = weight_names
        self.weight = _shape_only(embedding)
        self.lookup: nn.Module = embedding
        """Looks up the rows of a pass in a table of them alone."""
        embedding.padding_idx = None  # it matters to training alone, and may be beyond a pass's rows
        del embedding.weight
        self.lookup.weight = self.weight  # a plain attribute, for which no memory is taken

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (...) of any integers to (..., embedding_dim)."""
        self.lookup.weight = torch.from_numpy(self.narrow.rows(ids.reshape(-1).numpy()))
        found: torch.Tensor = self.lookup(torch.arange(ids.numel()).reshape(ids.shape))
        self.lookup.weight = self.weight
        return found


def _shape_only(module: nn.Linear | nn.Embedding) -> torch.Tensor:
    return torch.empty(module.weight.shape, dtype=torch.float32, device="meta")
