"""The noise of sampling: which token is the highest once each has got its own Gumbel noise (the Gumbel-max trick).

A token's noise is a function of (seed, position, token id) and of nothing else: the seed and the position give a key,
and a counter-based generator mixes the key with the id. So a token is drawn alike in a pass of any width, beside any
other rows and on any device, and since each token keeps its noise whatever the others' logits are, a change in a
logit's last bits changes the outcome only where two tokens come out equal to those bits.

Integers are the same everywhere, bit for bit. Two logarithms in float64 follow, whose last bit may depend on the
machine: that decides where two tokens come out equal to 15 digits, which is once in 10**14 tokens or so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from copyspec_engine.compiled import compiled

__all__ = ["highest_perturbed", "noise_keys", "warm_up_noise"]

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Odd constants of the generator: SplitMix64's step and the multipliers of its mixer."""
_STEP64, _FIRST64, _SECOND64 = np.uint64(_GAMMA), np.uint64(_FIRST), np.uint64(_SECOND)
_SHIFT30, _SHIFT27, _SHIFT31, _SHIFT12, _SHIFT28 = (np.uint64(bits) for bits in (30, 27, 31, 12, 28))
_SPACING = 2.0**-52
_BLOCK = 256
"""Tokens that are looked at roughly, all in the same way, before any of them is looked at closely."""
_EXPONENT_OF_24_BITS = np.int32((127 + 24) << 23)
"""What a float32 of 2**24 looks like as an integer."""
_LN_2 = math.log(2.0)


def noise_keys(seed: int, positions: Sequence[int]) -> npt.NDArray[np.uint64]:
    """The keys of positions, shape (len(positions), 2): blocks of the Philox generator whose key is the seed.

    Args:
        seed: 0 to 2**63 - 1.
        positions: of tokens in their sequence, from 0; not far apart.
    """
    first, last = min(positions), max(positions)
    blocks = np.random.Philox(key=seed, counter=first).random_raw(4 * (last - first + 1)).reshape(-1, 4)
    return np.ascontiguousarray(blocks[np.asarray(positions) - first, :2])


def highest_perturbed(
    scores: torch.Tensor, ids: torch.Tensor, keys: npt.NDArray[np.uint64], temperature: float, likeliest: torch.Tensor
) -> torch.Tensor:
    """The column that is the highest in each row after division by the temperature and noise; shape (rows,).

    Columns are drawn with exactly the probabilities of a softmax, but that noise has 52 bits.

    Args:
        scores: float32, shape (rows, columns), any device; -inf is never chosen.
        ids: the columns' token ids, int32, shape (rows, columns), or (1, columns) if all rows have the same.
        keys: of the rows' positions, shape (rows, 2).
        temperature: above 0.
        likeliest: a column of the highest score, int64, shape (rows,).
    """
    if scores.device.type == "cpu":
        arrays = scores.contiguous().numpy(), ids.contiguous().numpy(), keys, likeliest.numpy()
        return torch.from_numpy(_highest(*arrays, temperature))
    tempered = scores.double().sub_(scores.gather(-1, likeliest[:, None])).div_(temperature)
    return tempered.add_(_noise_of(ids, torch.from_numpy(keys.view(np.int64)).to(scores.device))).argmax(dim=-1)


def _noise_of(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of every column, float64, shape (rows, columns); what `_noise` gives, for any device.

    Args:
        ids: as above.
        keys: int64 with the bits of those above, shape (rows, 2).
    """
    mixed = ids.long() * _signed(_GAMMA) + keys[:, :1]
    mixed.bitwise_xor_(_shifted(mixed, 30)).mul_(_signed(_FIRST)).add_(keys[:, 1:])
    mixed.bitwise_xor_(_shifted(mixed, 27)).mul_(_signed(_SECOND))
    mixed.bitwise_xor_(_shifted(mixed, 31))
    uniform = _shifted(mixed, 12).double().add_(0.5).mul_(_SPACING)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _signed(constant: int) -> int:
    """The int64 with the bits of a uint64: torch multiplies and adds them alike."""
    return constant - 2**64 if constant >= 2**63 else constant


def _shifted(mixed: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted to the right with zeros behind, which torch does for unsigned integers only on a CPU."""
    return (mixed >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@compiled
def _mixed(token: int, first_key: int, second_key: int) -> int:
    """64 bits for a token: SplitMix64's mixer, with one half of the key at the beginning and one in the middle."""
    mixed = np.uint64(token) * _STEP64 + first_key
    mixed = (mixed ^ (mixed >> _SHIFT30)) * _FIRST64 + second_key
    mixed = (mixed ^ (mixed >> _SHIFT27)) * _SECOND64
    return mixed ^ (mixed >> _SHIFT31)  # type: ignore[no-any-return] # numpy's integers


@compiled
def _noise(token: int, first_key: int, second_key: int) -> float:
    """Gumbel noise of a token: from a uniform number that is neither 0 nor 1, by half a spacing."""
    uniform = (np.float64(_mixed(token, first_key, second_key) >> _SHIFT12) + 0.5) * _SPACING
    return -math.log(-math.log1p(-uniform))


@compiled
def _rough(
    scores: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    scale: np.float32,
    cut: np.float32,
    bounds: npt.NDArray[np.float32],
) -> int:
    """How many tokens of a block may come out above `cut`; what each comes out at, at most, goes into `bounds`.

    A token's noise is below -log(u) of its uniform number u. Of that the first 24 bits are taken, as a float32, whose
    exponent and mantissa read as one integer are a logarithm to base 2 that is never too high.
    """
    count = 0
    for i in range(len(scores)):
        bits = np.float32(np.int32(_mixed(ids[i], keys[0], keys[1]) >> _SHIFT28 >> _SHIFT12)).view(np.int32)
        bounds[i] = scores[i] + scale * np.float32(_EXPONENT_OF_24_BITS - bits)
        count += bounds[i] > cut
    return count


@compiled
def _highest(
    scores: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    likeliest: npt.NDArray[np.int64],
    temperature: float,
) -> npt.NDArray[np.int64]:
    """See `highest_perturbed`. Logarithms are taken only of tokens that may be the highest so far."""
    chosen: npt.NDArray[np.int64] = likeliest.copy()
    bounds = np.empty(_BLOCK, dtype=np.float32)
    scale = np.float32(temperature * _LN_2 / 2**23)
    for row in range(len(scores)):
        tokens, key = ids[row if len(ids) > 1 else 0], keys[row]
        top = np.float64(scores[row, likeliest[row]])
        best = _noise(tokens[likeliest[row]], key[0], key[1])
        cut = _below(top, temperature, best)
        for start in range(0, scores.shape[1], _BLOCK):
            end = min(start + _BLOCK, scores.shape[1])
            if not _rough(scores[row, start:end], tokens[start:end], key, scale, cut, bounds):
                continue
            for column in range(start, end):
                if bounds[column - start] > cut:
                    value = (scores[row, column] - top) / temperature + _noise(tokens[column], key[0], key[1])
                    if value > best:
                        chosen[row], best = column, value
                        cut = _below(top, temperature, best)
    return chosen


@compiled
def _below(top: float, temperature: float, best: float) -> np.float32:
    """A score that is surely below the best one so far, by more than float32 rounds bounds."""
    height = temperature * best
    cut: np.float32 = np.float32(top + height - 1e-5 * temperature - 1e-6 * (abs(top) + abs(height)))
    return cut


def warm_up_noise() -> None:
    """Load the compiled code, or compile it."""
    highest_perturbed(
        torch.zeros((1, 2)),
        torch.zeros((1, 2), dtype=torch.int32),
        noise_keys(0, [0]),
        1.0,
        torch.zeros(1, dtype=torch.int64),
    )
