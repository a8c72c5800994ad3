"""What a pass says of a draft: which of its tokens the model would have written itself.

The draft is a guess that never depends on the noise, so sampling the target at every node and keeping the path that
agrees gives exactly the target's distribution: no rejection step is needed.

Not covered: what else the model held likely (likely_tokens.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from copyspec_engine.drafting.tree import DraftTree, Run
from copyspec_engine.memory.alternatives import Alternatives
from copyspec_engine.values.outputs import TokenLogprob

__all__ = ["Verdict", "verify"]


@dataclass(slots=True)
class Verdict:
    """The longest agreeing path, and what else is known of it as a step goes on."""

    accepted: tuple[int, ...]
    """Draft nodes on the path, from the root down."""
    tokens: tuple[int, ...]
    """Their tokens and then the bonus token, sampled where the path ends."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `tokens`, if the request asked for them."""
    runs: Sequence[Run] = ()
    """Where the accepted nodes came from, one after the other."""
    alternatives: Alternatives | None = None
    """What was likely at branch points of the draft, if the drafter wants to know."""


def verify(draft: DraftTree, sampled: Sequence[int]) -> Verdict:
    """Walk down the draft as long as a child holds the token that was sampled at its parent.

    Args:
        draft: the proposed nodes.
        sampled: the target's token after the sequence's last token, then after each node, shape (1 + len(draft),).

    Example: a draft 5 6 7 with sampled 5 6 9 4 accepts nodes 0 and 1 and gives the tokens 5 6 9; the 4, sampled after
    a 7 that was never written, is dropped.
    """
    children = draft.children()
    accepted: list[int] = []
    node, tokens = -1, [sampled[0]]
    while (child := children[node + 1].get(tokens[-1])) is not None:
        accepted.append(child)
        node = child
        tokens.append(sampled[child + 1])
    return Verdict(tuple(accepted), tuple(tokens))
