"""Options that a model and each of its calls share, checked in one place, and the choice of engine and conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    CopySpecDrafter,
    Engine,
    EngineConfig,
    NoDrafter,
    SamplingParams,
)

__all__ = ["CallOptions", "adopt_engine", "clear_errors", "session_of"]

_SESSION_KEYS = ("thread_id", "session_id", "conversation_id")
_TOOL_OPTIONS = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "response_format")


class CallOptions(BaseModel):
    """What may be set for a model and again for one call."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = None
    """0 (the default) is greedy decoding."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities reach this sum, above 0 and up to 1 (the default)."""
    top_k: int | None = None
    """Keep this many of the most likely tokens, at least 1; default: all."""
    seed: int | None = None
    """The same seed gives the same answer; default: a fresh one for each call."""
    max_tokens: int | None = None
    """Most tokens to generate, at least 1; default: up to the end of the context."""
    stop: list[str] | None = None
    """Texts that end the answer and are not part of it; also accepted as `stop_sequences`, or as one string."""
    drafter: AdaptiveDrafter | CopySpecDrafter | NoDrafter | None = None
    """Where drafts come from: "adaptive", "copyspec" or "none", or an object with options; default: the engine's."""
    session_id: str | None = Field(default=None, min_length=1)
    """The conversation; on a model: of those calls whose config names none. Default: one for each instance."""
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds until the call is cancelled in the engine and raises `RequestTimeoutError`; default: no limit."""
    max_retries: int = Field(default=0, ge=0)
    """How often a call is tried again if its forward pass failed before any text came."""
    include_segments: bool = False
    """Put the pieces of the text, and whether each was copied, into `response_metadata["copyspec"]["segments"]`."""

    @model_validator(mode="before")
    @classmethod
    def _one_stop(cls, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        if "stop_sequences" in options:
            if options.get("stop") is not None:
                raise ConfigError("Got both stop and stop_sequences but expected one of them: they mean the same")
            options["stop"] = options.pop("stop_sequences")
        if isinstance(options.get("stop"), str):
            options["stop"] = [options["stop"]]
        return options

    @field_validator("drafter", mode="before")
    @classmethod
    def _drafter_of_name(cls, drafter: Any) -> Any:  # noqa: ANN401 - the engine's options check it
        return None if drafter is None else EngineConfig(drafter=drafter).drafter

    @model_validator(mode="after")
    def _check_sampling(self) -> CallOptions:
        self.sampling()
        return self

    def sampling(self) -> SamplingParams:
        """The sampling options for the engine; those that are None keep the engine's defaults."""
        names = ("temperature", "top_p", "top_k", "seed", "max_tokens")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(stop=tuple(self.stop or ()), **values)

    def for_call(self, stop: list[str] | None, options: dict[str, Any]) -> CallOptions:
        """These options, replaced by those of one call that are not None.

        Raises:
            ConfigError: an unknown option, or a value out of range.
            NotImplementedError: an option of tool calling or structured output.
        """
        tools = [name for name in _TOOL_OPTIONS if options.get(name)]
        if tools:
            raise NotImplementedError(
                f"Got {', '.join(tools)} but ChatCopySpec has no tool calling and no structured output yet: ask for "
                "text, or use another model for this step"
            )
        # `stream` is the base class's, which has used it to choose between invoke and stream.
        given = {name: value for name, value in options.items() if value is not None and name != "stream"}
        if stop is not None:
            given["stop"] = stop
        fixed = {name: getattr(self, name) for name in CallOptions.model_fields}
        if "stop_sequences" in given:
            fixed.pop("stop")
        with clear_errors("a call of ChatCopySpec"):
            return CallOptions(**{**fixed, **given})


def adopt_engine(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the model, device and dtype of the engine in them, if there is one.

    Raises:
        ConfigError: one of the three is given too and differs.
    """
    engine = options.get("engine")
    config = engine.config if isinstance(engine, Engine) else engine
    if not isinstance(config, EngineConfig):
        return options
    adopted = {name: getattr(config, name) for name in ("model", "device", "dtype")}
    for name, value in adopted.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"Got {name}={options[name]!r} but the engine has {name}={value!r}: leave {name} out, or pass no engine"
            )
    return {**options, **adopted}


@contextmanager
def clear_errors(owner: str) -> Iterator[None]:
    """Raise pydantic's validation errors as one `ConfigError` that names each option and its value."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(owner, problem) for problem in error.errors(include_url=False))) from None


def _explain(owner: str, problem: ErrorDetails) -> str:
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"Got unknown option {name}={problem['input']!r} for {owner}: check the spelling"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"Got {name}={problem['input']!r} for {owner} but expected {expected}"


def session_of(config: RunnableConfig | None) -> str | None:
    """The conversation that `config`, merged into that of the running chain or graph, names; None if it names none."""
    merged = ensure_config(config)
    for source in (merged.get("configurable", {}), merged.get("metadata", {})):
        for key in _SESSION_KEYS:
            if source.get(key) not in (None, ""):
                return str(source[key])
    return None
