"""JSON schemas in a plain form: references followed, `allOf` merged, alternatives apart, the rest by type of value."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from copyspec_engine.grammar.patterns import FORMATS
from copyspec_engine.values.errors import ConfigError

__all__ = ["TYPES", "Json", "Plain", "SchemaReader", "fits_limits", "joined", "merged", "property_schema"]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
Json = Any
"""What JSON can hold; a schema is one."""
_UNSUPPORTED = (
    "not",
    "if",
    "uniqueItems",
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
    "$recursiveRef",
)
_LIMITS = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
_MOST_LEVELS = 100
"""References and parts of `allOf` that lead to each other."""


@dataclass(frozen=True)
class Plain:
    """What a value must be; a schema in a place is one of the caller's, which is to be read in turn."""

    types: frozenset[str] = frozenset(TYPES) - {"integer"}
    """Kinds of values; every integer is a number."""
    constants: tuple[Json, ...] | None = None
    """The only values."""
    properties: dict[str, Json] = field(default_factory=dict)
    pattern_properties: dict[str, Json] = field(default_factory=dict)
    additional: Json = None
    """The schema of other properties; None: nothing is said of them."""
    required: tuple[str, ...] = ()
    prefix: tuple[Json, ...] = ()
    items: Json = True
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    multiples: tuple[float, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    choices: tuple[tuple[Json, ...], ...] = ()
    """One schema of each tuple must hold as well."""


class SchemaReader:
    """Reads the parts of one schema.

    Args:
        root: the whole schema, which references are looked up in.
        leave_out: is told what cannot be expressed, and where; raises if that is not to be left out.
        refuse: makes the error for something that is no schema, from a text and where it is.
    """

    def __init__(
        self, root: Json, leave_out: Callable[[str, str], None], refuse: Callable[[str, str], ConfigError]
    ) -> None:
        self._root, self._leave_out, self._refuse = root, leave_out, refuse

    def plain(self, schema: Json, where: str, depth: int = 0, *, told: bool = True) -> Plain:
        """A part of the schema in its plain form.

        Args:
            schema: the part.
            where: its place, for messages.
            depth: references and parts of `allOf` that led here.
            told: `leave_out` is told what cannot be expressed.

        Raises:
            ConfigError: it is no schema, refers to nothing or to itself, or `leave_out` raises.
        """
        if isinstance(schema, bool):
            return Plain() if schema else Plain(frozenset())
        if not isinstance(schema, dict):
            raise self._refuse(f"{_short(schema)} but expected a JSON schema", where)
        if depth > _MOST_LEVELS:
            raise self._refuse(f"{_short(schema)}, which refers to itself without end", where)
        if schema.get("not") in ({}, True):
            return Plain(frozenset())
        if told:
            self._tell(schema, where, depth)
        found = self._own(schema, where)
        if "$ref" in schema and (there := self._looked_up(self._text(schema, "$ref", where), where)) is not None:
            found = merged(self.plain(there, where, depth + 1, told=told), found)
        for part in self._list(schema, "allOf", where):
            found = merged(found, self.plain(part, where, depth + 1, told=told))
        if "propertyNames" in schema:
            found = merged(found, self._named_so(schema["propertyNames"], where, depth, told=told))
        return found

    def _tell(self, schema: dict[str, Json], where: str, depth: int) -> None:
        """Say what a schema itself asks for that cannot be expressed."""
        for key in _UNSUPPORTED:
            if schema.get(key) not in (None, False):
                self._leave_out(f"{key}={_short(schema[key])}", where)
        if "oneOf" in schema and not self._exclude(self._list(schema, "oneOf", where), where, depth):
            self._leave_out(f"oneOf={_short(schema['oneOf'])} is taken as anyOf: that no other one fits", where)

    def _named_so(self, names: Json, where: str, depth: int, *, told: bool) -> Plain:
        """Objects whose properties have such names."""
        found = self.plain(names, where, depth + 1, told=told)
        if "string" not in found.types:
            return Plain(additional=False)
        if found.constants is not None:
            texts = [value for value in found.constants if isinstance(value, str) and fits_limits(value, found)]
            return Plain(properties=dict.fromkeys(texts, True), additional=False)
        if found == Plain(found.types, patterns=found.patterns[:1]):
            return Plain(pattern_properties={found.patterns[0]: True}, additional=False) if found.patterns else Plain()
        if told:
            self._leave_out(f"propertyNames={_short(names)}", where)
        return Plain()

    def _exclude(self, options: list[Json], where: str, depth: int) -> bool:
        """Whether no value fits two of these schemas, as far as their types and constants show."""
        plains = [self.plain(option, where, depth + 1, told=False) for option in options]
        return all(self._differ(one, two, where, depth) for at, one in enumerate(plains) for two in plains[:at])

    def _differ(self, one: Plain, two: Plain, where: str, depth: int) -> bool:
        both = merged(one, two)
        if not both.types or both.constants == ():
            return True
        return both.types == {"object"} and any(
            self.plain(both.properties[name], where, depth + 1, told=False).constants == ()
            for name in both.required
            if name in one.properties and name in two.properties
        )

    def _own(self, schema: dict[str, Json], where: str) -> Plain:
        """What a schema says itself, without those it refers to."""
        constants = self._list(schema, "enum", where) if "enum" in schema else None
        if "const" in schema:
            constants = [schema["const"]] if constants is None or is_among(schema["const"], constants) else []
        items, prefix = schema.get("items", True), self._list(schema, "prefixItems", where)
        if isinstance(items, list):  # until draft 2019-09
            prefix, items = items, schema.get("additionalItems", True)
        return Plain(
            types=self._types(schema, where),
            constants=None if constants is None else tuple(constants),
            properties=self._dict(schema, "properties", where),
            pattern_properties=self._dict(schema, "patternProperties", where),
            additional=schema.get("additionalProperties"),
            required=self._required(schema, where),
            prefix=tuple(prefix),
            items=items,
            patterns=(self._text(schema, "pattern", where),) if "pattern" in schema else (),
            formats=(self._text(schema, "format", where),) if "format" in schema else (),
            multiples=(self._number(schema, "multipleOf", where, above=0),) if "multipleOf" in schema else (),
            limits=self._limits(schema, where),
            choices=tuple(tuple(self._list(schema, key, where)) for key in ("anyOf", "oneOf") if key in schema),
        )

    def _types(self, schema: dict[str, Json], where: str) -> frozenset[str]:
        given = schema.get("type")
        if given is None:
            return Plain.types
        types = list(given) if isinstance(given, list) else [given]
        for name in types:
            if name not in TYPES:
                raise self._refuse(f"type={given!r} but expected one of {', '.join(TYPES)}", where)
        if schema.get("nullable") is True:  # OpenAPI 3.0
            types.append("null")
        return frozenset(types) - ({"integer"} if "number" in types else set())

    def _required(self, schema: dict[str, Json], where: str) -> tuple[str, ...]:
        if isinstance(schema.get("required"), bool):  # draft 3: it is said of the property itself
            return ()
        names = self._list(schema, "required", where)
        if not all(isinstance(name, str) for name in names):
            raise self._refuse(f"required={_short(names)} but expected names", where)
        return tuple(dict.fromkeys(names))

    def _limits(self, schema: dict[str, Json], where: str) -> dict[str, float]:
        limits = {}
        for key in _LIMITS:
            value = schema.get(key)
            if isinstance(value, bool) and key.startswith("exclusive"):  # until draft 4
                value = schema.get(key.replace("exclusiveM", "m")) if value else None
            if value is not None:
                limits[key] = self._number({key: value}, key, where, above=-math.inf if "imum" in key else -1)
        return limits

    def _looked_up(self, reference: str, where: str) -> Json:
        """What a reference stands for; None if it cannot be known."""
        if not reference.startswith("#"):
            self._leave_out(f"$ref={reference!r}, which leads out of the schema", where)
            return None
        name, *steps = unquote(reference).removeprefix("#").split("/")
        found: Json = _anchored(self._root, name) if name else self._root
        if found is None:
            raise self._refuse(f"$ref={reference!r} but the schema has no such anchor", where)
        for step in steps:
            key = step.replace("~1", "/").replace("~0", "~")
            is_index = isinstance(found, list) and key.isdecimal() and int(key) < len(found)
            found = found[int(key)] if is_index else found.get(key) if isinstance(found, dict) else None
            if found is None:
                raise self._refuse(f"$ref={reference!r} but the schema has no such part", where)
        return found

    # ---- keywords of one type ------------------------------------------------------------------------------------

    def _list(self, schema: dict[str, Json], key: str, where: str) -> list[Json]:
        value = schema.get(key, [])
        if not isinstance(value, list):
            raise self._refuse(f"{key}={_short(value)} but expected a list", where)
        return value

    def _dict(self, schema: dict[str, Json], key: str, where: str) -> dict[str, Json]:
        value = schema.get(key, {})
        if not isinstance(value, dict):
            raise self._refuse(f"{key}={_short(value)} but expected names with schemas", where)
        return value

    def _text(self, schema: dict[str, Json], key: str, where: str) -> str:
        value = schema[key]
        if not isinstance(value, str):
            raise self._refuse(f"{key}={_short(value)} but expected a text", where)
        return value

    def _number(self, schema: dict[str, Json], key: str, where: str, *, above: float = -math.inf) -> float:
        value = schema[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
            least = f" above {above:g}" if above > -math.inf else ""
            raise self._refuse(f"{key}={_short(value)} but expected a number{least}", where)
        return value


def _anchored(root: Json, name: str) -> Json:
    """The part of a schema that has this anchor, or None."""
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and (
            name in (part.get("$anchor"), part.get("$dynamicAnchor")) or part.get("$id") == f"#{name}"
        ):
            return part
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return None


def merged(one: Plain, two: Plain) -> Plain:
    """What fits both."""
    types = (one.types & two.types) | ({"integer"} if _has_integers(one) and _has_integers(two) else set())
    constants = one.constants if two.constants is None else two.constants
    if one.constants is not None and two.constants is not None:
        constants = tuple(value for value in one.constants if is_among(value, two.constants))
    limits = dict(one.limits)
    for key, value in two.limits.items():
        limits[key] = _LIMITS[key](limits.get(key, value), value)
    length = max(len(one.prefix), len(two.prefix))
    firsts, seconds = ((*it.prefix, *[it.items] * (length - len(it.prefix))) for it in (one, two))
    names = dict.fromkeys([*one.properties, *two.properties])
    patterns = dict.fromkeys([*one.pattern_properties, *two.pattern_properties])
    return Plain(
        types=types - ({"integer"} if "number" in types else set()),
        constants=constants,
        properties={name: joined(property_schema(one, name), property_schema(two, name)) for name in names},
        pattern_properties={it: joined(_matching_schema(one, it), _matching_schema(two, it)) for it in patterns},
        additional=joined(one.additional, two.additional),
        required=tuple(dict.fromkeys(one.required + two.required)),
        prefix=tuple(map(joined, firsts, seconds)),
        items=joined(one.items, two.items),
        patterns=one.patterns + two.patterns,
        formats=one.formats + two.formats,
        multiples=one.multiples + two.multiples,
        limits=limits,
        choices=one.choices + two.choices,
    )


def property_schema(plain: Plain, name: str) -> Json:
    """The schema of a property; None: nothing is said of it."""
    found = plain.properties.get(name)
    matching = [schema for pattern, schema in plain.pattern_properties.items() if _matches(pattern, name)]
    if name not in plain.properties and not matching:
        return plain.additional
    for schema in matching:
        found = joined(found, schema)
    return found


def _matches(pattern: str, text: str, *, unreadable: bool = False) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error:  # of another syntax: what is written will not be held to it
        return unreadable


def is_among(value: Json, values: Sequence[Json]) -> bool:
    """Whether JSON has a value among these: true is not 1 there."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def fits_limits(value: Json, plain: Plain) -> bool:
    """Whether a constant is of a type and size that is asked for, a text of the form, an object complete."""
    kind = _kind(value)
    if kind not in plain.types and not (kind == "integer" and "number" in plain.types):
        return False
    measures = {"Length": value} if isinstance(value, str) else {"Items": value} if isinstance(value, list) else {}
    for name, sized in measures.items():
        if not plain.limits.get(f"min{name}", 0) <= len(sized) <= plain.limits.get(f"max{name}", math.inf):
            return False
    if isinstance(value, str):
        wanted = [*plain.patterns, *(FORMATS[it] for it in plain.formats if it in FORMATS)]
        return all(_matches(it, value, unreadable=True) for it in wanted)
    if isinstance(value, dict):
        count = plain.limits.get("minProperties", 0) <= len(value) <= plain.limits.get("maxProperties", math.inf)
        return count and value.keys() >= set(plain.required)
    if kind not in ("integer", "number"):
        return True
    if any(Fraction(str(value)) % Fraction(str(it)) for it in plain.multiples):
        return False
    low, high = plain.limits.get("minimum", -math.inf), plain.limits.get("maximum", math.inf)
    above, below = plain.limits.get("exclusiveMinimum", -math.inf), plain.limits.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def _kind(value: Json) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float) and value.is_integer():
        return "integer"
    names = {type(None): "null", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def _has_integers(plain: Plain) -> bool:
    return bool(plain.types & {"integer", "number"})


def _matching_schema(plain: Plain, pattern: str) -> Json:
    """What is said of the properties whose names match a pattern."""
    return plain.pattern_properties.get(pattern, plain.additional)


def joined(one: Json, two: Json) -> Json:
    """A schema for what fits two, of which None says nothing."""
    if one is False or two is False:
        return False
    if one is None or one is True or one == two:
        return two
    if two is None or two is True:
        return one
    parts: list[Json] = []
    for part in (*_parts(one), *_parts(two)):
        if part not in parts:
            parts.append(part)
    return parts[0] if len(parts) == 1 else {"allOf": parts}


def _parts(schema: Json) -> list[Json]:
    is_list = isinstance(schema, dict) and [*schema] == ["allOf"] and isinstance(schema["allOf"], list)
    return schema["allOf"] if is_list else [schema]


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 100 else f"{text[:97]}..."
