"""Linear layers whose weights oneDNN has laid out for its kernels, once at load, for passes on a CPU.

A verify pass has few rows. With weights as they are, the BLAS library behind torch takes two to three times as long for
two rows as for one; with packed weights it reads them at the memory's speed up to some eight rows.

oneDNN compiles code for each number of rows that it meets, and keeps it: 0.6 MB a layer shape. So it is shown a few
numbers only: many rows are padded to the next of them, by an eighth at most.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["PackedLinear", "pack_linears", "unpack_linears", "why_not_packed"]

_ROWS = 8
"""Rows that the layout is chosen for; all layouts serve any number."""
_LEAST_WEIGHTS = 1 << 19
"""Smaller layers stay as they are: their weights stay in the cache, and threads cost them more than they gain."""
_UNPADDED_ROWS = 64
_MOST_PADDING = 32
"""Rows; a whole multiple of it, as the widest pass usually is, has none."""


class PackedLinear(nn.Module):
    """`nn.Linear` of float32 on a CPU, with its weight in oneDNN's own layout.

    Args:
        linear: its weight is copied; what else holds it, such as a tied embedding, keeps it as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (..., in_features) to (..., out_features)."""
        rows = x.shape[:-1].numel()
        padding = -rows % _step(rows)
        shown = functional.pad(x.reshape(rows, -1), (0, 0, 0, padding)) if padding else x
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(shown, self.weight, self.bias, "none", [], "")
        return result[:rows].view(*x.shape[:-1], -1) if padding else result

    def unpacked(self) -> nn.Linear:
        """An ordinary layer with the very same weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        linear.bias = self.bias
        return linear


def _step(rows: int) -> int:
    """Rows that are shown to oneDNN are a multiple of this."""
    return 1 if rows <= _UNPADDED_ROWS else min(1 << ((rows - 1).bit_length() - 4), _MOST_PADDING)


def why_not_packed(model: nn.Module) -> str | None:
    """What keeps a model's linear layers from being packed; None: at least one of them can be."""
    operators = torch.ops.mkldnn
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(operators, "_reorder_linear_weight"):
        return "this build of torch has no oneDNN"
    if not any(_can_be_packed(module) for module in model.modules()):
        return "no linear layer is large and holds float32 on a CPU"
    return None


def pack_linears(model: nn.Module) -> None:
    """Replace a model's linear layers in place, one after another: no more than one weight is there twice.

    Layers of other classes stay as they are, and weights in other types.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and _can_be_packed(module):
            model.set_submodule(name, PackedLinear(module))


def unpack_linears(model: nn.Module) -> None:
    """Put ordinary layers back, on weights of their own: what was tied is not tied any more, but equal."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, module.unpacked())


def _can_be_packed(module: nn.Module) -> bool:
    """Subclasses compute something else, and so may layers with hooks or whose weight is a subclass (quantized)."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is torch.Tensor
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.layout == torch.strided
        and module.weight.numel() >= max(_LEAST_WEIGHTS, 1)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
