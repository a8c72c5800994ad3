"""Log-probabilities of the tokens that were written, with the likeliest alternatives.

They are the model's own: of the logits as the model gave them, before any mask, bias, penalty, temperature or filter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copyspec_engine.sampling.sampler import SampleRow
from copyspec_engine.sampling.verify import Verdict
from copyspec_engine.values.outputs import TokenLogprob

__all__ = ["add_logprobs"]


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
