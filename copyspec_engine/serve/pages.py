"""Lists of items, a part at a time, and what else the address of a request may say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from copyspec_engine.serve.errors import invalid

__all__ = ["PAGE", "check_query", "page_of", "query"]

_DEFAULT, _MOST = 20, 100
_ORDERS = ("asc", "desc")


_PARAMETERS = {
    "limit": ({"type": "integer", "minimum": 1, "maximum": _MOST, "default": _DEFAULT}, "Most items of a page."),
    "order": ({"enum": list(_ORDERS), "default": "desc"}, "Whether the first or the last item comes first."),
    "after": ({"type": "string"}, "The id of the item before the page."),
    "include": ({"type": "array", "items": {"type": "string"}}, "Changes nothing."),
}
PAGE = tuple(_PARAMETERS)
"""What the address of a list may say."""


def query(*names: str) -> dict[str, Any]:
    """What the OpenAPI document says of parameters, one of `PAGE` each."""
    told = [(name, *_PARAMETERS[name]) for name in names]
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": description}
            for name, schema, description in told
        ]
    }


def check_query(request: Request, known: Iterable[str]) -> None:
    """Refuse what the address says that nobody looks at.

    Raises:
        ApiError: there is such a thing.
    """
    known = tuple(known)
    unknown = next((name for name in request.query_params if name.removesuffix("[]") not in known), None)
    if unknown is not None:
        expected = f"one of {', '.join(known)}" if known else "none"
        raise invalid(unknown, f"Got {unknown} in the address but expected {expected}", "unknown_parameter")


def page_of(request: Request, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of a list that a request asks for by `limit` (1 to 100), `order` ("asc" or "desc") and `after` (an id).

    Raises:
        ApiError: one of these cannot be as it is.
    """
    check_query(request, PAGE)
    asked = request.query_params
    limit, order, after = asked.get("limit", str(_DEFAULT)), asked.get("order", "desc"), asked.get("after")
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= _MOST:
        raise invalid("limit", f"Got limit={limit!r:.80} but expected 1 to {_MOST}")
    if order not in _ORDERS:
        raise invalid("order", f"Got order={order!r} but expected 'asc' or 'desc'")
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        places = [at for at, item in enumerate(ordered) if item.get("id") == after]
        if not places:
            raise invalid("after", f"Got after={after!r} but expected the id of an item of this list")
        ordered = ordered[places[0] + 1 :]
    shown = ordered[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(ordered) > len(shown),
    }
