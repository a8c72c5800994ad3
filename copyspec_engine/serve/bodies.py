"""Bodies of requests: read as far as their size allows, JSON as deep as it may be, and checked field by field."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from starlette.requests import ClientDisconnect, Request

from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.values.options import Documented, explain_errors

__all__ = [
    "NUM_BYTES",
    "Body",
    "body_schemas",
    "documented",
    "json_of",
    "read_body",
    "read_bytes",
    "read_json",
    "read_nothing",
]


class Body(Documented):
    """What an endpoint takes: known fields of known types, none of which is ignored without a word.

    Subclasses say in `without_effect` which of their fields are accepted and change nothing, and in `unsupported` which
    are refused, and what to do instead.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    without_effect: ClassVar[tuple[str, ...]] = ()
    unsupported: ClassVar[Mapping[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """JSON has one kind of number: 1.0 is an integer too."""
        return [_number(item) for item in value] if isinstance(value, list) else _number(value)

    @model_validator(mode="before")
    @classmethod
    def _with_few_unknown(cls, value: Any) -> Any:  # noqa: ANN401 - anything may be given
        """Of fields that are not known as many as one error can tell of."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        unknown = [name for name in value if name not in cls.model_fields][:_MOST_UNKNOWN]
        return {name: item for name, item in value.items() if name in cls.model_fields or name in unknown}

    def ignored(self) -> list[str]:
        """Fields that were given, and change nothing."""
        return [name for name in self.without_effect if getattr(self, name) not in (None, False)]


def _number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


NUM_BYTES = "copyspec.num_bytes"
"""Where the scope of a request says how many its body had."""
_MOST_UNKNOWN = 8
_MOST_DIGITS = 20
"""Of a number that are shown."""
_LARGE_BYTES = 1 << 16
"""Of a body that takes more than a few milliseconds to be read."""
_PARTS = ((b"[{:", 64, "lists, objects and fields"), (b",", 8, "items in lists and objects"))
"""What takes long to be made of a body: the signs that it is counted by, and bytes of the largest body for each."""
_LEAST_MAX_BYTES = 8 << 20
"""Where bodies may be no larger than that they may still have as many parts."""

Any_Body = TypeVar("Any_Body", bound=Body)


async def read_body(request: Request, kind: type[Any_Body], config: ServeConfig) -> Any_Body:
    """The body of a request as an object of some kind.

    Raises:
        ApiError: it is too large, no JSON, too deep, or a field is unknown or has a wrong type.
    """
    value = await read_json(request, config)
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", f"Got a JSON {type(value).__name__} as the body but expected an object")
    try:
        return kind(**value)
    except ValidationError as error:
        raise _of_validation(kind, error) from None


async def read_json(request: Request, config: ServeConfig, max_bytes: int | None = None) -> Any:  # noqa: ANN401 - any JSON value
    """The body of a request. Raises as `read_body` does of it.

    Args:
        request: whose body it is.
        config: the limits.
        max_bytes: of the body, if not as the config has it.
    """
    largest = config.max_body_bytes if max_bytes is None else max_bytes
    return await json_of(await read_bytes(request, config, largest), config, largest)


async def json_of(body: bytes, config: ServeConfig, max_bytes: int) -> Any:  # noqa: ANN401 - any JSON value
    """What a body says, read in a thread where that takes a while: others are answered meanwhile.

    Args:
        body: as it came; nothing is an empty object.
        config: the limits.
        max_bytes: that it may have had.

    Raises:
        ApiError: it is no JSON, too deep, or of too many parts.
    """
    if len(body) < _LARGE_BYTES:
        return _parsed(body, config.max_depth)

    def parsed() -> Any:  # noqa: ANN401 - any JSON value
        _check_parts(body, max(max_bytes, _LEAST_MAX_BYTES))
        return _parsed(body, config.max_depth)

    return await asyncio.to_thread(parsed)


async def read_nothing(request: Request, config: ServeConfig) -> None:
    """See to it that a body, where all is said in the path, says nothing.

    Raises:
        ApiError: it says something.
    """
    if (await read_bytes(request, config, config.max_body_bytes)).strip() not in (b"", b"{}"):
        raise ApiError(400, "invalid_value", "Got a body but all there is to say is in the path: send none, or {}")


async def read_bytes(request: Request, config: ServeConfig, max_bytes: int) -> bytes:
    """The body of a request as it came.

    Raises:
        ApiError: it is larger than `max_bytes`, does not come, or its client goes away.
    """
    body, pieces = bytearray(), aiter(request.stream())
    try:
        while (piece := await asyncio.wait_for(anext(pieces, None), config.body_timeout_s)) is not None:
            body += piece
            if len(body) > max_bytes:
                raise ApiError(413, "body_too_large", f"Got a body of more than {max_bytes} bytes: shorten it")
    except asyncio.TimeoutError:
        raise ApiError(408, "body_timeout", f"Got nothing of the body for {config.body_timeout_s} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "incomplete_body", "The client went away before its body was whole") from None
    request.scope[NUM_BYTES] = len(body)
    return bytes(body)


def _check_parts(body: bytes, max_bytes: int) -> None:
    """Refuse JSON of very many parts: while the parser makes them it lets no other thread do anything."""
    bare = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    outside = bare[~np.logical_xor.accumulate(bare == ord('"'))]  # of texts
    for marks, per, called in _PARTS:
        number, most = int(np.isin(outside, list(marks)).sum()), max_bytes // per
        if number > most:
            raise ApiError(
                400, "invalid_json", f"Got a body with {number} {called} but expected {most} at most: shorten it"
            )


def _parsed(body: bytes, max_depth: int) -> Any:  # noqa: ANN401 - any JSON value
    try:
        value = json.loads(body or b"{}", parse_constant=_no_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"Got a body that is no JSON: {error}") from None
    _check(value, max_depth)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # it could not be given back in JSON
        raise ValueError(f"{digits[:_MOST_DIGITS]} is too large a number")
    return value


def _check(value: Any, max_depth: int) -> None:  # noqa: ANN401 - any JSON value
    """Refuse what is nested too deeply, and texts with half a character."""
    level = [value]
    for _ in range(max_depth + 1):
        for text in (item for item in level if isinstance(item, str) and not item.isascii()):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ApiError(
                    400, "invalid_json", f"Got a text with half a surrogate pair in the body: {ascii(text)[:80]}"
                )
        level = [inner for item in level for inner in _inner(item)]
        if not level:
            return
    raise ApiError(400, "invalid_json", f"Got a body nested more than {max_depth} deep: make it flatter")


def _inner(value: Any) -> Iterator[Any]:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _of_validation(kind: type[BaseModel], error: ValidationError) -> ApiError:
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    told = explain_errors(kind, error, called="the body")
    return ApiError(400, codes.get(first["type"], "invalid_value"), str(told), where.removeprefix(".") or None)


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of an endpoint that reads such a body by itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    required = any(field.is_required() for field in kind.model_fields.values())
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def body_schemas() -> dict[str, Any]:
    """The JSON schemas of all bodies and of what they hold, by the names in `documented`."""
    found: dict[str, Any] = {}
    kinds = list(Body.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, instead in kind.unsupported.items():
            schema["properties"][name] = {"enum": [None, False], "description": f"Refused: {instead}."}
        found |= schema.pop("$defs", {})
        found[kind.__name__] = schema
    return found
