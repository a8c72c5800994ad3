"""A draft: a tree of tokens that a sequence may go on with, and where each of them comes from.

Not covered: which tokens are proposed (drafter.py), and which of them the model would have written
(sampling/verify.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compiled
from copyspec_engine.memory.index import Span

__all__ = ["ALTERNATIVE", "DRAFT_MODEL", "FORCED", "DraftTree", "Run", "best_nodes", "best_prefix"]

FORCED = int(np.iinfo(np.int64).min)
"""The source of a token that a grammar leaves no choice about."""
DRAFT_MODEL, ALTERNATIVE = FORCED + 1, FORCED + 2
"""The sources of tokens that are not copied: written by a draft model; held likely in an earlier pass."""


class Run(NamedTuple):
    """Accepted tokens in a row whose sources are in a row."""

    num_tokens: int
    kind: str
    """As in `EngineMetrics.accepted_by_source`; without a text one of "grammar", "frequent", "draft_model" and
    "recycled"."""
    text: Span | None = None
    offset: int = 0
    """Behind the text's first own token; without a text, among the call's own tokens."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Tokens proposed after the last token of a sequence.

    Node i holds `tokens[i]` and follows node `parents[i]` (-1: the sequence's last token); parents come first. A plain
    draft is a chain, parents -1, 0, 1, ...
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probabilities: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False)
    """How likely its own source held each node to be, shape (len,); empty if nobody asked."""
    sources: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False)
    """Where each node comes from: a position in the memory's index; 0 for a frequent token without a source; ~i for
    the call's own token i; `FORCED` by a grammar; a `DRAFT_MODEL`; an `ALTERNATIVE`. Shape (len,), or empty if nobody
    knows."""
    cost: float = field(default=0.0, compare=False)
    """What it took to make, in passes of one token, where that is not next to nothing."""

    @classmethod
    def chain(cls, tokens: Sequence[int], sources: npt.NDArray[np.int64] | None = None) -> DraftTree:
        parents = tuple(range(-1, len(tokens) - 1))
        return cls(tuple(tokens), parents) if sources is None else cls(tuple(tokens), parents, sources=sources)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    def first(self, count: int) -> DraftTree:
        """The first `count` nodes: they are a tree too, since parents come first."""
        if count >= len(self):
            return self
        count = max(count, 0)
        return DraftTree(
            self.tokens[:count], self.parents[:count], self.probabilities[:count], self.sources[:count], self.cost
        )

    def depths(self) -> list[int]:
        """Tokens from the sequence's last token down to each node, at least 1 each, shape (len,)."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def children(self) -> list[dict[int, int]]:
        """The nodes behind the root, then those behind each node, by their tokens; length 1 + len.

        Where two nodes of one parent hold the same token, it is the first one.
        """
        children: list[dict[int, int]] = [{} for _ in range(len(self) + 1)]
        for node, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True)):
            children[parent + 1].setdefault(token, node)
        return children

    def paths(self) -> list[tuple[int, ...]]:
        """The tokens down to the root, which are none, then those down to each node; length 1 + len."""
        paths: list[tuple[int, ...]] = [()]
        for parent, token in zip(self.parents, self.tokens, strict=True):
            paths.append((*paths[parent + 1], token))
        return paths

    def visible(self, num_before: int) -> npt.NDArray[np.bool_]:
        """Which tokens see which: `num_before` in a chain, at least 1, and the nodes behind the last one of them.

        Returns:
            Shape (num_before + len, num_before + len); row i: what token i sees, itself among it.

        Example: behind one token, parents (-1, 0, -1): node 2 sees that token and itself, not nodes 0 and 1.
        """
        size = num_before + len(self)
        if self.is_chain:
            return np.tri(size, dtype=np.bool_)
        seen = np.zeros((size, size), dtype=np.bool_)
        seen[:num_before, :num_before] = np.tri(num_before, dtype=np.bool_)
        for node, parent in enumerate(self.parents, num_before):
            seen[node] = seen[num_before + parent]  # parent -1: the last token before the draft
            seen[node, node] = True
        return seen

    def kept(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of some nodes only, ascending; each one's parent must be among them."""
        number = {-1: -1} | {node: i for i, node in enumerate(nodes)}
        return DraftTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(number[self.parents[node]] for node in nodes),
            self.probabilities[list(nodes)] if len(self.probabilities) else self.probabilities,
            self.sources[list(nodes)] if len(self.sources) else self.sources,
            self.cost,
        )

    def below(self, limit: int) -> DraftTree:
        """The nodes whose tokens are below `limit`, as those of their ancestors are."""
        if max(self.tokens, default=-1) < limit:
            return self
        kept: set[int] = {-1}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if token < limit and parent in kept:
                kept.add(node)
        return self.kept(sorted(kept)[1:])

    def joined(self, at: int, tokens: Sequence[int], room: int) -> DraftTree:
        """The tree with a chain of forced tokens below node `at` (-1: the root), as likely as the node itself.

        Nodes that are there already are not added again, but count as that likely; the chain is cut where the tree has
        `room` nodes.
        """
        children = self.children()
        likely = float(self.probabilities[at]) if at >= 0 and len(self.probabilities) else 1.0
        new_tokens, new_parents = list(self.tokens), list(self.parents)
        known = []
        for token in tokens:
            node = children[at + 1].get(token) if at < len(self) else None
            if node is not None:
                known.append(node)
            else:
                if len(new_tokens) >= room:
                    break
                node = len(new_tokens)
                new_tokens.append(token)
                new_parents.append(at)
            at = node
        added = len(new_tokens) - len(self)
        probabilities, sources = self.probabilities, self.sources
        if len(probabilities) == len(self):
            probabilities = np.append(probabilities, np.full(added, likely))
            probabilities[known] = likely
        if len(sources) == len(self):
            sources = np.append(sources, np.full(added, FORCED))
        return DraftTree(tuple(new_tokens), tuple(new_parents), probabilities, sources, self.cost)

    def merged(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        probabilities: npt.ArrayLike,
        source: int,
        cost: float = 0.0,
    ) -> DraftTree:
        """The tree with the nodes of another one, whose root is the same.

        Nodes that both have stay as they are; the others come behind all nodes of this tree.

        Args:
            tokens: of the other tree's nodes.
            parents: of its nodes, parents first.
            probabilities: of its nodes, shape (len(tokens),).
            source: of its nodes, as in `sources`.
            cost: what it took to make.
        """
        children = self.children()
        new_tokens, new_parents, added = list(self.tokens), list(self.parents), []
        numbers = [-1]  # of the other tree's root and nodes, in the new one
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            siblings = children[numbers[parent + 1] + 1]
            if token not in siblings:
                siblings[token] = len(new_tokens)
                new_tokens.append(token)
                new_parents.append(numbers[parent + 1])
                children.append({})
                added.append(i)
            numbers.append(siblings[token])
        likely, sources = self.probabilities, self.sources
        if len(likely) == len(self):
            likely = np.append(likely, np.asarray(probabilities, dtype=np.float64)[added])
        known = sources if len(sources) == len(self) else np.zeros(len(self), dtype=np.int64)
        sources = np.append(known, np.full(len(added), source, dtype=np.int64))
        return DraftTree(tuple(new_tokens), tuple(new_parents), likely, sources, self.cost + cost)

    def reach(self, likely: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """How likely each node is to be reached, by how likely each is: no less than the likeliest node below it.

        Both of shape (len,).
        """
        parents = np.array(self.parents, dtype=np.int64)
        inner = parents >= 0
        if (likely[parents[inner]] >= likely[inner]).all():  # as one source leaves it
            return likely
        raised = likely.tolist()
        for node in range(len(self) - 1, -1, -1):
            if self.parents[node] >= 0:
                raised[self.parents[node]] = max(raised[self.parents[node]], raised[node])
        return np.array(raised)

    def __len__(self) -> int:
        return len(self.tokens)


@compiled
def best_prefix(likely: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64], pace: float) -> int:
    """How many nodes to verify of those in some order: as many as gain most over what their time gives otherwise.

    Args:
        likely: the probability of each to be accepted, shape (n,) or longer.
        seconds: cost of a pass with none of them, with the first one, with the first two, ...; shape (n + 1,).
        pace: tokens that are written anyway in a time of 1.
    """
    best, most, gain = 0, 0.0, 0.0
    for i in range(len(seconds) - 1):
        gain += likely[i]
        if gain - pace * (seconds[i + 1] - seconds[0]) > most:
            best, most = i + 1, gain - pace * (seconds[i + 1] - seconds[0])
    return best


def best_nodes(likely: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64], pace: float) -> npt.NDArray[np.int64]:
    """The nodes to verify of those whose probabilities are `likely`, most likely first; see `best_prefix`.

    A node whose parent comes before it, and is as likely at least, is never among them without that one.
    """
    order = np.argsort(-likely, kind="stable")
    return order[: best_prefix(likely[order], seconds, pace)]
