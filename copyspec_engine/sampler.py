"""From logits to tokens: greedy, or temperature with top-k and top-p.

The noise is a function of (seed, absolute position) alone. A token therefore comes out the same whether its logits were
computed one step at a time or inside a long draft, and drafting never changes a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from copyspec_engine.config import SamplingParams

__all__ = ["filtered_probabilities", "sample", "uniform_noise"]


def sample(logits: torch.Tensor, params: SamplingParams, seed: int, positions: Sequence[int]) -> list[int]:
    """One token for each row of logits.

    Args:
        logits: shape (nodes, vocabulary), any floating type, any device.
        params: temperature, top_k and top_p.
        seed: of the request, 0 to 2**63 - 1.
        positions: absolute position of the token to be sampled at each node, shape (nodes,).
    """
    if params.temperature == 0.0:
        greedy: list[int] = logits.argmax(dim=-1).tolist()
        return greedy
    cumulative = filtered_probabilities(logits, params).cumsum(dim=-1)  # (nodes, vocabulary)
    noise = torch.tensor(uniform_noise(seed, positions), dtype=torch.float64, device=logits.device)  # (nodes,)
    # The total is 1 up to rounding; scaled noise below it always falls on a token that was kept.
    chosen = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)
    tokens: list[int] = chosen.squeeze(-1).clamp_(max=logits.shape[-1] - 1).tolist()
    return tokens


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities after temperature, top_k and top_p, in that order; shape (nodes, vocabulary), float64."""
    scores = logits.double() / params.temperature
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        least = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens: the first token is always kept
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def uniform_noise(seed: int, positions: Sequence[int]) -> list[float]:
    """Uniform numbers in [0, 1), one for each position, from the counter-based Philox generator keyed by the seed."""
    first, last = min(positions), max(positions)
    blocks = np.random.Philox(key=seed, counter=first).random_raw(4 * (last - first + 1))[::4]  # a block a position
    return [int(blocks[position - first] >> 11) * 2.0**-53 for position in positions]
