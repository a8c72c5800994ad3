"""transformers' `generate` as its users call it, made to write recorded answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from copyspec_engine.cli.demo.transformers_lanes import LOOKUP_TOKENS, generate_greedy
from copyspec_engine.kv.slots import common_prefix_length
from copyspec_engine.lab.recorded.records import Turn, Written
from copyspec_engine.lab.recorded.runner import force, next_tokens

__all__ = ["GENERATE_PEERS", "GeneratePeer"]

GENERATE_PEERS = ("generate", "generate-kv", "prompt-lookup")


class GeneratePeer:
    """One of `GENERATE_PEERS`.

    generate and prompt-lookup read the whole prompt in every turn, as their users do; generate-kv carries its cache
    over a conversation's turns, cut back to what the new prompt begins with.

    Args:
        model: a decoder with transformers' own attention; forced for good.
        name: one of `GENERATE_PEERS`.
    """

    def __init__(self, model: Any, name: str) -> None:  # noqa: ANN401 - any decoder of transformers
        self._model, self._name = model, name
        self._head = _RecordedHead(model)
        self._caches: dict[tuple[str, int], tuple[Any, tuple[int, ...]]] = {}
        """Of each conversation: its cache and the tokens in it."""

    def write(self, turns: Sequence[Turn]) -> list[Written]:
        """The turns' answers, one after another."""
        return [self._write(turn) for turn in turns]

    def forget(self) -> None:
        """Drop what was kept of the conversations so far."""
        self._caches.clear()

    def _write(self, turn: Turn) -> Written:
        options: dict[str, Any] = {}
        cached = 0
        if self._name == "prompt-lookup":
            options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        elif self._name == "generate-kv":
            options["past_key_values"], cached = self._cache(turn)
        start = time.perf_counter()
        with self._head.writing(turn) as record:
            token_ids, seconds = generate_greedy(self._model, turn.prompt_ids, turn.max_tokens, **options)
        if self._name == "generate-kv":
            self._caches[turn.place] = (options["past_key_values"], (*turn.prompt_ids, *token_ids[:-1]))
        return Written(token_ids, seconds, record.first_s - start, record.passes, cached)

    def _cache(self, turn: Turn) -> tuple[Any, int]:
        """The conversation's cache, and how many tokens of the prompt are in it; the last one is always read."""
        cache, tokens = self._caches.get(turn.place) or (DynamicCache(config=self._model.config), ())
        kept = common_prefix_length(turn.prompt_ids[:-1], tokens)
        if kept < len(tokens):
            cache.crop(kept - len(tokens))
        if cache.get_seq_length() != kept:
            raise RuntimeError(f"the cache holds {cache.get_seq_length()} tokens but expected {kept}")
        return cache, kept


@dataclass(slots=True)
class _Record:
    """The answer that is being written, and what the model's passes showed of it."""

    turn: Turn
    passes: int = 0
    first_s: float = 0.0
    length: int = 0
    """Tokens of the sequence that the current pass ends with, its draft included."""


class _RecordedHead:
    """Hooks on a model and its head: the head's logits, once computed, say what is recorded."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any decoder of transformers
        self._record: _Record | None = None
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(self._after)

    @contextmanager
    def writing(self, turn: Turn) -> Iterator[_Record]:
        """A context in which the model writes the turn's answer."""
        self._record = record = _Record(turn)
        try:
            yield record
        finally:
            self._record = None

    def _before(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401 - as torch calls it
        if self._record is not None:
            self._record.length = kwargs["past_key_values"].get_seq_length() + kwargs["input_ids"].shape[1]

    def _after(self, _head: Any, _args: Any, logits: torch.Tensor) -> None:  # noqa: ANN401 - as torch calls it
        """Logits of shape (1, rows, vocabulary), those of the last `rows` tokens of the sequence."""
        record = self._record
        if record is None:
            return
        rows, written = logits.shape[1], record.length - len(record.turn.prompt_ids)
        force(logits[0], next_tokens(record.turn.answer_ids, range(written - rows + 1, written + 1)))
        record.passes += 1
        if record.passes == 1:
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            record.first_s = time.perf_counter()
