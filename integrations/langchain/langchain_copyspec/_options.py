"""Options that a model and each of its calls share, checked in one place."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from copyspec_engine import ConfigError, EngineConfig
from copyspec_engine.adapters.options import AdapterOptions
from langchain_copyspec._tools import ToolOptions

__all__ = ["CallOptions", "deciding", "deciding_config"]

_REUSE = {"session_id", "memory_pool", "prediction", "cache_salt"}
"""Options that only decide what a call may reuse, which never changes an answer."""
_PATIENCE = {"timeout", "max_retries"}
"""Options that decide whether there is an answer at all."""
_CAPACITY = {
    *("max_running", "max_waiting", "max_prefill_tokens", "max_sessions", "memory_tokens"),
    *("memory_path", "step_cost"),
}
"""Options of an engine that decide how much it does at once and how fast."""
_LANGCHAINS_OWN = {"stream", "ls_structured_output_format"}
"""What the base class uses itself: to choose between invoke and stream, and for traces."""


class CallOptions(AdapterOptions):
    """What may be set for a model and again for one call."""

    called: ClassVar[str | None] = "a call of ChatCopySpec"
    beside: ClassVar[tuple[str, ...]] = ("model", *ToolOptions.model_fields)

    max_retries: int = Field(default=0, ge=0)
    """How often a call is tried again if its forward pass failed before any text came."""

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

    def deciding(self) -> dict[str, Any]:
        """What decides the answer, as plain values."""
        names = set(CallOptions.model_fields) - _REUSE - _PATIENCE
        return self.model_dump(mode="json", include=names)

    def for_call(self, stop: list[str] | None, options: dict[str, Any]) -> tuple[CallOptions, ToolOptions]:
        """These options, replaced by those of one call that are not None; and what the call says of tools.

        Raises:
            ConfigError: an unknown option, or a value out of range.
        """
        given = {name: value for name, value in options.items() if value is not None and name not in _LANGCHAINS_OWN}
        if stop is not None:
            given["stop"] = stop
        tools = {name: given.pop(name) for name in ToolOptions.model_fields if name in given}
        fixed = {name: getattr(self, name) for name in CallOptions.model_fields}
        if "stop_sequences" in given:
            fixed.pop("stop")
        return CallOptions(**{**fixed, **given}), ToolOptions(**tools)


def deciding(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call without those that only decide what it may reuse."""
    return {name: value for name, value in options.items() if name not in _REUSE}


def deciding_config(config: EngineConfig) -> dict[str, Any]:
    """What decides the answers of an engine, as plain values."""
    return config.model_dump(mode="json", exclude={**dict.fromkeys(_CAPACITY, True), "draft": {"step_cost"}})
