"""Samples follow the filtered distribution, and rounding hardly moves them; processors equal transformers'."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from copyspec_engine import SamplingParams
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.sampling.gumbel import noise_keys
from copyspec_engine.sampling.likely_tokens import add_logprobs
from copyspec_engine.sampling.processors import TokenCounts, mask_tokens, penalise
from copyspec_engine.sampling.sampler import SampleRow, filtered, sample
from copyspec_engine.sampling.verify import Verdict


def chain(count: int) -> DraftTree:
    return DraftTree.chain([0] * (count - 1))


def draw(logits: torch.Tensor, params: SamplingParams, seed: int = 3, position: int = 10) -> list[int]:
    """The tokens of one row whose draft is a chain."""
    (tokens,) = sample(logits, [SampleRow(params, seed, position, chain(len(logits)))])
    return tokens


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What the filters leave, over the whole vocabulary."""
    kept, ids, is_whole = filtered(logits, params, logits.shape[-1])
    assert is_whole.all()
    chances = (kept.double() / params.temperature).softmax(-1)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_(-1, ids, chances)


def counts_of(prompt: list[int], answer: list[int]) -> TokenCounts:
    counts = TokenCounts()
    counts.update([*prompt, *answer], len(prompt))
    return counts


def random_tree(rng: random.Random, size: int, vocabulary: int) -> DraftTree:
    tokens = tuple(rng.randrange(vocabulary) for _ in range(size))
    return DraftTree(tokens, tuple(rng.randrange(-1, node) for node in range(size)))


def paths(draft: DraftTree) -> list[list[int]]:
    """The tokens down to the root and to each node."""
    found: list[list[int]] = [[]]
    for parent, token in zip(draft.parents, draft.tokens, strict=True):
        found.append([*found[parent + 1], token])
    return found


def test_greedy_takes_the_most_likely_token_at_every_node() -> None:
    assert draw(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), SamplingParams()) == [1, 0]


def test_noise_in_a_tree_is_that_of_the_depth() -> None:
    draft = DraftTree((1, 2, 3), (-1, 0, -1))
    assert (SampleRow(SamplingParams(), 5, 70, draft).keys() == noise_keys(5, [70, 71, 72, 71])).all()


def test_a_token_is_the_same_alone_and_inside_a_draft() -> None:
    logits = torch.randn((30, 50), generator=torch.Generator().manual_seed(0))
    for params in (SamplingParams(temperature=0.8), SamplingParams(temperature=1.3, top_p=0.7, top_k=9, min_p=0.05)):
        together = draw(logits, params, seed=3, position=10)
        assert together == [draw(logits[i : i + 1], params, seed=3, position=10 + i)[0] for i in range(30)]


FILTERS: list[dict[str, Any]] = [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.15}, {"top_k": 7, "top_p": 0.9}]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_samples_follow_the_exact_probabilities(options: dict[str, Any]) -> None:
    """Chi-square over 10,000 positions and as many seeds; 27.9 is the 0.1% point at 9 degrees of freedom."""
    logits = torch.tensor([1.0, -1.0, 0.3, 2.0, 0.0, -3.0, 1.5, 0.2, -0.4, 0.9])
    params = SamplingParams(temperature=1.7, **options)
    exact = probabilities(logits[None], params)[0]
    count = 20_000
    places = [(11, position) for position in range(count // 2)] + [(seed, 7) for seed in range(count // 2)]
    rows = [SampleRow(params, seed, position) for seed, position in places]
    tokens = torch.tensor(sample(logits.expand(count, -1), rows)).flatten()
    seen = torch.bincount(tokens, minlength=10).double()
    assert (seen[exact == 0] == 0).all()
    possible = exact > 0
    expected = exact[possible] * count
    assert ((seen[possible] - expected) ** 2 / expected).sum() < 27.9


@pytest.mark.parametrize("options", [*FILTERS, {"top_k": 50, "top_p": 0.95, "min_p": 0.01}], ids=str)
def test_logits_that_differ_by_rounding_give_the_same_tokens(options: dict[str, Any]) -> None:
    """Past regression: of 1,000 tokens 3 or so were others, as a wide pass adds up in another order than a narrow."""
    generator = torch.Generator().manual_seed(5)
    for temperature in (0.7, 1.0, 1.5):
        params = SamplingParams(temperature=temperature, **options)
        logits = torch.randn((300, 20_000), generator=generator) * 3
        rounded = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
        rows = [SampleRow(params, seed, position=7) for seed in range(len(logits))]
        flips = sum(a != b for a, b in zip(sample(logits, rows), sample(rounded, rows), strict=True))
        assert flips <= 1, temperature


def test_filters_keep_what_they_promise() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    raw = logits.double().softmax(-1)
    needed = float(raw[0, :2].sum())
    cases: list[tuple[dict[str, Any], int]] = [({"top_k": 2}, 2), ({"top_k": 9}, 5), ({"min_p": 1.0}, 1)]
    cases += [({"min_p": math.exp(-2.5)}, 3), ({"top_p": 1e-9}, 1), ({"top_p": needed - 1e-6}, 2)]
    cases += [({"top_p": needed + 1e-6}, 3), ({"top_k": 3, "min_p": 0.9}, 1)]
    for options, count in cases:
        found = probabilities(logits, SamplingParams(temperature=1.0, **options))
        assert (found > 0).tolist() == [[True] * count + [False] * (5 - count)], options


def test_equally_likely_tokens_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0]])
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        kept = probabilities(logits, SamplingParams(temperature=1.0, **options)) > 0
        assert kept.tolist() == [[False, True, True, True, True]]


def test_filters_equal_those_of_transformers() -> None:
    rng = random.Random(0)
    logits = torch.randn((20, 60), generator=torch.Generator().manual_seed(2)) * 3
    for _ in range(60):
        temperature, top_k = rng.uniform(0.3, 3), rng.choice([None, *range(1, 70, 7)])
        top_p, min_p = rng.choice([1.0, rng.uniform(0.05, 1)]), rng.choice([0.0, rng.uniform(0.001, 0.5)])
        peers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        peers += [TopKLogitsWarper(top_k)] if top_k else []
        peers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        peers += [MinPLogitsWarper(min_p)] if min_p else []
        theirs = peers(torch.zeros((20, 1), dtype=torch.long), logits.double()).softmax(-1)
        ours = probabilities(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_filters_that_look_at_few_tokens_first_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaked rows need few tokens, flat ones many more than are looked at first, and ties stand at every edge."""
    generator = torch.Generator().manual_seed(4)
    spread = torch.tensor([0.0, 0.1, 1.0, 4.0, 20.0]).repeat(8)[:, None]
    logits = (torch.randn((40, 3000), generator=generator) * spread).half().float()
    logits[::7, 5:] = -torch.inf
    for options in [*FILTERS[1:], {"top_p": 0.999}, {"min_p": 1e-4}, {"top_k": 50, "top_p": 0.99}, {"top_k": 2500}]:
        params = SamplingParams(temperature=0.9, **options)
        whole = {}
        for width in (4, 64, 3000):
            monkeypatch.setattr("copyspec_engine.sampling.sampler._WIDTH", width)
            whole[width] = draw(logits, params)
        assert whole[4] == whole[64] == whole[3000], options


def test_a_filtered_token_is_never_sampled() -> None:
    rng = random.Random(0)
    logits = torch.randn((200, 30), generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        params = SamplingParams(temperature=rng.uniform(0.1, 3), top_p=rng.uniform(0.05, 1), top_k=rng.randrange(1, 40))
        kept = probabilities(logits, params) > 0
        tokens = draw(logits, params, seed=rng.randrange(2**63), position=0)
        assert all(kept[i, token] for i, token in enumerate(tokens))


def test_the_lowest_temperature_is_greedy() -> None:
    logits = torch.randn((50, 30), generator=torch.Generator().manual_seed(1)) * 9
    assert draw(logits, SamplingParams(temperature=5e-324, top_p=0.9)) == logits.argmax(-1).tolist()
    assert draw(logits, SamplingParams(temperature=5e-324)) == logits.argmax(-1).tolist()


def test_counts_grow_with_the_text() -> None:
    rng = random.Random(3)
    for _ in range(30):
        text = [rng.randrange(12) for _ in range(40)]
        num_prompt = rng.randrange(41)
        counts, end = TokenCounts(), 0
        while end < 40:
            end = min(40, end + rng.randrange(12))
            counts.update(text[:end], num_prompt)
        assert counts.ids.tolist() == sorted(set(text))
        assert counts.times.tolist() == [text[num_prompt:].count(token) for token in sorted(set(text))]
        asked = np.array([0, 99, 5])
        assert counts.times_of(asked).tolist() == [text[num_prompt:].count(token) for token in (0, 99, 5)]


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(6)
    for penalty in (0.7, 1.0001, 1.3, 5.0):
        prompt, answer = [[rng.randrange(40) for _ in range(9)] for _ in range(2)]
        logits = torch.randn((1, 50), generator=generator) * 4
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), logits.clone())
        ours = logits.clone()
        penalise(ours, SamplingParams(repetition_penalty=penalty), counts_of(prompt, answer), DraftTree())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_penalties_at_a_node_are_bit_for_bit_those_of_its_path_as_text() -> None:
    rng = random.Random(2)
    generator = torch.Generator().manual_seed(7)
    for _ in range(40):
        params = SamplingParams(
            repetition_penalty=rng.uniform(0.5, 2),
            presence_penalty=rng.uniform(-2, 2),
            frequency_penalty=rng.uniform(-2, 2),
        )
        prompt, answer = ([rng.randrange(25) for _ in range(rng.randrange(12))] for _ in range(2))
        draft = random_tree(rng, rng.randrange(20), 30)
        logits = torch.randn((1 + len(draft), 30), generator=generator) * 4
        inside = logits.clone()
        penalise(inside, params, counts_of(prompt, answer), draft)
        for node, path in enumerate(paths(draft)):
            alone = logits[node : node + 1].clone()
            written = [*answer, *path]
            penalise(alone, params, counts_of(prompt, written), DraftTree())
            assert torch.equal(inside[node], alone[0])
            for token in range(30):  # the definition, for one token at a time
                score = float(logits[node, token])
                if token in prompt + written:
                    penalty = params.repetition_penalty
                    score = score / penalty if score > 0 else score * penalty
                score -= params.frequency_penalty * written.count(token) + params.presence_penalty * (token in written)
                assert float(alone[0, token]) == pytest.approx(score, rel=1e-5, abs=1e-5)


def test_a_mask_bans_each_token_whose_bit_is_off() -> None:
    rng = random.Random(5)
    for vocabulary, words in ((32, 1), (70, 3), (100, 3), (20, 2)):
        may = [[rng.random() < 0.5 for _ in range(32 * words)] for _ in range(6)]
        packed = np.packbits(np.array(may), axis=-1, bitorder="little").view(np.int32)
        scores = torch.zeros((6, vocabulary))
        mask_tokens(scores, torch.from_numpy(packed))
        expected = [[0.0 if t < len(row) and row[t] else -math.inf for t in range(vocabulary)] for row in may]
        assert scores.tolist() == expected


def test_a_mask_comes_before_everything_that_renormalises() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.5]])
    allowed = torch.tensor([[0b1100]], dtype=torch.int32)
    for options in ({"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.5}, {"logit_bias": {0: 100}}):
        row = SampleRow(SamplingParams(**options), seed=1, position=4, allowed=allowed)
        assert sample(logits, [row]) == [[2]]


def random_row(rng: random.Random, vocabulary: int) -> SampleRow:
    options: dict[str, Any] = {}
    if rng.random() < 0.6:
        options |= {"temperature": rng.choice([0.5, 1.0, 1.5]), **rng.choice([*FILTERS, {"min_p": 0.3}])}
    if rng.random() < 0.4:
        options |= {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.3}
    if rng.random() < 0.3:
        options |= {"logit_bias": {rng.randrange(vocabulary): rng.uniform(-9, 9) for _ in range(3)}}
    draft = random_tree(rng, rng.randrange(7), vocabulary)
    allowed = None
    if rng.random() < 0.3:
        words = [[rng.randrange(1, 2**31) for _ in range(-(-vocabulary // 32))] for _ in range(1 + len(draft))]
        allowed = torch.tensor(words, dtype=torch.int32)
    counts = counts_of([rng.randrange(vocabulary) for _ in range(9)], [rng.randrange(vocabulary) for _ in range(9)])
    return SampleRow(SamplingParams(**options), rng.randrange(2**63), rng.randrange(500), draft, counts, allowed)


def test_rows_of_one_step_give_what_each_gives_alone() -> None:
    rng = random.Random(8)
    generator = torch.Generator().manual_seed(9)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for _ in range(30):
            rows = [random_row(rng, 70) for _ in range(rng.randrange(1, 6))]
            logits = (torch.randn((sum(row.num_nodes for row in rows), 70), generator=generator) * 3).to(dtype)
            before = logits.clone()
            parts = logits.split([row.num_nodes for row in rows])
            assert sample(logits, rows) == [sample(part, [row])[0] for part, row in zip(parts, rows, strict=True)]
            assert torch.equal(logits, before)


@pytest.mark.gpu
def test_a_gpu_chooses_the_tokens_that_the_cpu_chooses() -> None:
    rng = random.Random(9)
    for vocabulary in (70, 5000):
        for _ in range(20):
            rows = [random_row(rng, vocabulary) for _ in range(4)]
            logits = torch.randn((sum(row.num_nodes for row in rows), vocabulary)) * 3
            assert sample(logits.cuda(), rows) == sample(logits, rows)


def test_greedy_rows_without_processors_cost_one_argmax_and_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("argmax", "tolist", "float", "to", "__getitem__"):
        method = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _method: Any = method, **options: Any) -> Any:
            calls.append(_name)
            return _method(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    logits = torch.arange(60.0).reshape(6, 10)
    rows = [SampleRow(SamplingParams(), 1, 5, chain(3)), SampleRow(SamplingParams(), 2, 9, chain(3))]
    assert sample(logits, rows) == [[9, 9, 9], [9, 9, 9]]
    assert calls == ["tolist"], "NumPy finds the highest scores"
    calls.clear()
    assert sample(logits.bfloat16(), rows) == [[9, 9, 9], [9, 9, 9]]
    assert calls == ["argmax", "tolist"]


def test_logprobs_are_those_of_the_untouched_logits_at_accepted_nodes() -> None:
    logits = torch.randn((7, 12), generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=0.3, logit_bias={4: 50}, logprobs=True, top_logprobs=3)
    draft = DraftTree((5, 6, 7), (-1, -1, 1))
    rows = [
        SampleRow(SamplingParams(logprobs=True), 1, 5),
        SampleRow(SamplingParams(), 1, 5, chain(2)),
        SampleRow(params, 1, 5, draft),
    ]
    first, second, third = verdicts = [Verdict((), (3,)), Verdict((0,), (0, 1)), Verdict((1, 2), (6, 7, 4))]
    add_logprobs(logits, rows, verdicts)
    exact = logits.log_softmax(-1)
    assert second == Verdict((0,), (0, 1))
    assert first.logprobs is not None
    assert [(found.token_id, found.top) for found in first.logprobs] == [(3, ())]
    assert first.logprobs[0].logprob == pytest.approx(float(exact[0, 3]))
    assert third.logprobs is not None
    for found, node, token in zip(third.logprobs, (3, 5, 6), (6, 7, 4), strict=True):
        assert (found.token_id, found.logprob) == (token, pytest.approx(float(exact[node, token])))
        best = sorted(enumerate(exact[node].tolist()), key=lambda pair: -pair[1])[:3]
        assert [pair[0] for pair in found.top] == [pair[0] for pair in best]
        assert [pair[1] for pair in found.top] == pytest.approx([pair[1] for pair in best])


def test_a_row_is_filtered_as_if_alone() -> None:
    """Past regression: torch adds up a long row in another order when there are several."""
    logits = torch.randn((4, 100_000), generator=torch.Generator().manual_seed(3)) * 3
    params = SamplingParams(temperature=0.9, top_p=0.7, seed=1)
    together = filtered(logits, params, 1024)
    for row in range(4):
        alone = filtered(logits[row : row + 1], params, 1024)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("size", [50, 3000])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-20, 1.0, 100.0])
def test_values_that_are_hardly_more_than_nothing_leave_the_most_likely_token(size: int, temperature: float) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(0)) * 5
    extremes: list[dict[str, Any]] = [
        {"top_p": 1e-46},
        {"top_p": 5e-324},
        {"top_p": 1e-46, "top_k": 7},
        {"min_p": 1.0},
        {"top_k": 1},
    ]
    if temperature < 1e-10:
        extremes += [{}, {"min_p": 5e-324}, {"top_p": 1 - 1e-16}, {"top_k": 10**30}]
    for options in extremes:
        rows = [SampleRow(SamplingParams(temperature=temperature, **options), 1, 7) for _ in logits]
        assert [tokens[0] for tokens in sample(logits, rows)] == logits.argmax(-1).tolist(), options
