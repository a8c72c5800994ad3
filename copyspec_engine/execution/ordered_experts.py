"""Mixtures of experts whose result for a token is the same bits however many other tokens an expert reads.

Importing this module registers the experts function "copyspec". Each expert's matrix products are filled up as passes
are (exact_passes.py), and what a token's experts say is added up in the order of its own choice of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = ["order_experts"]

_NAME = "copyspec"
_ROWS = 4
"""Matrix products have a multiple of so many rows."""


def order_experts(model: PreTrainedModel) -> None:
    """Let a model's experts run as above, if it has any that transformers lets run in other ways."""
    if any(hasattr(module, "gate_up_proj") or hasattr(module, "up_proj") for module in _experts(model)):
        model.set_experts_implementation(_NAME)


def _experts(model: nn.Module) -> list[nn.Module]:
    """Modules that hold the weights of several experts as one tensor."""
    return [module for module in model.modules() if isinstance(getattr(module, "down_proj", None), nn.Parameter)]


def _run_experts(
    self: Any,  # noqa: ANN401 - each architecture has a class of its own
    hidden_states: torch.Tensor,  # (tokens, hidden)
    top_k_index: torch.Tensor,  # (tokens, chosen)
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What each token's experts say of it, weighted and added up, shape (tokens, hidden)."""
    num_tokens, num_chosen = top_k_index.shape
    experts, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
    said = hidden_states.new_zeros((len(experts), hidden_states.shape[1]), dtype=weights.dtype)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in sorted(set(experts.tolist())):
        if expert >= self.num_experts:  # chosen by nobody
            continue
        places = (experts == expert).nonzero()[:, 0]
        places = torch.cat((places, places[-1:].expand(-len(places) % _ROWS)))
        inner = _linear(self, hidden_states[places // num_chosen], first, expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _linear(self, inner, "down_proj", expert)
        if getattr(self, "has_post_expert_norm", False):
            outer = self.post_expert_norm(outer)
        said[places] = outer * weights[places]
    by_token = said.view(num_tokens, num_chosen, -1)
    total = by_token[:, 0]
    for choice in range(1, num_chosen):
        total = total + by_token[:, choice]
    return total.to(hidden_states.dtype)


def _linear(experts: Any, x: torch.Tensor, name: str, expert: int) -> torch.Tensor:  # noqa: ANN401
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.t() if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _run_experts)
