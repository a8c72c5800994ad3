"""Lossless is the law: whatever is drafted, reused, cut or interleaved, the tokens are those of plain decoding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from copyspec_engine import (
    AdaptiveDrafter,
    CopySpecDrafter,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
)
from copyspec_engine.drafting.drafter import Drafter
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.lab.bench.lossless_rounds import crowded, rounds
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import END, assert_all_slots_free, build_model

MakeEngine = Callable[..., Engine]


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


PROMPT = ids_of("the cat sat on the mat; the cat ate the rat; the dog sat on the log; ") * 2


def run(
    engine: Engine,
    prompt: tuple[int, ...],
    drafter: Any,
    session: str | None = None,
    options: dict[str, Any] | None = None,
    **sampling: Any,
) -> GenerationOutput:
    return engine.generate(
        GenerationRequest(
            prompt_token_ids=prompt,
            drafter=drafter,
            session_id=session,
            sampling=SamplingParams(**{"max_tokens": 48, **sampling}),
            **(options or {}),
        )
    )


def generate(name: str, prompt: tuple[int, ...], max_new_tokens: int = 48) -> list[int]:
    """The tokens of transformers' own greedy `generate`."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = build_model(name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("drafter", ["none", "adaptive", "copyspec"])
def test_greedy_tokens_equal_generate_over_turns_with_kv_reuse(
    make_engine: MakeEngine, architecture: str, drafter: str
) -> None:
    engine = make_engine(architecture, max_prefill_tokens=37)
    prompt = PROMPT
    for turn in range(3):
        got = run(engine, prompt, drafter, session="chat")
        assert list(got.token_ids) == generate(architecture, prompt)
        assert (got.usage.cached_tokens > 0) == (turn > 0)
        if turn:
            assert got.usage.cached_tokens >= len(prompt) - 25
        prompt = (*prompt, *got.token_ids, *ids_of(" the cat sat on"))
    assert_all_slots_free(engine)


def test_drafts_are_accepted_in_these_tests_at_all(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    assert run(engine, PROMPT, "adaptive").draft_stats.num_accepted_tokens > 5
    assert run(engine, PROMPT, "copyspec").draft_stats.num_accepted_tokens > 5


def random_case(rng: random.Random, longest: int = 40) -> tuple[tuple[int, ...], dict[str, Any], Any]:
    """A repetitive prompt, how to sample, and a drafter."""
    words = ["ab", "c ", "the ", "the cat ", "12", "\n", "é", "- x: "]
    prompt = ids_of("".join(rng.choice(words) for _ in range(rng.randrange(1, longest))))
    sampling: dict[str, Any] = {"max_tokens": rng.randrange(1, longest)}
    if rng.random() < 0.5:
        sampling |= {"temperature": rng.choice([0.01, 0.05, 0.7]), "seed": rng.randrange(2**63)}
        sampling |= rng.choice([{}, {"top_k": rng.randrange(1, 9)}, {"top_p": rng.choice([0.3, 0.9])}])
    if rng.random() < 0.2:
        sampling["ignore_eos"] = True
    if rng.random() < 0.2:
        sampling["stop_token_ids"] = tuple(rng.sample(range(256), 12))
    drafter = rng.choice(
        [
            AdaptiveDrafter(max_draft_tokens=rng.choice([1, 5, 64])),
            AdaptiveDrafter(),
            CopySpecDrafter(min_match_tokens=rng.randrange(1, 4), block=rng.randrange(1, 14)),
        ]
    )
    return prompt, sampling, drafter


def same_answer(a: GenerationOutput, b: GenerationOutput) -> bool:
    return (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)


def watch_drafts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[DraftTree]:
    """The drafts that an engine verifies from now on."""
    drafts: list[DraftTree] = []
    forward = loop_of(engine).model.runner.forward

    def watched(pieces: Sequence[Piece]) -> torch.Tensor:
        drafts.extend(piece.draft for piece in pieces)
        return forward(pieces)

    monkeypatch.setattr(loop_of(engine).model.runner, "forward", watched)
    return drafts


def test_random_conversations_have_the_answers_of_plain_decoding(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Trees, blocks, sampling, grammars, stop texts that cut answers, sessions that branch, shared KV and texts,
    requests that give way or are cancelled: in any mixture nothing of it shows in the tokens."""
    count = int(request.config.getoption("--random-cases"))
    config = crowded(EngineConfig(model="tiny-llama"))
    with Engine(config, model=prepare(build_model("llama"), ByteTokenizer(), config)) as engine:
        drafts = watch_drafts(engine, monkeypatch)
        outcomes = [outcome for outcomes in rounds(engine, count, count) for outcome in outcomes]
        now = engine.metrics()
        assert_all_slots_free(engine)
    assert [outcome.turn.number for outcome in outcomes] == list(range(count))
    assert not [outcome.described() for outcome in outcomes if not outcome.is_same]
    seen = Counter(feature for outcome in outcomes for feature in outcome.features)
    assert all(seen[name] > count / 40 for name in ("greedy", "seeded", "grammar", "stop", "cancelled", "branch"))
    assert seen["reused KV"] > count / 10
    assert seen["accepted drafts"] > count / 4
    assert now.num_preemptions > 0
    assert sum(not draft.is_chain for draft in drafts) > count / 10
    assert max(map(len, drafts)) > 12


def test_a_stop_text_inside_an_accepted_draft_cuts_where_plain_decoding_stops(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    whole = run(engine, PROMPT, "adaptive")
    lengths = whole.draft_stats.accepted_lengths
    assert max(lengths) >= 4
    step = lengths.index(max(lengths))
    inside = sum(lengths[:step]) + step + 1  # a token in the middle of the longest accepted draft
    stop = engine.decode(whole.token_ids[inside : inside + 2])
    plain = run(engine, PROMPT, "none", stop=(stop,))
    drafted = run(engine, PROMPT, "adaptive", stop=(stop,))
    assert same_answer(plain, drafted)
    assert plain.finish_reason == "stop"
    assert stop not in drafted.text
    assert_all_slots_free(engine)


class OracleTrees:
    """Drafts trees that hold the right path next to wrong ones, so that every part of verification is exercised."""

    def __init__(self, answer: tuple[int, ...], seed: int) -> None:
        self._answer, self._rng = answer, random.Random(seed)
        self._done = 0

    def begin(self, *_: object, owner: str | None) -> Drafter:
        """As `DraftingPolicy.begin`."""
        self._done = 0
        return self

    def without_delay(self, _width: int, room: int) -> int:
        return room

    def share(self, _: Sequence[Drafter | None], drafts: Sequence[DraftTree], width: int) -> list[DraftTree]:
        """As `DraftingPolicy.share`, but nothing is given up."""
        return list(drafts)

    def propose(self, num_pending: int, room: int) -> DraftTree:
        right = list(self._answer[self._done : self._done + self._rng.randrange(1, 6)])
        tokens, parents = [], []
        at = -1
        for token in right[: room // 3]:
            wrong = [(self._rng.randrange(256), at), (self._rng.randrange(256), len(tokens))]
            nodes = [*wrong, (token, at)]
            tokens += [node[0] for node in nodes]
            parents += [node[1] for node in nodes]
            at = len(tokens) - 1
        return DraftTree(tuple(tokens), tuple(parents))

    def observe(self, draft: DraftTree, accepted: Sequence[int], tokens: Sequence[int]) -> None:
        self._done += len(tokens)

    def finish(self) -> None:
        """Nothing to keep."""


def test_draft_trees_with_wrong_branches_give_the_plain_tokens(make_engine: MakeEngine, architecture: str) -> None:
    engine = make_engine(architecture)
    plain = run(engine, PROMPT, "none", max_tokens=60)
    for seed in range(3):
        loop_of(engine).core.policy = OracleTrees(plain.token_ids, seed)  # type: ignore[assignment]
        drafted = run(engine, PROMPT, "adaptive", session="chat", max_tokens=60)
        assert same_answer(plain, drafted)
        assert drafted.tokens_per_forward > 1.5
        follow_up = (*PROMPT, *drafted.token_ids, *PROMPT[:20])
        loop_of(engine).core.policy = OracleTrees((), seed)  # type: ignore[assignment]
        reused = run(engine, follow_up, "none", session="chat")
        assert reused.usage.cached_tokens > len(PROMPT)
        assert same_answer(reused, run(engine, follow_up, "none"))
    assert_all_slots_free(engine)


def test_scattered_slots_give_the_plain_tokens(make_engine: MakeEngine, architecture: str) -> None:
    engine = make_engine(architecture, kv_cache_tokens=1024)
    plain = run(engine, PROMPT, "none")
    taken = np.random.default_rng(0).permutation(1024)[:700]
    pool = loop_of(engine).core.kv.pool
    pool.release(np.setdiff1d(pool.allocate(1024), taken))
    trial = pool.allocate(len(PROMPT))
    assert (np.diff(trial) > 1).any()  # no run is long enough
    pool.release(trial)
    assert same_answer(plain, run(engine, PROMPT, "adaptive"))
    pool.release(taken)
    assert_all_slots_free(engine)


def test_requests_in_flight_together_answer_as_if_alone(make_engine: MakeEngine) -> None:
    rng = random.Random(7)
    engine = make_engine("qwen2", max_running=4, max_prefill_tokens=16)
    cases = [random_case(rng) for _ in range(24)]
    alone = [run(engine, prompt, "none", **sampling) for prompt, sampling, _ in cases]
    handles = [
        engine.stream(
            GenerationRequest(
                prompt_token_ids=prompt,
                drafter=drafter,
                session_id=rng.choice("ab"),
                sampling=SamplingParams(**sampling),
            )
        )
        for prompt, sampling, drafter in cases
    ]
    for expected, handle in zip(alone, handles, strict=True):
        assert same_answer(expected, handle.result())
    assert_all_slots_free(engine)


@pytest.mark.parametrize("max_prefill_tokens", [1, 7, 64, 512])
def test_the_size_of_prompt_pieces_never_shows(make_engine: MakeEngine, max_prefill_tokens: int) -> None:
    engine = make_engine("mistral", max_prefill_tokens=max_prefill_tokens)
    assert list(run(engine, PROMPT, "adaptive").token_ids) == generate("mistral", PROMPT)


def test_an_end_of_sequence_token_inside_a_draft_ends_the_answer(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    whole = run(engine, PROMPT, "adaptive")
    lengths = whole.draft_stats.accepted_lengths
    inside = sum(lengths[: lengths.index(max(lengths))]) + lengths.index(max(lengths)) + 2
    end = whole.token_ids[inside]
    plain = run(engine, PROMPT, "none", stop_token_ids=(end,))
    assert same_answer(plain, run(engine, PROMPT, "adaptive", stop_token_ids=(end,)))
    assert plain.token_ids[-1] == end
    assert END not in plain.token_ids


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.05, "seed": 3}], ids=["greedy", "seeded"])
def test_trees_of_the_real_drafter_give_the_plain_tokens(
    make_engine: MakeEngine, architecture: str, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    """Over turns of a session whose KV is that of accepted branches, on every architecture."""
    engine = make_engine(architecture, step_cost=((1, 1.0), (200, 1.2)))
    drafts = watch_drafts(engine, monkeypatch)
    prompt = PROMPT
    for _ in range(3):
        plain = run(engine, prompt, "none", **sampling)
        drafted = run(engine, prompt, "adaptive", "chat", **sampling)
        assert same_answer(plain, drafted)
        prompt = (*prompt, *drafted.token_ids, *ids_of(" the dog sat on"))
    assert drafted.usage.cached_tokens > len(PROMPT)
    assert sum(not draft.is_chain for draft in drafts) > 10
    assert_all_slots_free(engine)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4, "seed": 11}], ids=["greedy", "seeded"])
def test_the_bundled_model_writes_the_plain_tokens(sampling: dict[str, Any]) -> None:
    document = "# Notes\n" + "".join(f"- item {n}: {n * 37 % 100} boxes of nails\n" for n in range(8))
    turns = [
        "Append this line:\n- Bo brings the slides",
        "Replace every 'nails' with 'screws'.",
        "Repeat the document.",
    ]
    with Engine(EngineConfig(model="bundled", step_cost=((1, 1.0), (8, 1.3), (64, 2.4)), max_model_len=1024)) as engine:
        for turn in turns:
            messages = ({"role": "user", "content": document}, {"role": "user", "content": turn})
            params = SamplingParams(max_tokens=150, **sampling)
            plain, drafted = (
                engine.generate(GenerationRequest(messages=messages, session_id=name, drafter=name, sampling=params))
                for name in ("none", "adaptive")
            )
            assert same_answer(plain, drafted)
            document = drafted.text
            stop = drafted.text[len(drafted.text) // 2 :][:6]
            params = SamplingParams(max_tokens=150, stop=stop, **sampling)
            plain, drafted = (
                engine.generate(GenerationRequest(messages=messages, session_id=name, drafter=name, sampling=params))
                for name in ("none", "adaptive")
            )
            assert same_answer(plain, drafted)


def test_a_conversation_goes_on_as_if_nothing_happened_after_a_cancelled_answer(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", step_cost=((1, 1.0), (200, 1.2)))
    for steps in range(1, 8):
        request = GenerationRequest(
            prompt_token_ids=PROMPT,
            session_id="s",
            sampling=SamplingParams(max_tokens=200),
            drafter=AdaptiveDrafter(max_draft_tokens=8),
        )
        stream = engine.stream(request)
        for _ in range(steps):
            next(stream)
        engine.cancel(request.request_id)
        cut = stream.result()
        follow_up = (*PROMPT, *cut.token_ids, *ids_of(" the cat"))
        assert same_answer(run(engine, follow_up, "adaptive", "s"), run(engine, follow_up, "none"))
    assert_all_slots_free(engine)


def test_a_reused_prefix_gives_the_answer_of_a_fresh_one(make_engine: MakeEngine) -> None:
    """A prompt that leaves the last call's path in the middle reuses the part before, and nothing of the rest."""
    engine = make_engine("gemma3")
    run(engine, PROMPT, "adaptive", session="s")
    branch = (*PROMPT[:70], *ids_of("something else entirely"))
    reused = run(engine, branch, "adaptive", session="s")
    assert reused.usage.cached_tokens == 70
    assert same_answer(reused, run(engine, branch, "none"))
    repeated = run(engine, branch, "adaptive", session="s")
    assert repeated.usage.cached_tokens == len(branch) - 1  # the last prompt token is always computed
    assert same_answer(reused, repeated)
