"""Copies and a draft model in one tree: who is asked before a pass, for how many tokens.

A draft model costs passes of its own. With combine="tree" a row asks it for one more token as long as that is expected
to gain more than the time it takes, at the pace at which tokens come anyway: where copies are strong they cover what
the draft model would say, so that it is not asked at all. "copy-first" and "draft-only" ask for a fixed number.

An answer's first token never waits for the draft model. What fails inside of it costs a request its draft model and
nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from copyspec_engine.copies import DRAFT_MODEL
from copyspec_engine.cost import CostCurve
from copyspec_engine.draft_model import DraftModel, Guess
from copyspec_engine.draft_survival import DraftSurvival, Place
from copyspec_engine.drafter import DraftingPolicy, DraftTree
from copyspec_engine.sequence import Sequence

__all__ = ["Combination"]

logger = logging.getLogger(__name__)

_HORIZON = 6
"""Steps over which reading what is missing has to pay, and as many as there were since it might have paid."""
_LEAST = 0.02
"""Probabilities below this are not divided by."""
_MOST_FAILURES = 3
"""Requests in a row whose draft model failed, after which it is not asked any more."""
_SHARED = 0.3
"""How far what a call has learnt moves what later conversations start from."""


@dataclass(slots=True)
class _Known:
    """What is kept of a request from step to step."""

    survival: DraftSurvival
    """Of its conversation."""
    places: list[Place] = field(default_factory=list)
    """What the draft model wrote before the last pass."""
    lost: float = 0.0
    """Tokens that the draft model might have gained if it had read the text."""


class _Writer:
    """A request that may ask the draft model before this pass.

    Args:
        sequence: the request.
        copies: its draft so far.
        most: tokens that it may ask for.
        is_greedy: it takes them all; else each has to be worth its time.
        survival: what is known of the draft model in its conversation.
    """

    def __init__(
        self, sequence: Sequence, copies: DraftTree, most: int, is_greedy: bool, survival: DraftSurvival
    ) -> None:
        self.sequence, self.copies, self.most, self.is_greedy = sequence, copies, most, is_greedy
        self._survival = survival
        self.places: list[Place] = []
        self._likely: list[float] = []
        """Probability of each of the places."""
        self._masses = _masses(copies)
        self._children = {way: node for node, way in enumerate(zip(copies.parents, copies.tokens, strict=True))}
        self._at: int | None = -1
        """The node of the copies that says the same so far."""
        self.passes = 0
        self.is_done = False

    def strength(self, depth: int) -> float:
        """Probability that copies hold the right token at a depth, from 1."""
        return self._masses[depth - 1] if depth <= len(self._masses) else 0.0

    def gain(self, pass_cost: float, node_costs: Seq[float], pace: float) -> float:
        """Tokens that asking on is expected to gain over what the time gives otherwise, at the best number of them.

        Args:
            pass_cost: of each pass of the draft model.
            node_costs: of one node after the other in the pass that verifies them.
            pace: tokens that are written anyway in a time of 1.
        """
        best = total = 0.0
        reach = self._likely[-1] if self._likely else 1.0
        for depth in range(len(self.places) + 1, self.most + 1):
            right, new = self._survival.expected(self.strength(depth), depth)
            total += reach * new - pace * (pass_cost + node_costs[depth - 1])
            reach *= right
            best = max(best, total)
        return best

    def take(self, guess: Guess) -> None:
        """Add a token of the draft model."""
        if self._at is not None:
            self._at = self._children.get((self._at, guess.token))
        strength = self.strength(len(self.places) + 1)
        self.places.append(Place(guess.token, guess.probability, strength, self._at is not None))
        before = self._likely[-1] if self._likely else 1.0
        self._likely.append(1.0 if self.is_greedy else before * self._survival.chance(self.places[-1]))
        self.passes += 1
        self.is_done = guess.token in self.sequence.eos_token_ids or len(self.places) >= self.most

    def tree(self, pass_cost: float) -> DraftTree:
        """The copies and the whole chain."""
        tokens, cost = [place.token for place in self.places], self.passes * pass_cost
        return self.copies.merged(tokens, range(-1, len(tokens) - 1), self._likely, DRAFT_MODEL, cost)

    def likely(self, tree: DraftTree) -> list[float]:
        """How likely each node of `tree` is, now that the draft model has spoken.

        Copies that say something else can only be right where it errs: what is left of their probability is what it
        leaves to others. Where both agree, what was learnt of such places holds.
        """
        nodes = {way: node for node, way in enumerate(zip(tree.parents, tree.tokens, strict=True))}
        depths = {-1: 0}  # of the nodes that the draft model has written
        at = -1
        for place in self.places:
            at = nodes[at, place.token]
            depths[at] = len(depths)
        chain, reach, own = list(depths), [1.0, *self._likely], [*tree.probabilities.tolist(), 1.0]
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
        place, reach = self.places[depth], [1.0, *self._likely]
        others = 1 - own_next / max(own, _LEAST) if place.is_copied else 1.0
        return (1 - reach[depth + 1] / max(reach[depth], _LEAST)) / max(others, _LEAST)

    def reset(self) -> None:
        """As if nothing had been asked."""
        self.places, self._likely, self._at, self.passes, self.is_done = [], [], -1, 0, False


def _masses(draft: DraftTree) -> list[float]:
    """Probability that a draft holds the right token at each depth; 1 where nobody said how likely its nodes are."""
    masses: list[float] = []
    likely = draft.reach().tolist() if len(draft.probabilities) else [1.0] * len(draft)
    for depth, probability in zip(draft.depths(), likely, strict=True):
        if depth > len(masses):
            masses.append(0.0)
        masses[depth - 1] = min(masses[depth - 1] + probability, 1.0)
    return masses


class Combination:
    """Adds a draft model's tokens to the drafts of a pass.

    Args:
        draft_model: which is asked.
        policy: what the drafts so far come from, with the cost of a pass.
        unit: seconds that a pass of one token takes, in the unit of the draft model's costs.
        max_tokens: tokens that it is asked for before a pass, at most.
        only_chains: a draft with branches cannot be verified: the draft model is asked where there is no copy.
    """

    def __init__(
        self, draft_model: DraftModel, policy: DraftingPolicy, unit: float, max_tokens: int, *, only_chains: bool
    ) -> None:
        self.draft_model, self._policy = draft_model, policy
        self._cost = CostCurve([(width, seconds / unit) for width, seconds in draft_model.model.step_cost])
        self._max_tokens, self._only_chains = max_tokens, only_chains
        self._survival = DraftSurvival()
        self._known: dict[Sequence, _Known] = {}
        self._failures = 0
        self.error: str | None = None
        """Why the draft model is not asked any more."""

    def extend(self, sequences: Seq[Sequence], drafts: Seq[DraftTree], rooms: Seq[int], width: int) -> list[DraftTree]:
        """The drafts for one pass with what the draft model adds.

        Args:
            sequences: that sample in it.
            drafts: the copies that they propose.
            rooms: most nodes of each draft.
            width: tokens that the pass reads without any draft.
        """
        asking = zip(sequences, drafts, rooms, strict=True)
        writers = [self._writer(sequence, draft, room) for sequence, draft, room in asking]
        able = [writer for writer in writers if writer is not None and self.error is None]
        if not able:
            return list(drafts)
        pace = self._policy.pace([sequence.drafter for sequence in sequences], width)
        try:
            self._write(able, width, pace)
        except Exception as error:
            self._write_apart(able, width, pace, error)
        return [
            draft if writer is None or not writer.places else self._tree(writer, width, pace)
            for writer, draft in zip(writers, drafts, strict=True)
        ]

    def _writer(self, sequence: Sequence, draft: DraftTree, room: int) -> _Writer | None:
        """A request that may ask the draft model, or None."""
        rule = sequence.combine
        if rule == "copy-only" or not sequence.first_token_s:
            return None
        has_odds = rule == "tree" and not self._only_chains and (not len(draft) or len(draft.probabilities))
        if len(draft) and not has_odds:
            return None
        most = min(self._max_tokens, room - len(draft), self.draft_model.room(sequence))
        if most <= 0:
            return None
        known = self._known.get(sequence) or self._begin(sequence)
        known.places = []
        return _Writer(sequence, draft, most, rule != "tree", known.survival)

    def _begin(self, sequence: Sequence) -> _Known:
        memory = sequence.memory
        survival = self._survival.copy() if memory is None or memory.draft_survival is None else memory.draft_survival
        if memory is not None:
            memory.draft_survival = survival
        self._known[sequence] = known = _Known(survival)
        return known

    def _write(self, writers: Seq[_Writer], width: int, pace: float) -> None:
        """Ask the draft model, one pass after the other, as long as anybody has reason to."""
        active = [writer for writer in writers if self._begins(writer, len(writers), width, pace)]
        while active:
            guesses = self.draft_model.guess([writer.sequence for writer in active])
            for writer, guess in zip(active, guesses, strict=True):
                if guess is None:
                    writer.is_done = True
                else:
                    writer.take(guess)
            going = [writer for writer in active if not writer.is_done]
            active = [writer for writer in going if writer.is_greedy or self._gain(writer, len(going), width, pace) > 0]
        self._failures = 0

    def _begins(self, writer: _Writer, num_writers: int, width: int, pace: float) -> bool:
        """Whether a request asks the draft model at all before this pass, with all that it has to read for that."""
        sequence, known = writer.sequence, self._known[writer.sequence]
        if writer.is_greedy:
            self.draft_model.follow(sequence)
            return True
        gain = self._gain(writer, num_writers, width, pace)
        if gain > 0:
            missing = self.draft_model.follow(sequence)
            reading = pace * float(self._cost.seconds(missing)[0] - self._cost.seconds(1)[0])
            left = sequence.max_total_tokens - len(sequence.token_ids)
            if known.lost + min(known.lost + _HORIZON * gain, left * gain) >= reading:
                known.lost = 0.0
                return True
            known.lost += gain
        known.survival.rest(writer.strength(1))
        return False

    def _gain(self, writer: _Writer, num_writers: int, width: int, pace: float) -> float:
        """What asking on is expected to gain, if all writers share a pass."""
        pass_cost = float(self._cost.seconds(num_writers)[0]) / num_writers
        return writer.gain(pass_cost, self._node_costs(writer, width), pace)

    def _node_costs(self, writer: _Writer, width: int) -> list[float]:
        """Of the nodes that the draft model may add."""
        count = len(writer.copies)
        costs: list[float] = self._policy.cost.marginal(width, count + writer.most)[count:].tolist()
        return costs

    def _tree(self, writer: _Writer, width: int, pace: float) -> DraftTree:
        """What is verified of a request's copies and of what the draft model wrote."""
        tree = writer.tree(float(self._cost.seconds(1)[0]))
        if writer.is_greedy:
            return tree
        self._known[writer.sequence].places = writer.places
        likely = np.array(writer.likely(tree))
        order = np.argsort(-likely, kind="stable")  # a node never comes before its parent, which is as likely at least
        seconds = self._policy.cost.seconds(width, len(tree) + 1)
        gains = np.cumsum(likely[order]) - pace * (seconds[1:] - seconds[0])
        return tree.kept(np.sort(order[: int(gains.argmax()) + 1 if gains.max() > 0 else 0]).tolist())

    def _write_apart(self, writers: Seq[_Writer], width: int, pace: float, error: Exception) -> None:
        """The draft model failed: ask it for one request at a time, and no more for those of which it fails."""
        for writer in writers:
            writer.reset()
        if len(writers) == 1:
            self._give_up(writers[0].sequence, error)
            return
        for writer in writers:
            if self.error is None:
                try:
                    self._write([writer], width, pace)
                except Exception as own:
                    writer.reset()
                    self._give_up(writer.sequence, own)

    def _give_up(self, sequence: Sequence, error: Exception) -> None:
        self._failures += 1
        logger.warning(
            "The draft model failed and request %s goes on without it: %s: %s",
            sequence.request.request_id,
            type(error).__name__,
            error,
            exc_info=error,
        )
        sequence.combine = "copy-only"
        self._known.pop(sequence, None)
        self.draft_model.drop(sequence)
        if self._failures >= _MOST_FAILURES:
            self.error = f"{type(error).__name__}: {error}"
            logger.error("The draft model is not asked any more: it failed %d times in a row", self._failures)
            for other in list(self._known):
                self.draft_model.drop(other)
            self._known.clear()

    def observe(self, sequence: Sequence, written: Seq[int]) -> None:
        """A pass is over: what a request has written."""
        known = self._known.get(sequence)
        if known is not None:
            known.survival.learn(known.places, written)

    def release(self, sequence: Sequence) -> None:
        """A request is over."""
        known = self._known.pop(sequence, None)
        if known is not None:
            self._survival.blend(known.survival, _SHARED)
        self.draft_model.release(sequence)
