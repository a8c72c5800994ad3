"""What a draft model writes beside copies is bought as long as it pays; what it is worth is learnt."""

from __future__ import annotations

import random

import numpy as np
import pytest

from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.tree import DRAFT_MODEL, DraftTree
from copyspec_engine.loop.draft_chain import DraftChain, Guess
from copyspec_engine.memory.draft_acceptance import DraftAcceptance, DraftedToken

COST = CostCurve([(1, 1.0), (64, 1.63)])
"""A node costs 0.01."""
END = 99
COPIES = DraftTree((5, 8, 6), (-1, -1, 0), np.array([0.6, 0.1, 0.5]), np.array([40, 90, 41]))
NOTHING = DraftTree()


def chain(copies: DraftTree = NOTHING, most: int = 5, *, is_fixed: bool = False) -> DraftChain:
    return DraftChain(copies, copies.probabilities, most, DraftAcceptance(), frozenset({END}), is_fixed=is_fixed)


def written(chain: DraftChain, *tokens: int) -> DraftChain:
    for token in tokens:
        chain.take(Guess(token, 0.9))
    return chain


def test_what_is_known_follows_what_was_written() -> None:
    acceptance, rng = DraftAcceptance(), random.Random(0)
    for _ in range(400):
        right = rng.random() < 0.4
        acceptance.learn(
            [DraftedToken(1, 0.9, 0.0, is_copied=False), DraftedToken(2, 0.9, 0.0, is_copied=False)],
            [1 if right else 3, 2],
        )
    assert acceptance.expected(0.0, 1) == (pytest.approx(0.4, abs=0.1), pytest.approx(0.4, abs=0.1))
    assert acceptance.expected(0.0, 2)[0] > 0.9
    assert acceptance.chance(DraftedToken(7, 0.93, 0.0, is_copied=False)) == pytest.approx(0.4 / 0.7, abs=0.2)
    # Nothing was seen where copies stand: there it is taken to be as good as it is on the whole.
    right, new = acceptance.expected(0.6, 1)
    assert acceptance.expected(0.0, 1)[0] < right < acceptance.expected(0.0, 2)[0]
    assert new == pytest.approx(right * 0.35)


def test_tokens_that_a_copy_says_too_are_right_but_gain_nothing() -> None:
    acceptance = DraftAcceptance()
    for _ in range(100):
        acceptance.learn([DraftedToken(1, 0.9, 0.9, is_copied=True)], [1])
    right, new = acceptance.expected(0.9, 1)
    assert right > 0.9
    assert new < 0.05


def test_what_stands_behind_a_wrong_token_is_not_learnt_from() -> None:
    acceptance, other = DraftAcceptance(), DraftAcceptance()
    first, second = DraftedToken(1, 0.9, 0.0, is_copied=False), DraftedToken(2, 0.5, 0.0, is_copied=False)
    acceptance.learn([first, second], [4, 2])
    other.learn([first], [4])
    assert acceptance.expected(0.0, 2) == other.expected(0.0, 2)
    assert acceptance.chance(second) == DraftAcceptance().chance(second)
    assert acceptance.chance(first) == other.chance(first) < DraftAcceptance().chance(first)


def test_what_is_known_gets_older_while_nobody_asks() -> None:
    acceptance = DraftAcceptance()
    for _ in range(50):
        acceptance.learn([DraftedToken(1, 0.9, 0.0, is_copied=False)], [2])
    low = acceptance.expected(0.0, 1)[0]
    for _ in range(1500):
        acceptance.age(0.0)
    assert low < 0.15
    assert acceptance.expected(0.0, 1)[0] > 0.6


def test_a_copy_of_what_is_known_goes_its_own_way() -> None:
    acceptance = DraftAcceptance()
    own = acceptance.copy()
    for _ in range(50):
        own.learn([DraftedToken(1, 0.9, 0.0, is_copied=False)], [2])
    assert acceptance.expected(0.0, 1) == DraftAcceptance().expected(0.0, 1)
    acceptance.blend(own, 0.5)
    assert own.expected(0.0, 1)[0] < acceptance.expected(0.0, 1)[0] < DraftAcceptance().expected(0.0, 1)[0]


def test_passes_are_bought_as_long_as_they_pay() -> None:
    assert chain().gain(0.2, COST, 1, 1.0) > 0.5
    assert chain().gain(0.8, COST, 1, 1.0) == 0
    assert chain().gain(0.2, COST, 1, 4.0) == 0, "where tokens come fast anyway a pass has to give more"
    assert written(chain(), 1, 2).gain(0.2, COST, 1, 1.0) < chain().gain(0.2, COST, 1, 1.0)
    assert written(chain(most=2), 1, 2).gain(0.01, COST, 1, 1.0) == 0


def test_strong_copies_leave_nothing_to_gain() -> None:
    strong = DraftTree((5, 6, 7, 8, 9), (-1, 0, 1, 2, 3), np.full(5, 0.95), np.arange(40, 45))
    assert chain(strong).gain(0.1, COST, 1, 1.0) == 0
    assert chain(COPIES).gain(0.1, COST, 1, 1.0) > 0
    assert chain(strong).strength(1) == pytest.approx(0.95)
    assert chain(strong).strength(6) == 0


def test_nothing_is_written_behind_an_end_or_beyond_the_limit() -> None:
    assert written(chain(), 1, END).is_done
    assert not written(chain(), 1, 2).is_done
    assert written(chain(most=2), 1, 2).is_done


def test_copies_that_the_draft_model_confirms_gain_and_the_others_lose() -> None:
    confirmed = written(chain(COPIES), 5, 6, 7)
    likely = confirmed.posterior(COPIES.merged((5, 6, 7), (-1, 0, 1), confirmed.likely, DRAFT_MODEL))
    assert likely[0] > 0.8 > 0.6
    assert likely[2] > 0.7 > 0.5
    assert likely[1] < 0.06
    opposed = written(chain(COPIES), 7)
    likely = opposed.posterior(COPIES.merged((7,), (-1,), opposed.likely, DRAFT_MODEL))
    assert likely[3] == opposed.likely[0] > 0.5
    assert likely[0] == pytest.approx(0.6 * (1 - likely[3]))
    assert likely[2] == pytest.approx(0.5 * (1 - likely[3]))


def test_a_tree_holds_what_is_worth_its_place() -> None:
    tree = written(chain(COPIES), 5, 7).tree(0.2, COST, 1, 1.0)
    assert tree == DraftTree((5, 6, 7), (-1, 0, 0))
    assert tree.sources.tolist() == [40, 41, DRAFT_MODEL]
    assert tree.cost == pytest.approx(0.4)
    steep = CostCurve([(1, 1.0), (64, 26.2)])
    assert written(chain(COPIES), 5, 7).tree(0.2, steep, 1, 1.0) == DraftTree((5, 7), (-1, 0))
    assert written(chain(is_fixed=True), 3, 4).tree(0.2, steep, 1, 9.0) == DraftTree.chain([3, 4])


def test_doubtful_copies_do_not_keep_the_draft_model_from_speaking() -> None:
    """It may be asked instead of them, although beside them it would gain too little."""
    copies = DraftTree((1, 2, 3), (-1, 0, 1), np.array([0.3, 0.1, 0.05]), np.arange(1, 4))
    curve = CostCurve([(1, 1.0), (64, 1.0 + 63 * 0.1)])
    _, new = DraftAcceptance().expected(0.3, 1)
    assert new < 1.2 * (0.4 + 0.1)
    assert chain(copies).gain(0.4, curve, 1, 1.2) > 0
    strong = DraftTree((1, 2, 3), (-1, 0, 1), np.array([0.97, 0.95, 0.93]), np.arange(1, 4))
    assert chain(strong).gain(0.4, curve, 1, 1.2) == 0


def test_what_copies_were_worth_is_learnt_by_how_strongly_they_stood() -> None:
    acceptance = DraftAcceptance()
    assert acceptance.trust(0.6) == 1.0
    for i in range(40):
        acceptance.learn_copies(0.6, i % 4 == 0)
        acceptance.learn_copies(0.95, True)
    assert acceptance.trust(0.6) == pytest.approx(0.25 / 0.6, abs=0.1)
    assert acceptance.trust(0.95) == 1.0
    other = DraftAcceptance()
    other.blend(acceptance, 0.5)
    assert acceptance.trust(0.6) < other.trust(0.6) < 1.0
