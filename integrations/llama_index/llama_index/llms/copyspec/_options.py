"""Options of a model and of each of its calls, tools included: checked before the engine sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llama_index.core.tools.types import BaseTool
from pydantic import BaseModel, field_validator

from copyspec_engine import ConfigError, GenerationRequest, Grammar
from copyspec_engine.adapters.model import AdapterOptions
from copyspec_engine.adapters.remote import AnyEngine
from copyspec_engine.adapters.tools import calls_grammar, check_nesting, guides_calls, tool_choice_of

__all__ = ["CallOptions", "CheckedCall", "ToolUse", "take_tools", "to_function_schemas"]

_WRITTEN_AS_BY_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How calls are written: as chat templates write those of earlier turns, so that they can be copied."""

_TOOL_OPTIONS = ("tools", "tool_choice", "parallel_tool_calls")


def to_function_schemas(tools: Iterable[BaseTool | dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """OpenAI-style schemas, under the tools' own names: calls are looked up by them.

    Raises:
        ConfigError: this is no list, or one of something else.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ConfigError(f"Got tools={tools!r} but expected a list of tools or function schemas")
    return tuple(_to_function_schema(position, tool) for position, tool in enumerate(tools))


def _to_function_schema(position: int, tool: object) -> dict[str, Any]:
    if isinstance(tool, dict):
        check_nesting(tool, f"tools[{position}]")
        return tool
    if not isinstance(tool, BaseTool):
        raise ConfigError(
            f"Got tools[{position}]={tool!r} but expected a tool or a function schema: FunctionTool.from_defaults "
            "makes a tool of a function"
        )
    schema = tool.metadata.to_openai_tool(skip_length_check=True)
    return {**schema, "function": {**schema["function"], "name": tool.metadata.get_name()}}


class CallOptions(AdapterOptions):
    """What may be set for a model and again for one call."""

    called: ClassVar[str | None] = "a call of CopySpec"
    beside: ClassVar[tuple[str, ...]] = _TOOL_OPTIONS

    response_format: Grammar | None = None
    """What answers must look like: a `Grammar`, or OpenAI's {"type": "json_schema", ...} or {"type": "json_object"}."""

    @field_validator("response_format", mode="before")
    @classmethod
    def _grammar_of_dict(cls, value: Any) -> Any:  # noqa: ANN401 - the engine's options check it
        return GenerationRequest(prompt=" ", grammar=value).grammar

    def for_call(self, options: dict[str, Any]) -> CallOptions:
        """These options, replaced by those of one call that are not None.

        Raises:
            ConfigError: an unknown option, or a value out of range.
        """
        fixed = {name: getattr(self, name) for name in CallOptions.model_fields}
        given = {name: value for name, value in options.items() if value is not None}
        return CallOptions(**{**fixed, **given})


@dataclass(frozen=True)
class ToolUse:
    """Functions that an answer may call."""

    tools: tuple[dict[str, Any], ...]
    """OpenAI-style schemas."""
    choice: str
    """"auto", "required" or a function's name."""
    parallel: bool
    """Several calls in one answer."""

    @property
    def max_calls(self) -> int | None:
        """Most calls in one answer; None: any number."""
        return None if self.parallel else 1

    def grammar(self, engine: AnyEngine) -> Grammar | None:
        """What holds the answer to well-formed calls.

        None where calls of the model's own free will can only be read: nobody else knows how it writes them, or the
        extra "grammar" is not installed.

        Raises:
            ConfigError: calls are required of such a model.
        """
        if self.choice == "auto" and not guides_calls(engine):
            return None
        return calls_grammar(engine, map(_spelled, self.tools), self.choice, parallel=self.parallel)


def _spelled(tool: dict[str, Any]) -> dict[str, Any]:
    """A function schema that says how calls are written: see `_WRITTEN_AS_BY_TEMPLATES`."""
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("parameters") or {}, dict):
        return tool  # the engine's options will say what is wrong
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    return {**tool, "function": {**function, "parameters": {"x-guidance": _WRITTEN_AS_BY_TEMPLATES, **parameters}}}


@dataclass(frozen=True)
class CheckedCall:
    """One call, checked as far as it can be without the engine, which may have to be loaded first."""

    options: CallOptions
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    """Raw text to go on with, instead of messages."""
    question: str | None = None
    """A user's message instead of both; raw text for a base model, which has no chat template."""
    tool_use: ToolUse | None = None
    """The tools that the prompt tells of."""
    response_format: Grammar | dict[str, Any] | None = None
    object_class: type[BaseModel] | None = None
    """What the answer is read as, or its tool call: one that is cut off is an error."""

    def __post_init__(self) -> None:
        if self.tool_use is not None and self.prompt is not None:
            raise ConfigError(
                "Got tools with a prompt but expected messages: the chat template writes tools, and neither "
                "messages_to_prompt nor completion_to_prompt does"
            )
        if self.tool_use is not None and self.response_format is not None:
            raise ConfigError("Got response_format with tools but expected one of them: an answer has one form")

    @property
    def max_calls(self) -> int | None:
        """Most tool calls that the answer may have; None: any number."""
        return None if self.tool_use is None else self.tool_use.max_calls

    def without_answer(self) -> GenerationRequest:
        """What its prompt is made of where there is a chat template, without tools."""
        question = None if self.question is None else ({"role": "user", "content": self.question},)
        return GenerationRequest(
            messages=self.messages or question,
            prompt=self.prompt,
            chat_template_kwargs=self.options.chat_template_kwargs or {},
        )

    def request(self, engine: AnyEngine) -> GenerationRequest:
        """What to ask of `engine`, in no conversation yet.

        Raises:
            ConfigError: no answer can have the form that is asked for.
        """
        tools, messages, prompt = self.tool_use, self.messages, self.prompt
        if self.question is not None and engine.chat_format.is_chat:
            messages = ({"role": "user", "content": self.question},)
        elif self.question is not None:
            prompt = self.question
        return GenerationRequest(
            messages=messages,
            prompt=prompt,
            tools=tools.tools if tools else None,
            grammar=tools.grammar(engine) if tools else self.response_format,
            parse_reply=messages is not None,
            **self.options.request_options(),
        )


def take_tools(options: dict[str, Any]) -> tuple[ToolUse | None, dict[str, Any]]:
    """The tools that a call's options offer, and the other options; with the choice "none" there are none.

    Raises:
        ConfigError: an option of tools without tools, something that is no tool, or a choice that is none.
    """
    others = dict(options)
    given, choice, parallel = (others.pop(name, None) for name in _TOOL_OPTIONS)
    tools = () if given is None else to_function_schemas(given)
    if not tools and choice not in (None, "auto", "none"):
        raise ConfigError(f"Got tool_choice={choice!r} without tools: pass tools=, or leave tool_choice out")
    chosen = _choice(choice)
    return (ToolUse(tools, chosen, parallel is not False) if tools and chosen != "none" else None), others


def _choice(choice: object) -> str:
    chosen = "auto" if choice is None else tool_choice_of(choice)
    if not isinstance(chosen, str) or not chosen:
        raise ConfigError(f"Got tool_choice={choice!r} but expected auto, none, required, or a function's name")
    return chosen
