"""Which form an answer must have: JSON, a regular expression, a Lark grammar, one of some texts, tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.options import Options

__all__ = ["CallLayout", "Grammar", "RequestedGrammar", "ToolCalls", "check_nesting", "tool_choice_of"]

_MOST_LEVELS = 100
"""Of lists and dicts in each other: many readers of nested values recurse."""


def tool_choice_of(choice: object) -> object:
    """OpenAI's, Anthropic's and the frameworks' ways to choose tools, in one: "auto", "none", "required" or a name.

    What is none of them stays as it is.
    """
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        said = choice.get("type") if choice.get("type") in ("auto", "any", "none", "required") else choice
        choice = said if name is None else name
    if isinstance(choice, bool):
        return "required" if choice else "none"
    return "required" if choice == "any" else choice


class CallLayout(Options):
    """How calls are written: `before`, one or more of `begin`, a call and `end`, `after`.

    White space may stand around a JSON object or array, and `between` two calls.
    """

    style: Literal["object", "array", "named"] = "object"
    """object: a JSON object with the function's name and arguments; array: all calls as such objects in one JSON array;
    named: the name, one of `name_ends`, the arguments as a JSON object, `arguments_end`."""
    begin: str = "<tool_call>"
    """Opens a call or the array; "": an answer that begins with an object is a call."""
    end: str = "</tool_call>"
    """Closes it."""
    before: str = ""
    """Opens all calls of an answer."""
    after: str = ""
    """Closes them; nothing follows."""
    between: str = "\n"
    """May stand between two calls."""
    repeats: bool = True
    """An answer may hold several calls."""
    name_key: str = Field(default="name", min_length=1)
    """Of the function's name in a JSON object."""
    arguments_key: str = Field(default="arguments", min_length=1)
    """Of the arguments in a JSON object."""
    name_ends: tuple[str, ...] = Field(default=("",), min_length=1)
    """What may stand between a name and its arguments."""
    id_begin: str = ""
    """Opens the call's id behind the name, if there may be one."""
    arguments_end: str = ""
    """Closes the arguments of a named call."""
    string_quote: str = ""
    """Named calls only: the arguments are no JSON; keys stand bare, and strings between two of these."""

    @model_validator(mode="after")
    def _check_begin(self) -> CallLayout:
        if not self.begin and (self.style != "object" or self.before):
            raise ConfigError(
                f"Got begin='' with style={self.style!r} but expected a text: only bare objects need none", "begin"
            )
        return self


def check_nesting(value: object, what: str) -> None:
    """Refuse nested values that no recursive reader could take.

    Raises:
        ConfigError: lists and dicts are nested too deeply.
    """
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            item
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for item in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise ConfigError(f"Got {what} nested more than {_MOST_LEVELS} deep: name its parts in $defs, or make it flatter")


def _check_levels(value: object) -> object:
    """What is nested too deeply is refused before anything reads it by recursion."""
    check_nesting(value, "a JSON schema")
    return value


Schema = Annotated[dict[str, JsonValue], BeforeValidator(_check_levels)]
"""A JSON schema, or what holds one."""


class ToolCalls(CallLayout):
    """Calls of functions in some layout."""

    tools: tuple[Schema, ...] = Field(min_length=1)
    """OpenAI-style function schemas: {"type": "function", "function": {"name": ..., "parameters": JSON schema}}."""
    tool_choice: Annotated[str, BeforeValidator(tool_choice_of)] = "auto"
    """"auto": free text in which each `begin` opens a call, an invalid one of an unknown tool too; "required": at least
    one call and no text; or the name of the one function to be called, also in OpenAI's form."""
    parallel: bool = True
    """More than one call in an answer; off: the answer ends after the first."""
    answer_schema: Schema | None = None
    """With "auto": an answer that calls nothing is JSON that fits this schema, and one that calls is calls alone."""

    @model_validator(mode="after")
    def _check_tools(self) -> ToolCalls:
        names: list[str] = []
        for tool in self.tools:
            function = tool.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ConfigError(
                    f'Got tool {tool!r} but expected {{"type": "function", "function": {{"name": ...}}}}', "tools"
                )
            if not isinstance(function.get("parameters") or {}, dict):
                raise ConfigError(f"Got parameters={function['parameters']!r} but expected a JSON schema", "tools")
            names.append(str(function["name"]))
        if len(set(names)) < len(names):
            raise ConfigError(f"Got tools named {names!r} but expected different names", "tools")
        if self.tool_choice not in ("auto", "required", *names):
            raise ConfigError(
                f"Got tool_choice={self.tool_choice!r} but expected auto, required or one of {', '.join(names)}",
                "tool_choice",
            )
        if self.answer_schema is not None and self.tool_choice != "auto":
            raise ConfigError(
                f"Got answer_schema with tool_choice={self.tool_choice!r} but expected auto: there must be a choice",
                "answer_schema",
            )
        return self

    @property
    def is_free(self) -> bool:
        """Free text may stand where no call does."""
        return self.tool_choice == "auto" and self.answer_schema is None


class Grammar(Options):
    """What an answer must look like: exactly one of the first six. Drafting never changes what is written."""

    json_schema: Schema | None = None
    """A JSON object or other value that fits this schema, its members in any order, its letters escaped or not. White
    space may follow each part, unless the schema's key "x-guidance" says {"whitespace_flexible": False}."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = Field(default=None, min_length=1)
    """A regular expression (Rust's syntax) that the whole answer matches."""
    lark: str | None = Field(default=None, min_length=1)
    """A context-free grammar in llguidance's dialect of Lark; its first rule is `start`."""
    choice: tuple[str, ...] | None = Field(default=None, min_length=1)
    """One of these texts."""
    tools: ToolCalls | None = None
    """Calls of functions."""
    lenient: bool = False
    """Leave out what grammars cannot express of a JSON schema, and log where; otherwise such a schema is refused."""
    closed: bool = False
    """Objects of a JSON schema take only the properties that it names, unless it says otherwise itself."""
    start_after: str | None = Field(default=None, min_length=1)
    """The grammar begins behind the first place where this text is written ("</think>", say). What comes before is
    free; an answer that ends before has no form."""

    @model_validator(mode="after")
    def _check_kind(self) -> Grammar:
        kinds = ("json_schema", "json_object", "regex", "lark", "choice", "tools")
        given = [kind for kind in kinds if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(
                f"Got {' and '.join(given) or 'no grammar'} but expected exactly one of {', '.join(kinds)}", "grammar"
            )
        if self.choice is not None and not all(self.choice):
            raise ConfigError(f"Got choice={self.choice!r} but expected texts of at least one character", "choice")
        if self.start_after is not None and self.tools is not None and self.tools.is_free:
            raise ConfigError(
                f"Got start_after={self.start_after!r} with tool_choice='auto' but expected one of them: text is free "
                "until a call begins",
                "start_after",
            )
        return self


def _from_response_format(value: object) -> object:
    """The grammar of an OpenAI `response_format` object; anything else as it is."""
    if not isinstance(value, dict) or "type" not in value:
        return value
    if value == {"type": "text"}:
        return None
    if value == {"type": "json_object"}:
        return Grammar(json_object=True)
    wrapped = value.get("json_schema")
    if value["type"] != "json_schema" or not isinstance(wrapped, dict) or not isinstance(wrapped.get("schema"), dict):
        raise ValueError(
            'a Grammar, or {"type": "json_schema", "json_schema": {"schema": ...}}, {"type": "json_object"} or '
            '{"type": "text"}'
        )
    return Grammar(json_schema=wrapped["schema"])


RequestedGrammar = Annotated[Grammar | None, BeforeValidator(_from_response_format)]
"""A grammar, or OpenAI's `response_format` as a dict."""
