"""Noise is uniform and independent over seeds, positions and tokens, and the highest token is found without it all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from copyspec_engine.sampling.gumbel import _mixed, _noise, _noise_of, highest_perturbed, noise_keys


def noise(seed: int, positions: list[int], num_tokens: int) -> torch.Tensor:
    """The noise of the first tokens, shape (positions, tokens)."""
    keys = torch.from_numpy(noise_keys(seed, positions).view(np.int64))
    return _noise_of(torch.arange(num_tokens, dtype=torch.int32)[None], keys)


def highest(scores: torch.Tensor, keys: np.ndarray, temperature: float, ids: torch.Tensor | None = None) -> list[int]:
    ids = torch.arange(scores.shape[-1])[None] if ids is None else ids
    found = highest_perturbed(scores, ids.int(), keys, temperature, scores.argmax(-1))
    return [int(column) for column in found]


def test_keys_depend_on_seed_and_position_alone() -> None:
    whole = noise_keys(42, range(100))
    assert len(np.unique(whole)) == 200
    assert all((noise_keys(42, [position]) == whole[position]).all() for position in range(100))
    assert (noise_keys(42, [9, 3, 9, 4]) == whole[[9, 3, 9, 4]]).all()
    assert not np.isin(noise_keys(43, range(100)), whole).any()
    assert not np.isin(noise_keys(2**63 - 1, range(100)), whole).any()


def test_compiled_noise_is_that_of_tensor_operations() -> None:
    """To the last bits of two logarithms: the integers before them are the same."""
    keys = np.concatenate([noise_keys(7, [position]) for position in (0, 5, 2**40)])
    for row, (first, second) in enumerate(keys):
        compiled = [_noise(np.int32(token), first, second) for token in range(3000)]
        tensor = _noise_of(torch.arange(3000)[None], torch.from_numpy(keys.view(np.int64)))[row]
        torch.testing.assert_close(torch.tensor(compiled, dtype=torch.float64), tensor, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 40.0])
def test_tokens_that_are_passed_over_could_not_have_been_the_highest(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for columns in (1, 2, 255, 256, 257, 1000, 5000):
        for temperature in (5e-324, 1e-30, 1e-3, 0.3, 1.0, 1.7, 100.0):
            scores = torch.randn((6, columns), generator=generator) * spread + 30 * torch.randn(1, generator=generator)
            scores[1, 1:] = -torch.inf
            scores[2, ::3] = scores[2, 0]
            keys = noise_keys(columns, range(6))
            tempered = (scores.double() - scores.amax(-1, keepdim=True)) / temperature
            whole = tempered + _noise_of(torch.arange(columns)[None], torch.from_numpy(keys.view(np.int64)))
            assert highest(scores, keys, temperature) == whole.argmax(-1).tolist()


def test_a_token_wins_wherever_its_column_is() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn((50, 700), generator=generator)
    keys = noise_keys(1, range(50))
    order = torch.stack([torch.randperm(700, generator=generator) for _ in range(50)])
    columns = highest(scores.gather(-1, order), keys, 1.0, order)
    assert [int(order[row, column]) for row, column in enumerate(columns)] == highest(scores, keys, 1.0)


def test_logits_of_no_number_give_a_token_all_the_same() -> None:
    """A model that overflows writes nonsense, but nothing breaks."""
    scores = torch.full((2, 300), math.nan)
    scores[1] = -torch.inf
    assert all(0 <= column < 300 for column in highest(scores, noise_keys(1, [0, 1]), 1.0))


def test_noise_is_that_of_a_gumbel_variable_into_its_tails() -> None:
    """Each share within 4.5 standard deviations, down to one in 100,000 on both sides."""
    found = noise(123, list(range(300)), 20_000).flatten()
    for share in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99, 0.9999, 0.99999):
        seen = int((found < -math.log(-math.log(share))).sum())
        deviation = math.sqrt(len(found) * share * (1 - share))
        assert abs(seen - len(found) * share) < 4.5 * deviation, share
    assert found.isfinite().all()


def test_noise_of_other_tokens_positions_and_seeds_is_independent() -> None:
    """Correlations of 4,000,000 pairs, each within 4.5 standard deviations, of the noise and of its size."""
    found = noise(1, list(range(200)), 20_000)
    others = {
        "next token": found.roll(1, 1),
        "token 64 further": found.roll(64, 1),
        "token 4096 further": found.roll(4096, 1),
        "next position": found.roll(1, 0),
        "next seed": noise(2, list(range(200)), 20_000),
        "seed of another top bit": noise(1 + 2**62, list(range(200)), 20_000),
    }
    for name, other in others.items():
        for measure in (lambda x: (-(-x).exp()).exp(), lambda x: ((-(-x).exp()).exp() - 0.5).abs()):
            pair = torch.stack((measure(found).flatten(), measure(other).flatten()))
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / math.sqrt(found.numel()), name


def test_a_bit_of_a_token_id_changes_half_of_the_bits() -> None:
    first, second = noise_keys(9, [3])[0]
    before = np.array([_mixed(np.int32(token), first, second) for token in range(2000)], dtype=np.uint64)
    for bit in range(17):
        after = np.array([_mixed(np.int32(token ^ (1 << bit)), first, second) for token in range(2000)], np.uint64)
        changed = np.unpackbits((before ^ after).view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
        assert (np.abs(changed - 0.5) < 0.06).all(), bit
