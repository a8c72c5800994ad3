"""What the model held likely at the places of a draft, to be drafted again later (memory/alternatives.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from copyspec_engine.memory.alternatives import NUM_CANDIDATES, Candidates, chance_buckets, contexts_of
from copyspec_engine.sampling.sampler import SampleRow
from copyspec_engine.sampling.verify import Verdict

__all__ = ["add_candidates"]

_MOST, _MOST_ON_CPU = 32, 8
"""Places that are looked at in one pass, of all rows together: each takes the time and room of a row of logits."""


def add_candidates(
    logits: torch.Tensor,
    rows: Sequence[SampleRow],
    verdicts: Sequence[Verdict],
) -> None:
    """Note in the verdicts the candidates at some places of those rows that want them (`SampleRow.ending`).

    The candidates are the model's own, of the logits as it gave them.

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
        nodes.append([] if row.ending is None else _places(verdict, len(row.draft), most))
        chosen += [first + 1 + node for node in nodes[-1]]
        first += row.num_nodes
    if not chosen:
        return
    if chosen != list(range(len(logits))):
        logits = logits.index_select(0, torch.tensor(chosen, device=logits.device))
    tokens, chances = _likeliest(logits)
    start = 0
    for row, verdict, places in zip(rows, verdicts, nodes, strict=True):
        part = slice(start, start + len(places))
        start = part.stop
        if row.ending is not None:
            contexts = contexts_of(row.ending, row.draft.tokens, row.draft.parents, places)
            verdict.candidates = Candidates(contexts, tokens[part], chances[part])


def _places(verdict: Verdict, num_nodes: int, most: int) -> list[int]:
    """Draft nodes to look behind, ascending (-1: the text's end): the end of the path, then the likeliest others."""
    path = [-1, *verdict.accepted][-most:]
    others = [node for node in range(num_nodes) if node not in verdict.accepted]
    return sorted([*path, *others[: most - len(path)]])


def _likeliest(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens and the buckets of their probabilities, as in `Candidates`; with one copy to the host."""
    scores = logits.float()
    top = scores.topk(min(NUM_CANDIDATES, scores.shape[-1]), dim=-1)
    chances = scores.softmax(dim=-1).gather(-1, top.indices)
    both = torch.cat((top.indices.double(), chances.double()), dim=-1).cpu().numpy()
    tokens = np.full((len(both), NUM_CANDIDATES), -1, dtype=np.int32)
    buckets = np.full((len(both), NUM_CANDIDATES), -1, dtype=np.int8)
    width = top.indices.shape[-1]
    buckets[:, :width] = chance_buckets(both[:, width:])
    tokens[:, :width] = np.where(buckets[:, :width] >= 0, both[:, :width], -1)
    return tokens, buckets
