"""A call's drafter from begin to finish; the reference mode follows the publication to the letter."""

from __future__ import annotations

import random
from typing import Any

import pytest

from copyspec_engine import AdaptiveDrafter, CopySpecDrafter, NoDrafter
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import Drafter, DraftingPolicy
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.memory.conversation import SessionMemory

FLAT = CostCurve([(1, 1.0), (256, 1.0)])
END = 257
ROOM = 1000


def begin(options: Any, prompt: list[int], memory: SessionMemory | None = None) -> Drafter:
    return DraftingPolicy(FLAT).begin(options, memory or SessionMemory(100_000), prompt, frozenset({END}))


def write(drafter: Drafter, answer: list[int]) -> list[DraftTree]:
    """Write an answer with the drafter's drafts, which are given back; then finish."""
    drafts, done = [], 0
    while done < len(answer):
        draft = drafter.propose(1, ROOM)
        nodes, at = [], -1
        while done + len(nodes) < len(answer):
            token = answer[done + len(nodes)]
            ways = zip(draft.parents, draft.tokens, strict=True)
            at = next((node for node, way in enumerate(ways) if way == (at, token)), -2)
            if at < 0:
                break
            nodes.append(at)
        tokens = answer[done : done + len(nodes) + 1]
        drafter.observe(draft, nodes, tokens)
        drafts.append(draft)
        done += len(tokens)
    drafter.finish()
    return drafts


def texts(memory: SessionMemory) -> list[list[int]]:
    return [memory.index.tokens_of(span).tolist() for span in memory.index.spans]


def test_plain_decoding_drafts_nothing_but_remembers() -> None:
    memory = SessionMemory(1000)
    assert set(write(begin(NoDrafter(), [1, 2, 3] * 9, memory), [1, 2, 3])) == {DraftTree()}
    assert texts(memory) == [[1, 2, 3] * 9, [1, 2, 3]]


def reference_draft(tokens: list[int], gamma: int, block: int) -> list[int]:
    """The published rule, by search: the earliest place where the last gamma tokens stood before."""
    for end in range(gamma, len(tokens)):
        if tokens[end - gamma : end] == tokens[-gamma:]:
            return tokens[end : end + block]
    return []


@pytest.mark.parametrize(("gamma", "block"), [(3, 10), (1, 4), (5, 2)])
def test_reference_mode_copies_a_fixed_block_from_the_earliest_match(gamma: int, block: int) -> None:
    rng = random.Random(gamma)
    for _ in range(100):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 60))]
        drafter = begin(CopySpecDrafter(min_match_tokens=gamma, block=block), tokens)
        for _ in range(10):
            draft = drafter.propose(1, ROOM)
            assert list(draft.tokens) == reference_draft(tokens, gamma, block)
            assert draft.is_chain
            tokens.append(rng.randrange(4))
            drafter.observe(draft, (), tokens[-1:])


def test_reference_mode_stops_at_the_end_of_an_answer_and_at_the_room_that_is_left() -> None:
    tokens = [1, 2, 3, 4, 5, END, 6, 7, 1, 2, 3]
    drafter = begin(CopySpecDrafter(), tokens)
    assert drafter.propose(1, ROOM).tokens == (4, 5, END)
    assert drafter.propose(1, 1).tokens == (4,)
    assert drafter.propose(1, 0) == DraftTree()


def test_reference_mode_does_not_see_earlier_calls() -> None:
    memory = SessionMemory(10_000)
    write(begin(NoDrafter(), [1, 2, 3, 4, 5, 6], memory), [7])
    assert not begin(CopySpecDrafter(), [9, 1, 2, 3], memory).propose(1, ROOM)
    assert begin(AdaptiveDrafter(), [9, 1, 2, 3], memory).propose(1, ROOM).tokens[:3] == (4, 5, 6)


@pytest.mark.parametrize("options", [AdaptiveDrafter(), CopySpecDrafter(), NoDrafter()])
def test_a_finished_call_leaves_its_prompt_and_its_answer_in_the_memory(options: Any) -> None:
    memory = SessionMemory(100_000)
    write(begin(options, list(range(100)), memory), list(range(200, 300)))
    for run in (range(50, 80), range(250, 280)):
        match = memory.index.longest_match(run)
        assert match is not None
        assert match.length == 30
        assert memory.index.read(match.position, 3).tolist() == [run[-1] + 1, run[-1] + 2, run[-1] + 3]
    assert not any(span.is_open for span in memory.index.spans)


def test_an_answer_longer_than_a_region_of_the_memory_is_kept_whole() -> None:
    memory = SessionMemory(100_000)
    drafter = begin(AdaptiveDrafter(), [1, 2, 3], memory)
    for token in range(1000, 7000):
        drafter.observe(DraftTree(), (), (token,))
    drafter.finish()
    for at in (1500, 3040, 3050, 5100, 6990):
        match = memory.index.longest_match(range(at - 20, at))
        assert match is not None
        assert match.length == 20
        assert memory.index.read(match.position, 1).tolist() == [at]
    assert not any(span.is_open for span in memory.index.spans)


def test_two_calls_of_a_conversation_at_the_same_time_keep_both_answers() -> None:
    memory = SessionMemory(100_000)
    first, second = begin(AdaptiveDrafter(), [1, 2, 3], memory), begin(AdaptiveDrafter(), [4, 5, 6], memory)
    for i in range(5000):
        first.observe(DraftTree(), (), (10_000 + i,))
        second.observe(DraftTree(), (), (20_000 + i,))
    second.finish()
    first.finish()
    for start in (10_000, 20_000):
        match = memory.index.longest_match(range(start + 4000, start + 4040))
        assert match is not None
        assert match.length == 40
    assert not any(span.is_open for span in memory.index.spans)


def test_a_conversation_starts_from_what_others_of_its_owner_have_learnt() -> None:
    """Only numbers go from one conversation to the next, and slowly; from one owner to the next nothing."""
    policy, rng = DraftingPolicy(CostCurve([(1, 1.0), (256, 6.0)])), random.Random(0)
    before = policy.acceptance.of(None).copy()
    memory = SessionMemory(100_000)
    noise = [rng.randrange(5) for _ in range(300)]
    write(policy.begin(AdaptiveDrafter(), memory, noise), [rng.randrange(5) for _ in range(300)])
    assert memory.acceptance is not None
    there, here = (abs(known.weights - before.weights) for known in (policy.acceptance.of(None), memory.acceptance))
    assert 0 < there.sum() < here.sum()
    assert (policy.acceptance.of("another").weights == before.weights).all()


def test_the_first_token_does_not_wait_for_a_draft() -> None:
    policy = DraftingPolicy(CostCurve([(1, 1.0), (11, 1.5), (21, 3.0)]))
    assert policy.without_delay(1, 100) == 1  # 1.05 is one token on
    assert policy.without_delay(1, 1) == 1
    assert policy.without_delay(11, 100) == 0
    assert policy.without_delay(1, 0) == 0
    assert DraftingPolicy(CostCurve([(1, 1.0), (64, 1.04)])).without_delay(1, 40) == 40
