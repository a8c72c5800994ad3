"""transformers' continuous batching, `generate_batch`, made to write recorded answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from copyspec_engine.lab.recorded.records import Turn, Written
from copyspec_engine.lab.recorded.runner import CERTAIN, next_tokens

__all__ = ["BatchPeer"]

_PAGE = 256
_CPU_BATCH_TOKENS = 2048


class BatchPeer:
    """generate-batch: all turns in one call, whole prompts, as `generate_batch` keeps nothing between calls.

    Its clock runs from the first request to the last token, without the making of its cache and its graphs.

    Args:
        model: a decoder with transformers' own attention.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any decoder of transformers
        self._model = model

    def write(self, turns: Sequence[Turn]) -> list[Written]:
        """The turns' answers, written together.

        Raises:
            RuntimeError: `generate_batch` gave no answer.
        """
        forced = _Forced([turn.answer_ids for turn in turns])
        with _processor(self._model, forced), _quiet():
            outputs = self._model.generate_batch(
                [list(turn.prompt_ids) for turn in turns],
                continuous_batching_config=self._config(turns),
                max_new_tokens=max(turn.max_tokens for turn in turns),
                record_timestamps=True,
            )
        if len(outputs) < len(turns):
            raise RuntimeError(f"generate_batch gave {len(outputs)} answers to {len(turns)} prompts")
        start = min(output.created_time for output in outputs.values())
        return [
            Written(
                tuple(output.generated_tokens),
                output.timestamps[-1] - start,
                output.timestamps[0] - start,
                forced.passes[place],
            )
            for place, output in enumerate(outputs[f"req_{place}"] for place in range(len(turns)))
        ]

    def forget(self) -> None:
        """It keeps nothing."""

    def _config(self, turns: Sequence[Turn]) -> ContinuousBatchingConfig:
        """Its defaults; on a CPU, where it would take most of the memory, a cache that holds all turns."""
        config = ContinuousBatchingConfig(per_request_processors=True)
        if self._model.device.type == "cpu":
            totals = (len(turn.prompt_ids) + turn.max_tokens for turn in turns)
            config.num_blocks = sum(math.ceil(total / _PAGE) + 1 for total in totals)
            config.max_batch_tokens = _CPU_BATCH_TOKENS
        return config


class _Marker(LogitsProcessor):
    """Stands for `_Forced` in a list of processors: only known classes get an argument per request."""

    def __init__(self, forced: _Forced) -> None:
        self.forced = forced


class _Forced(ContinuousBatchingLogitsProcessor):
    """Says what is recorded, whatever the scores; counts the passes of each request."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - as in its base class
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self._answers = answers
        self.passes = [0] * len(answers)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """The next recorded token of each request; ids are req_0, req_1, ... in the order of the prompts."""
        tokens = []
        for request in requests_with_new_token:
            place = int(request.state.request_id.removeprefix("req_"))
            # Its own count may lag behind by a pass that is still under way.
            tokens += next_tokens(self._answers[place], [self.passes[place]])
            self.passes[place] += self.passes[place] < len(self._answers[place])
        return torch.tensor(tokens, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, tensor_arg[: scores.size(0), None].long(), CERTAIN)


_registry: dict[Any, Any] = CLASSIC_TO_CB_PROCESSORS_MAP
_registry[_Marker] = lambda marker: marker.forced


@contextmanager
def _processor(model: Any, forced: _Forced) -> Iterator[None]:  # noqa: ANN401 - any decoder of transformers
    """Give continuous batching a processor: it asks the model for those that the generation config names."""
    model._get_logits_processor = lambda *_args, **_kwargs: LogitsProcessorList([_Marker(forced)])
    try:
        yield
    finally:
        del model._get_logits_processor


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its log, which asks for psutil."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
