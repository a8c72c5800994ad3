"""Every sampling option through the whole engine: with drafting on and off, alone and among others, and log-probs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from copyspec_engine import (
    ConfigError,
    Engine,
    EngineConfig,
    EngineInfo,
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
)
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import STEP_COST, assert_all_slots_free, build_model
from tests.loop.test_lossless import PROMPT, OracleTrees, run, same_answer

MakeEngine = Callable[..., Engine]

PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 0.7},
    {"presence_penalty": -0.9},
    {"frequency_penalty": 0.4},
    {"frequency_penalty": -0.5},
    {"logit_bias": {32: 0.8, "116": -0.7, 104: 0.4}},
    {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.1, "logit_bias": {97: 0.5}},
]
SEEDED: list[dict[str, Any]] = [
    {"temperature": 0.1, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "seed": 3},
    {"temperature": 0.7, "top_p": 0.1, "seed": 3},
    {"temperature": 0.3, "min_p": 0.4, "seed": 3},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.4, "min_p": 0.2, "seed": 3},
]
CASES = [
    *PROCESSORS,
    *SEEDED,
    *({**processor, **seeded} for processor, seeded in zip(PROCESSORS[::2], SEEDED[1:], strict=True)),
    {**PROCESSORS[-1], **SEEDED[-1]},
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_drafting_never_changes_the_answer(make_engine: MakeEngine, sampling: dict[str, Any]) -> None:
    """Neither copies from the conversation, over turns, nor trees that hold wrong branches beside the right path."""
    engine = make_engine("llama")
    prompt, num_accepted, changed = PROMPT, 0, False
    sampling = {**sampling, "max_tokens": 32}
    for seed in range(2):
        plain = run(engine, prompt, "none", **sampling)
        assert same_answer(plain, run(engine, prompt, "adaptive", "chat", **sampling))
        changed |= plain.token_ids != run(engine, prompt, "adaptive", max_tokens=32).token_ids
        copying = loop_of(engine).core.policy
        loop_of(engine).core.policy = OracleTrees(plain.token_ids, seed)  # type: ignore[assignment]
        trees = run(engine, prompt, "adaptive", "trees", **sampling)
        loop_of(engine).core.policy = copying
        assert same_answer(plain, trees)
        num_accepted += trees.draft_stats.num_accepted_tokens
        prompt = (*prompt, *plain.token_ids, *PROMPT[:20])
    assert changed
    assert num_accepted > 20
    assert_all_slots_free(engine)


def test_a_repetition_penalty_gives_the_tokens_of_generate(make_engine: MakeEngine, architecture: str) -> None:
    engine, ids = make_engine(architecture), torch.tensor([PROMPT])
    with torch.inference_mode():
        out = build_model(architecture).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.2,
        )
    found = run(engine, PROMPT, "adaptive", repetition_penalty=1.2)
    assert list(found.token_ids) == out[0, len(PROMPT) :].tolist()
    assert found.token_ids != run(engine, PROMPT, "adaptive").token_ids


def test_requests_with_different_options_answer_as_if_alone(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen2", max_running=6, max_prefill_tokens=50)
    cases = [{**case, "max_tokens": 16, "logprobs": i % 3 == 0} for i, case in enumerate(CASES)]
    alone = [run(engine, PROMPT, "none", **case) for case in cases]
    handles = [
        engine.stream(
            GenerationRequest(prompt_token_ids=PROMPT, session_id=f"{i % 4}", sampling=SamplingParams(**case))
        )
        for i, case in enumerate(cases)
    ]
    for expected, handle in zip(alone, handles, strict=True):
        found = handle.result()
        assert same_answer(expected, found)
        same_logprobs(expected, found)
    assert_all_slots_free(engine)


def same_logprobs(a: GenerationOutput, b: GenerationOutput) -> None:
    """Equal up to rounding: passes of different widths add up in different orders."""
    if a.logprobs is None or b.logprobs is None:
        assert a.logprobs is b.logprobs
        return
    assert [found.token_id for found in a.logprobs] == list(a.token_ids) == [found.token_id for found in b.logprobs]
    for mine, other in zip(a.logprobs, b.logprobs, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [pair[1] for pair in mine.top] == pytest.approx([pair[1] for pair in other.top], abs=1e-4)


def test_seeds_are_alike_modulo_two_to_the_63(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    def written(seed: int) -> tuple[int, ...]:
        sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=20)
        return engine.generate(GenerationRequest(prompt_token_ids=(1, 2, 3), sampling=sampling)).token_ids

    assert written(-1) == written(2**63 - 1) != written(-(2**63)) == written(0)


@pytest.mark.parametrize("sampling", [{}, CASES[-1], SEEDED[0]], ids=["greedy", "processed", "seeded"])
def test_logprobs_are_those_of_a_plain_pass_of_the_model(make_engine: MakeEngine, sampling: dict[str, Any]) -> None:
    """Whatever the options, with drafting on and off, in the chunks of a stream and in the whole answer."""
    engine = make_engine("llama")
    sampling = {**sampling, "logprobs": True, "top_logprobs": 4}
    plain = run(engine, PROMPT, "none", **sampling)
    loop_of(engine).core.policy = OracleTrees(plain.token_ids, 0)  # type: ignore[assignment]
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=48, **sampling))
    chunks = list(engine.stream(request))
    drafted = chunks[-1].output
    assert drafted is not None
    assert drafted.draft_stats.num_accepted_tokens > 10
    assert same_answer(plain, drafted)
    same_logprobs(plain, drafted)
    assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)
    assert tuple(itertools.chain.from_iterable(chunk.logprobs or () for chunk in chunks)) == drafted.logprobs
    with torch.inference_mode():
        logits = build_model("llama")(torch.tensor([[*PROMPT, *plain.token_ids]])).logits[0]
    exact = logits[len(PROMPT) - 1 : -1].double().log_softmax(-1)
    for row, found in zip(exact, drafted.logprobs or (), strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert [value for _, value in found.top] == pytest.approx(
            [float(row[token]) for token, _ in found.top], abs=1e-4
        )


@pytest.mark.parametrize("ended_by", ["stop", "stop_token_ids", "max_tokens"])
def test_logprobs_end_where_the_answer_ends(make_engine: MakeEngine, ended_by: str) -> None:
    """In the middle of the longest accepted draft."""
    engine = make_engine("llama")
    whole = run(engine, PROMPT, "adaptive")
    lengths = whole.draft_stats.accepted_lengths
    inside = sum(lengths[: lengths.index(max(lengths))]) + lengths.index(max(lengths)) + 2
    assert max(lengths) > 3
    end: Any = {
        "stop": (engine.decode(whole.token_ids[inside : inside + 2]),),
        "stop_token_ids": (whole.token_ids[inside],),
        "max_tokens": inside,
    }[ended_by]
    sampling = {ended_by: end, "logprobs": True}
    plain, drafted = (run(engine, PROMPT, drafter, **sampling) for drafter in ("none", "adaptive"))
    assert same_answer(plain, drafted)
    assert len(plain.token_ids) < len(whole.token_ids)
    same_logprobs(plain, drafted)


def test_nobody_gets_logprobs_unasked(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    assert run(engine, PROMPT, "adaptive").logprobs is None
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=3))
    assert all(chunk.logprobs is None for chunk in engine.stream(request))
    found = run(engine, PROMPT, "adaptive", logprobs=True).logprobs
    assert found is not None
    assert all(not token.top for token in found)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "seeded"])
def test_a_bias_of_100_forces_a_token_and_of_minus_100_bans_it(
    make_engine: MakeEngine, sampling: dict[str, Any]
) -> None:
    engine = make_engine("llama")
    for drafter in ("none", "adaptive"):
        forced = run(engine, PROMPT, drafter, logit_bias={65: 100}, **sampling)
        assert forced.token_ids == (65,) * 48
    free = run(engine, PROMPT, "none", **sampling)
    banned = run(engine, PROMPT, "adaptive", logit_bias=dict.fromkeys(free.token_ids, -100), **sampling)
    assert not set(banned.token_ids) & set(free.token_ids)


@pytest.mark.parametrize("options", [{"logit_bias": {"258": 1}}, {"stop_token_ids": (258,)}], ids=str)
def test_ids_outside_the_vocabulary_are_refused_by_name(make_engine: MakeEngine, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"Got {name} with 258 but expected ids from 0 to 257"):
        run(make_engine("llama"), PROMPT, "adaptive", **options)


class MarkovRunner:
    """A model of six tokens, each of which depends on the last one alone, so that answers' exact odds are known."""

    vocab_size, num_rows = 6, 0

    def __init__(self) -> None:
        self.logits = torch.randn((6, 6), generator=torch.Generator().manual_seed(12)) * 1.2

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        last = [[piece.text[-1], *piece.draft.tokens] for piece in pieces if piece.num_logits]
        return self.logits[[token for tokens in last for token in tokens]]

    def release(self, key: str) -> None:
        """Nothing is kept."""


class RandomTrees(OracleTrees):
    """Trees of random tokens: right now and then, at any depth."""

    def propose(self, num_pending: int, room: int) -> DraftTree:
        size = min(room, 12)
        tokens = tuple(self._rng.randrange(6) for _ in range(size))
        return DraftTree(tokens, tuple(self._rng.randrange(-1, node) for node in range(size)))


def exact_odds(logits: torch.Tensor, first: int, penalty: float) -> dict[tuple[int, ...], float]:
    """Probability of each answer of three tokens, at top_k=4 and a presence penalty, worked out by hand."""
    odds: dict[tuple[int, ...], float] = {}
    for answer in itertools.product(range(6), repeat=3):
        chance, last = 1.0, first
        for i, token in enumerate(answer):
            scores = logits[last].double() - penalty * torch.tensor([float(t in answer[:i]) for t in range(6)])
            scores[scores < scores.sort().values[2]] = -torch.inf
            chance *= float(scores.softmax(-1)[token])
            last = token
        odds[answer] = chance
    return odds


@pytest.mark.parametrize("drafter", ["none", "adaptive"])
def test_answers_over_many_seeds_follow_the_exact_probabilities(drafter: str) -> None:
    """Chi-square over answers of three tokens, one a seed, with trees drafted and without."""
    config = EngineConfig(model="markov", max_sessions=1, max_running=64, max_waiting=4096)
    model = LoadedModel(
        runner=MarkovRunner(),
        tokenizer=ByteTokenizer(),
        info=EngineInfo(
            model="markov",
            architecture="MarkovModel",
            device="cpu",
            dtype="float32",
            max_model_len=16,
            num_parameters=0,
            num_kv_slots=1024,
            kv_bytes_per_token=0,
            step_cost=STEP_COST,
        ),
        eos_token_ids=frozenset(),
    )
    count, num_accepted, rng = 2000, 0, random.Random(1)
    odds = exact_odds(model.runner.logits, 1, 0.8)  # type: ignore[attr-defined]
    seen = dict.fromkeys(odds, 0)
    with Engine(config, model=model) as engine:
        if drafter == "adaptive":
            loop_of(engine).core.policy = RandomTrees((), 5)  # type: ignore[assignment]
        options: dict[str, Any] = {"temperature": 1.0, "top_k": 4, "presence_penalty": 0.8, "max_tokens": 3}
        handles = [
            engine.stream(
                GenerationRequest(
                    prompt_token_ids=(0, 1),
                    drafter=drafter,
                    sampling=SamplingParams(seed=rng.randrange(2**63), **options),
                )
            )
            for _ in range(count)
        ]
        for handle in handles:
            answer = handle.result()
            seen[answer.token_ids] += 1
            num_accepted += answer.draft_stats.num_accepted_tokens
    assert (num_accepted > 500) == (drafter == "adaptive")
    assert all(seen[answer] == 0 for answer, chance in odds.items() if chance == 0)
    likely = [answer for answer, chance in odds.items() if chance * count >= 5]
    expected = {answer: odds[answer] * count for answer in likely}
    rest = count - sum(expected.values())
    statistic = sum((seen[answer] - expected[answer]) ** 2 / expected[answer] for answer in likely)
    statistic += (count - sum(seen[answer] for answer in likely) - rest) ** 2 / rest
    freedom = len(likely)
    assert freedom > 20
    assert statistic < freedom + 3.3 * (2 * freedom) ** 0.5  # above the 0.1% point at these degrees of freedom
