"""Cases that are made of OpenAI's document: what the server refuses by name is left out, so that more are answered."""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis

FIELDS: dict[str, dict[str, Any]] = json.loads(os.environ["CONFORMANCE_FIELDS"])
"""The fields of each path's body, each with a value that it has in every case, or null."""


def map_body(context: Any, body: Any) -> Any:  # noqa: ANN401 - any JSON value
    """A body as the server takes it, as far as its fields go."""
    fields = FIELDS.get(context.operation.path)
    if fields is None or not isinstance(body, dict):
        return body
    always = {name: value for name, value in fields.items() if value is not None and name not in body}
    return {**{name: value for name, value in body.items() if name in fields}, **always}


schemathesis.hook(map_body)
