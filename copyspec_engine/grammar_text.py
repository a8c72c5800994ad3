"""Grammars as llguidance reads them: options to JSON schemas, regular expressions and Lark."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from copyspec_engine.grammar_dialect import dialect_rules
from copyspec_engine.grammar_options import Grammar, ToolCalls

__all__ = ["quoted", "translate"]

_WHITE_SPACE = r"[ \t]{1,40}|[\r\n]{1,2}[ \t]{0,40}"
"""What may stand between the parts of JSON: a model that sees no way on must not write line breaks for ever."""


def _guidance(grammar: Grammar) -> dict[str, Any]:
    """How llguidance reads the JSON schemas of a grammar that do not say so themselves, by the key it looks for."""
    lenient = {"lenient": True, "coerce_one_of": True} if grammar.lenient else {}
    return {"x-guidance": {"whitespace_pattern": _WHITE_SPACE, **lenient}}


def translate(grammar: Grammar, literal: Callable[[str], str]) -> tuple[str, bytes, bool]:
    """A grammar in llguidance's form, the marker before it, and whether it may come again behind a marker.

    Args:
        grammar: what was asked for.
        literal: a marker in Lark, with special tokens in it.
    """
    from llguidance import LLMatcher

    marker = (grammar.start_after or "").encode()
    if grammar.tools is not None:
        calls = grammar.tools
        free = calls.is_free
        text = LLMatcher.grammar_from_lark(_tool_calls(calls, literal, _guidance(grammar), behind=bool(marker)))
        again = free and calls.parallel and calls.repeats and not (calls.before or calls.style == "array")
        opening = (calls.before or calls.begin).encode() if free else marker
        return text, opening, again and bool(calls.begin)
    if grammar.regex is not None:
        return LLMatcher.grammar_from_regex(grammar.regex), marker, False
    if grammar.lark is not None:
        return LLMatcher.grammar_from_lark(grammar.lark), marker, False
    if grammar.choice is not None:
        texts = " | ".join(map(quoted, grammar.choice))
        return LLMatcher.grammar_from_lark(f"start: {texts}"), marker, False
    schema = {"type": "object"} if grammar.json_schema is None else grammar.json_schema
    return LLMatcher.grammar_from_json_schema(json.dumps(_guidance(grammar) | schema)), marker, False


def _tool_calls(options: ToolCalls, literal: Callable[[str], str], guidance: dict[str, Any], *, behind: bool) -> str:
    """Lark for the calls; where free text precedes a call, for what follows its `begin`, or `before` of all calls.

    Args:
        options: what may be called, and how.
        literal: a marker in Lark.
        guidance: how JSON schemas are read.
        behind: line breaks may stand first, since a reasoning or other text does.
    """
    functions = [cast("dict[str, Any]", tool["function"]) for tool in options.tools]
    chosen = [function for function in functions if options.tool_choice in ("auto", "required", function["name"])]
    begin, end, after = literal(options.begin), literal(options.end), literal(options.after)
    several = options.parallel and options.repeats
    free = options.is_free
    rest = _rest(options, end, several=several)
    between = f"({literal(options.between)})?" if options.between else ""
    more = f" ({between} {begin} rest)*" if several and options.style != "array" else ""
    if not options.begin and free:
        start = r"rest | TEXT"  # which of them is told by the first letter
    elif free and options.before:
        start = f"{begin} rest{more} {after}"
    elif free:
        start = "rest"
    else:
        lines = '("\\n" | "\\n\\n")? ' if behind else ""
        start = f"{lines}{literal(options.before)} {begin} rest{more} {after}"
    if options.answer_schema is not None:
        start += " | answer"
    names = " | ".join(f"f{i}" for i in range(len(chosen)))
    rules = [f"start: {start}", f"rest: {rest}", f"call: {names}"]
    for i, function in enumerate(chosen):
        rules += (
            _named_call(i, function, options, literal, guidance)
            if options.style == "named"
            else [f"f{i}: %json {json.dumps(_call_schema(function, options, guidance))}"]
        )
    rules += (
        [f"answer: %json {json.dumps(guidance | options.answer_schema)}"] if options.answer_schema is not None else []
    )
    rules += [r"TEXT: /([ \t\r\n]*[^ \t\r\n{](.|\n)*)?/"] if "TEXT" in start else []
    return "\n".join(rules) + "\n"


def _rest(options: ToolCalls, end: str, *, several: bool) -> str:
    """What follows the `begin` of a call or array."""
    if options.style == "named":
        return f"call {end}"
    space = r'("\n" | " ")?'
    inner = "call"
    if options.style == "array":
        inner = f'"[" {space} call ("," {space} call)* {space} "]"' if several else '"[" call "]"'
    if options.begin:
        inner = f"{space} {inner}"
    return f"{inner} {space} {end}" if end else inner


def _named_call(
    number: int,
    function: dict[str, Any],
    options: ToolCalls,
    literal: Callable[[str], str],
    guidance: dict[str, Any],
) -> list[str]:
    """The rules of a call whose name stands before its arguments."""
    call_id = f"({literal(options.id_begin)} /[a-zA-Z0-9]{{9}}/)?" if options.id_begin else ""
    name_end = " | ".join(literal(text) or '""' for text in options.name_ends)
    call = f"f{number}: {quoted(function['name'])} {call_id} ({name_end}) a{number} {literal(options.arguments_end)}"
    if options.string_quote:
        return [call, *dialect_rules(f"a{number}", _parameters(function), literal(options.string_quote))]
    return [call, f"a{number}: %json {json.dumps(guidance | _parameters(function))}"]


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments."""
    return function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}


def _call_schema(function: dict[str, Any], options: ToolCalls, guidance: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a call of one function."""
    name, arguments, parameters = options.name_key, options.arguments_key, _parameters(function)
    return {
        "x-guidance": parameters.get("x-guidance", guidance["x-guidance"]),
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
