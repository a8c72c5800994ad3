"""Passes out of static buffers, replayed as CUDA graphs: launching them one by one costs more than a small pass takes.

A pass travels to the device as one array (packing.py). The first pass of a bucket runs as it is, which sets up whatever
is set up once, and is then captured; later ones are replayed. What cannot be captured goes on as it is, and says so.

The same code runs on a CPU, without graphs, so that it can be tested there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from copyspec_engine.execution.attention import KVBatch, KVStore, keep_out_of_compiled_code
from copyspec_engine.execution.packing import Bucket, Piece, pack
from copyspec_engine.execution.paged_attention import PagedRows, kernels
from copyspec_engine.values.errors import UnsupportedModelError

__all__ = ["StaticPasses", "compile_layers", "undo_compile", "why_not_paged"]

logger = logging.getLogger(__name__)

_FIRST_CAPACITY = 2**17
"""int32 numbers in the buffers at first: a pass over about 100,000 tokens of context."""

_VERSIONS = 64
"""Versions of one function that torch.compile makes before it gives up on it."""


class StaticPasses:
    """Forward passes of a model whose rows all stand in one device buffer.

    Only one thread at a time may use it. The logits of a pass are good until the next one.

    Args:
        model: in evaluation mode, on one device, with the attention implementation "copyspec".
        store: the KV pool's tensors.
        use_graphs: capture and replay; needs a GPU.
    """

    def __init__(self, model: PreTrainedModel, store: KVStore, *, use_graphs: bool) -> None:
        self._model, self._store, self._device = model, store, model.device
        self._is_cuda = self._device.type == "cuda"
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._use_graphs = use_graphs
        self._pool = torch.cuda.graph_pool_handle() if use_graphs else None
        self._sent = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._side: torch.cuda.Stream | None = None
        self._logits: torch.Tensor | None = None
        self.capture_error: str | None = None
        """Why passes are not captured any more."""
        self._reserve(_FIRST_CAPACITY)

    @property
    def num_graphs(self) -> int:
        """Captured passes."""
        return len(self._graphs)

    @property
    def is_capturing(self) -> bool:
        """Whether a new bucket's pass will be captured."""
        return self._use_graphs and self.capture_error is None

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all pieces in one pass; the logits they want, in order, shape (sum of num_logits, vocabulary)."""
        bucket = Bucket.around(pieces)
        with self._on_device():
            self._send(pieces, bucket)
            captured = self._graphs.get(bucket)
            if captured is None and bucket.is_static and self.is_capturing:
                logits = self._capture(bucket)
            elif captured is None:
                logits = self._forward(bucket)
            else:
                graph, logits = captured
                graph.replay()
        return logits[: sum(piece.num_logits for piece in pieces)]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._is_cuda else nullcontext()

    def _reserve(self, capacity: int) -> None:
        """Buffers of `capacity` numbers; graphs of the old ones are gone."""
        self._graphs.clear()
        self.host = torch.zeros(capacity, dtype=torch.int32, pin_memory=self._is_cuda)
        self.buffer = torch.zeros(capacity, dtype=torch.int32, device=self._device)

    def _send(self, pieces: Sequence[Piece], bucket: Bucket) -> None:
        """One copy to the device, behind which nothing waits here."""
        if self._sent is not None:
            self._sent.synchronize()  # the pass before may still be read from the host's buffer
        if (size := bucket.size(pieces)) > len(self.host):
            if self._is_cuda:
                torch.cuda.synchronize(self._device)
            self._reserve(1 << (size - 1).bit_length())
        size = pack(pieces, bucket, self._store.padding_slot, self.host.numpy())
        self.buffer[:size].copy_(self.host[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _capture(self, bucket: Bucket) -> torch.Tensor:
        """The logits of the pass that stands in the buffer; the next of its bucket will be replayed."""
        current = torch.cuda.current_stream()
        # One for all captures: the allocator keeps memory apart for each stream.
        side = self._side = self._side or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            eager = self._forward(bucket)  # compiles kernels and makes the KV's tensors
        current.wait_stream(side)
        eager.record_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            logits = self._room(eager)
            # "thread_local": other threads of the process may use the GPU in the meantime.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits.copy_(self._forward(bucket))
        except Exception as error:
            self.capture_error = f"{type(error).__name__}: {error}"
            logger.warning("passes run without CUDA graphs, which is slower: %s", self.capture_error)
            torch.cuda.synchronize(self._device)
            return eager
        self._graphs[bucket] = graph, logits
        return eager

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        """A part of the one tensor that all graphs leave their logits in, which spares one for each of them."""
        if self._logits is None or len(self._logits) < len(like):
            self._logits = torch.empty_like(like)
        return self._logits[: len(like)]

    def _forward(self, bucket: Bucket) -> torch.Tensor:
        """The model on what stands in the buffer, without a look at it; shape (bucket.logits, vocabulary)."""
        flat = self.buffer
        parts = {
            name: flat[at : at + int(np.prod(shape))].view(shape) for name, (at, shape) in bucket.fields.items()
        } | {"slots": flat[bucket.fields["slots"][0] :]}
        wanted = parts["wanted"].long()
        result = self._model(
            input_ids=parts["ids"].long()[None],
            position_ids=parts["positions"].long()[None],
            use_cache=False,
            logits_to_keep=wanted,
            kv_batch=KVBatch(
                self._store, paged=PagedRows(**{field.name: parts[field.name] for field in fields(PagedRows)})
            ),
        )
        logits: torch.Tensor = result.logits[0]  # from some models, those of every token
        return logits if len(logits) == bucket.logits else logits[wanted]


def why_not_paged(model: PreTrainedModel) -> str | None:
    """What keeps a model's passes from reading the KV in place on a GPU; None: nothing that is known beforehand."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {len(devices)} devices"
    if kernels() is None:
        return "Triton is not installed"
    return None


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Let torch.compile fuse what stands between matrix products, in each decoder layer; compiled at its first pass.

    Layers of one kind share their code, and sizes stay open, so that no bucket compiles again.

    Raises:
        UnsupportedModelError: the model's layers are not made as those of transformers are.
    """
    layers = _layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no layers that are known to compile")
    keep_out_of_compiled_code()
    # All models share the function around a layer's own, so that versions of it add up over the process's models.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def undo_compile(model: PreTrainedModel) -> None:
    """Run the layers as they are again."""
    for layer in _layers(model):
        layer._compiled_call_impl = None


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
