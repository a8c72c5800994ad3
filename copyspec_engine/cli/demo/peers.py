"""The peers: transformers `generate` on the same weights, greedy and with prompt lookup, and llama.cpp where it is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from copyspec_engine import Engine, ModelLoadError
from copyspec_engine.cli.demo.figures import GENERATE, LLAMA, LLAMA_NGRAM, LOOKUP, PeerAnswer
from copyspec_engine.cli.demo.llama_server import LlamaServers, find_llama_server, gguf_file
from copyspec_engine.models import locate_model

__all__ = ["LOOKUP_TOKENS", "Lane", "Peers", "generate_greedy", "transformers_lanes"]

LOOKUP_TOKENS = 10
"""`prompt_lookup_num_tokens`, the value that the transformers documentation uses."""

Lane = Callable[[Sequence[int], int], PeerAnswer]
"""Prompt and the most tokens of an answer -> the answer."""
LLAMA_OPTIONS: dict[str, tuple[str, ...]] = {LLAMA: (), LLAMA_NGRAM: ("--spec-type", "ngram-mod")}


class Peers:
    """Everything that answers the same prompts beside us; `close` ends what was started.

    `notes` says in a line each which peer does not take part, and why.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        info, trusted = engine.info, engine.config.trust_remote_code
        self._lanes = transformers_lanes(info.model, info.device, info.dtype, trust_remote_code=trusted)
        self._servers: LlamaServers | None = None

    @property
    def notes(self) -> list[str]:
        told = self._servers.notes if self._servers is not None else {}
        return [f"{name} is left out: {reason}" for name, reason in told.items()]

    def start_servers(self, probe: str) -> None:
        """Start llama.cpp if it is there and the model is a GGUF file; `probe` is a text that all must cut alike."""
        binary, gguf = find_llama_server(), gguf_file(self._engine.info.model)
        if binary is None or gguf is None:
            return
        self._servers = LlamaServers(binary, gguf, torch.get_num_threads())
        for name, options in LLAMA_OPTIONS.items():
            self._servers.start(name, options, probe, self._engine.encode(probe))

    def warm_up(self, prompt_ids: Sequence[int]) -> None:
        """Ask each once for a few tokens."""
        self.answer(prompt_ids, 4)

    def answer(self, prompt_ids: Sequence[int], max_tokens: int, *, backwards: bool = False) -> dict[str, PeerAnswer]:
        """The answers of all, asked one after the other, the last one first if `backwards`."""
        names = [*self._lanes, *(self._servers.running if self._servers is not None else ())]
        asked = {name: self._ask(name, prompt_ids, max_tokens) for name in (names[::-1] if backwards else names)}
        return {name: answer for name in names if (answer := asked[name]) is not None}

    def ask(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """The answer of one that always takes part: `GENERATE` or `LOOKUP`."""
        return self._lanes[name](prompt_ids, max_tokens)

    def close(self) -> None:
        """End the servers."""
        if self._servers is not None:
            self._servers.close()

    def _ask(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer | None:
        """None from one that fails."""
        if name in self._lanes:
            return self._lanes[name](prompt_ids, max_tokens)
        assert self._servers is not None
        return self._servers.answer(name, prompt_ids, max_tokens)


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
