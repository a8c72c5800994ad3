"""Drafting the model's own other alternatives: where it pays, from nobody else's texts, and never in the tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from copyspec_engine import AdaptiveDrafter, Engine, GenerationRequest, Grammar, SamplingParams
from copyspec_engine.drafting.cost import CostCurve
from copyspec_engine.drafting.drafter import DraftingPolicy, wants_alternatives
from copyspec_engine.drafting.kernels.growth import damped_pace
from copyspec_engine.drafting.tree import ALTERNATIVE, DraftTree
from copyspec_engine.memory.acceptance import (
    BY_ALTERNATIVE,
    BY_SUPPORT,
    NUM_WEIGHTS,
    alternatives_worth,
    blend,
    first_guess,
    learn_alternatives,
)
from copyspec_engine.memory.alternatives import NUM_ALTERNATIVES, Alternatives, buckets_of
from copyspec_engine.memory.conversation import SessionMemory, SessionStore
from copyspec_engine.sampling.likely_tokens import add_alternatives
from copyspec_engine.sampling.sampler import SampleRow
from copyspec_engine.sampling.verify import verify
from copyspec_engine.testing import loop_of, scripted_engine
from copyspec_engine.values.config import EngineConfig
from tests.conftest import assert_all_slots_free
from tests.loop.test_lossless import PROMPT, ids_of, random_case, run, same_answer, watch_drafts

MakeEngine = Callable[..., Engine]

CHEAP = ((1, 1.0), (200, 1.1))
CHEAPEST = CostCurve([(1, 1.0), (256, 1.01)])
FRESH = ids_of("QwErTy uIoP [asd] {fgh} 1234567890 #@!")
"""Nothing stands in it twice."""
ON, OFF = AdaptiveDrafter(recycle=True), AdaptiveDrafter(recycle=False)
GREEDY: dict[str, Any] = {}
SEEDED: dict[str, Any] = {"temperature": 1.5, "seed": 5}
samplings = pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
sources = pytest.mark.parametrize("source", ["recycled", "copy+recycled"])


def engine_for(make_engine: MakeEngine, source: str, name: str = "llama", **options: Any) -> Engine:
    """An engine that trusts what it recycles; with the source "recycled" it expects nothing of copies.

    Its model is more certain than random ones are: those hold nothing likely.
    """
    engine = make_engine(name, step_cost=CHEAP, **options)
    runner = loop_of(engine).model.runner
    forward = runner.forward
    runner.forward = lambda pieces: 30.0 * forward(pieces)  # type: ignore[method-assign]
    weights = loop_of(engine).core.policy.acceptance.of(None).weights
    if source == "recycled":
        weights[:BY_ALTERNATIVE] = -8.0
    weights[BY_ALTERNATIVE : BY_ALTERNATIVE + 26] = 0.0
    return engine


def recycled(engine: Engine) -> int:
    """Accepted tokens that were recycled."""
    return engine.metrics().accepted_by_source.get("recycled", 0)


# ---- lossless ------------------------------------------------------------------------------------------------------


@samplings
@sources
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_the_tokens_are_those_of_plain_decoding_over_turns_with_kv_reuse(
    make_engine: MakeEngine, name: str, source: str, sampling: dict[str, Any]
) -> None:
    engine = engine_for(make_engine, source, name)
    prompt = FRESH
    for _ in range(3):
        plain = run(engine, prompt, "none", max_tokens=80, **sampling)
        drafted = run(engine, prompt, ON, session="chat", max_tokens=80, **sampling)
        assert same_answer(plain, drafted)
        prompt = (*prompt, *drafted.token_ids, *ids_of(" more"))
    assert drafted.usage.cached_tokens > len(FRESH)
    assert recycled(engine) > 2
    if source == "recycled":
        assert set(engine.metrics().accepted_by_source) == {"recycled"}
    assert_all_slots_free(engine)


@sources
def test_requests_in_flight_together_answer_as_if_alone(make_engine: MakeEngine, source: str) -> None:
    """With sampling of all kinds, stop ids, sessions and a pool that are shared, and requests that give way."""
    rng = random.Random(3)
    engine = engine_for(make_engine, source, "qwen2", max_running=4, max_prefill_tokens=16, kv_cache_tokens=300)
    cases = [random_case(rng)[:2] for _ in range(30)]
    alone = [run(engine, prompt, "none", **sampling) for prompt, sampling in cases]
    handles = [
        engine.stream(
            GenerationRequest(
                prompt_token_ids=prompt,
                drafter=ON,
                session_id=rng.choice(["a", "b", None]),
                memory_pool=rng.choice(["pool", None]),
                sampling=SamplingParams(**sampling),
            )
        )
        for prompt, sampling in cases
    ]
    for expected, handle in zip(alone, handles, strict=True):
        assert same_answer(expected, handle.result())
    assert recycled(engine) > 10
    assert_all_slots_free(engine)


@samplings
@sources
def test_a_stop_text_cuts_where_plain_decoding_stops(
    make_engine: MakeEngine, source: str, sampling: dict[str, Any]
) -> None:
    engine = engine_for(make_engine, source)
    whole = run(engine, PROMPT, ON, session="s", max_tokens=80, **sampling)
    for at in range(10, 70, 6):
        stop = engine.decode(whole.token_ids[at : at + 2])
        if stop:
            plain = run(engine, PROMPT, "none", stop=(stop,), max_tokens=80, **sampling)
            assert same_answer(plain, run(engine, PROMPT, ON, session="s", stop=(stop,), max_tokens=80, **sampling))
    assert recycled(engine) > 0
    assert_all_slots_free(engine)


@samplings
@sources
def test_a_grammar_gives_the_plain_tokens(make_engine: MakeEngine, source: str, sampling: dict[str, Any]) -> None:
    engine = engine_for(make_engine, source)
    grammar = Grammar(regex=r"[a-e]{30,60}[.]")
    for turn in range(4):
        plain, drafted = (
            run(engine, (*FRESH, turn), drafter, session, {"grammar": grammar}, max_tokens=70, **sampling)
            for drafter, session in (("none", None), (ON, "s"))
        )
        assert same_answer(plain, drafted)
    assert_all_slots_free(engine)


@sources
def test_a_conversation_goes_on_after_a_cancelled_answer(make_engine: MakeEngine, source: str) -> None:
    engine = engine_for(make_engine, source)
    for steps in range(1, 6):
        request = GenerationRequest(
            prompt_token_ids=FRESH, session_id="s", drafter=ON, sampling=SamplingParams(max_tokens=200)
        )
        stream = engine.stream(request)
        for _ in range(steps):
            next(stream)
        engine.cancel(request.request_id)
        follow_up = (*FRESH, *stream.result().token_ids, *ids_of(" more"))
        assert same_answer(run(engine, follow_up, ON, "s"), run(engine, follow_up, "none"))
    assert recycled(engine) > 0
    assert_all_slots_free(engine)


def test_the_exact_mode_recycles_trees(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(make_engine, "recycled", exact=True)
    plain = run(engine, FRESH, "none", max_tokens=100)
    drafts = watch_drafts(engine, monkeypatch)
    assert same_answer(plain, run(engine, FRESH, ON, max_tokens=100))
    assert sum((draft.sources == ALTERNATIVE).sum() for draft in drafts) > 0
    assert not all(draft.is_chain for draft in drafts)


# ---- whose alternatives, and for how long ----------------------------------------------------------------------------


def kept_tokens(memory: SessionMemory) -> set[int]:
    return set(memory.alternatives.arrays.tokens.ravel().tolist()) - {-1}


def test_sessions_have_alternatives_of_their_own_and_share_those_of_pools() -> None:
    store = SessionStore(EngineConfig(), lambda _: None)
    own = [store.open(name).memory.alternatives for name in ("a", "b", None, None)]
    shared = [
        store.open_pool(pool, name).alternatives for pool, name in (("p", "a"), ("p", "b"), ("p", None), ("q", "a"))
    ]
    assert len({id(table) for table in own}) == 4
    assert shared[0] is shared[1] is shared[2] is not shared[3]
    assert not {id(table) for table in own} & {id(table) for table in shared}


def test_a_session_never_drafts_what_was_likely_in_another_one(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(make_engine, "recycled")
    drafts = watch_drafts(engine, monkeypatch)

    def first_draft(session: str | None, pool: str | None = None) -> int:
        """Recycled tokens in what is drafted first for the same prompt."""
        drafts.clear()
        run(engine, FRESH, ON, session, {"memory_pool": pool}, max_tokens=20)
        return int((drafts[0].sources == ALTERNATIVE).sum())

    assert first_draft("a") == 0
    assert first_draft("a") > 0
    assert first_draft("b") == first_draft(None) == 0
    assert first_draft("a", "pool") == 0
    assert first_draft("b", "pool") > 0
    engine.forget("a")  # its alternatives cannot be told from those of others
    assert first_draft("b", "pool") == 0
    assert first_draft("a") == 0


def test_forgetting_a_session_erases_its_alternatives(make_engine: MakeEngine) -> None:
    engine = engine_for(make_engine, "recycled")
    shared = loop_of(engine).core.policy.acceptance.of(None)
    before = shared.copy()
    first = run(engine, FRESH, ON, session="a", max_tokens=80)
    memory = loop_of(engine).core.conversations.store.peek("a")
    assert memory is not None
    assert kept_tokens(memory)
    assert engine.memory("a").num_bytes > memory.index.num_bytes
    engine.forget("a")
    blend(shared, before, 1.0)  # what later conversations start from, which no forgetting undoes
    assert run(engine, FRESH, ON, session="a", max_tokens=80).draft_stats == first.draft_stats


def test_forgetting_while_an_answer_is_written_erases_its_alternatives(make_engine: MakeEngine) -> None:
    engine = engine_for(make_engine, "recycled")
    plain = run(engine, FRESH, "none", max_tokens=150)
    request = GenerationRequest(
        prompt_token_ids=FRESH, session_id="a", drafter=ON, sampling=SamplingParams(max_tokens=150)
    )
    stream = engine.stream(request)
    next(stream)
    memory = loop_of(engine).core.conversations.store.peek("a")
    engine.forget("a")
    assert same_answer(plain, stream.result())
    assert memory is not None
    assert not kept_tokens(memory)


# ---- what it may cost ----------------------------------------------------------------------------------------------


def test_nothing_is_kept_where_nobody_wants_it(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", step_cost=CHEAP)
    for drafter in (OFF, "none", "copyspec"):
        run(engine, PROMPT, drafter, session="s")
    memory = loop_of(engine).core.conversations.store.peek("s")
    assert memory is not None
    assert not kept_tokens(memory)
    assert not recycled(engine)


def test_nothing_is_kept_where_verifying_is_expensive(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", step_cost=((1, 1.0), (2, 1.9), (64, 60.0)))
    output = run(engine, PROMPT, ON, session="s")
    memory = loop_of(engine).core.conversations.store.peek("s")
    assert memory is not None
    assert not kept_tokens(memory)
    assert output.tokens_per_forward < 1.2


def test_the_engine_and_each_request_switch_it() -> None:
    config = EngineConfig(drafter=AdaptiveDrafter(recycle=False), step_cost=CHEAP)
    with scripted_engine(["abcdefghijkl"] * 3, config) as engine:
        for drafter, wanted in ((None, False), (ON, True), (OFF, False)):
            session = f"{drafter}"
            engine.generate(GenerationRequest(prompt="x", drafter=drafter, session_id=session))
            memory = loop_of(engine).core.conversations.store.peek(session)
            assert memory is not None
            assert bool(kept_tokens(memory)) == wanted


def test_recycled_tokens_do_not_count_as_copied(make_engine: MakeEngine) -> None:
    engine = engine_for(make_engine, "recycled")
    output = run(engine, FRESH, ON, max_tokens=80)
    assert output.draft_stats.num_accepted_tokens > 5
    assert output.copied_share == 0.0
    assert {copy.source for copy in output.copies} == {"recycled"}
    assert not any(segment.copied for segment in output.segments)


# ---- what is learnt ------------------------------------------------------------------------------------------------


def likely_after(contexts: list[tuple[int, int]], tokens: list[list[int]], chance: float) -> Alternatives:
    bucket = int(buckets_of(np.array([chance]))[0])
    kept = np.full((len(contexts), NUM_ALTERNATIVES), -1, dtype=np.int32)
    for row, likely in enumerate(tokens):
        kept[row, : len(likely)] = likely
    return Alternatives(np.array(contexts, dtype=np.int64), kept, np.full(kept.shape, bucket, dtype=np.int8))


def test_what_was_likely_is_drafted_as_branches_and_on_from_there() -> None:
    memory = SessionMemory(4096)
    drafter = DraftingPolicy(CHEAPEST).begin(ON, memory, [1, 2])
    memory.alternatives.add(likely_after([(1, 2), (2, 5), (-1, 6)], [[5, 6], [7], [8]], 0.4))
    draft = drafter.propose(1, 100)
    assert draft == drafter.propose(1, 100)
    nodes = np.flatnonzero(draft.sources == ALTERNATIVE)
    path = {node: (draft.parents[node], draft.tokens[node]) for node in nodes.tolist()}
    (five,), (six,) = ([node for node, place in path.items() if place == (-1, token)] for token in (5, 6))
    assert set(path.values()) >= {(five, 7), (six, 8)}
    assert (np.diff(draft.probabilities) <= 0).all()


def test_alternatives_learn_from_what_is_written() -> None:
    guess = first_guess()
    for right in (True, False):
        memory = SessionMemory(4096)
        drafter = DraftingPolicy(CHEAPEST, guess).begin(ON, memory, [1, 2])
        for i in range(300):
            last = 2 if i == 0 else 1000 + i - 1
            memory.alternatives.add(likely_after([(-1, last)], [[1000 + i if right else 9]], 0.4))
            drafter.observe(DraftTree(), (), (1000 + i,))
        assert memory.acceptance is not None
        moved = memory.acceptance.weights - guess
        (place,) = BY_ALTERNATIVE + np.flatnonzero(moved[BY_ALTERNATIVE:BY_SUPPORT])
        assert (moved[place] > 0.5) if right else (moved[place] < -0.5)


def test_alternatives_that_come_to_nothing_are_soon_left_out() -> None:
    """In every conversation: those that begin later start from what was seen."""
    policy, drafted = DraftingPolicy(CostCurve([(1, 1.0), (256, 3.5)])), []
    for call in range(2):
        memory = SessionMemory(4096)
        drafter = policy.begin(ON, memory, [1, 2])
        for i in range(120):
            last = 2 if i == 0 else 1000 + i - 1
            memory.alternatives.add(likely_after([(-1, last)], [list(range(8))], 0.4))
            draft = drafter.propose(1, 100)
            drafted.append(int((draft.sources == ALTERNATIVE).sum()))
            drafter.observe(draft, (), (1000 + i,))
        drafter.finish()
        assert float(alternatives_worth(policy.acceptance.of(None).alternatives)) < 0.5, call
    assert sum(drafted[:20]) > 10 * sum(drafted[100:120])
    assert sum(drafted[120:140]) < sum(drafted[:20])


def test_what_came_of_alternatives_says_what_they_are_worth() -> None:
    counts = np.zeros(2)
    assert alternatives_worth(counts) == 1.0
    for _ in range(40):
        learn_alternatives(counts, 2.0, 1)
    assert alternatives_worth(counts) == pytest.approx(0.5, abs=0.05)
    for _ in range(2000):
        learn_alternatives(counts, 0.0, 0)
    assert alternatives_worth(counts) > 0.8
    for _ in range(40):
        learn_alternatives(counts, 1.0, 3)
    assert alternatives_worth(counts) == 1.0


def test_drafting_that_gains_nothing_does_not_make_drafts_seem_cheap() -> None:
    """A step without a draft writes a token in the time of one, whatever came of the drafts."""
    assert damped_pace(np.array([1.1, 3.0, 50.0])) == 1.0
    assert damped_pace(np.array([3.0, 1.5, 50.0])) > 1.5


def test_copies_learn_nothing_from_alternatives_where_none_are_kept() -> None:
    memory = SessionMemory(4096)
    policy = DraftingPolicy(CHEAPEST)
    drafter = policy.begin(ON, memory, list(ids_of("abcabcabdabcabe") * 4))
    before = policy.acceptance.of(None).weights[BY_ALTERNATIVE:].copy()
    for token in ids_of("abcabcabdabcabe") * 4:
        drafter.observe(DraftTree(), (), (token,))
    assert memory.acceptance is not None
    assert (memory.acceptance.weights[BY_ALTERNATIVE:] == before).all()
    assert (memory.acceptance.weights[:BY_ALTERNATIVE] != policy.acceptance.of(None).weights[:BY_ALTERNATIVE]).any()


def test_only_adaptive_drafters_want_alternatives() -> None:
    policy = DraftingPolicy(CHEAPEST)
    assert wants_alternatives(policy.begin(ON, SessionMemory(4096), [1]))
    assert not wants_alternatives(policy.begin(OFF, SessionMemory(4096), [1]))
    assert not wants_alternatives(None)
    assert len(first_guess()) == NUM_WEIGHTS


# ---- from logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alternatives_are_the_likeliest_tokens_with_their_probabilities(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 500, generator=generator) * 4).to(dtype)
    drafts = [DraftTree((5, 6, 7), (-1, 0, 0)), DraftTree((1, 2), (-1, -1)), DraftTree()]
    endings = [(3, 4), None, (-1, 4)]
    rows = [SampleRow(SamplingParams(), 0, 10, draft, ending=at) for draft, at in zip(drafts, endings, strict=True)]
    first, second, third = verdicts = [verify(draft, [0] * (1 + len(draft))) for draft in drafts]
    add_alternatives(logits[:8], rows, verdicts)
    assert second.alternatives is None
    assert first.alternatives is not None
    assert third.alternatives is not None
    assert first.alternatives.contexts.tolist() == [[3, 4], [4, 5], [5, 6], [5, 7]]
    assert third.alternatives.contexts.tolist() == [[-1, 4]]
    for row, alternatives in [*((i, first.alternatives) for i in range(4)), (7, third.alternatives)]:
        chances = logits[row].double().softmax(-1).numpy()
        place = row if row < 4 else 0
        likely = [token for token in np.argsort(-chances, kind="stable")[:NUM_ALTERNATIVES] if chances[token] > 0.008]
        found = [token for token in alternatives.tokens[place].tolist() if token >= 0]
        assert set(found) >= set(likely) or dtype is torch.bfloat16
        buckets = buckets_of(chances[found])
        assert abs(alternatives.buckets[place, : len(found)] - buckets).max() <= 1


def test_odd_logits_give_alternatives_that_can_be_kept() -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2] = torch.inf
    logits[2] = torch.nan
    logits[3, 1:] = -torch.inf
    draft = DraftTree.chain([1, 2, 3])
    verdict = verify(draft, [0] * 4)
    add_alternatives(logits, [SampleRow(SamplingParams(), 0, 9, draft, ending=(1, 1))], [verdict])
    assert verdict.alternatives is not None
    tokens, chances = verdict.alternatives.tokens, verdict.alternatives.buckets
    assert sorted(tokens[0].tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]
    assert (tokens[1:3] == -1).all()
    assert tokens[3].tolist() == [0, *[-1] * 7]
    assert ((chances >= 0) == (tokens >= 0)).all()


def test_of_a_long_draft_the_end_of_the_path_and_the_likeliest_others_are_looked_at() -> None:
    draft = DraftTree(tuple(range(100)), (*range(-1, 79), *[-1] * 20))
    verdict = verify(draft, [*range(70), 999, *[999] * 30])
    assert len(verdict.accepted) == 70
    add_alternatives(torch.randn(101, 50), [SampleRow(SamplingParams(), 0, 9, draft, ending=(7, 8))], [verdict])
    assert verdict.alternatives is not None
    assert verdict.alternatives.contexts[:, 1].tolist() == list(range(62, 70))
