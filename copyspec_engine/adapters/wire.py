"""An answer's chunks on their way between two machines: everything that they say, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from copyspec_engine.values.errors import RequestFailedError
from copyspec_engine.values.outputs import StreamChunk

__all__ = ["chunk_from_json", "chunk_to_json"]

_CHUNK = TypeAdapter(StreamChunk)


def chunk_to_json(chunk: StreamChunk) -> dict[str, Any]:
    """A chunk as plain values, without those that are as by default."""
    written: dict[str, Any] = _CHUNK.dump_python(chunk, mode="json", exclude_defaults=True)
    return written


def chunk_from_json(value: object) -> StreamChunk:
    """The inverse of `chunk_to_json`.

    Raises:
        RequestFailedError: this is no chunk, as of another version of this package.
    """
    try:
        return _CHUNK.validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise RequestFailedError(
            f"Got a piece of an answer whose {place or 'form'} is not as expected ({problem['msg']}): server and "
            "client should be of one version of copyspec"
        ) from None
