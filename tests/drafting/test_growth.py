"""Drafts are real continuations, on as many branches and as far as they pay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyspec_engine import AdaptiveDrafter
from copyspec_engine.drafting.cost import CostCurve, undisturbed
from copyspec_engine.drafting.drafter import Drafter, DraftingPolicy, Ingredients
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.memory.conversation import SessionMemory

FLAT = CostCurve([(1, 1.0), (256, 1.0)])
GPU = CostCurve([(1, 1.002), (256, 1.512)]).relative()
MIXED = CostCurve([(1, 1.0), (256, 6.1)])
CPU = CostCurve([(1, 1.1), (256, 26.6)]).relative()
END = 9999
ROOM = 1024


def begin(
    cost: CostCurve,
    prompt: Sequence[int],
    memory: SessionMemory | None = None,
    answer: Sequence[int] = (),
    **options: Any,
) -> Drafter:
    """A drafter that has read a prompt and written the beginning of an answer, token by token."""
    memory = memory or SessionMemory(100_000)
    drafter = DraftingPolicy(cost).begin(AdaptiveDrafter(), memory, prompt, frozenset({END}), **options)
    for token in answer:
        drafter.observe(DraftTree(), (), (token,))
    return drafter


def paths(draft: DraftTree) -> list[list[int]]:
    """The tokens from the root down to each node."""
    paths: list[list[int]] = []
    for parent, token in zip(draft.parents, draft.tokens, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else ()), token])
    return paths


def assert_is_sound(draft: DraftTree, memory: SessionMemory, room: int) -> None:
    """A tree of real continuations: every token stands in the memory, where the node says it comes from."""
    assert len(draft) == len(draft.parents) == len(draft.sources) == len(draft.probabilities) <= room
    held = {token for span in memory.index.spans for token in memory.index.read(span.start, span.stop - span.start)}
    for node, (token, parent, source) in enumerate(zip(draft.tokens, draft.parents, draft.sources, strict=True)):
        assert -1 <= parent < node
        assert token in held
        if source:
            assert memory.index.read(source, 1).tolist() == [token]
        above = draft.probabilities[parent] if parent >= 0 else 1.0
        assert 0.0 < draft.probabilities[node] <= above
        assert parent < 0 or draft.tokens[parent] != END
    assert len(set(zip(draft.parents, draft.tokens, strict=True))) == len(draft)  # no child twice


def follow(draft: DraftTree, answer: Sequence[int]) -> list[int]:
    """The nodes that agree with an answer, from the root down."""
    nodes: list[int] = []
    for token in answer:
        at = nodes[-1] if nodes else -1
        ways = enumerate(zip(draft.parents, draft.tokens, strict=True))
        node = next((node for node, way in ways if way == (at, token)), None)
        if node is None:
            break
        nodes.append(node)
    return nodes


def first_copies(draft: DraftTree) -> set[int]:
    """The tokens that an answer may go on with, as far as they have a source."""
    nodes = zip(draft.tokens, draft.parents, draft.sources, strict=True)
    return {token for token, parent, source in nodes if parent < 0 and source}


texts = st.one_of(
    st.lists(st.integers(0, 4), max_size=120),
    st.lists(st.integers(0, 40), max_size=120),
    st.builds(
        lambda unit, times: unit * times, st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12)
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    prediction=texts,
    cost=st.sampled_from([FLAT, GPU, MIXED, CPU]),
    room=st.integers(0, 200),
    seed=st.integers(0, 1000),
)
def test_drafts_are_real_continuations_and_asking_again_gives_the_same(
    calls: list[tuple[list[int], list[int]]], prediction: list[int], cost: CostCurve, room: int, seed: int
) -> None:
    """Any texts, small memories that forget, steps that are cut short."""
    rng = random.Random(seed)
    policy, memory = DraftingPolicy(cost), SessionMemory(rng.choice([4096, 100_000]))
    for prompt, text in calls:
        answer = [*text, *prompt[: len(prompt) // 2], END, *text]
        drafter = policy.begin(AdaptiveDrafter(), memory, [7, *prompt], frozenset({END}), prediction)
        while answer:
            draft = drafter.propose(rng.randrange(1, 9), room)
            assert_is_sound(draft, memory, room)
            draft = drafter.propose(1, room)
            assert drafter.propose(1, room) == draft
            nodes = follow(draft, answer)[: rng.choice([3, 1000])]
            tokens = answer[: len(nodes) + (rng.random() < 0.9)] or answer[:1]
            drafter.observe(draft, nodes[: len(tokens)], tokens)
            del answer[: len(tokens)]
        drafter.finish()


def test_drafts_grow_with_the_length_of_the_match() -> None:
    text = list(range(300))
    lengths = []
    for matched in (2, 4, 8, 16, 48):
        draft = begin(MIXED, [*text, *text[:matched]]).propose(1, ROOM)
        longest = max(paths(draft), key=len, default=[])
        assert longest == [*text, *text][matched : matched + len(longest)]
        lengths.append(len(longest))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_drafts_are_shorter_where_verification_is_dear() -> None:
    tokens = [*range(300), *range(12)]
    cheap, dear = begin(GPU, tokens).propose(1, ROOM), begin(CPU, tokens).propose(1, ROOM)
    assert 0 < len(dear) < len(cheap)


def test_text_that_was_never_seen_is_hardly_drafted() -> None:
    for cost in (MIXED, CPU):
        assert len(begin(cost, range(1000), answer=range(5000, 5040)).propose(1, ROOM)) <= 2


def test_both_ways_a_text_went_on_are_branches() -> None:
    prompt = [*range(100, 120), 1, 2, 3, *range(200, 220), *range(100, 120), 1, 2, 3, *range(300, 320)]
    draft = begin(GPU, [*prompt, 50, *range(100, 120), 1, 2, 3]).propose(1, ROOM)
    assert [200, 201, 202] in paths(draft)
    assert [300, 301, 302] in paths(draft)


@pytest.mark.parametrize(
    ("written", "goes_on"),
    [([9001], 41), ([9001, 9002, 9003], 43), ([9001], 40), ([43], 44)],
    ids=["replaced", "replaced-three", "inserted", "deleted"],
)
def test_a_source_is_found_again_right_behind_an_edit(written: list[int], goes_on: int) -> None:
    """Answer 0 to 39 of the source, then the edit; the source goes on behind it before anything matches there."""
    answer = [*range(40), *written]
    draft = begin(GPU, range(100), answer=answer).propose(1, ROOM)
    assert [goes_on, goes_on + 1, goes_on + 2, goes_on + 3] in paths(draft)
    if written != [43]:
        assert [goes_on, goes_on + 1] not in paths(
            begin(GPU, range(100), answer=answer, ingredients=Ingredients(resync=False)).propose(1, ROOM)
        )


def test_an_answer_may_start_like_the_last_one_or_like_a_new_text() -> None:
    memory = SessionMemory(100_000)
    begin(GPU, range(1000, 1040), memory, answer=range(2000, 2060)).finish()
    draft = begin(GPU, range(3000, 3050), memory).propose(1, ROOM)
    assert first_copies(draft) >= {2000, 3000}
    off = begin(GPU, range(4000, 4050), memory, ingredients=Ingredients(start=False)).propose(1, ROOM)
    assert not first_copies(off) & {2000, 4000}


def test_a_prediction_is_drafted_from_its_first_token_on_and_soon_long() -> None:
    memory = SessionMemory(100_000)
    drafter = begin(GPU, range(1000, 1040), memory, prediction_ids=range(5000, 5400))
    assert 5000 in first_copies(drafter.propose(1, ROOM))
    for token in range(5000, 5004):
        draft = drafter.propose(1, ROOM)
        drafter.observe(draft, follow(draft, [token]), [token])
    assert len(drafter.propose(1, ROOM)) > 20


def test_nothing_is_drafted_past_the_end_of_an_answer_or_the_room_that_is_left() -> None:
    tokens = [*range(20), END, *range(30, 60), *range(20)]
    draft = begin(FLAT, tokens).propose(1, ROOM)
    assert END in draft.tokens
    assert [END, 30] not in paths(draft)
    assert len(begin(FLAT, [*range(100), *range(20)]).propose(1, 3)) == 3
    assert begin(FLAT, [*range(100), *range(20)]).propose(1, 0) == DraftTree()


def test_a_drafter_draws_on_all_earlier_calls_of_its_memory_and_on_no_other() -> None:
    memory = SessionMemory(100_000)
    begin(FLAT, range(100), memory).finish()
    begin(FLAT, range(500, 600), memory).finish()
    assert begin(FLAT, [7777, *range(20, 40)], memory).propose(1, ROOM).tokens[:3] == (40, 41, 42)
    stranger = begin(FLAT, [7777, *range(20, 40)]).propose(1, ROOM)
    assert set(stranger.tokens) <= {7777, *range(20, 40)}


def test_refused_drafts_get_shorter_and_accepted_ones_longer_again() -> None:
    rng = random.Random(0)
    memory, policy = SessionMemory(100_000), DraftingPolicy(MIXED)
    text = [rng.randrange(10_000) for _ in range(4000)]

    def probe() -> int:
        """Nodes drafted behind a match of eight tokens."""
        drafter = policy.begin(AdaptiveDrafter(), memory, text[100:108])
        draft = drafter.propose(1, ROOM)
        drafter.finish()
        return len(draft)

    policy.begin(AdaptiveDrafter(), memory, text).finish()
    first = probe()
    drafter = policy.begin(AdaptiveDrafter(), memory, [5])
    for at in range(0, 3900, 13):  # every copy breaks off after eight tokens
        for token in (*text[at : at + 8], 20_000 + at):
            drafter.observe(DraftTree(), (), (token,))
    drafter.finish()
    worse = probe()
    assert worse < first
    drafter = policy.begin(AdaptiveDrafter(), memory, [6])
    for _ in range(3):
        for token in text:
            drafter.observe(DraftTree(), (), (token,))
    drafter.finish()
    assert probe() > worse


def test_a_long_match_is_drafted_however_badly_costs_were_measured() -> None:
    """Past regression: on a busy machine the measured curve kept everything from being drafted."""
    wild = CostCurve(
        undisturbed([(1, 0.005), (2, 0.333), (4, 0.4), (8, 0.4), (16, 0.5), (32, 0.9), (64, 1.4)])
    ).relative()
    text = list(range(300))
    assert len(begin(wild, [*text, *text[:24]]).propose(1, ROOM)) > 8


@pytest.mark.parametrize("part", [part.name for part in fields(Ingredients)])
def test_each_ingredient_can_be_left_out(part: str) -> None:
    memory = SessionMemory(100_000)
    prompt = [*range(100, 120), 1, 2, 3, *range(200, 220), *range(100, 120), 1, 2, 3, *range(300, 320)]
    tokens = [*prompt, 50, *range(100, 120), 1, 2, 3]
    draft = begin(GPU, tokens, memory, ingredients=Ingredients(**{part: False})).propose(1, ROOM)
    assert_is_sound(draft, memory, ROOM)
    if part == "tree":
        assert draft.is_chain
