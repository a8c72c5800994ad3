"""The peers: transformers `generate` on the same weights, greedy and with prompt lookup, and llama.cpp where it is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from copyspec_engine import Engine, ModelLoadError
from copyspec_engine.cli.demo.figures import GENERATE, LLAMA, LLAMA_NGRAM, LOOKUP, PeerAnswer
from copyspec_engine.cli.demo.llama_server import LlamaServer, LlamaServerError, find_llama_server
from copyspec_engine.models import find_model, locate_model

__all__ = ["LOOKUP_TOKENS", "Peers", "generate_greedy"]

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
        self._lanes: dict[str, Lane] = dict(_transformers_lanes(engine))
        self._servers: dict[str, LlamaServer] = {}
        self.notes: list[str] = []

    def start_servers(self, probe: str) -> None:
        """Start llama.cpp if it is there and the model is a GGUF file; `probe` is a text that all must cut alike."""
        binary, gguf = find_llama_server(), _gguf_file(self._engine.info.model)
        if binary is None or gguf is None:
            return
        for name in LLAMA_OPTIONS:
            self._start_server(name, binary, gguf, probe)

    def _start_server(self, name: str, binary: str, gguf: Path, probe: str) -> None:
        try:
            server = LlamaServer(binary, gguf, threads=torch.get_num_threads(), options=LLAMA_OPTIONS[name])
            self._servers[name] = server
            server.check_tokens(probe, self._engine.encode(probe))
            self._lanes[name] = _server_lane(server)
        except LlamaServerError as error:
            self._leave_out(name, error)

    def warm_up(self, prompt_ids: Sequence[int]) -> None:
        """Ask each once for a few tokens."""
        self.answer(prompt_ids, 4)

    def answer(self, prompt_ids: Sequence[int], max_tokens: int, *, backwards: bool = False) -> dict[str, PeerAnswer]:
        """The answers of all, asked one after the other, the last one first if `backwards`."""
        names = list(self._lanes)
        asked = {name: self._ask(name, prompt_ids, max_tokens) for name in (names[::-1] if backwards else names)}
        return {name: answer for name in names if (answer := asked[name]) is not None}

    def ask(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """The answer of one that always takes part: `GENERATE` or `LOOKUP`."""
        return self._lanes[name](prompt_ids, max_tokens)

    def close(self) -> None:
        """End the servers."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def _ask(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer | None:
        """None for one that fails, and takes no further part."""
        try:
            return self._lanes[name](prompt_ids, max_tokens)
        except LlamaServerError as error:
            self._leave_out(name, error)
            return None

    def _leave_out(self, name: str, error: LlamaServerError) -> None:
        self.notes.append(f"{name} is left out: {error}")
        self._lanes.pop(name, None)
        if name in self._servers:
            self._servers.pop(name).close()


def _transformers_lanes(engine: Engine) -> dict[str, Lane]:
    """The same checkpoint loaded once more by transformers alone, on the same device, in the same type.

    The whole prompt goes into every call, since `generate` keeps nothing from one call to the next.
    """
    info = engine.info
    path = str(locate_model(info.model).as_folder().path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, info.dtype), trust_remote_code=engine.config.trust_remote_code
        )
        model = model.to(torch.device(info.device)).eval()
        passes = _Passes(model)
    except (OSError, RuntimeError, MemoryError) as error:
        raise ModelLoadError(
            f"Cannot load {path} a second time for --compare: {error}. Leave --compare out, or take a smaller model"
        ) from None

    def lane(**options: int) -> Lane:
        def ask(prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
            start = passes.reset()
            token_ids, seconds = generate_greedy(model, prompt_ids, max_tokens, **options)
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


def _server_lane(server: LlamaServer) -> Lane:
    def ask(prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        said = server.answer(prompt_ids, max_tokens)
        return PeerAnswer(said.tokens, said.seconds, text=said.text, write_s=said.write_s)

    return ask


def _gguf_file(model: str) -> Path | None:
    """The GGUF file that a model is read from; None for another kind of checkpoint."""
    found = find_model(model)
    return found.path if found is not None and found.path.suffix.lower() == ".gguf" else None
