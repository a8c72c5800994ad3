"""What the model held likely at the branch points of a draft, to be drafted again later (memory/alternatives.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from copyspec_engine.memory.alternatives import NUM_ALTERNATIVES, Alternatives, buckets_of, contexts_of
from copyspec_engine.sampling.sampler import SampleRow
from copyspec_engine.sampling.verify import Verdict

__all__ = ["add_alternatives"]

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
