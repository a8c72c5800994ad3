"""Options that a model and each of its calls share, and those of a call alone: tools, and the form of its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from copyspec_engine import ConfigError, EngineConfig, GenerationRequest, Grammar
from copyspec_engine.adapters.model import AdapterOptions, clear_errors
from copyspec_engine.adapters.remote import AnyEngine
from copyspec_engine.adapters.tools import answer_grammar, check_nesting, closed, tool_choice_of

__all__ = [
    "CallOptions",
    "Tool",
    "ToolOptions",
    "convert_tools",
    "deciding",
    "deciding_config",
    "json_schema_of",
]


Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool
"""Whatever LangChain takes for a tool."""


def convert_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """OpenAI-style function schemas.

    Raises:
        ConfigError: one of them cannot be read as a function, or is a server's own tool.
    """
    if not isinstance(tools, Iterable) or isinstance(tools, (str, Mapping)):
        raise ConfigError(f"Got tools={tools!r} but expected a list of functions, classes, tools or schemas")
    converted = []
    for tool in tools:
        check_nesting(tool, "a tool")
        try:
            schema = convert_to_openai_tool(tool)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"Got tool {tool!r} but expected a function, a class, a tool or a schema: {error}"
            ) from error
        if schema.get("type") != "function" or "function" not in schema:
            raise ConfigError(f"Got tool {tool!r} but expected a function: this model has no tools of its own")
        converted.append(schema)
    return converted


def json_schema_of(schema: dict[str, Any] | type) -> dict[str, Any]:
    """The JSON schema of a class, a function schema, or itself.

    Raises:
        ConfigError: it is none of them.
    """
    check_nesting(schema, "a JSON schema")
    if isinstance(schema, Mapping) and "title" not in schema and "name" not in schema:
        return dict(schema)
    try:
        return convert_to_json_schema(schema)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"Got schema={schema!r} but expected a class or a JSON schema: {error}") from error


class ToolOptions(BaseModel):
    """What a call says of tools and of the form of its answer."""

    model_config = ConfigDict(extra="forbid")

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(ToolOptions, called="a call of ChatCopySpec"):
            super().__init__(**options)

    tools: list[dict[str, Any]] = Field(default_factory=list)
    """OpenAI-style function schemas; whatever LangChain takes for a tool is accepted."""
    tool_choice: str = "auto"
    """"auto": the model decides; "required": at least one call; "none": no call; or the name of the tool to call."""
    parallel_tool_calls: bool = True
    """More than one call in an answer."""
    strict: bool | None = None
    """True: arguments fit their schema in every detail, or the call raises. None: as far as grammars can express it,
    where the extra "grammar" is installed. False: whatever the model writes, unless a call is asked for."""
    response_format: dict[str, Any] | None = None
    """OpenAI's form, or the schema (a class or JSON schema) that the answer fits."""

    @field_validator("tools", mode="before")
    @classmethod
    def _convert(cls, tools: Any) -> Any:  # noqa: ANN401 - whatever the caller gave
        return convert_tools(tools)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _one_form(cls, choice: Any) -> Any:  # noqa: ANN401 - whatever the caller gave
        return tool_choice_of(choice)

    @field_validator("response_format", mode="before")
    @classmethod
    def _openai_form(cls, form: Any) -> Any:  # noqa: ANN401 - whatever the caller gave
        if isinstance(form, Mapping) and form.get("type") in ("json_schema", "json_object", "text"):
            return form
        return {"type": "json_schema", "json_schema": {"schema": json_schema_of(form)}}

    @model_validator(mode="after")
    def _check_choice(self) -> ToolOptions:
        names = [tool["function"]["name"] for tool in self.tools]
        if self.tool_choice not in ("auto", "none", *(("required", *names) if names else ())):
            expected = f"auto, none, any, required or one of {', '.join(names)}" if names else "tools to choose from"
            raise ValueError(f"Got tool_choice={self.tool_choice!r} but expected {expected}")
        if self.response_format is not None and self.tool_choice not in ("auto", "none"):
            raise ValueError(
                f"Got response_format with tool_choice={self.tool_choice!r} but expected one of them: an answer that "
                "must be a call has no other form"
            )
        return self

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the prompt tells of: with tool_choice="none" it tells of none."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    def grammar(self, engine: AnyEngine) -> Grammar | None:
        """What the answer must look like; None: whatever the model writes.

        Raises:
            ConfigError: a form is asked for that cannot be had of this model.
        """
        return answer_grammar(
            engine,
            self.offered,
            self.tool_choice,
            self._answer_grammar(),
            parallel=self.parallel_tool_calls,
            strict=self.strict,
        )

    def _answer_grammar(self) -> Grammar | None:
        if self.response_format is None:
            return None
        wanted = GenerationRequest(prompt="-", grammar=self.response_format).grammar
        if wanted is None or wanted.json_schema is None:
            return wanted
        strict = self.strict or self.response_format["json_schema"].get("strict")
        return closed(wanted, strict=strict)


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
    return config.model_dump(mode="json", exclude={**dict.fromkeys(_CAPACITY, True), "draft_model": {"step_cost"}})
