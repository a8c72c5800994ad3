"""What the model held likely at the nodes of a draft: log-probabilities for the caller, alternatives for later drafts.

Both are the model's own: of the logits as the model gave them, before any mask, bias, penalty, temperature or filter.
Alternatives are drafted again later (memory/alternatives.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from copyspec_engine.memory.alternatives import NUM_ALTERNATIVES, Alternatives, buckets_of, contexts_of
from copyspec_engine.sampling.sampler import SampleRow
from copyspec_engine.sampling.verify import Verdict
from copyspec_engine.values.outputs import TokenLogprob

__all__ = ["add_alternatives", "add_logprobs"]


def add_logprobs(logits: torch.Tensor, rows: Sequence[SampleRow], verdicts: Sequence[Verdict]) -> None:
    """Note log-probabilities in the verdicts of those rows that asked for them: of accepted nodes only.

    Args:
        logits: as for `sample`.
        rows: of one step.
        verdicts: one for each row.
    """
    nodes: list[int] = []
    tokens: list[int] = []
    first = 0
    for row, verdict in zip(rows, verdicts, strict=True):
        if row.params.logprobs:
            nodes += [first, *(first + 1 + node for node in verdict.accepted)]
            tokens += verdict.tokens
        first += row.num_nodes
    if not nodes:
        return
    found = iter(_measure(logits[nodes], tokens, max(row.params.top_logprobs for row in rows if row.params.logprobs)))
    for row, verdict in zip(rows, verdicts, strict=True):
        if row.params.logprobs:
            verdict.logprobs = tuple(_cut(next(found), row.params.top_logprobs) for _ in verdict.tokens)


def _measure(logits: torch.Tensor, tokens: list[int], most: int) -> list[TokenLogprob]:
    """Each token's log-probability and the `most` highest ones beside it; logits of shape (len(tokens), vocabulary)."""
    scores = logits.float().log_softmax(dim=-1)
    own = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])
    top = scores.topk(min(most, scores.shape[-1]), dim=-1)
    values: list[list[float]] = torch.cat((own, top.values), dim=-1).tolist()
    ids: list[list[int]] = top.indices.tolist()
    return [
        TokenLogprob(token, row[0], tuple(zip(alternatives, row[1:], strict=True)))
        for token, row, alternatives in zip(tokens, values, ids, strict=True)
    ]


def _cut(logprob: TokenLogprob, most: int) -> TokenLogprob:
    return TokenLogprob(logprob.token_id, logprob.logprob, logprob.top[:most])


_MOST, _MOST_ON_CPU = 32, 8
"""Branch points looked at in one pass, of all rows together: each takes the time and room of a row of logits."""


def add_alternatives(
    logits: torch.Tensor,
    rows: Sequence[SampleRow],
    verdicts: Sequence[Verdict],
) -> None:
    """Note in the verdicts the alternatives at some branch points of those rows that want them (`SampleRow.ending`).

    The alternatives are the model's own, of the logits as it gave them.

    Args:
        logits: as for `sample`.
        rows: of one step.
        verdicts: one for each row.
    """
    first, chosen = 0, []
    nodes: list[list[int]] = []
    most = _MOST_ON_CPU if logits.device.type == "cpu" else _MOST
    most = max(most // max(sum(row.ending is not None for row in rows), 1), 1)
    for row, verdict in zip(rows, verdicts, strict=True):
        nodes.append([] if row.ending is None else _points(verdict, len(row.draft), most))
        chosen += [first + 1 + node for node in nodes[-1]]
        first += row.num_nodes
    if not chosen:
        return
    if chosen != list(range(len(logits))):
        logits = logits.index_select(0, torch.tensor(chosen, device=logits.device))
    tokens, chances = _likeliest(logits)
    start = 0
    for row, verdict, points in zip(rows, verdicts, nodes, strict=True):
        part = slice(start, start + len(points))
        start = part.stop
        if row.ending is not None:
            contexts = contexts_of(row.ending, row.draft.tokens, row.draft.parents, points)
            verdict.alternatives = Alternatives(contexts, tokens[part], chances[part])


def _points(verdict: Verdict, num_nodes: int, most: int) -> list[int]:
    """Draft nodes to look behind, ascending (-1: the text's end): the end of the path, then the likeliest others."""
    path = [-1, *verdict.accepted][-most:]
    others = [node for node in range(num_nodes) if node not in verdict.accepted]
    return sorted([*path, *others[: most - len(path)]])


def _likeliest(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens and the buckets of their probabilities, as in `Alternatives`; with one copy to the host."""
    scores = logits.float()
    top = scores.topk(min(NUM_ALTERNATIVES, scores.shape[-1]), dim=-1)
    chances = scores.softmax(dim=-1).gather(-1, top.indices)
    both = torch.cat((top.indices.double(), chances.double()), dim=-1).cpu().numpy()
    tokens = np.full((len(both), NUM_ALTERNATIVES), -1, dtype=np.int32)
    buckets = np.full((len(both), NUM_ALTERNATIVES), -1, dtype=np.int8)
    width = top.indices.shape[-1]
    buckets[:, :width] = buckets_of(both[:, width:])
    tokens[:, :width] = np.where(buckets[:, :width] >= 0, both[:, :width], -1)
    return tokens, buckets
