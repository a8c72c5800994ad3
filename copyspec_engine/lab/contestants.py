"""The drafters that `copyspec bench` replays: ours, with and without each ingredient, and the known ones beside it.

Not covered: drafters that need a model of their own (EAGLE, Medusa), since a replay has none.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import Drafter, DraftingPolicy, Ingredients
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.lab.replay import Begin
from copyspec_engine.memory.conversation import SessionMemory
from copyspec_engine.values.config import AdaptiveDrafter, CopySpecDrafter, DrafterConfig, NoDrafter
from copyspec_engine.values.errors import ConfigError, missing_extra

__all__ = ["INGREDIENTS", "OURS", "PEERS", "Contestant", "Session", "contestant", "installed", "ours"]

OURS = "adaptive"
PEERS = ("copyspec", "copyspec-64", "prompt-lookup", "arctic", "arctic-tuned")
"""What ours is measured against; "none" is plain decoding."""
INGREDIENTS = {
    "adaptive-no-longest": "longest_match",
    "adaptive-no-agreement": "agreement",
    "adaptive-no-tree": "tree",
    "adaptive-no-resync": "resync",
    "adaptive-no-start": "start",
    "adaptive-no-memory": "",
}
"""Ours with one ingredient switched off; without memory, each call starts from an empty one."""
MEMORY_TOKENS = 50_000_000
"""More than any replay holds: nothing is evicted."""

Contestant = Callable[[], Begin]
"""Opens a conversation. What a drafter learns over conversations lives here; a session's texts live in `Begin`."""


def contestant(name: str, cost: CostCurve, end: int | None = None) -> Contestant:
    """A fresh drafter that has learnt nothing yet.

    Args:
        name: one of `OURS`, `PEERS`, `INGREDIENTS` and "none".
        cost: what a pass costs; only ours looks at it.
        end: the token that ends an answer; nobody drafts behind it.

    Raises:
        ConfigError: no such name.
        CopySpecError: it needs a package that is not installed.
    """
    if name == "none":
        return ours(NoDrafter(), cost, end)
    if name == "copyspec":
        return ours(CopySpecDrafter(), cost, end)
    if name == "copyspec-64":
        return ours(CopySpecDrafter(block=64), cost, end)
    if name == "prompt-lookup":
        return lambda: _ending(PromptLookup, end)
    if name == "arctic":
        return lambda: _ending(ArcticConversation(max_spec_tokens=64, max_spec_factor=1.0).begin, end)
    if name == "arctic-tuned":
        return lambda: _ending(ArcticConversation(max_spec_tokens=192, max_spec_factor=4.0).begin, end)
    if name == "adaptive-no-memory":
        return ours(AdaptiveDrafter(), cost, end, remember=False)
    if name in INGREDIENTS:
        return ours(AdaptiveDrafter(), cost, end, Ingredients(**{INGREDIENTS[name]: False}))
    if name == OURS:
        return ours(AdaptiveDrafter(), cost, end)
    raise ConfigError(f"Got drafter {name!r} but expected one of {', '.join(('none', *PEERS, OURS, *INGREDIENTS))}")


def installed(name: str) -> bool:
    """Whether the package that a drafter needs is there."""
    return not name.startswith("arctic") or importlib.util.find_spec("arctic_inference") is not None


def ours(
    options: DrafterConfig,
    cost: CostCurve,
    end: int | None,
    ingredients: Ingredients | None = None,
    *,
    remember: bool = True,
) -> Contestant:
    """Our drafter with options of one's own; see `contestant`.

    Args:
        options: which way.
        cost: what a pass costs.
        end: the token that ends an answer.
        ingredients: what takes part in adaptive drafts; default: all.
        remember: keep texts from one call of a conversation to the next.
    """
    policy, eos = DraftingPolicy(cost.relative()), frozenset() if end is None else frozenset((end,))

    def conversation() -> Begin:
        memory = SessionMemory(MEMORY_TOKENS)

        def begin(prompt_ids: Sequence[int]) -> Drafter:
            session = memory if remember else SessionMemory(MEMORY_TOKENS)
            return policy.begin(options, session, prompt_ids, eos, ingredients=ingredients)

        return begin

    return conversation


def _ending(begin: Begin, end: int | None) -> Begin:
    """The same drafters, whose drafts end where the answer must."""
    return lambda prompt_ids: _Ending(begin(prompt_ids), end)


class _Ending:
    """A drafter without what it drafts behind the end of an answer."""

    def __init__(self, drafter: Drafter, end: int | None) -> None:
        self._drafter, self._end = drafter, end
        self.observe, self.finish = drafter.observe, drafter.finish

    def propose(self, num_pending: int, room: int) -> DraftTree:
        draft = self._drafter.propose(num_pending, room)
        if self._end not in draft.tokens:
            return draft
        return draft.kept([node for node, path in enumerate(draft.paths()[1:]) if self._end not in path[:-1]])


class Session:
    """One conversation of ours whose memory can be weighed."""

    def __init__(self, cost: CostCurve, end: int | None = None) -> None:
        self._policy, self._memory = DraftingPolicy(cost.relative()), SessionMemory(MEMORY_TOKENS)
        self._eos = frozenset() if end is None else frozenset((end,))

    def begin(self, prompt_ids: Sequence[int]) -> Drafter:
        """Open the conversation's next call."""
        return self._policy.begin(AdaptiveDrafter(), self._memory, prompt_ids, self._eos)

    @property
    def num_tokens(self) -> int:
        """Tokens in the memory: what it did not hold already of the prompts, and the answers."""
        return len(self._memory.index)


class PromptLookup:
    """transformers' prompt lookup with its defaults: the oldest place of the last 2 tokens, else of the last 1.

    It proposes the 10 tokens that follow there. It looks at this call's prompt and answer only.
    """

    _MAX_NGRAM = 2
    _NUM_TOKENS = 10

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        """The position behind the oldest occurrence of each run of one or two tokens that something follows."""
        self._extend(prompt_ids)

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size in range(1, min(self._MAX_NGRAM, end) + 1):
                self._follows.setdefault(tuple(self._tokens[end - size :]), end)
            self._tokens.append(token)

    def propose(self, num_pending: int, room: int) -> DraftTree:  # noqa: ARG002 - looks at no cost
        """See `Drafter`."""
        for size in range(self._MAX_NGRAM, 0, -1):
            at = self._follows.get(tuple(self._tokens[-size:]))
            if at is not None:
                return _chain(self._tokens[at : at + min(self._NUM_TOKENS, room)])
        return DraftTree()

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:  # noqa: ARG002
        """See `Drafter`."""
        self._extend(tokens)

    def finish(self) -> None:
        """Keeps nothing for the next call."""


class ArcticConversation:
    """One `SuffixDecodingCache` of Arctic Inference per conversation: earlier answers stay in its global tree.

    Raises:
        CopySpecError: the package is not installed.
    """

    MIN_DEPTH = 64
    """The cache's own default depth; deeper only where longer drafts are asked for."""

    def __init__(self, *, max_spec_tokens: int, max_spec_factor: float) -> None:
        try:
            module = importlib.import_module("arctic_inference.suffix_decoding")
        except ImportError:
            raise missing_extra("arctic-inference", "bench") from None
        self._cache: Any = module.SuffixDecodingCache(max_tree_depth=max(self.MIN_DEPTH, max_spec_tokens))
        self._limits = {"max_spec_tokens": max_spec_tokens, "max_spec_factor": max_spec_factor}
        self._num_calls = 0

    def begin(self, prompt_ids: Sequence[int]) -> ArcticCall:
        """Open the conversation's next call."""
        self._num_calls += 1
        return ArcticCall(self._cache, self._num_calls, self._limits, prompt_ids)


class ArcticCall:
    """One request to a `SuffixDecodingCache`."""

    _CONTEXT = 64
    """Tokens at the end that are looked up."""

    def __init__(self, cache: Any, request: int, limits: dict[str, Any], prompt_ids: Sequence[int]) -> None:  # noqa: ANN401
        self._cache, self._request, self._limits = cache, request, limits
        self._tail = list(prompt_ids[-self._CONTEXT :])
        cache.start_request(request, np.asarray(prompt_ids, dtype=np.int32))

    def propose(self, num_pending: int, room: int) -> DraftTree:  # noqa: ARG002 - looks at no cost
        """See `Drafter`."""
        found = self._cache.speculate(self._request, self._tail, **self._limits)
        return DraftTree(tuple(found.token_ids[:room]), tuple(found.parents[:room]))

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:  # noqa: ARG002
        """See `Drafter`."""
        self._cache.add_active_response(self._request, list(tokens))
        self._tail = [*self._tail, *tokens][-self._CONTEXT :]

    def finish(self) -> None:
        """Drops the prompt; the answer stays in the conversation's cache."""
        self._cache.stop_request(self._request)


def _chain(tokens: Sequence[int]) -> DraftTree:
    return DraftTree(tuple(tokens), tuple(range(-1, len(tokens) - 1)))
