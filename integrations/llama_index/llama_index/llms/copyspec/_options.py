"""Options that a model and each of its calls share; those of tool calling are refused."""

from __future__ import annotations

from typing import Any

from copyspec_engine.adapters import AdapterOptions, clear_errors

__all__ = ["CallOptions", "no_tools"]

_TOOL_OPTIONS = ("tools", "tool_choice", "tool_required", "response_format")


class CallOptions(AdapterOptions):
    """What may be set for a model and again for one call."""

    def for_call(self, options: dict[str, Any]) -> CallOptions:
        """These options, replaced by those of one call that are not None.

        Raises:
            ConfigError: an unknown option, or a value out of range.
            NotImplementedError: an option of tool calling or structured output.
        """
        tools = [name for name in _TOOL_OPTIONS if options.get(name)]
        if tools:
            raise no_tools(", ".join(tools))
        fixed = {name: getattr(self, name) for name in CallOptions.model_fields}
        given = {name: value for name, value in options.items() if value is not None}
        with clear_errors("a call of CopySpec"):
            return CallOptions(**{**fixed, **given})


def no_tools(got: str) -> NotImplementedError:
    """The error for a call that needs tool calling."""
    return NotImplementedError(
        f"Got {got} but CopySpec has no tool calling yet: ask for text, use a ReActAgent, which calls tools through "
        "text, or use another model for this step"
    )
