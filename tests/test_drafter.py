"""Drafts are real continuations, as long as they pay; the reference mode follows the publication to the letter."""

from __future__ import annotations

import random
from typing import Any

import pytest

from copyspec_engine import AdaptiveDrafter, CopySpecDrafter, GenerationRequest, NoDrafter
from copyspec_engine.drafter import CostCurve, Drafter, DraftTree, undisturbed
from copyspec_engine.memory import SessionMemory
from copyspec_engine.sequence import Sequence
from copyspec_engine.testing import ByteTokenizer

FLAT = CostCurve([(1, 1.0), (256, 1.0)])
GPU = CostCurve([(1, 1.002), (256, 1.512)])
MIXED = CostCurve([(1, 1.0), (256, 6.1)])
CPU = CostCurve([(1, 1.1), (256, 26.6)])
END = 257


def sequence_of(tokens: list[int], drafter: Any, session: SessionMemory | None = None, **options: Any) -> Sequence:
    sequence = Sequence(
        request=GenerationRequest(prompt_token_ids=tokens),
        token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        max_total_tokens=options.get("max_total_tokens", len(tokens) + 1000),
        eos_token_ids=frozenset({END}),
        drafter=drafter,
        seed=0,
        text=ByteTokenizer().text_stream(()),
    )
    sequence.session = session or SessionMemory(10_000)
    sequence.live = sequence.session.begin_call(tokens)
    sequence.num_indexed = len(tokens)
    sequence.num_computed = len(tokens) - 1
    return sequence


def append(sequence: Sequence, *tokens: int) -> None:
    sequence.token_ids += tokens
    sequence.num_computed += len(tokens)


def test_plain_decoding_drafts_nothing() -> None:
    assert Drafter(FLAT).propose(sequence_of([1, 2, 3] * 9, NoDrafter())) == DraftTree()


def reference_draft(tokens: list[int], gamma: int, block: int) -> list[int]:
    """The published rule, by search: the earliest place where the last gamma tokens stood before."""
    for end in range(gamma, len(tokens)):
        if tokens[end - gamma : end] == tokens[-gamma:]:
            return tokens[end : end + block]
    return []


@pytest.mark.parametrize(("gamma", "block"), [(3, 10), (1, 4), (5, 2)])
def test_reference_mode_copies_a_fixed_block_from_the_earliest_match(gamma: int, block: int) -> None:
    rng = random.Random(gamma)
    drafter = Drafter(FLAT)
    for _ in range(100):
        sequence = sequence_of(
            [rng.randrange(4) for _ in range(rng.randrange(1, 60))],
            CopySpecDrafter(min_match_tokens=gamma, block=block),
        )
        for _ in range(10):
            draft = drafter.propose(sequence)
            assert list(draft.tokens) == reference_draft(sequence.token_ids, gamma, block)
            assert draft.is_chain
            append(sequence, rng.randrange(4))


def test_reference_mode_does_not_see_earlier_calls() -> None:
    session = SessionMemory(1000)
    live = session.begin_call([1, 2, 3, 4, 5, 6])
    session.end_call(live, [1, 2, 3, 4, 5, 6])
    assert not Drafter(FLAT).propose(sequence_of([9, 1, 2, 3], CopySpecDrafter(), session))
    assert Drafter(FLAT).propose(sequence_of([9, 1, 2, 3], AdaptiveDrafter(), session)).tokens[:3] == (4, 5, 6)


def test_drafts_grow_with_the_length_of_the_match() -> None:
    text = list(range(300))
    lengths = []
    for matched in (2, 4, 8, 16, 48):
        draft = Drafter(MIXED).propose(sequence_of([*text, *text[:matched]], AdaptiveDrafter()))
        assert list(draft.tokens) == text[matched : matched + len(draft)]
        lengths.append(len(draft))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_drafts_are_shorter_where_verification_is_dear() -> None:
    tokens = [*range(300), *range(12)]
    cheap = Drafter(GPU).propose(sequence_of(tokens, AdaptiveDrafter()))
    dear = Drafter(CPU).propose(sequence_of(tokens, AdaptiveDrafter()))
    assert 0 < len(dear) < len(cheap)


def test_fresh_text_is_not_drafted() -> None:
    assert not Drafter(FLAT).propose(sequence_of(list(range(100)), AdaptiveDrafter()))


def test_this_calls_text_wins_over_an_earlier_call_with_an_equal_match() -> None:
    session = SessionMemory(1000)
    live = session.begin_call([1, 2, 3, 50, 51, 52])
    session.end_call(live, [1, 2, 3, 50, 51, 52])
    draft = Drafter(FLAT).propose(sequence_of([0, 1, 2, 3, 60, 61, 0, 1, 2, 3], AdaptiveDrafter(), session))
    assert draft.tokens[:2] == (60, 61)


def test_nothing_is_drafted_past_the_end_of_an_answer_or_the_room_that_is_left() -> None:
    tokens = [1, 2, 3, 4, 5, END, 6, 7, 1, 2, 3]
    draft = Drafter(FLAT).propose(sequence_of(tokens, AdaptiveDrafter()))
    assert draft.tokens == (4, 5, END)
    short = sequence_of(tokens, AdaptiveDrafter(), max_total_tokens=len(tokens) + 2)
    assert Drafter(FLAT).propose(short).tokens == (4,)
    full = sequence_of(tokens, AdaptiveDrafter(), max_total_tokens=len(tokens) + 1)
    assert not Drafter(FLAT).propose(full)


def test_refused_drafts_get_shorter_and_accepted_ones_longer_again() -> None:
    text = list(range(400))
    sequence = sequence_of([*text, *text[:4]], AdaptiveDrafter())
    drafter = Drafter(MIXED)
    first = drafter.propose(sequence)
    for _ in range(60):
        drafter.observe(sequence, drafter.propose(sequence), num_accepted=0)
    worse = drafter.propose(sequence)
    assert len(worse) < len(first)
    for _ in range(200):
        trial = DraftTree.chain(text[4:24], match_length=4)
        drafter.observe(sequence, trial, num_accepted=20)
    assert len(drafter.propose(sequence)) > len(worse)


def test_survival_stays_a_probability_under_any_history() -> None:
    rng = random.Random(0)
    drafter, sequence = Drafter(CPU), sequence_of([1, 2, 3], AdaptiveDrafter())
    for _ in range(5000):
        size = rng.randrange(1, 200)
        accepted = rng.choice([0, size, rng.randrange(size + 1)])
        drafter.observe(sequence, DraftTree.chain([0] * size, rng.randrange(2, 64)), accepted)
    rates = drafter._survival.rates(1, 100)
    assert ((rates > 0) & (rates < 1)).all()


def test_a_long_match_is_drafted_however_badly_costs_were_measured() -> None:
    """Past regression: on a busy machine the measured curve kept everything from being drafted."""
    wild = CostCurve(undisturbed([(1, 0.005), (2, 0.333), (4, 0.4), (8, 0.4), (16, 0.5), (32, 0.9), (64, 1.4)]))
    text = list(range(300))
    assert len(Drafter(wild).propose(sequence_of([*text, *text[:24]], AdaptiveDrafter()))) > 16
