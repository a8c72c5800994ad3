"""GET /docs: the endpoints and their fields as a page without any script, so that it works under any policy, offline.

The usual pages for OpenAPI documents load a script from elsewhere, which the policy here forbids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from copyspec_engine.values.html import look

__all__ = ["POLICY", "docs_page"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of the page."""
_STYLE = """
body { background: var(--paper); color: var(--ink); font: 1rem/var(--leading) var(--font); margin: 2rem auto;
  max-width: 60rem; padding: 0 var(--space) }
a { color: var(--accent) }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line) }
code { font: 90% var(--mono) }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """A page of an OpenAPI document."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    schemas = document.get("components", {}).get("schemas", {})
    parts = [part for path, methods in document["paths"].items() for part in _endpoint(path, methods, schemas)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{look()}{_STYLE}</style>'
        f"<h1>{title}</h1><p>A server with keys wants one with each call: <code>Authorization: Bearer KEY</code>.</p>"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a></p>{"".join(parts)}</html>'
    )


def _endpoint(path: str, methods: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    for method, said in methods.items():
        yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
        yield f"<p>{escape(said.get('description', ''))}</p>"
        for title, body in (("asked", said.get("requestBody", {})), ("answered", said["responses"]["200"])):
            schema = body.get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in schema:
                yield f"<h3>{title}</h3>{_fields(schemas[schema['$ref'].rpartition('/')[2]], schemas)}"


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        mark = " (required)" if name in required else ""
        text = escape(field.get("description", ""))
        parts = (field, field.get("items", {}), *field.get("anyOf", ()))
        held = next((part["$ref"] for part in parts if "$ref" in part), "")
        inner = _fields(schemas[held.rpartition("/")[2]], schemas) if held else ""
        rows.append(
            f"<tr><td><code>{escape(name)}</code>{mark}<td><code>{escape(_type(field))}</code><td>{text}{inner}"
        )
    return f"<table>{''.join(rows)}</table>"


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " | ".join(kind for kind in map(_type, field["anyOf"]) if kind != "null")
    if field.get("enum") == [None, False]:
        return "nothing"
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type") or field.get("$ref", "any").rpartition("/")[2])
