"""Options that a model and each of its calls share, checked in one place, and the choice of engine and conversation."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import Field, model_validator

from copyspec_engine import ConfigError
from copyspec_engine.adapters import AdapterOptions, clear_errors

__all__ = ["CallOptions", "session_of"]

_SESSION_KEYS = ("thread_id", "session_id", "conversation_id")
_TOOL_OPTIONS = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "response_format")


class CallOptions(AdapterOptions):
    """What may be set for a model and again for one call."""

    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds until the call is cancelled in the engine and raises `RequestTimeoutError`; default: no limit."""
    max_retries: int = Field(default=0, ge=0)
    """How often a call is tried again if its forward pass failed before any text came."""
    include_segments: bool = False
    """Put the pieces of the text, and whether each was copied, into `response_metadata["copyspec"]["segments"]`."""

    @model_validator(mode="before")
    @classmethod
    def _stop_sequences_are_stop(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "stop_sequences" not in options:
            return options
        if options.get("stop") is not None:
            raise ConfigError("Got both stop and stop_sequences but expected one of them: they mean the same")
        texts = options["stop_sequences"]
        others = {name: value for name, value in options.items() if name != "stop_sequences"}
        return {**others, "stop": [texts] if isinstance(texts, str) else texts}

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


def session_of(config: RunnableConfig | None) -> str | None:
    """The conversation that `config`, merged into that of the running chain or graph, names; None if it names none."""
    merged = ensure_config(config)
    for source in (merged.get("configurable", {}), merged.get("metadata", {})):
        for key in _SESSION_KEYS:
            if source.get(key) not in (None, ""):
                return str(source[key])
    return None
