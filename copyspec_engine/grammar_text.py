"""Grammars as llguidance reads them: options to JSON schemas, regular expressions and Lark."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from copyspec_engine.grammar_options import Grammar, ToolCalls

__all__ = ["quoted", "translate"]

_WHITE_SPACE = r"[ \t]{1,40}|[\r\n]{1,2}[ \t]{0,40}"
"""What may stand between the parts of JSON: a model that sees no way on must not write line breaks for ever."""

_LAYOUT = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}


def translate(grammar: Grammar, literal: Callable[[str], str]) -> tuple[str, bytes, bool]:
    """A grammar in llguidance's form, the marker before it, and whether it may come again behind a marker.

    Args:
        grammar: what was asked for.
        literal: a marker in Lark, with special tokens in it.
    """
    from llguidance import LLMatcher

    marker = (grammar.start_after or "").encode()
    if grammar.tools is not None:
        free = grammar.tools.tool_choice == "auto"
        text = LLMatcher.grammar_from_lark(_tool_calls(grammar.tools, literal))
        return text, grammar.tools.begin.encode() if free else marker, free and grammar.tools.parallel
    if grammar.regex is not None:
        return LLMatcher.grammar_from_regex(grammar.regex), marker, False
    if grammar.lark is not None:
        return LLMatcher.grammar_from_lark(grammar.lark), marker, False
    if grammar.choice is not None:
        texts = " | ".join(map(quoted, grammar.choice))
        return LLMatcher.grammar_from_lark(f"start: {texts}"), marker, False
    schema = {"type": "object"} if grammar.json_schema is None else grammar.json_schema
    return LLMatcher.grammar_from_json_schema(json.dumps(_LAYOUT | schema)), marker, False


def _tool_calls(options: ToolCalls, literal: Callable[[str], str]) -> str:
    """Lark for the calls; where free text precedes a call, for what follows its `begin`."""
    functions = [cast("dict[str, Any]", tool["function"]) for tool in options.tools]
    chosen = [function for function in functions if options.tool_choice in ("auto", "required", function["name"])]
    begin, end = literal(options.begin), literal(options.end)
    if options.tool_choice == "auto":
        start = "rest"
    else:
        start = f'{begin} rest ("\\n"? {begin} rest)*' if options.parallel else f"{begin} rest"
    objects = "\n".join(f"f{i}: %json {json.dumps(_call_schema(f, options))}" for i, f in enumerate(chosen))
    names = " | ".join(f"f{i}" for i in range(len(chosen)))
    rest = f'"\\n"? ({names}) "\\n"? {end}' if end else f'"\\n"? ({names})'
    return f"start: {start}\nrest: {rest}\n{objects}\n"


def _call_schema(function: dict[str, Any], options: ToolCalls) -> dict[str, Any]:
    """The JSON schema of a call of one function."""
    name, arguments = options.name_key, options.arguments_key
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "x-guidance": parameters.get("x-guidance", _LAYOUT["x-guidance"]),
        "type": "object",
        "properties": {name: {"const": function["name"]}, arguments: _moved(parameters, f"#/properties/{arguments}")},
        "required": [name, arguments],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:  # noqa: ANN401 - any JSON value
    """A schema whose references to its own root point to where it stands now."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


def quoted(text: str) -> str:
    """A plain text in Lark."""
    return json.dumps(text, ensure_ascii=False)
