"""transformers `generate` on a checkpoint, greedy and with prompt lookup."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from copyspec_engine import ModelLoadError
from copyspec_engine.cli.demo.figures import GENERATE, LOOKUP, PeerAnswer
from copyspec_engine.models import locate_model

__all__ = ["LOOKUP_TOKENS", "Lane", "generate_greedy", "transformers_lanes"]

LOOKUP_TOKENS = 10
"""`prompt_lookup_num_tokens`, the value that the transformers documentation uses."""

Lane = Callable[[Sequence[int], int], PeerAnswer]
"""Prompt and the most tokens of an answer -> the answer."""


def transformers_lanes(model: str, device: str, dtype: str, *, trust_remote_code: bool) -> dict[str, Lane]:
    """A checkpoint loaded by transformers alone, and its lanes `GENERATE` and `LOOKUP`.

    The whole prompt goes into every call, since `generate` keeps nothing from one call to the next.

    Args:
        model: a name or path, as the engine knows it.
        device: as torch calls it.
        dtype: of the weights, as torch calls it.
        trust_remote_code: whether code of the checkpoint may run.

    Raises:
        ModelLoadError: transformers cannot load it.
    """
    path = str(locate_model(model).as_folder().path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        loaded = loaded.to(torch.device(device)).eval()
        passes = _Passes(loaded)
    except (OSError, RuntimeError, MemoryError) as error:
        raise ModelLoadError(
            f"Cannot load {path} a second time for transformers: {error}. Leave its peers out, or take a smaller model"
        ) from None

    def lane(**options: int) -> Lane:
        def ask(prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
            start = passes.reset()
            token_ids, seconds = generate_greedy(loaded, prompt_ids, max_tokens, **options)
            return PeerAnswer(
                len(token_ids),
                seconds,
                token_ids=token_ids,
                ttft_s=passes.first_s - start,
                forward_passes=passes.count,
            )

        return ask

    return {GENERATE: lane(), LOOKUP: lane(prompt_lookup_num_tokens=LOOKUP_TOKENS)}


def generate_greedy(
    model: Any,  # noqa: ANN401 - any decoder of transformers
    prompt_ids: Sequence[int],
    max_tokens: int,
    **options: Any,  # noqa: ANN401 - further ones of `generate`
) -> tuple[tuple[int, ...], float]:
    """(tokens that `generate(do_sample=False)` adds to the prompt, seconds from the call to its return)."""
    inputs = torch.tensor([list(prompt_ids)], device=model.device)
    config = model.generation_config
    pad = config.pad_token_id if config.pad_token_id is not None else _first(config.eos_token_id)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            **options,
        )
        token_ids = output[0, inputs.shape[1] :].tolist()  # waits for the device
        seconds = time.perf_counter() - start
    return tuple(token_ids), seconds


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


class _Passes:
    """Counts a model's forward passes, and notes when the first one ended."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count, self.first_s = 0, 0.0
        model.register_forward_hook(self._after)

    def reset(self) -> float:
        """Count from 0 again, from the time that is returned on."""
        self.count = 0
        return time.perf_counter()

    def _after(self, model: torch.nn.Module, *_: object) -> None:
        self.count += 1
        if self.count == 1:
            device = next(model.parameters()).device
            if device.type == "cuda":
                torch.accelerator.synchronize(device)
            self.first_s = time.perf_counter()
