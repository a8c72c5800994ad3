"""Tools and answer formats of a call: what the prompt says of them, and the grammar that the answer keeps to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from copyspec_engine import ConfigError, Engine, GenerationRequest, Grammar
from copyspec_engine.adapters.options import clear_errors
from copyspec_engine.adapters.tools import calls_grammar, check_nesting, closed, guides_calls, tool_choice_of

__all__ = ["Tool", "ToolOptions", "convert_tools", "json_schema_of"]

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

    def grammar(self, engine: Engine) -> Grammar | None:
        """What the answer must look like; None: whatever the model writes.

        Raises:
            ConfigError: a form is asked for that cannot be had of this model.
        """
        answer = self._answer_grammar()
        tools = self.offered
        if tools is None:
            return answer
        forced = self.tool_choice != "auto"
        if not forced and answer is None and not self._guides(engine):
            return None
        parallel, strict = self.parallel_tool_calls, bool(self.strict)
        calls = calls_grammar(engine, tools, self.tool_choice, parallel=parallel, strict=strict)
        if answer is not None and not forced and calls.tools is not None:
            either = calls.tools.model_copy(update={"answer_schema": answer.json_schema or {"type": "object"}})
            calls = calls.model_copy(update={"tools": either})
        return calls

    def _guides(self, engine: Engine) -> bool:
        """Whether calls that the model begins by itself are held to their schemas."""
        if self.strict is None:
            return guides_calls(engine) or not self.parallel_tool_calls
        return self.strict or not self.parallel_tool_calls

    def _answer_grammar(self) -> Grammar | None:
        if self.response_format is None:
            return None
        wanted = GenerationRequest(prompt="-", grammar=self.response_format).grammar
        if wanted is None or wanted.json_schema is None:
            return wanted
        strict = self.strict or self.response_format["json_schema"].get("strict")
        return closed(wanted, strict=strict)
