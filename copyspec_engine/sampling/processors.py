"""What changes logits before a token is chosen: the grammar's mask, logit_bias, penalties and bans, in that order.

Penalties look at the text in front of each node: the sequence's own, which is counted once, and the draft's path down
to the node. A token's penalty is computed from whole counts in one place, so that it is the same to the last bit
whether the text in front was written or only drafted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.sampling.bans import Banned
from copyspec_engine.sampling.token_counts import TokenCounts
from copyspec_engine.values.config import SamplingParams

__all__ = ["add_bias", "ban", "mask_tokens", "penalise"]


def mask_tokens(scores: torch.Tensor, allowed: torch.Tensor) -> None:
    """Make every token impossible that is not allowed.

    Args:
        scores: shape (nodes, vocabulary); changed in place.
        allowed: bit t % 32 of word t // 32 says whether token t may follow, shape (nodes, words), int32. Tokens beyond
            the last word may not.
    """
    forbidden = ~_unpacked(allowed.to(scores.device))[:, : scores.shape[-1]]
    scores[:, : forbidden.shape[1]].masked_fill_(forbidden, -torch.inf)
    scores[:, forbidden.shape[1] :] = -torch.inf


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """The bits of a mask, shape (nodes, 32 * words)."""
    octets = words.contiguous().view(torch.uint8)
    if octets.device.type == "cpu":  # many times faster there
        return torch.from_numpy(np.unpackbits(octets.numpy(), axis=1, bitorder="little")).view(torch.bool)
    return _unpacked_octets(octets)


def _unpacked_octets(octets: torch.Tensor) -> torch.Tensor:
    """The bits of bytes on any device, shape (nodes, 8 * bytes)."""
    bits = (octets[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
    return bits.view(len(octets), -1).bool()


def add_bias(scores: torch.Tensor, logit_bias: tuple[tuple[int, float], ...]) -> None:
    """Add each token's bias to its scores, shape (nodes, vocabulary), in place."""
    tokens = torch.tensor([token for token, _ in logit_bias], device=scores.device)
    scores[:, tokens] += torch.tensor([bias for _, bias in logit_bias], dtype=scores.dtype, device=scores.device)


def ban(scores: torch.Tensor, banned: Banned, *, is_bound: bool) -> None:
    """Make banned tokens impossible, in place.

    Args:
        scores: shape (nodes, vocabulary).
        banned: by nodes.
        is_bound: a grammar has made other tokens impossible. Where it leaves only banned ones, these stay possible.
    """
    before = scores.clone() if is_bound else scores
    scores[:, torch.from_numpy(banned.everywhere).to(scores.device)] = -torch.inf
    rows, tokens = (torch.from_numpy(part).to(scores.device) for part in (banned.rows, banned.tokens))
    scores[rows, tokens] = -torch.inf
    if is_bound:
        stuck = scores.amax(dim=-1) == -torch.inf
        scores[stuck] = before[stuck]


def penalise(scores: torch.Tensor, params: SamplingParams, counts: TokenCounts, draft: DraftTree) -> None:
    """Apply the penalties at every node, each with its own path.

    Args:
        scores: behind the sequence's last token and behind each node, shape (1 + len(draft), vocabulary); changed in
            place.
        params: repetition_penalty, frequency_penalty and presence_penalty, applied in that order.
        counts: of the sequence.
        draft: the nodes.
    """
    device = scores.device
    drafted, on_path = _count_paths(draft)
    columns = torch.from_numpy(drafted).to(device)
    untouched = scores[:, columns]
    ids, times = torch.from_numpy(counts.ids).to(device), torch.from_numpy(counts.times).to(device)
    scores[:, ids] = _penalised(scores[:, ids], times, params)
    if len(draft):
        stands = torch.from_numpy(on_path > 0).to(device)
        times = torch.from_numpy(on_path + counts.times_of(drafted)).to(device)
        scores[:, columns] = torch.where(stands, _penalised(untouched, times, params), scores[:, columns])


def _penalised(scores: torch.Tensor, times: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores of tokens that stand in the text, `times` times in the answer; shape (nodes, tokens)."""
    penalty = params.repetition_penalty
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    scores = scores - times * params.frequency_penalty
    return scores - (times > 0) * params.presence_penalty


def _count_paths(draft: DraftTree) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The draft's distinct tokens, and how often each stands on the path to the root and to every node.

    Returns:
        Shapes (distinct,) and (1 + len(draft), distinct).
    """
    tokens, columns = np.unique(np.asarray(draft.tokens, dtype=np.int64), return_inverse=True)
    counts = np.zeros((1 + len(draft), len(tokens)), dtype=np.int64)
    for node, (parent, column) in enumerate(zip(draft.parents, columns.tolist(), strict=True)):
        counts[node + 1] = counts[parent + 1]
        counts[node + 1, column] += 1
    return tokens, counts
