"""A draft is kept exactly as far as the model agrees with it."""

from __future__ import annotations

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.sampling.verify import Verdict, verify


def test_no_draft_gives_the_one_sampled_token() -> None:
    assert verify(DraftTree(), [7]) == Verdict((), (7,))


def test_a_chain_is_kept_up_to_the_first_difference_and_gives_a_bonus_token() -> None:
    draft = DraftTree.chain([5, 6, 7])
    assert verify(draft, [5, 6, 9, 4]) == Verdict((0, 1), (5, 6, 9))
    assert verify(draft, [5, 6, 7, 8]) == Verdict((0, 1, 2), (5, 6, 7, 8))
    assert verify(draft, [1, 6, 7, 8]) == Verdict((), (1,))


def test_a_tree_is_followed_down_the_branch_that_agrees() -> None:
    #   root -> 5 -> 6
    #        -> 8 -> 9 -> 1
    draft = DraftTree(tokens=(5, 8, 6, 9, 1), parents=(-1, -1, 0, 1, 3))
    assert verify(draft, [8, 0, 9, 0, 1, 2]) == Verdict((1, 3, 4), (8, 9, 1, 2))
    assert verify(draft, [5, 6, 0, 3, 0, 0]) == Verdict((0, 2), (5, 6, 3))


def test_a_token_after_a_refused_node_never_counts() -> None:
    draft = DraftTree.chain([5, 6])
    assert verify(draft, [4, 6, 6]).tokens == (4,)
