"""How tokens are chosen, as calls of OpenAI's API and of servers like this one say it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from copyspec_engine.serve.bodies import Body
from copyspec_engine.serve.errors import invalid
from copyspec_engine.serve.service import Service
from copyspec_engine.values.config import SamplingParams

__all__ = ["SamplingBody", "Texts", "seeded"]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
"""Several texts, or one by itself."""
_Word = str | list[int]
_Words = Annotated[list[_Word], BeforeValidator(_as_list, json_schema_input_type=str | list[_Word])]


class SamplingBody(Body):
    """The options of `SamplingParams`, by the same names."""

    told_by = (SamplingParams,)

    temperature: float | None = None
    """0 is greedy decoding. Default: the checkpoint's own, else 1 as OpenAI has it."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words: _Words | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Texts | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    def sampling(self, service: Service, **others: Any) -> SamplingParams:  # noqa: ANN401 - options of any type
        """The options for the engine.

        Args:
            service: its limits, and its model's own temperature.
            others: options that go before these; None: not given.

        Raises:
            ApiError: too many stop texts.
            ConfigError: a value is out of range.
        """
        most = service.config.max_stop
        if self.stop is not None and len(self.stop) > most:
            raise invalid("stop", f"Got {len(self.stop)} stop texts but expected {most} at most", "array_too_long")
        given = {name: getattr(self, name) for name in SamplingBody.model_fields}
        given |= {name: value for name, value in others.items() if value is not None}
        if given["temperature"] is None and "temperature" not in service.info.sampling_defaults:
            given["temperature"] = 1.0
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def seeded(params: SamplingParams, number: int) -> SamplingParams:
    """The options of choice `number` of a call: each has a seed of its own, the first the call's."""
    if params.seed is None:
        return params
    return params.model_copy(update={"seed": (params.seed + number) % 2**63})
