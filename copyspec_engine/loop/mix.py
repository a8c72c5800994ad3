"""Copies and a draft model in one tree: who is asked before a pass, for how many tokens.

A draft model costs passes of its own. With "in-tree" a row asks it for one more token as long as that is expected
to gain more than the time it takes, at the pace at which tokens come anyway: where copies are strong they cover what
the draft model would say, so that it is not asked at all. "after-copies" and "alone" ask for a fixed number.

An answer's first token never waits for the draft model. What fails inside of it costs a request its draft model and
nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from copyspec_engine.drafting.cost import LiveCost
from copyspec_engine.drafting.drafter import DraftingPolicy, likely_nodes
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.loop.draft_chain import DraftChain, Guess, masses
from copyspec_engine.loop.draft_model import DraftWriter, UnknownTokenError
from copyspec_engine.loop.request import Request
from copyspec_engine.memory.draft_acceptance import DraftAcceptance, DraftedToken
from copyspec_engine.memory.per_owner import PerOwner

__all__ = ["Combination"]

logger = logging.getLogger(__name__)

_MATCH = 0.5
"""Copies that are right less often count as none with "after-copies": adaptive drafts hold guesses as well."""
_HORIZON = 20
"""Steps over which reading what is missing has to pay, and as many as there were since it might have paid."""
_MOST_FAILURES = 3
"""Requests in a row whose draft model failed, after which it is not asked any more."""
_SHARED = 0.5
"""How far what a call has learnt moves what later conversations of its owner start from."""


@dataclass(slots=True)
class _Known:
    """What is kept of a request from step to step."""

    acceptance: DraftAcceptance
    """Of its conversation."""
    drafted: list[DraftedToken] = field(default_factory=list)
    """What the draft model wrote before the last pass."""
    copies: tuple[float, frozenset[int]] | None = None
    """How strongly copies stood before the last pass, and their first tokens."""
    lost: float = 0.0
    """Tokens that the draft model might have gained if it had read the text."""


class _Writer:
    """A request that may ask the draft model before this pass."""

    def __init__(
        self,
        request: Request,
        known: _Known,
        copies: DraftTree,
        likely: npt.NDArray[np.float64],
        most: int,
    ) -> None:
        self.request, self.known = request, known
        self._copies, self._likely, self._most = copies, likely, most
        self.start()

    def start(self) -> None:
        """Nothing has been asked yet."""
        is_fixed, eos = self.request.drafting.draft_model_use != "in-tree", self.request.asked.eos_token_ids
        self.chain = DraftChain(self._copies, self._likely, self._most, self.known.acceptance, eos, is_fixed=is_fixed)


class Combination:
    """Adds a draft model's tokens to the drafts of a pass.

    Args:
        draft_model: which is asked.
        policy: what the drafts so far come from, with the cost of a pass.
        cost: that cost, of the model that it drafts for.
        max_tokens: tokens that it is asked for before a pass, at most.
    """

    def __init__(self, draft_model: DraftWriter, policy: DraftingPolicy, cost: LiveCost, max_tokens: int) -> None:
        self.draft_model, self._policy = draft_model, policy
        model = draft_model.model
        self._cost, self.own_cost = cost, LiveCost(model.info.step_cost, is_fixed=not model.cost_is_measured)
        self.seconds = 0.0
        """Time that the draft model has taken so far."""
        self._max_tokens = max_tokens
        self._acceptance = PerOwner(DraftAcceptance)
        self._known: dict[Request, _Known] = {}
        self._failures = 0
        self.error: str | None = None
        """Why the draft model is not asked any more."""

    @property
    def num_requests(self) -> int:
        """Requests of which anything is kept."""
        return max(len(self._known), self.draft_model.num_rows)

    def extend(
        self, requests: Sequence[Request], drafts: Sequence[DraftTree], rooms: Sequence[int], width: int
    ) -> list[DraftTree]:
        """The drafts for one pass with what the draft model adds.

        Args:
            requests: that sample in it.
            drafts: the copies that they propose.
            rooms: most nodes of each draft.
            width: tokens that the pass reads without any draft.
        """
        asking = zip(requests, drafts, rooms, strict=True)
        writers = [self._writer(request, draft, room) for request, draft, room in asking]
        able = [writer for writer in writers if writer is not None]
        if not able:
            return list(drafts)
        pace = self._policy.pace([request.drafting.drafter for request in requests], width)
        try:
            self._write(able, width, pace)
        except Exception as error:
            self._write_apart(able, width, pace, error)
        pass_cost, cost = self._passes(1), self._policy.cost
        for writer in able:
            writer.known.drafted = [] if writer.chain.is_fixed else writer.chain.drafted
        return [
            draft if writer is None or not writer.chain.drafted else writer.chain.tree(pass_cost, cost, width, pace)
            for writer, draft in zip(writers, drafts, strict=True)
        ]

    def _writer(self, request: Request, draft: DraftTree, room: int) -> _Writer | None:
        """A request that may ask the draft model, or None."""
        use = request.drafting.draft_model_use
        if use == "never" or not request.progress.first_token_s or self.error is not None:
            return None
        guessed = draft.probabilities
        if use == "after-copies" and len(guessed) and masses(draft, draft.reach(guessed))[0] < _MATCH:
            draft = DraftTree()
        can_share = use == "in-tree" and len(draft.probabilities)
        most = min(self._max_tokens, room - len(draft), self.draft_model.room(request))
        if most <= 0 or (len(draft) and not can_share):
            return None
        known = self._known.get(request) or self._begin(request)
        likely = likely_nodes(request.drafting.drafter, draft)
        if len(likely):
            strength = masses(draft, likely)[0]
            known.copies = strength, frozenset(draft.children()[0])
            likely = likely * known.acceptance.trust(strength)
        return _Writer(request, known, draft, likely, most)

    def _begin(self, request: Request) -> _Known:
        memory = request.drafting.memory
        acceptance = None if memory is None else memory.draft_acceptance
        if acceptance is None:
            acceptance = self._acceptance.of(request.account).copy()
        if memory is not None:
            memory.draft_acceptance = acceptance
        self._known[request] = known = _Known(acceptance)
        return known

    def _write(self, writers: Sequence[_Writer], width: int, pace: float) -> None:
        """Ask the draft model, one pass after the other, as long as anybody has reason to."""
        gains = self._gains(writers, width, pace)
        active = [writer for writer in writers if self._begins(writer, gains.get(writer.request, 0.0), pace)]
        while active:
            guesses = self._guess([writer.request for writer in active])
            pairs = [(writer, guess) for writer, guess in zip(active, guesses, strict=True) if guess is not None]
            for writer, guess in pairs:
                writer.chain.take(guess)
            going = [writer for writer, _ in pairs if not writer.chain.is_done]
            gains = self._gains(going, width, pace)
            active = [writer for writer in going if writer.request in gains]
        self._failures = 0

    def _guess(self, requests: Sequence[Request]) -> list[Guess | None]:
        before, start = self.draft_model.num_tokens_read, time.perf_counter()
        guesses = self.draft_model.guess(requests)
        seconds, width = time.perf_counter() - start, self.draft_model.num_tokens_read - before
        self.seconds += seconds
        if width:
            self.own_cost.observe(width, seconds)
        return guesses

    def _passes(self, width: int) -> float:
        """Cost of a pass of the draft model, in passes of one token of the model it drafts for."""
        return self.own_cost.passes(width, self._cost.unit)

    def _gains(self, writers: Sequence[_Writer], width: int, pace: float) -> dict[Request, float]:
        """Those for whom asking on is worth its time if they share the passes, and what they are expected to gain."""
        going = list(writers)
        while going:
            pass_cost = self._passes(len(going)) / len(going)
            gains = {
                writer.request: 0.0
                if writer.chain.is_fixed
                else writer.chain.gain(pass_cost, self._policy.cost, width, pace)
                for writer in going
            }
            left = [writer for writer in going if writer.chain.is_fixed or gains[writer.request] > 0]
            if len(left) == len(going):
                return gains
            going = left
        return {}

    def _begins(self, writer: _Writer, gain: float, pace: float) -> bool:
        """Whether a request asks the draft model at all before this pass, with all that it has to read for that."""
        request, known = writer.request, writer.known
        if writer.chain.is_fixed:
            self.draft_model.follow(request)
            return True
        if gain > 0:
            missing = self.draft_model.follow(request)
            reading = pace * (self._passes(missing) - self._passes(1))
            left = request.asked.max_total_tokens - len(request.sequence.token_ids)
            if known.lost + min(known.lost + _HORIZON * gain, left * gain) >= reading:
                known.lost = 0.0
                return True
            known.lost += gain
        known.acceptance.age(writer.chain.strength(1))
        return False

    def _write_apart(self, writers: Sequence[_Writer], width: int, pace: float, error: Exception) -> None:
        """The draft model failed: ask it for one request at a time, and no more for those of which it fails."""
        for writer in writers:
            writer.start()
        if len(writers) == 1:
            self._give_up(writers[0].request, error)
            return
        for writer in writers:
            if self.error is None:
                try:
                    self._write([writer], width, pace)
                except Exception as own:
                    writer.start()
                    self._give_up(writer.request, own)

    def _give_up(self, request: Request, error: Exception) -> None:
        if not isinstance(error, UnknownTokenError):  # that is the text's doing, and no reason to leave others without
            self._failures += 1
        logger.warning(
            "The draft model failed and request %s goes on without it: %s: %s",
            request.id,
            type(error).__name__,
            error,
            exc_info=error,
        )
        request.drafting.draft_model_use = "never"
        self._known.pop(request, None)
        self.draft_model.drop(request)
        if self._failures >= _MOST_FAILURES:
            self.error = f"{type(error).__name__}: {error}"
            logger.error("The draft model is not asked any more: it failed %d times in a row", self._failures)
            for other in list(self._known):
                self.draft_model.drop(other)
            self._known.clear()

    def observe(self, request: Request, written: Sequence[int]) -> None:
        """A pass is over: what a request has written."""
        known = self._known.get(request)
        if known is not None:
            known.acceptance.learn(known.drafted, written)
            if known.copies is not None:
                known.acceptance.learn_copies(known.copies[0], written[0] in known.copies[1])
            known.drafted, known.copies = [], None

    def release(self, request: Request) -> None:
        """A request is over."""
        known = self._known.pop(request, None)
        if known is not None:
            self._acceptance.of(request.account).blend(known.acceptance, _SHARED)
        self.draft_model.release(request)
