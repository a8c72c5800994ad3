"""Whether passes over our KV give a model's own logits, checked on the real weights, and how they run fastest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.attention import ATTENTION_NAME, KVStore
from copyspec_engine.execution.checkpoint import relative_difference, tolerance, vocab_size
from copyspec_engine.execution.cuda_graphs import compile_layers, undo_compile, why_not_paged
from copyspec_engine.execution.narrow_decoder import NarrowDecoder, UnmatchedError, match_decoder
from copyspec_engine.execution.narrow_weights import NarrowWeight
from copyspec_engine.execution.ordered_experts import order_experts
from copyspec_engine.execution.packed_linear import pack_linears, unpack_linears, why_not_packed
from copyspec_engine.execution.packing import Piece
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ModelLoadError, UnsupportedModelError
from copyspec_engine.values.info import Execution

__all__ = ["Checked", "check_equivalence", "kv_dtype_of"]

logger = logging.getLogger(__name__)


class PassRunner(Protocol):
    """What is checked: `ModelRunner`."""

    @property
    def store(self) -> KVStore: ...

    @property
    def capture_error(self) -> str | None: ...

    def run(self, pieces: Sequence[Piece]) -> torch.Tensor: ...


class MakeRunner(Protocol):
    """Makes one."""

    def __call__(
        self,
        *,
        num_slots: int,
        execution: Execution = "eager",
        narrow: NarrowDecoder | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> PassRunner: ...


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check of a model found.

    Bytes of KV for one token, how its passes run, why not faster, the relative difference of their logits from the
    model's own, and for "narrow" passes what they read.
    """

    bytes_per_token: int
    execution: Execution = "eager"
    error: str | None = None
    difference: float | None = None
    narrow: NarrowDecoder | None = None


_TOKENS = 12
_ROUNDED_KV = 5e-2
"""Up to which difference logits count as equal where keys and values are rounded to bfloat16."""


def check_equivalence(
    model: PreTrainedModel,
    config: EngineConfig,
    make_runner: MakeRunner,
    narrow: Mapping[str, NarrowWeight] | None = None,
) -> Checked:
    """Compare passes over our KV with the model's own on a few tokens, and switch it to our attention.

    The fastest way of running passes that gives the model's own logits is the one that is taken.

    Args:
        model: with its own attention.
        config: what to load.
        make_runner: `ModelRunner` of this model.
        narrow: weights of linear layers by their names, where there are any in less than float32.

    Raises:
        UnsupportedModelError: the logits differ, so drafts would be verified against a wrong model.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size(model), (_TOKENS,), generator=generator).tolist()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        if config.exact:
            order_experts(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"{config.model} ({type(model).__name__}) cannot run over our KV: {error}"
        ) from error
    checked = _check_wide(model, config, make_runner, ids, expected)
    if narrow:
        checked = _check_narrow(model, config.model, checked, make_runner, ids, expected, narrow)
    kv_dtype = kv_dtype_of(config, model)
    if kv_dtype is None:
        return checked
    runner = make_runner(num_slots=2 * _TOKENS, execution=checked.execution, narrow=checked.narrow, kv_dtype=kv_dtype)
    for in_few in (False, True):
        num_bytes, _ = _compare(runner, model, config.model, ids, expected, in_few=in_few, most=_ROUNDED_KV)
    return replace(checked, bytes_per_token=num_bytes)


def kv_dtype_of(config: EngineConfig, model: PreTrainedModel) -> torch.dtype | None:
    """What keys and values are kept in where that is not what they are computed in; None: it is.

    Raises:
        ModelLoadError: attention on that device, or of that type, cannot read it.
    """
    if config.kv_dtype == "auto" or model.dtype == torch.bfloat16:
        return None
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ModelLoadError(
            f"Got kv_dtype={config.kv_dtype!r} but {config.model} computes in {model.dtype} on {model.device}, where "
            "KV is kept in the same type: leave it out, or use dtype='bfloat16'"
        )
    return torch.bfloat16


def _check_wide(
    model: PreTrainedModel, config: EngineConfig, make_runner: MakeRunner, ids: list[int], expected: torch.Tensor
) -> Checked:
    """How passes of any number of tokens run fastest."""
    executions, why_not = _candidates(model, config)
    for execution in executions:
        found = _check_fast(model, config.model, execution, make_runner, ids, expected, why_not)
        if isinstance(found, Checked):
            return found
        why_not = found
    runner = make_runner(num_slots=2 * _TOKENS)
    num_bytes, difference = _compare(runner, model, config.model, ids, expected)
    return Checked(num_bytes, error=why_not, difference=difference)


def _check_narrow(
    model: PreTrainedModel,
    name: str,
    wide: Checked,
    make_runner: MakeRunner,
    ids: list[int],
    expected: torch.Tensor,
    weights: Mapping[str, NarrowWeight],
) -> Checked:
    """Let passes of few tokens read narrow weights, if they then give the model's own logits; else all stays as it is.

    Args:
        model: with our attention.
        name: for messages.
        wide: how its other passes run.
        make_runner: see above.
        ids: tokens.
        expected: the model's own logits, shape (tokens, vocabulary).
        weights: see `check_equivalence`.
    """
    try:
        runner = make_runner(num_slots=2 * _TOKENS)
        runner.run([Piece(np.arange(1), 0, ids[:1], DraftTree(), 0)])  # by which each layer tells its scoring
        decoder = match_decoder(model, weights, runner.store.scorings)
        runner = make_runner(num_slots=2 * _TOKENS, execution="narrow", narrow=decoder)
        _, difference = _compare(runner, model, name, ids, expected)
        num_bytes, in_few = _compare(runner, model, name, ids, expected, in_few=True)
        return Checked(num_bytes, "narrow", None, max(difference, in_few, wide.difference or 0.0), decoder)
    except Exception as error:  # whatever it is, a slower way is left
        why = str(error) if isinstance(error, UnmatchedError | UnsupportedModelError) else repr(error)
        logger.warning("%s: passes of few tokens read all weights as float32: %s", name, why)
        return replace(wide, error=wide.error or why)


def _candidates(model: PreTrainedModel, config: EngineConfig) -> tuple[tuple[Execution, ...], str | None]:
    """What to try besides "eager", the fastest first; if nothing, then what stands in the way."""
    if model.device.type == "cpu":
        why_not = why_not_packed(model)
        return ("packed",) if why_not is None else (), why_not
    if model.device.type != "cuda":
        return (), None
    if config.exact:
        return (), "exact=True sums in an order of its own, which the kernels for a GPU do not know"
    why_not = why_not_paged(model)
    if why_not is not None:
        return (), why_not
    return ("compiled", "graphs") if config.compile_layers else ("graphs",), None


def _check_fast(
    model: PreTrainedModel,
    name: str,
    execution: Execution,
    make_runner: MakeRunner,
    ids: list[int],
    expected: torch.Tensor,
    why_not: str | None,
) -> Checked | str:
    """Compare passes that run in a faster way with the model's own.

    Args:
        model: with our attention.
        name: for messages.
        execution: "packed", "compiled" or "graphs".
        make_runner: see above.
        ids: tokens.
        expected: the model's own logits, shape (tokens, vocabulary).
        why_not: why no faster way is taken.

    Returns:
        What was found, or why it does not work: then the layers compute as they did.
    """
    try:
        if execution == "compiled":
            compile_layers(model)
        elif execution == "packed":
            pack_linears(model)
        runner = make_runner(num_slots=2 * _TOKENS, execution=execution)
        _compare(runner, model, name, ids, expected)
        num_bytes, difference = _compare(runner, model, name, ids, expected)  # what was captured is replayed now
    except Exception as error:  # whatever it is, a slower way is left
        failure: str | None = str(error)
    else:
        failure = runner.capture_error
        if failure is None:
            return Checked(num_bytes, execution, why_not, difference)
        if execution == "graphs":
            return Checked(num_bytes, "paged", failure, difference)
        # Compiled and still launched kernel by kernel: without its compiler a pass is as fast, and loads faster.
    unpack_linears(model)
    undo_compile(model)
    logger.warning("%s: passes run slower than they might: %s", name, failure)
    return str(failure)


def _compare(
    runner: PassRunner,
    model: PreTrainedModel,
    name: str,
    ids: list[int],
    expected: torch.Tensor,
    *,
    in_few: bool = False,
    most: float | None = None,
) -> tuple[int, float]:
    """Bytes of KV for one token, and the relative difference of the logits, if passes in pieces give the model's own.

    Raises:
        UnsupportedModelError: they do not.
    """
    passes = _narrow_passes(ids) if in_few else _wide_passes(ids)
    try:
        got = torch.cat([runner.run(pieces).float() for pieces in passes])  # good until the next pass only
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    except Exception as error:
        raise UnsupportedModelError(f"{name} ({type(model).__name__}) cannot run over our KV: {error}") from error
    expected, got = torch.cat((expected, expected[3:])), got[: 2 * _TOKENS - 3]
    layers = int(model.config.get_text_config().num_hidden_layers)
    difference = relative_difference(got, expected)
    if runner.store.num_layers != layers or not difference < (most or tolerance(model)):
        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) gives other logits over our KV than by itself (relative difference "
            f"{difference:.2g}, {runner.store.num_layers} of {layers} layers): this "
            "architecture is not supported yet"
        )
    return runner.store.bytes_per_token, difference


def _two_rows() -> npt.NDArray[np.int64]:
    """Slots of two rows, scattered on purpose, and not in order."""
    return np.random.default_rng(0).permutation(2 * _TOKENS).reshape(2, _TOKENS)


def _wide_passes(ids: list[int]) -> Iterator[list[Piece]]:
    """Passes that read a text twice: logits of all its tokens, and then of those from the fourth on."""
    slots, other = _two_rows()
    yield [Piece(slots, 0, ids[:7], DraftTree(), 7), Piece(other, 0, ids[:3], DraftTree(), 0)]
    yield [Piece(slots, 7, ids[7:], DraftTree(), 5), Piece(other, 3, ids[3:], DraftTree(), 9)]


def _narrow_passes(ids: list[int]) -> Iterator[list[Piece]]:
    """The same in passes of at most eight tokens, the last ones of them a draft with a branch besides."""
    slots, other = _two_rows()
    yield [Piece(slots, 0, ids[:5], DraftTree(), 5), Piece(other, 0, ids[:3], DraftTree(), 0)]
    yield [Piece(slots, 5, ids[5:], DraftTree(), 7)]
    yield [Piece(other, 3, ids[3:8], DraftTree(), 5)]
    draft = DraftTree((*ids[9:], ids[0]), (-1, 0, 1, -1))
    yield [Piece(np.append(other, slots[0]), 8, [ids[8], *draft.tokens], draft, 5)]  # the branch's logits come last
