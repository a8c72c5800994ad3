"""JSON schemas made up by chance, and values that fit them."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["random_document", "random_schema"]

_KEYS = ("a", "b", "ab", "name", "l", "n", "s", "\u00fc")
_WORDS = ("", "a", "ab", "b a", "J\u00fcrgen", 'say "a"', "a/b\\c", "\u65e5\u672c\n", "\U0001f600!", "12")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of at most `depth` levels of objects and arrays."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "short", "range", "anyOf"]
    kind = rng.choice(kinds + ["object", "array"] * 6 if depth else kinds)
    if kind == "object":
        names = rng.sample(_KEYS, rng.randrange(4))
        schema: dict[str, Any] = {"type": "object", "properties": {n: random_schema(rng, depth - 1) for n in names}}
        if rng.random() < 0.6:
            schema["required"] = [name for name in names if rng.random() < 0.5]
        if rng.random() < 0.6:
            schema["additionalProperties"] = rng.random() < 0.2
        return schema
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1)} | rng.choice([{}, {"maxItems": 2}])
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, max(depth - 1, 0)) for _ in range(2)]}
    scalars: dict[str, dict[str, Any]] = {
        "enum": {"enum": [rng.choice(_WORDS), rng.choice((None, True, 7, "ab"))]},
        "short": {"type": "string", "maxLength": rng.randrange(1, 5)},
        "range": {"type": "integer", "minimum": rng.randrange(-9, 9), "maximum": rng.randrange(9, 200)},
    }
    return scalars.get(kind, {"type": kind})


def random_document(rng: random.Random, schema: dict[str, Any]) -> Any:
    """A value that fits a schema made here, its members in any order."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return random_document(rng, rng.choice(schema["anyOf"]))
    kind = schema["type"]
    if kind == "object":
        needed = schema.get("required", ())
        names = [name for name in schema["properties"] if name in needed or rng.random() < 0.6]
        rng.shuffle(names)
        return {name: random_document(rng, schema["properties"][name]) for name in names}
    if kind == "array":
        return [random_document(rng, schema["items"]) for _ in range(rng.randrange(3))]
    if kind == "integer":
        return rng.randint(schema.get("minimum", -1000), schema.get("maximum", 1000))
    return {
        "string": rng.choice(_WORDS)[: schema.get("maxLength")],
        "number": rng.choice((0, -1.5, 3e-7, 12.25, 10**9)),
        "boolean": rng.random() < 0.5,
        "null": None,
    }[kind]
