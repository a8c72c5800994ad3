"""Grammars as llguidance reads them: options to JSON schemas, regular expressions and Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, cast

from copyspec_engine.grammar.json_values import ANY_TEXT, JsonSpelling, key_regex, plain_regex, value_rules
from copyspec_engine.grammar.schema import Json
from copyspec_engine.values.errors import ConfigError, about
from copyspec_engine.values.grammar import Grammar, ToolCalls

__all__ = ["quoted", "translate"]

_WHITE_SPACE = r"(?:[ \t]{1,40}|[\r\n]{1,2}[ \t]{0,40})?"
"""What may stand between the parts of JSON: a model that sees no way on must not write line breaks for ever."""
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def translate(grammar: Grammar, literal: Callable[[str], str]) -> tuple[str, bytes, bool]:
    """A grammar in llguidance's form, the marker before it, and whether it may come again behind a marker.

    Args:
        grammar: what was asked for.
        literal: a marker in Lark, with special tokens in it.

    Raises:
        ConfigError: nothing fits a JSON schema, or it says something that cannot be expressed.
    """
    from llguidance import LLMatcher

    marker = (grammar.start_after or "").encode()
    if grammar.tools is not None:
        calls = grammar.tools
        free = calls.is_free
        text = LLMatcher.grammar_from_lark(_ToolRules(grammar, calls, literal).write(behind=bool(marker)))
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
    schema = _ANY_OBJECT if grammar.json_schema is None else grammar.json_schema
    rules = _json_rules("value", schema, grammar, "the JSON schema")
    return LLMatcher.grammar_from_lark("\n".join(["start: value", *rules])), marker, False


def _json_rules(
    name: str, schema: Json, grammar: Grammar, owner: str, spelling: JsonSpelling | None = None
) -> list[str]:
    """Rules for JSON, the first of which has this name; spelled as the schema says, or as something around it does."""
    spelling = spelling or _spelling(schema, owner)
    return value_rules(name, schema, spelling, owner=owner, lenient=grammar.lenient, closed=grammar.closed)


def _spelling(schema: Json, owner: str) -> JsonSpelling:
    """How a schema's JSON is written: white space may stand everywhere, unless the schema's "x-guidance" says more."""
    asked = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
    known = ("whitespace_flexible", "item_separator", "key_separator")
    if not isinstance(asked, dict) or not set(asked).issubset(known):
        raise ConfigError(f"Got x-guidance={asked!r} in {owner} but expected a dict of {', '.join(known)}")
    space = _WHITE_SPACE if asked.get("whitespace_flexible", True) else ""
    comma, colon = (str(asked.get(key, usual)) for key, usual in (("item_separator", ","), ("key_separator", ":")))
    return JsonSpelling(space, re.escape(comma), re.escape(colon))


class _ToolRules:
    """Lark for calls; where free text precedes a call, for what follows its `begin`, or `before` of all calls.

    Args:
        grammar: what was asked for.
        options: what may be called, and how.
        literal: a marker in Lark.
    """

    def __init__(self, grammar: Grammar, options: ToolCalls, literal: Callable[[str], str]) -> None:
        self._grammar, self._options, self._literal = grammar, options, literal
        functions = [cast("dict[str, Any]", tool["function"]) for tool in options.tools]
        chosen = options.tool_choice
        self._functions = [function for function in functions if chosen in ("auto", "required", function["name"])]
        self._names = [function["name"] for function in functions]

    def write(self, *, behind: bool) -> str:
        """All rules.

        Args:
            behind: line breaks may stand first, since a reasoning or other text does.
        """
        options, literal = self._options, self._literal
        begin, end, after = literal(options.begin), literal(options.end), literal(options.after)
        several = options.parallel and options.repeats
        free = options.is_free
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
        rules = [f"rest: {_rest(options, end, several=several)}"]
        if options.answer_schema is not None:
            start += " | answer"
            rules += _json_rules("answer", options.answer_schema, self._grammar, "the schema of the answer")
        names = [f"f{number}" for number in range(len(self._functions))]
        write = self._named_call if options.style == "named" else self._object_call
        with about("tools"):
            for name, function in zip(names, self._functions, strict=True):
                rules += write(name, function["name"], _parameters(function), f"tool {function['name']!r}")
        if options.tool_choice == "auto":
            names.append("unknown")  # a call of a tool that there is not is not turned into one of another
            rules += write("unknown", None, _ANY_OBJECT, "an unknown tool")
        if "TEXT" in start:
            rules.append(r"TEXT: /([ \t\r\n]*[^ \t\r\n{](.|\n)*)?/")
        return "\n".join([f"start: {start}", f"call: {' | '.join(names)}", *rules]) + "\n"

    def _object_call(self, rule: str, name: str | None, parameters: Json, owner: str) -> list[str]:
        """The rules of a call that is a JSON object; without a name it is one of an unknown tool."""
        options, spelling = self._options, _spelling(parameters, owner)
        space, comma, colon = spelling.space, spelling.comma, f" /{spelling.space}{spelling.colon}{spelling.space}/ "
        known = f"/{'|'.join(map(key_regex, self._names))}/"
        value = f"/{key_regex(name)}/" if name is not None else "UNKNOWN"
        named = f"/{key_regex(options.name_key)}/{colon}{value}"
        argued = f"/{key_regex(options.arguments_key)}/{colon}{rule}a"
        members = " | ".join(rf"{one} /{space}{comma}{space}/ {two}" for one, two in ((named, argued), (argued, named)))
        arguments = _json_rules(f"{rule}a", parameters, self._grammar, owner, spelling)
        rules = [rf"{rule}: /\{{{space}/ ({members}) /{space}\}}/", *arguments]
        return rules if name is not None else [*rules, f"UNKNOWN: {ANY_TEXT} & ~{known}"]

    def _named_call(self, rule: str, name: str | None, parameters: Json, owner: str) -> list[str]:
        """The rules of a call whose name stands before its arguments."""
        options, literal = self._options, self._literal
        call_id = f"({literal(options.id_begin)} /[a-zA-Z0-9]{{9}}/)?" if options.id_begin else ""
        name_end = " | ".join(literal(text) or '""' for text in options.name_ends)
        written = quoted(name) if name is not None else "UNKNOWN"
        call = f"{rule}: {written} {call_id} ({name_end}) {rule}a {literal(options.arguments_end)}"
        quote = literal(options.string_quote)
        spelling = JsonSpelling(quote=quote) if quote else None
        rules = [call, *_json_rules(f"{rule}a", parameters, self._grammar, owner, spelling)]
        known = "|".join(map(plain_regex, self._names))
        return rules if name is not None else [*rules, rf"UNKNOWN: /[\w.\-]+/ & ~/{known}/"]


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


def _parameters(function: dict[str, Any]) -> Json:
    """The JSON schema of a function's arguments, which are an object."""
    given = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    return {"type": "object", **given}


def quoted(text: str) -> str:
    """A plain text in Lark."""
    return json.dumps(text, ensure_ascii=False)
