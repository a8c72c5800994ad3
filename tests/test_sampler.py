"""Samples follow the filtered distribution, and depend on seed and position alone."""

from __future__ import annotations

import random

import pytest
import torch

from copyspec_engine import SamplingParams
from copyspec_engine.sampler import filtered_probabilities, sample, uniform_noise


def test_greedy_takes_the_most_likely_token_at_every_node() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample(logits, SamplingParams(), seed=1, positions=[5, 6]) == [1, 0]


def test_noise_depends_on_seed_and_position_alone() -> None:
    whole = uniform_noise(42, range(100))
    assert [uniform_noise(42, [position])[0] for position in range(100)] == whole
    assert uniform_noise(42, [9, 3, 9, 4]) == [whole[9], whole[3], whole[9], whole[4]]
    assert uniform_noise(43, range(100)) != whole
    assert all(0.0 <= number < 1.0 for number in whole)


def test_a_token_is_the_same_alone_and_inside_a_draft() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((30, 50), generator=generator)
    for params in (SamplingParams(temperature=0.8), SamplingParams(temperature=1.3, top_p=0.7, top_k=9)):
        together = sample(logits, params, seed=3, positions=range(10, 40))
        alone = [sample(logits[i : i + 1], params, seed=3, positions=[10 + i])[0] for i in range(30)]
        assert together == alone


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_k=4),
        SamplingParams(temperature=1.7, top_p=0.8),
    ],
)
def test_samples_follow_the_exact_probabilities(params: SamplingParams) -> None:
    """Chi-square over 20,000 positions; 27.9 is the 0.1% point at 9 degrees of freedom."""
    logits = torch.tensor([1.0, -1.0, 0.3, 2.0, 0.0, -3.0, 1.5, 0.2, -0.4, 0.9])
    exact = filtered_probabilities(logits[None], params)[0]
    count = 20_000
    tokens = torch.tensor(sample(logits.expand(count, -1), params, seed=11, positions=range(count)))
    seen = torch.bincount(tokens, minlength=10).double()
    assert (seen[exact == 0] == 0).all()
    possible = exact > 0
    expected = exact[possible] * count
    assert ((seen[possible] - expected) ** 2 / expected).sum() < 27.9


def test_filters_keep_what_they_promise() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    top_k = filtered_probabilities(logits, SamplingParams(temperature=1.0, top_k=2))
    assert (top_k > 0).tolist() == [[True, True, False, False, False]]
    raw = logits.double().softmax(-1)
    needed = float(raw[0, :2].sum())
    for top_p, kept in ((1e-9, 1), (needed - 1e-6, 2), (needed + 1e-6, 3), (1.0, 5)):
        found = filtered_probabilities(logits, SamplingParams(temperature=1.0, top_p=top_p))
        assert int((found > 0).sum()) == kept


def test_a_filtered_token_is_never_sampled() -> None:
    rng = random.Random(0)
    logits = torch.randn((200, 30), generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        params = SamplingParams(temperature=rng.uniform(0.1, 3), top_p=rng.uniform(0.05, 1), top_k=rng.randrange(1, 40))
        kept = filtered_probabilities(logits, params) > 0
        tokens = sample(logits, params, seed=rng.randrange(2**63), positions=range(200))
        assert all(kept[i, token] for i, token in enumerate(tokens))
