"""Options of a model and its calls that all integrations have: those of `SamplingParams` and `GenerationRequest`.

Their names and types are listed here, so that editors know them; what they do is told where the engine has them, which
checks their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from copyspec_engine.values.config import DrafterConfig, GenerationRequest, Prediction, SamplingParams
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.options import Documented, explain_errors

__all__ = ["AdapterOptions", "clear_errors"]


class AdapterOptions(Documented):
    """What may be set for a model and again for one call.

    None, the default of most, leaves an option as the checkpoint's generation_config.json has it, else as the engine.
    """

    model_config = ConfigDict(extra="forbid")

    called: ClassVar[str | None] = None
    """What errors call the owner of the options; default: the class."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of options that are taken along with these, for advice about one that is not known."""
    told_by = (SamplingParams, GenerationRequest)

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words: list[str | list[int]] | None = None
    no_repeat_ngram_size: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the engine ends the answer; default: no limit."""
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    drafter: DrafterConfig | None = None
    session_id: str | None = Field(default=None, min_length=1)
    """The conversation, whose texts and KV cache are kept over calls, for all who name it; default: the one whose
    messages, the last answer included, those of the call begin with, else none."""
    memory_pool: str | None = None
    prediction: Prediction | None = None
    include_segments: bool = False
    """Attach the pieces of what was written, and whether each was copied, as `segments`."""
    include_token_ids: bool = False
    """Attach the answer's `token_ids`."""
    include_explanation: bool = False
    """Attach all of what `explain` can tell: of all that was written, calls and reasoning too, which is attached
    as `written`, and with up to 60 characters around what was copied from elsewhere in a conversation that is named.
    Without it, `explain` tells of the text of the answer, and quotes nothing."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(type(self), called=self.called, beside=self.beside):
            super().__init__(**options)

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, options: dict[str, Any]) -> dict[str, Any]:
        single = {name: [options[name]] for name in ("stop", "bad_words") if isinstance(options.get(name), str)}
        return {**options, **single}

    @model_validator(mode="after")
    def _check_options(self) -> AdapterOptions:
        GenerationRequest(messages=[{}], **self.request_options())
        return self

    def sampling(self) -> SamplingParams:
        """The sampling options for the engine."""
        names = SamplingParams.model_fields
        return SamplingParams(**{name: value for name in names if (value := getattr(self, name)) is not None})

    def request_options(self) -> dict[str, Any]:
        """The options of a `GenerationRequest` besides its input and its session."""
        return {
            "sampling": self.sampling(),
            "memory_pool": self.memory_pool,
            "prediction": self.prediction,
            "drafter": self.drafter,
            "chat_template_kwargs": self.chat_template_kwargs or {},
            "cache_salt": self.cache_salt,
            "timeout_s": self.timeout,
            "explain": True,
        }


@contextmanager
def clear_errors(owner: type[BaseModel], *, called: str | None = None, beside: Iterable[str] = ()) -> Iterator[None]:
    """Raise pydantic's validation errors as one `ConfigError` that names each option, its value, and what to do.

    Args:
        owner: whose options are checked.
        called: the owner's name in the text; default: that of the class.
        beside: names of options that are taken along with the owner's.
    """
    try:
        yield
    except ValidationError as error:
        raise ConfigError(explain_errors(owner, error, called=called, beside=beside)) from None
