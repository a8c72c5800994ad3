"""The peers: transformers `generate` on the same weights, as its users call it, greedy and with prompt lookup."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from copyspec_engine import EngineInfo, ModelLoadError
from copyspec_engine.bundled import bundled_model_path

__all__ = ["LOOKUP_TOKENS", "PeerAnswer", "Peers"]

LOOKUP_TOKENS = 10
"""`prompt_lookup_num_tokens`, the value that the transformers documentation uses."""


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """What `generate` added to the prompt, and the seconds from the call to its return."""

    token_ids: tuple[int, ...]
    seconds: float


class Peers:
    """The same checkpoint loaded once more by transformers alone, on the same device, in the same type.

    The whole prompt goes into every call, since `generate` keeps nothing from one call to the next.
    """

    def __init__(self, info: EngineInfo, *, trust_remote_code: bool = False) -> None:
        path = str(bundled_model_path()) if info.model == "bundled" else info.model
        self._device = torch.device(info.device)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, info.dtype), trust_remote_code=trust_remote_code
            )
            self._model = model.to(self._device).eval()
        except (OSError, RuntimeError, MemoryError) as error:
            raise ModelLoadError(
                f"Cannot load {path} a second time for --compare: {error}. Leave --compare out, or take a smaller model"
            ) from None

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """`generate(do_sample=False)`."""
        return self._generate(prompt_ids, max_tokens)

    def prompt_lookup(self, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """`generate(do_sample=False, prompt_lookup_num_tokens=10)`."""
        return self._generate(prompt_ids, max_tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS)

    def _generate(self, prompt_ids: Sequence[int], max_tokens: int, **options: int) -> PeerAnswer:
        inputs = torch.tensor([list(prompt_ids)], device=self._device)
        config = self._model.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else _first(config.eos_token_id)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            output = self._model.generate(
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
        return PeerAnswer(tuple(token_ids), seconds)


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids
