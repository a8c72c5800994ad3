"""Our engine over random weights of a real shape, which writes the answers that it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.chat.tokenizer import HFTokenizer
from copyspec_engine.drafting.cost import Points
from copyspec_engine.engine.engine import Engine
from copyspec_engine.execution.loading import prepare
from copyspec_engine.lab.recorded.records import RecordMismatchError
from copyspec_engine.lab.recorded.runner import RecordedRunner
from copyspec_engine.lab.recorded.shapes import random_model, shape_config
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.outputs import GenerationOutput

__all__ = ["RecordedEngine", "open_recorded"]


class RecordedEngine:
    """An engine whose answers are prescribed.

    Args:
        engine: over `runner`.
        runner: writes what it is told.
        end: the token that ends an answer.
    """

    def __init__(self, engine: Engine, runner: RecordedRunner, end: int) -> None:
        self.engine, self._runner, self._end = engine, runner, end

    def prescribe(self, request_id: str, answer: str) -> None:
        """The answer to a request that is not submitted yet; its end-of-sequence token follows by itself."""
        self._runner.answers[request_id] = (*self.engine.encode(answer, special_tokens=False), self._end)

    def check(self, output: GenerationOutput) -> None:
        """Raises `RecordMismatchError` if an answer is not what was prescribed, as far as it was allowed to get."""
        expected, got = tuple(self._runner.answers[output.request_id]), output.token_ids
        if got != expected[: len(got)] or (output.finish_reason == "stop" and len(got) < len(expected)):
            at = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), len(got))
            raise RecordMismatchError(
                f"Token {at} of an answer is {got[at : at + 1]} but {expected[at : at + 1]} is recorded"
            )

    def forget(self, request_id: str) -> None:
        """The answer is over: let go of it."""
        self._runner.answers.pop(request_id, None)
        self._runner.passes.pop(request_id, None)


@contextmanager
def open_recorded(
    shape: str, tokenizer: str, *, device: str = "auto", dtype: str = "auto", step_cost: Points | None = None
) -> Iterator[RecordedEngine]:
    """A model of a shape, on the tokenizer and chat template of the model whose answers it is to write.

    Args:
        shape: one of `SHAPES`.
        tokenizer: a folder with `tokenizer.json` and a chat template, or "bundled".
        device: see `random_model`.
        dtype: see `random_model`.
        step_cost: what passes cost, for drafting; default: measured, as for any model.

    Raises:
        ConfigError: there is no such tokenizer, or the shape has fewer tokens than it.
        CopySpecError: the model cannot be built.
    """
    folder = bundled_model_path() if tokenizer == "bundled" else Path(tokenizer).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"Got --tokenizer {tokenizer} but there is no file {folder / 'tokenizer.json'}")
    fast = AutoTokenizer.from_pretrained(str(folder))
    end = fast.eos_token_id
    if end is None or fast.chat_template is None:
        raise ConfigError(f"Got --tokenizer {tokenizer} without an end-of-sequence token or without a chat template")
    known = shape_config(shape, end).vocab_size
    if len(fast) > known:
        raise ConfigError(
            f"Got --shape {shape} with {known} tokens but --tokenizer {tokenizer} has {len(fast)}: take another shape"
        )
    model = random_model(shape, end, device, dtype)
    config = EngineConfig(model=shape, device=device, step_cost=step_cost or "measured")
    loaded = prepare(model, HFTokenizer(fast), config)
    loaded.runner = runner = RecordedRunner(loaded.runner)
    with Engine(config, model=loaded) as engine:
        yield RecordedEngine(engine, runner, end)
