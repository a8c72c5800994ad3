"""Gemma's way to write a JSON value, as Lark: bare keys in alphabetical order, strings between two of one token.

Of a schema it prescribes types, constants, the keys of objects and which of them are required; not ranges of numbers,
lengths or patterns, and references only into the schema's own definitions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["dialect_rules"]

_ANY = r"""
{p}any: {p}text | {p}number | "true" | "false" | "null" | {p}object | {p}list
{p}object: "{{" ({p}key ":" {p}any ("," {p}key ":" {p}any)*)? "}}"
{p}list: "[" ({p}any ("," {p}any)*)? "]"
{p}key: /[\w.\-]+/
{p}text: {quote} /(.|\n)*/ {quote}
{p}number: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+\-]?[0-9]+)?/
{p}integer: /-?(0|[1-9][0-9]*)/
"""


def dialect_rules(prefix: str, schema: dict[str, Any], quote: str) -> list[str]:
    """Rules of which the first, named `prefix`, takes a value that fits a schema.

    Args:
        prefix: begins all names of rules, in small letters.
        schema: a JSON schema.
        quote: what opens and closes a string, in Lark.
    """
    writer = _Writer(prefix, schema, quote)
    writer.rules.append(_ANY.format(p=f"{prefix}_", quote=quote))
    top = writer.value(schema)
    return [f"{prefix}: {top}", *writer.rules]


class _Writer:
    def __init__(self, prefix: str, root: dict[str, Any], quote: str) -> None:
        self._prefix, self._root, self._quote = f"{prefix}_", root, quote
        self.rules: list[str] = []
        self._references: dict[str, str] = {}

    def _rule(self, body: Callable[[], str], reference: str | None = None) -> str:
        """The name of a new rule; one that is referred to may need itself."""
        name = f"{self._prefix}v{len(self.rules)}"
        at = len(self.rules)
        self.rules.append("")
        if reference is not None:
            self._references[reference] = name
        self.rules[at] = f"{name}: {body()}"
        return name

    def _named(self, body: str) -> str:
        return self._rule(lambda: body)

    def value(self, schema: Any) -> str:  # noqa: ANN401 - a schema may be anything
        """An expression for the values that fit a schema."""
        if not isinstance(schema, dict) or not schema:
            return f"{self._prefix}any"
        if isinstance(schema.get("$ref"), str):
            return self._reference(schema["$ref"])
        if "const" in schema or "enum" in schema:
            return self._one_of([self._constant(it) for it in schema.get("enum", [schema.get("const")])])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                return self._one_of([self.value(it) for it in schema[key]])
        types = schema.get("type", "object" if "properties" in schema else None)
        kinds = types if isinstance(types, list) else [types]
        return self._one_of([self._typed(kind, schema) for kind in kinds])

    def _one_of(self, values: list[str]) -> str:
        return values[0] if len(values) == 1 else f"({' | '.join(values)})"

    def _typed(self, kind: object, schema: dict[str, Any]) -> str:
        if kind == "object" and isinstance(schema.get("properties"), dict):
            return self._rule(lambda: self._object(schema))
        if kind == "array" and "items" in schema:
            item = self._named(self.value(schema["items"]))
            return f'("[" ({item} ("," {item})*)? "]")'
        names = {"string": "text", "integer": "integer", "number": "number", "object": "object", "array": "list"}
        if kind in ("boolean", "null"):
            return '("true" | "false")' if kind == "boolean" else '"null"'
        return self._prefix + names.get(str(kind), "any")

    def _constant(self, value: object) -> str:
        if isinstance(value, str):
            return f"({self._quote} {json.dumps(value, ensure_ascii=False)} {self._quote})" if value else self._empty
        if isinstance(value, dict | list):
            return f"{self._prefix}any"
        return json.dumps(json.dumps(value))

    @property
    def _empty(self) -> str:
        return f"({self._quote} {self._quote})"

    def _reference(self, reference: str) -> str:
        if reference not in self._references:
            found: Any = self._root
            for key in reference.removeprefix("#").strip("/").split("/"):
                found = found.get(key, {}) if isinstance(found, dict) and key else found
            return self._rule(lambda: self.value(found), reference)
        return self._references[reference]

    def _object(self, schema: dict[str, Any]) -> str:
        """Members in alphabetical order, each with a comma if one stands before it."""
        required = schema["required"] if isinstance(schema.get("required"), list) else []
        first, rest = '""', '""'
        for key in sorted(schema["properties"], reverse=True):
            member = f"{json.dumps(key + ':', ensure_ascii=False)} {self.value(schema['properties'][key])}"
            then = rest
            may_miss = key not in required
            first = self._named(f"{member} {then}" + (f" | {first}" if may_miss else ""))
            rest = self._named(f'"," {member} {then}' + (f" | {then}" if may_miss else ""))
        return f'"{{" {first} "}}"'
