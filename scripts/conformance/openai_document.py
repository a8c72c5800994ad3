"""OpenAI's published OpenAPI document, cut to what a server has, so that cases are made of what its clients may send.

It is published at github.com/openai/openai-openapi under the MIT licence, as openapi.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["cut_document"]

Json = dict[str, Any]


def cut_document(path: Path, own: Json, model: str) -> Json:
    """The document with the paths and methods of a server alone, whose only model it names.

    Of answers it keeps those that went well: the errors that it describes are not in the form that OpenAI's own have.

    Args:
        path: of the published document, in JSON.
        own: the server's own document.
        model: that calls are to ask.

    Raises:
        ValueError: the document has none of the server's paths.
    """
    document: Json = json.loads(path.read_text(encoding="utf-8"))
    ours = {(_pattern(name), method) for name, methods in own["paths"].items() for method in methods}
    paths: Json = {}
    for name, methods in document["paths"].items():
        kept = {method: said for method, said in methods.items() if (_pattern(f"/v1{name}"), method) in ours}
        if kept:
            shared = {"parameters": methods["parameters"]} if "parameters" in methods else {}
            paths[name] = {**{method: _answered(said) for method, said in kept.items()}, **shared}
    if not paths:
        raise ValueError(f"{path} has no path that the server has")
    document["paths"] = paths
    for schema in _schemas(document["components"]):
        properties = schema.get("properties")
        if isinstance(properties, dict) and "model" in properties:
            properties["model"] = {"type": "string", "enum": [model]}
    return document


def _answered(said: Json) -> Json:
    return {**said, "responses": {status: answer for status, answer in said["responses"].items() if status == "200"}}


def _pattern(path: str) -> str:
    """A path whose parameters have no names."""
    return re.sub(r"\{[^}]*\}", "{}", path)


def _schemas(value: object) -> Iterator[Json]:
    """All objects of a JSON value."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _schemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _schemas(inner)
