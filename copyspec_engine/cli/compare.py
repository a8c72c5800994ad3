"""The peers: transformers `generate` on the same weights, as its users call it, greedy and with prompt lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from copyspec_engine import EngineInfo, ModelLoadError
from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.forced.generate import LOOKUP_TOKENS, generate_greedy

__all__ = ["PeerAnswer", "Peers"]


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
        return PeerAnswer(*generate_greedy(self._model, prompt_ids, max_tokens, **options))
