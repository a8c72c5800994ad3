"""The peers: transformers `generate` on the same weights, greedy and with prompt lookup, and llama.cpp where it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from copyspec_engine import Engine
from copyspec_engine.cli.demo.figures import GENERATE, LLAMA, LLAMA_NGRAM, LOOKUP, PeerAnswer
from copyspec_engine.cli.demo.llama_server import LlamaServers, find_llama_server, gguf_file
from copyspec_engine.cli.demo.peer_process import PeerProcess, TransformersSide

__all__ = ["Peers"]

LLAMA_OPTIONS: dict[str, tuple[str, ...]] = {LLAMA: (), LLAMA_NGRAM: ("--spec-type", "ngram-mod")}


class Peers:
    """Everything that answers the same prompts beside us, each in a process of its own; `close` ends them.

    `notes` says in a line each which peer does not take part, and why.

    Raises:
        CopySpecError: transformers cannot load the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        info, trusted = engine.info, engine.config.trust_remote_code
        self._transformers = PeerProcess(
            "transformers",
            torch.get_num_threads(),
            TransformersSide,
            model=info.model,
            device=info.device,
            dtype=info.dtype,
            trust_remote_code=trusted,
        )
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
        names = [GENERATE, LOOKUP, *(self._servers.running if self._servers is not None else ())]
        asked = {name: self._ask(name, prompt_ids, max_tokens) for name in (names[::-1] if backwards else names)}
        return {name: answer for name in names if (answer := asked[name]) is not None}

    def ask(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer:
        """The answer of one that always takes part: `GENERATE` or `LOOKUP`."""
        answer: PeerAnswer = self._transformers.call("answer", name, tuple(prompt_ids), max_tokens)
        return answer

    def close(self) -> None:
        """End the processes."""
        self._transformers.close()
        if self._servers is not None:
            self._servers.close()

    def _ask(self, name: str, prompt_ids: Sequence[int], max_tokens: int) -> PeerAnswer | None:
        """None from one that fails."""
        if name in (GENERATE, LOOKUP):
            return self.ask(name, prompt_ids, max_tokens)
        assert self._servers is not None
        return self._servers.answer(name, prompt_ids, max_tokens)
