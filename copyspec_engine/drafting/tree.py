"""A draft: a tree of tokens that a sequence may go on with, and where each of them comes from.

Not covered: which tokens are worth proposing (drafter.py), and which of them the model would have written
(sampling/verify.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.memory.index import Span

__all__ = ["DRAFT_MODEL", "FORCED", "RECYCLED", "DraftTree", "Run"]

FORCED = int(np.iinfo(np.int64).min)
"""The source of a token that a grammar leaves no choice about."""
DRAFT_MODEL, RECYCLED = FORCED + 1, FORCED + 2
"""The sources of tokens that are not copied: written by a draft model; an earlier pass's other candidate."""


class Run(NamedTuple):
    """Accepted tokens in a row whose sources are in a row."""

    num_tokens: int
    kind: str
    """As in `EngineMetrics.accepted_by_source`; without a place one of "grammar", "frequent", "draft_model" and
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
    the call's own token i; `FORCED` by a grammar; a `DRAFT_MODEL`; `RECYCLED`. Shape (len,), empty if nobody knows."""
    cost: float = field(default=0.0, compare=False)
    """What it took to make, in passes of one token, where that is not next to nothing."""

    @classmethod
    def chain(cls, tokens: Seq[int], sources: npt.NDArray[np.int64] | None = None) -> DraftTree:
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

    def kept(self, nodes: Seq[int]) -> DraftTree:
        """The tree of some nodes only, ascending; each one's parent must be among them."""
        place = {-1: -1} | {node: i for i, node in enumerate(nodes)}
        return DraftTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(place[self.parents[node]] for node in nodes),
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

    def joined(self, at: int, tokens: Seq[int], room: int) -> DraftTree:
        """The tree with a chain of forced tokens below node `at` (-1: the root), as likely as the node itself.

        Nodes that are there already are not added again, but count as that likely; the chain is cut where the tree has
        `room` nodes.
        """
        children = {
            (parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        likely = float(self.probabilities[at]) if at >= 0 and len(self.probabilities) else 1.0
        new_tokens, new_parents = list(self.tokens), list(self.parents)
        known = []
        for token in tokens:
            node = children.get((at, token))
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
        self, tokens: Seq[int], parents: Seq[int], probabilities: npt.ArrayLike, source: int, cost: float = 0.0
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
        nodes = {place: node for node, place in enumerate(zip(self.parents, self.tokens, strict=True))}
        new_tokens, new_parents, added, at = list(self.tokens), list(self.parents), [], [-1]
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            place = (at[parent + 1], token)
            if place not in nodes:
                nodes[place] = len(new_tokens)
                new_tokens.append(token)
                new_parents.append(place[0])
                added.append(i)
            at.append(nodes[place])
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
