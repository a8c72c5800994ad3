"""Which tokens to propose for verification, and how many: one object for each call, in one of three ways.

"adaptive" grows a tree of copies from the conversation's memory by expected value (kernels/growth.py),
"copyspec" is the published algorithm, "none" proposes nothing; nor does "draft-model", whose tokens loop/mix.py asks
for. All learn or keep what they need in `observe`; `propose` changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.kernels.branch_points import (
    ANSWER_END,
    NUM_STARTS,
    PARENT,
    SOURCE,
    TAIL_SIZE,
    TOKEN,
    find_root,
    follow,
    make_call,
)
from copyspec_engine.drafting.kernels.candidates import Tables
from copyspec_engine.drafting.kernels.growth import MARGIN, damped_pace, grow, make_scratch, walk
from copyspec_engine.drafting.tree import ALTERNATIVE, DRAFT_MODEL, DraftTree, best_nodes
from copyspec_engine.memory.acceptance import (
    DECLARED,
    STARTED,
    Acceptance,
    alternatives_worth,
    blend,
    calibrated_all,
    fresh_acceptance,
    learn_alternatives,
    learn_pace,
    learn_paths,
)
from copyspec_engine.memory.alternatives import NO_ALTERNATIVES
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.memory.index import OVERLAP, EarliestIndex, Span
from copyspec_engine.memory.per_owner import PerOwner
from copyspec_engine.values.config import AdaptiveDrafter, CopySpecDrafter, DrafterConfig

__all__ = ["Drafter", "DraftingPolicy", "Ingredients", "answer_texts", "likely_nodes", "wants_alternatives"]

_MAX_NODES = 1024
_REGION = 2048
"""Tokens of memory that a call in flight holds for its answer at a time."""
_MOST_DELAY = 1.05
"""How much longer the pass that gives an answer's first token may take with a draft in it than without."""
_TRIAL_NODES, _MOST_GAIN = 16, 0.5
"""What so many alternatives gain in a pass at most, in tokens: where verifying them costs more, even keeping
them costs more than it gives."""
_SHARED = 0.05
"""How far what a call has learnt moves what later conversations of its owner start from."""


class Drafter(Protocol):
    """Drafts for one call. Only one thread at a time may use it and the others of its policy."""

    def propose(self, num_pending: int, room: int) -> DraftTree:
        """The draft behind the text known so far. Asking again gives the same.

        Args:
            num_pending: tokens that the same pass reads anyway, at least 1.
            room: most nodes, and so the deepest level; at least 0.
        """

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        """Take in what a step gave.

        Args:
            draft: what was proposed for it.
            accepted: its nodes on the accepted path, from the root down.
            tokens: what was written: their tokens and usually one more.
        """

    def finish(self) -> None:
        """The call is over, however it ended: its texts stay in the memory."""


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What takes part in adaptive drafts; for measuring what each part gives."""

    longest_match: bool = True
    """Off: only matches of one and two tokens."""
    agreement: bool = True
    """Off: nothing is made of other matches that go on with the same token or with another one."""
    tree: bool = True
    """Off: one candidate at each branch point."""
    resync: bool = True
    """Off: a source is not followed over an edit."""
    start: bool = True
    """Off: an answer's first token comes from matches only, like any other."""


class DraftingPolicy:
    """Begins drafters; holds the cost of a pass, which all conversations share, and what acceptance starts from.

    Args:
        cost: cost of a forward pass by its tokens, in passes of one token.
        weights: what acceptance starts from for a new owner; default: fitted to recorded conversations.
    """

    def __init__(self, cost: CostCurve, weights: Sequence[float] | None = None) -> None:
        self.cost = cost
        self.acceptance = PerOwner(partial(fresh_acceptance, weights))
        """What it starts from in a new conversation of each owner."""
        self.scratch = make_scratch(_MAX_NODES)

    def begin(
        self,
        options: DrafterConfig,
        memory: SessionMemory,
        prompt_ids: Sequence[int],
        eos_token_ids: frozenset[int] = frozenset(),
        prediction_ids: Sequence[int] = (),
        ingredients: Ingredients | None = None,
        owner: str | None = None,
    ) -> Drafter:
        """A drafter for one call.

        Args:
            options: which way, with its options.
            memory: the conversation's texts; the prompt is added to them.
            prompt_ids: the call's prompt, not empty.
            eos_token_ids: nothing is drafted behind one of these.
            prediction_ids: a text that the answer is expected to repeat in large part.
            ingredients: parts of adaptive drafting to leave out.
            owner: whose call it is: what it teaches is for his later ones.
        """
        if isinstance(options, AdaptiveDrafter):
            parts, known = ingredients or Ingredients(), self.acceptance.of(owner)
            return _AdaptiveDrafter(self, options, memory, prompt_ids, eos_token_ids, prediction_ids, parts, known)
        if isinstance(options, CopySpecDrafter):
            return _BlockDrafter(options, memory, prompt_ids, eos_token_ids)
        return _NoDrafter(memory, prompt_ids)

    def without_delay(self, width: int, room: int) -> int:
        """Of `room` draft nodes, how many a pass of `width` tokens takes along without a wait that anybody notices.

        A prompt's last pass gives the first token: whoever reads along waits for that one more than for the others.
        """
        seconds = self.cost.seconds(width, room + 1)
        return int(np.searchsorted(seconds, _MOST_DELAY * seconds[0], side="right")) - 1

    def pace(self, drafters: Sequence[Drafter | None], width: int) -> float:
        """Tokens that anything has to gain in the time of a pass of one token, since all rows of a pass wait for it.

        Args:
            drafters: of the rows that sample.
            width: tokens that the pass reads without any draft.
        """
        return MARGIN * sum(map(_pace, drafters)) / float(self.cost.seconds(width)[0])

    def share(self, drafters: Sequence[Drafter | None], drafts: Sequence[DraftTree], width: int) -> list[DraftTree]:
        """Of the drafts for one pass what is worth its time when all of them are in it.

        A further node makes everybody wait, so with more requests in a pass each node has to earn more. Nodes are taken
        in the order of their probabilities, whosever they are, as far as that gains tokens per second.

        Args:
            drafters: of the rows that sample.
            drafts: what they propose.
            width: tokens that the pass reads without any draft.
        """
        rows = [row for row, draft in enumerate(drafts) if len(draft.probabilities)]
        if len(drafts) < 2 or not rows:
            return list(drafts)
        likely = np.concatenate([drafts[row].reach(drafts[row].probabilities) for row in rows])
        owners = np.repeat(rows, [len(drafts[row]) for row in rows])
        nodes = np.concatenate([np.arange(len(drafts[row])) for row in rows])
        chosen = best_nodes(likely, self.cost.seconds(width, len(likely) + 1), self.pace(drafters, width))
        shared = list(drafts)
        for row in rows:
            kept = np.sort(nodes[chosen[owners[chosen] == row]])
            if len(kept) < len(drafts[row]):
                shared[row] = drafts[row].kept(kept.tolist())
        return shared


class _AdaptiveDrafter:
    """Copies from the memory, as a tree whose nodes are each worth their time."""

    def __init__(
        self,
        policy: DraftingPolicy,
        options: AdaptiveDrafter,
        memory: SessionMemory,
        prompt_ids: Sequence[int],
        eos_token_ids: frozenset[int],
        prediction_ids: Sequence[int],
        ingredients: Ingredients,
        known: Acceptance,
    ) -> None:
        self._policy, self._memory, self._index, self._known = policy, memory, memory.index, known
        self._alternatives, self._drafts_alternatives = memory.alternatives, options.recycle
        self._most = options.max_draft_tokens
        if memory.acceptance is None:
            memory.acceptance = known.copy()
        self.acceptance = memory.acceptance
        self._call = make_call(
            np.array(sorted(eos_token_ids), dtype=np.int64),
            np.array([getattr(ingredients, part.name) for part in fields(ingredients)], dtype=np.bool_),
        )
        starts = memory.add_prompt(prompt_ids)
        hypotheses = [(position, STARTED) for position in starts]
        if len(prediction_ids):
            predicted = memory.add_prediction(prediction_ids)
            hypotheses.insert(0, (predicted, DECLARED))
        room = len(self._call.starts)
        for row, hypothesis in enumerate(hypotheses[:room]):
            self._call.starts[row] = hypothesis
        self._call.sizes[NUM_STARTS] = len(hypotheses[:room])
        follow(self._index.arrays, self._call, np.asarray(prompt_ids[-len(self._call.tail) :], dtype=np.int64))
        if len(prediction_ids):
            self._call.alignments[0] = predicted, 0, 0
        self._length = len(prompt_ids)
        self.answer_texts: dict[Span, int] = {}
        self._first = self._answer = self._open(_REGION)
        self._call.sizes[ANSWER_END] = self._answer.stop
        find_root(self._index.arrays, self._call, True)

    def propose(self, num_pending: int, room: int) -> DraftTree:
        most = min(self._most, room)
        if most <= 0:
            return DraftTree()
        cost, scratch = self._policy.cost, self._policy.scratch
        count = grow(self._tables(), cost.marginal(num_pending, most), cost.seconds(num_pending, most + 1))
        nodes = scratch.nodes[1 : count + 1]
        return DraftTree(
            tuple(nodes[:, TOKEN].tolist()),
            tuple(nodes[:, PARENT].tolist()),
            scratch.probabilities[1 : count + 1].copy(),
            nodes[:, SOURCE].copy(),
        )

    def _tables(self) -> Tables:
        alternatives = self._alternatives.arrays if self._drafts_alternatives else NO_ALTERNATIVES
        return (
            tuple(self._index.arrays),
            tuple(alternatives),
            tuple(self.acceptance),
            tuple(self._call),
            tuple(self._policy.scratch),
        )

    @property
    def wants_alternatives(self) -> bool:
        """Whether what the next pass holds likely may ever be worth drafting."""
        if not self._drafts_alternatives:
            return False
        alone, drafted = self._policy.cost.seconds(1, _TRIAL_NODES + 1)[[0, -1]].tolist()
        worth = float(alternatives_worth(self.acceptance.alternatives))
        return bool(damped_pace(self.acceptance.pace) * (drafted - alone) < _MOST_GAIN * worth)

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        written, nodes = np.asarray(tokens, dtype=np.int64), np.asarray(accepted, dtype=np.int64)
        cost, acceptance = self._policy.cost, self.acceptance
        pace = acceptance.pace[0] / acceptance.pace[1]
        least = pace * float(cost.marginal(1, 1)[0])
        walk(self._tables(), written, draft.probabilities[nodes], least)
        learn_pace(acceptance, len(written), float(cost.seconds(1 + len(draft))[0]) + draft.cost)
        if len(draft):
            copied, accepted_copies = _copied_nodes(draft, nodes)
            learn_paths(acceptance, draft.probabilities[copied], accepted_copies)
            alternatives = draft.sources == ALTERNATIVE
            predicted = float(draft.probabilities[alternatives].sum()) / alternatives_worth(acceptance.alternatives)
            learn_alternatives(acceptance.alternatives, predicted, int(alternatives[nodes].sum()))
        if len(nodes):
            self._index.touch(draft.sources[nodes[-1:]])
        if not self._index.has_room(self._answer, len(written)):
            self._index.close(self._answer)
            self._answer = self._open(max(_REGION, OVERLAP + len(written)))
        follow(self._index.arrays, self._call, written)
        self._index.write(self._answer, written)
        self._length += len(written)
        self._call.sizes[ANSWER_END] = self._answer.stop
        find_root(self._index.arrays, self._call, False)

    def finish(self) -> None:
        self._index.close(self._answer)
        self._memory.add_answer(self._first)
        blend(self._known, self.acceptance, _SHARED)

    def _open(self, size: int) -> Span:
        """A part of the memory for the answer, or for what comes now of it."""
        span = self._memory.open_answer(size)
        self._index.write(span, self._call.tail[: min(OVERLAP, int(self._call.sizes[TAIL_SIZE]))][::-1], context=True)
        self.answer_texts[span] = self._length
        return span


class _BlockDrafter:
    """The published algorithm (arXiv 2502.08923, section 3), over this call's own tokens."""

    def __init__(
        self, options: CopySpecDrafter, memory: SessionMemory, prompt_ids: Sequence[int], eos_token_ids: frozenset[int]
    ) -> None:
        self._options, self._memory, self._eos = options, memory, eos_token_ids
        self._token_ids, self._num_prompt_tokens = list(prompt_ids), len(prompt_ids)
        self._earliest = EarliestIndex(options.min_match_tokens)

    def propose(self, num_pending: int, room: int) -> DraftTree:
        position = self._earliest.find(self._token_ids)
        if position is None or room <= 0:
            return DraftTree()
        tokens = _until_end(self._token_ids[position : position + min(self._options.block, room)], self._eos)
        return DraftTree.chain(tokens, ~np.arange(position, position + len(tokens)))

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        self._token_ids += tokens

    def finish(self) -> None:
        self._memory.remember(self._token_ids, self._num_prompt_tokens)


class _NoDrafter:
    """Plain decoding, which only remembers."""

    def __init__(self, memory: SessionMemory, prompt_ids: Sequence[int]) -> None:
        self._memory, self._token_ids, self._num_prompt_tokens = memory, list(prompt_ids), len(prompt_ids)

    def propose(self, num_pending: int, room: int) -> DraftTree:
        return DraftTree()

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        self._token_ids += tokens

    def finish(self) -> None:
        self._memory.remember(self._token_ids, self._num_prompt_tokens)


def _copied_nodes(
    draft: DraftTree, accepted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which nodes copying proposed, and the accepted ones, by their numbers among those."""
    copied = (draft.sources != DRAFT_MODEL) & (draft.sources != ALTERNATIVE)
    return copied, (np.cumsum(copied) - 1)[accepted[copied[accepted]]]


def likely_nodes(drafter: Drafter | None, draft: DraftTree) -> npt.NDArray[np.float64]:
    """How likely each node of a draft is to be reached, by all that its drafter knows; empty if nobody knows."""
    likely = draft.probabilities
    if isinstance(drafter, _AdaptiveDrafter):
        likely = np.asarray(calibrated_all(drafter.acceptance.paths, likely))
    return draft.reach(likely) if len(likely) else likely


def wants_alternatives(drafter: Drafter | None) -> bool:
    """Whether what a pass holds likely is to be kept in the memory (`SessionMemory.alternatives`)."""
    return isinstance(drafter, _AdaptiveDrafter) and drafter.wants_alternatives


def answer_texts(drafter: Drafter | None) -> Mapping[Span, int]:
    """The stored texts to which a drafter writes its answer, and where in the call's tokens each begins."""
    return drafter.answer_texts if isinstance(drafter, _AdaptiveDrafter) else {}


def _pace(drafter: Drafter | None) -> float:
    """Tokens that a request would write in the time of a pass of one token."""
    return float(damped_pace(drafter.acceptance.pace)) if isinstance(drafter, _AdaptiveDrafter) else 1.0


def _until_end(tokens: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """The draft up to and including the first end-of-sequence token: nothing behind it can be accepted."""
    for i, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: i + 1]
    return tokens
