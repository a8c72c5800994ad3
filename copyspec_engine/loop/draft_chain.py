"""The tokens that a draft model writes for one request before a pass, beside the copies for it.

Not covered: the draft model itself (draft_model.py), and who may ask it (mix.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.tree import DRAFT_MODEL, DraftTree, best_nodes
from copyspec_engine.memory.draft_acceptance import DraftAcceptance, DraftedToken

__all__ = ["DraftChain", "Guess", "masses"]

_LEAST = 0.02
"""Probabilities below this are not divided by."""


class Guess(NamedTuple):
    """The draft model's most likely next token."""

    token: int
    probability: float
    """What the draft model itself gives it."""


class DraftChain:
    """What the draft model has written so far for the draft of one pass.

    Args:
        copies: the draft so far.
        likely: how likely each node of it is to be reached, shape (len(copies),); empty if nobody knows.
        most: tokens that may be written.
        acceptance: what is known of the draft model in this conversation.
        eos_token_ids: nothing is written behind one of these.
        is_fixed: `most` tokens are written, whatever they are worth.
    """

    def __init__(
        self,
        copies: DraftTree,
        likely: npt.NDArray[np.float64],
        most: int,
        acceptance: DraftAcceptance,
        eos_token_ids: frozenset[int],
        *,
        is_fixed: bool,
    ) -> None:
        self.is_fixed = is_fixed
        self._copies, self._most, self._acceptance, self._eos = copies, most, acceptance, eos_token_ids
        self.drafted: list[DraftedToken] = []
        self.likely: list[float] = []
        """Probability of each of them."""
        self._copies_likely = likely.tolist()
        self._masses = masses(copies, likely)
        self._children = copies.children()
        self._at: int | None = -1
        """The node of the copies that says the same so far."""

    @property
    def is_done(self) -> bool:
        """No further token may follow."""
        return len(self.drafted) >= self._most or bool(self.drafted and self.drafted[-1].token in self._eos)

    def strength(self, depth: int) -> float:
        """Probability that copies hold the right token at a depth, from 1."""
        return self._masses[depth - 1] if depth <= len(self._masses) else 0.0

    def gain(self, pass_cost: float, cost: CostCurve, width: int, pace: float) -> float:
        """Tokens that going on is expected to gain over what its time gives otherwise, for the best number of passes.

        What is written is verified beside the copies, or, if it is the first of it, instead of them.

        Args:
            pass_cost: of each pass of the draft model.
            cost: of the pass that verifies, by its tokens.
            width: tokens that this one reads without any draft.
            pace: tokens that are written anyway in a time of 1.
        """
        node_costs = (pace * cost.marginal(width, len(self._copies) + self._most)).tolist()
        best = beside = 0.0
        instead = -self._worth_of_copies(cost, width, pace)
        reach = self.likely[-1] if self.likely else 1.0
        for depth in range(len(self.drafted) + 1, self._most + 1):
            right, new = self._acceptance.expected(self.strength(depth), depth)
            beside += reach * new - pace * pass_cost - node_costs[len(self._copies) + depth - 1]
            instead += reach * right - pace * pass_cost - node_costs[depth - 1]
            reach *= right
            best = max(best, beside, instead if not self.drafted else 0.0)
        return best

    def _worth_of_copies(self, cost: CostCurve, width: int, pace: float) -> float:
        """Tokens that the copies are expected to gain over what their time gives otherwise."""
        seconds = cost.seconds(width, len(self._copies) + 1)
        return sum(self._masses) - pace * float(seconds[-1] - seconds[0])

    def take(self, guess: Guess) -> None:
        """Add a token of the draft model."""
        if self._at is not None:
            self._at = self._children[self._at + 1].get(guess.token)
        strength = self.strength(len(self.drafted) + 1)
        self.drafted.append(DraftedToken(guess.token, guess.probability, strength, self._at is not None))
        before = self.likely[-1] if self.likely else 1.0
        self.likely.append(1.0 if self.is_fixed else before * self._acceptance.chance(self.drafted[-1]))

    def tree(self, pass_cost: float, cost: CostCurve, width: int, pace: float) -> DraftTree:
        """What is worth verifying of the copies and of what the draft model wrote; arguments as for `gain`."""
        tokens = [drafted_token.token for drafted_token in self.drafted]
        parents = range(-1, len(tokens) - 1)
        tree = self._copies.merged(tokens, parents, self.likely, DRAFT_MODEL, len(tokens) * pass_cost)
        if self.is_fixed or not len(tree):
            return tree
        chosen = best_nodes(np.array(self.posterior(tree)), cost.seconds(width, len(tree) + 1), pace)
        return tree.kept(np.sort(chosen).tolist())

    def posterior(self, tree: DraftTree) -> list[float]:
        """How likely each node of `tree` is, now that the draft model has spoken.

        Copies that say something else can only be right where it errs: what is left of their probability is what it
        leaves to others. Where both agree, what was learnt of such tokens holds.
        """
        children = tree.children()
        depths = {-1: 0}  # of the nodes that the draft model has written
        at = -1
        for drafted_token in self.drafted:
            at = children[at + 1][drafted_token.token]
            depths[at] = len(depths)
        chain, reach = list(depths), [1.0, *self.likely]
        own = [*self._copies_likely, *tree.probabilities[len(self._copies) :].tolist(), 1.0]
        likely, factors = [0.0] * len(tree), [1.0] * len(tree)
        for node, parent in enumerate(tree.parents):
            if node in depths:
                likely[node] = reach[depths[node]]
                continue
            factors[node] = factors[parent]
            if parent in depths:
                depth = depths[parent]
                left = self._left(depth, own[parent], own[chain[depth + 1]]) if depth + 1 < len(chain) else 1.0
                factors[node] = left * reach[depth] / max(own[parent], _LEAST)
            likely[node] = min(own[node] * factors[node], 1.0 if parent < 0 else likely[parent])
        return likely

    def _left(self, depth: int, own: float, own_next: float) -> float:
        """What the draft model's token leaves to others at a depth from 0, over what the copies had left to them.

        Args:
            depth: of the node before it.
            own: probability of that node.
            own_next: of its token, by the copies if they hold it.
        """
        drafted_token, reach = self.drafted[depth], [1.0, *self.likely]
        others = 1 - own_next / max(own, _LEAST) if drafted_token.is_copied else 1.0
        return (1 - reach[depth + 1] / max(reach[depth], _LEAST)) / max(others, _LEAST)


def masses(draft: DraftTree, likely: npt.NDArray[np.float64]) -> list[float]:
    """Probability that a draft holds the right token at each depth.

    Args:
        draft: whose nodes are asked of.
        likely: how likely each of them is to be reached, shape (len(draft),); empty if nobody knows: then all are sure.
    """
    masses: list[float] = []
    sure = likely if len(likely) else np.ones(len(draft))
    for depth, probability in zip(draft.depths(), sure.tolist(), strict=True):
        if depth > len(masses):
            masses.append(0.0)
        masses[depth - 1] = min(masses[depth - 1] + probability, 1.0)
    return masses
