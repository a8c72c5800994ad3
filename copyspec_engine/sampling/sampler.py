"""From logits to tokens: processors, then the most likely token or one drawn by temperature, top_k, top_p and min_p.

A token is drawn by adding Gumbel noise to every logit and taking the highest. The noise is a function of (seed,
absolute position, token id) alone. A token therefore comes out the same whether its logits were computed one step at a
time or inside a long draft, and drafting never changes a sample; nor do logits that differ by rounding, unless two
tokens come out equal to that last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.sampling.gumbel import highest_perturbed, noise_keys
from copyspec_engine.sampling.processors import Banned, TokenCounts, add_bias, ban, mask_tokens, penalise
from copyspec_engine.values.config import SamplingParams

__all__ = ["SampleRow", "filtered", "sample"]

_WIDTH = 1024
"""Tokens that filters look at first: selecting them is many times faster than sorting the vocabulary."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What decides the tokens of one sequence besides its logits."""

    params: SamplingParams
    seed: int
    """0 to 2**63 - 1."""
    position: int
    """Absolute position of the token behind the sequence's last one."""
    draft: DraftTree = field(default_factory=DraftTree)
    counts: TokenCounts = field(default_factory=TokenCounts)
    """Of the sequence, up to date; read if there are penalties."""
    allowed: torch.Tensor | None = None
    """Tokens that may follow at each node, see `mask_tokens`; None: all."""
    banned: Banned | None = None
    """Tokens that may not; None: all may."""
    ending: tuple[int, int] | None = None
    """The sequence's last two tokens (-1: there is none), if its drafter asks what else is likely; else None."""

    @property
    def num_nodes(self) -> int:
        """Tokens to sample: behind the sequence's last token and behind each node of the draft."""
        return 1 + len(self.draft)

    @property
    def is_processed(self) -> bool:
        """Whether anything changes the logits."""
        is_masked = self.allowed is not None or self.banned is not None
        return is_masked or bool(self.params.logit_bias) or self.params.has_penalties

    def process(self, scores: torch.Tensor) -> None:
        """Mask, bias, penalties, bans, in place; scores of shape (num_nodes, vocabulary)."""
        if self.allowed is not None:
            mask_tokens(scores, self.allowed)
        if self.params.logit_bias:
            add_bias(scores, self.params.logit_bias)
        if self.params.has_penalties:
            penalise(scores, self.params, self.counts, self.draft)
        if self.banned is not None:
            ban(scores, self.banned, is_bound=self.allowed is not None)

    def keys(self) -> npt.NDArray[np.uint64]:
        """What keys the noise at each node, shape (num_nodes, 2)."""
        return noise_keys(self.seed, [self.position + depth for depth in (0, *self.draft.depths())])


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[list[int]]:
    """The target's tokens for all rows of a step.

    Args:
        logits: those of all rows, one behind the other, shape (sum of num_nodes, vocabulary), any floating type, any
            device; not changed.
        rows: in the order of their logits.

    Returns:
        For each row the token behind the sequence's last token and behind each node, shape (num_nodes,).
    """
    ends = list(itertools.accumulate(row.num_nodes for row in rows))
    spans = [range(end - row.num_nodes, end) for row, end in zip(rows, ends, strict=True)]
    scores = logits
    if any(row.is_processed for row in rows):
        scores = logits.to(torch.float32, copy=True)
        for row, span in zip(rows, spans, strict=True):
            if row.is_processed:
                row.process(scores[span.start : span.stop])
    tokens = _likeliest(scores)
    alike: dict[tuple[object, ...], list[int]] = {}  # rows whose tokens are drawn in the same way
    for i, row in enumerate(rows):
        if row.params.temperature > 0.0:
            params = row.params
            alike.setdefault((params.temperature, params.top_k, params.top_p, params.min_p), []).append(i)
    for group in alike.values():
        nodes = torch.tensor([node for i in group for node in spans[i]], device=logits.device)
        drawn = scores if len(nodes) == len(scores) else scores.index_select(0, nodes)
        keys = np.concatenate([rows[i].keys() for i in group])
        tokens[nodes] = _draw(drawn.float(), rows[group[0]].params, keys, tokens[nodes], _WIDTH)
    flat: list[int] = tokens.tolist()
    return [flat[span.start : span.stop] for span in spans]


def _likeliest(scores: torch.Tensor) -> torch.Tensor:
    """The token with the highest score of each node, shape (nodes,); the first one of several."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:  # NumPy's is 20 times as fast as torch's
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def _draw(
    scores: torch.Tensor, params: SamplingParams, keys: npt.NDArray[np.uint64], likeliest: torch.Tensor, width: int
) -> torch.Tensor:
    """A token for each node, drawn from what the filters leave.

    Args:
        scores: float32, shape (nodes, vocabulary).
        params: temperature above 0, and the filters.
        keys: of the nodes' noise, shape (nodes, 2).
        likeliest: the token with the highest score of each node, shape (nodes,).
        width: tokens that filters look at, the most likely ones; all where these turn out to be too few.
    """
    if params.top_k is None and params.top_p == 1.0 and params.min_p == 0.0:
        ids = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)[None]
        return highest_perturbed(scores, ids, keys, params.temperature, likeliest)
    kept, ids, is_whole = filtered(scores, params, width)
    columns = highest_perturbed(kept, ids.int(), keys, params.temperature, torch.zeros_like(likeliest))
    tokens = ids.gather(-1, columns[:, None]).squeeze(-1)
    if width < scores.shape[-1] and not bool(is_whole.all()):
        rest = ~is_whole
        again = keys[rest.cpu().numpy()]
        tokens[rest] = _draw(scores[rest], params, again, likeliest[rest], scores.shape[-1])
    return tokens


def filtered(
    scores: torch.Tensor, params: SamplingParams, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What temperature, top_k, top_p and min_p leave, in that order, of the `width` most likely tokens.

    Each filter keeps the tokens down to a score of its own. Those exactly as likely as the last one kept are kept too:
    which of them a sort puts first must not show in the answer.

    Returns:
        kept: the scores from the highest down, -inf for tokens filtered out, shape (nodes, width).
        ids: their tokens, same shape.
        is_whole: whether no kept token lies outside of the `width`, shape (nodes,).
    """
    ordered, ids = scores.topk(min(width, scores.shape[-1]), dim=-1)
    tempered = (ordered.double() - ordered[:, :1]).div_(params.temperature)  # from 0: no temperature is too low
    least, is_whole = _least(tempered, scores, params)
    return ordered.masked_fill_(tempered < least, -torch.inf), ids, is_whole


def _least(ordered: torch.Tensor, scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest score that the filters keep.

    Args:
        ordered: the highest tempered scores, descending from 0, shape (nodes, width).
        scores: of all tokens, shape (nodes, vocabulary).
        params: temperature and filters.

    Returns:
        least: shape (nodes, 1).
        is_whole: whether no kept token lies outside of the `width`, shape (nodes,).
    """
    width, vocabulary = ordered.shape[-1], scores.shape[-1]
    least = ordered.new_full((len(ordered), 1), -torch.inf)
    if params.top_k is not None and params.top_k <= width:
        least = ordered[:, params.top_k - 1 : params.top_k]
    edge = least  # top_p shares out all that top_k keeps, so that all of it must be there
    if params.top_p < 1.0:
        masses = ordered.masked_fill(ordered < least, -torch.inf).exp()
        total = _sums(masses)
        if params.top_k is None and width < vocabulary:
            total = _total_mass(scores, params)
        above = masses.cumsum(dim=-1) - masses  # mass of the likelier tokens: the first is always kept
        count = ((above < params.top_p * total) & (masses > 0)).sum(dim=-1, keepdim=True)
        count = count.clamp(min=1)  # a top_p may be less than float32 can hold
        least = torch.maximum(least, ordered.gather(-1, count - 1))
    if params.min_p > 0.0:
        least = least.clamp(min=math.log(params.min_p))  # the most likely token stands at 0
    if params.top_k is None:
        edge = least
    last = ordered[:, -1:]
    return least, ((last < edge) | (last == -torch.inf)).squeeze(-1) | (width == vocabulary)


def _total_mass(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Sum of all tokens' probabilities, each relative to the most likely one, shape (nodes, 1).

    In float32, which is several times faster on a CPU: it decides no more than which token reaches top_p.
    """
    scores = scores.float() - scores.amax(dim=-1, keepdim=True)
    return _sums(scores.div_(max(params.temperature, 1e-30)).exp_())


def _sums(masses: torch.Tensor) -> torch.Tensor:
    """Sum of each row, shape (nodes, 1): one by one, since torch adds in another order the more rows there are."""
    return torch.stack([row.sum() for row in masses])[:, None]
