"""The last norm and the head of a model in float32: what decides which token is written.

Half-precision logits are coarse: bfloat16 ones near 20 are 0.125 apart, so that the best two tokens often tie, and
whether they do depends on how sums were rounded on the way. The same hidden states seldom tie in float32.

The layers stay as they are. The head's weights are held in float32 besides: 4 bytes for each of vocabulary x hidden
size, 113 MB for SmolLM2-135M and 2.1 GB for Llama 3 8B.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from copyspec_engine.execution.checkpoint import relative_difference, tolerance, vocab_size

__all__ = ["InFloat32", "decide_in_float32"]

logger = logging.getLogger(__name__)

_TOKENS = 12


class InFloat32(nn.Module):
    """A module whose weights are copied to float32, and whose input is cast to that.

    Args:
        module: takes one tensor; what else holds its weights, such as a tied embedding, keeps them as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).to(torch.float32)

    @property
    def weight(self) -> torch.Tensor:
        """In float32; models look at its type and size."""
        return cast("torch.Tensor", self.module.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """Likewise."""
        return cast("torch.Tensor | None", self.module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (..., hidden size) of any type to float32."""
        result: torch.Tensor = self.module(x.to(self.weight.device, torch.float32))
        return result


def decide_in_float32(model: PreTrainedModel, name: str) -> None:
    """Let a model of half precision give float32 logits, in place; others stay as they are.

    What the model does with its logits (soft-capping, scaling) it goes on doing, in float32. A head that is no plain
    linear layer (a quantized one) stays, and so does what a model cannot run with; both are logged.
    """
    head = _head(model)
    if head is None or model.get_submodule(head).weight.dtype == torch.float32:
        if head is None:
            logger.info("%s: its head is no plain linear layer, and decides in %s", name, model.dtype)
        return
    ids = torch.randint(0, vocab_size(model), (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    before, norm = _logits(model, ids), _last_norm(model, head, ids)
    failure = ""
    for names in ((norm, head), (head,)) if norm else ((head,),):
        kept = {name: model.get_submodule(name) for name in names}
        for part, module in kept.items():
            model.set_submodule(part, InFloat32(module))
        try:
            after = _logits(model, ids)
            difference = relative_difference(after, before.float())
            if after.dtype == torch.float32 and difference < tolerance(model):
                return
            failure = f"gives {after.dtype} logits that differ by {difference:.2g}"
        except Exception as error:  # whatever a model does between its norm and its head, it can do as before
            failure = f"{type(error).__name__}: {error}"
        for part, module in kept.items():
            model.set_submodule(part, module)
    logger.warning("%s decides in %s: with its head in float32 it %s", name, model.dtype, failure)


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Shape (tokens, vocabulary)."""
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    return logits


def _head(model: PreTrainedModel) -> str | None:
    """The name of a head whose weights can be copied to another type."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or type(head.weight.data) is not torch.Tensor:
        return None
    if not head.weight.dtype.is_floating_point:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _last_norm(model: PreTrainedModel, head: str, ids: torch.Tensor) -> str | None:
    """The name of the norm behind all layers that runs last before the head; None if there is none."""
    names: list[str] = []
    found: list[str] = []

    def note(name: str) -> Any:  # noqa: ANN401
        return lambda *_: names.append(name)

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if _is_outer_norm(name, module)
    ]
    hooks.append(model.get_submodule(head).register_forward_pre_hook(lambda *_: found.extend(names[-1:])))
    try:
        _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found else None


def _is_outer_norm(name: str, module: nn.Module) -> bool:
    """A norm that belongs to no layer, and that nothing moves between devices."""
    in_layer = any(part.isdigit() for part in name.split("."))
    is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
    return is_norm and not in_layer and not hasattr(module, "_hf_hook") and getattr(module, "weight", None) is not None
