"""Items, of which the input and the output of a response are made, and the messages of a chat that they stand for."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import ApiError, invalid, not_found
from copyspec_engine.serve.messages import checked_messages

__all__ = ["Item", "checked_items", "item_id", "messages_of", "text_part"]

Item = Mapping[str, Any]
"""As OpenAI's responses have it: {"type": "message", ...}."""

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}
_OWN = ("reasoning", "message", "function_call")
"""What an answer is made of."""
_KNOWN = {
    "message": {"type", "id", "role", "content", "status"},
    "function_call": {"type", "id", "call_id", "name", "arguments", "status"},
    "function_call_output": {"type", "id", "call_id", "output", "status"},
    "reasoning": {"type", "id", "summary", "content", "encrypted_content", "status"},
}
"""What is read of each kind, or says nothing."""


def item_id(kind: str) -> str:
    """A fresh id for an item of a kind."""
    return f"{_PREFIXES[kind]}_{secrets.token_hex(24)}"


def checked_items(
    field: str, given: str | Sequence[Item], known: Callable[[str], Item | None], ignored: dict[str, None]
) -> list[Item]:
    """A field of a body as whole items, each with an id.

    Args:
        field: its name.
        given: a text of a user, or items.
        known: finds an item of earlier responses by its id.
        ignored: takes the names of fields that change nothing.

    Raises:
        ApiError: one of them is none, or of a kind that stands for no text.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(f"{field}[{at}]", item, known, ignored) for at, item in enumerate(given)]


def _item(where: str, given: Item, known: Callable[[str], Item | None], ignored: dict[str, None]) -> Item:
    item = {name: value for name, value in given.items() if value is not None}
    kind = item.get("type", "message" if "role" in item else "item_reference" if set(item) == {"id"} else None)
    if kind == "item_reference":
        found = known(str(item.get("id")))
        if found is None:
            name = item.get("id")
            raise not_found(f"There is no item {name!r} here, or it is not kept any more", param=f"{where}.id")
        return found
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise invalid(
            f"{where}.type",
            f"Got {where}.type={kind!r} but expected one of {', '.join(_KNOWN)} and item_reference: the server has no "
            "tools of its own, and reads text only",
            "unsupported_parameter",
        )
    if not isinstance(item.get("id", ""), str):
        raise invalid(f"{where}.id", f"Got {where}.id={item['id']!r:.80} but expected a text")
    field = where.partition("[")[0]
    ignored.update(dict.fromkeys(f"{field}[].{name}" for name in item if name not in _KNOWN[kind]))
    whole = {"id": item_id(kind), "status": "completed", **item, "type": kind}
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        is_own = item.get("role") == "assistant"
        whole["content"] = [text_part(content) if is_own else {"type": "input_text", "text": content}]
    return whole


def text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A text that was written, as a part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def messages_of(field: str, items: Sequence[Item], config: ServeConfig) -> list[dict[str, Any]]:
    """The messages that items stand for: what was reasoned, said and called in one answer is one message.

    Args:
        field: where the items are.
        items: whole ones.
        config: the limits.

    Raises:
        ApiError: one of them lacks something, or holds something else than text.
    """
    raw: list[dict[str, Any]] = []
    places: list[int] = []
    before = "user"
    for at, item in enumerate(items):
        kind = item["type"] if item["type"] != "message" or item.get("role") == "assistant" else "user"
        is_own = kind in _OWN
        if not is_own or before not in _OWN or kind == "reasoning" or kind == before == "message":
            raw.append({"role": "assistant", "content": None} if is_own else _message(item))
            places.append(at)
        if is_own:
            _add(raw[-1], item, f"{field}[{at}]")
        before = kind
    for message in raw:
        if message["role"] == "assistant" and message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""  # it was only reasoned
    try:
        return checked_messages(raw, config)[0]
    except ApiError as error:
        error.param = _by_items(field, error.param or field, places)
        error.message = _by_items(field, error.message, places)
        raise


def _by_items(field: str, said: str, places: Sequence[int]) -> str:
    """What an error says of messages, said of the items that stand for them."""
    said = re.sub(r"\bmessages\[(\d+)\]", lambda found: f"{field}[{places[int(found[1])]}]", said)
    return re.sub(r"\bmessages\b", field, said)


def _message(item: Item) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    return {"role": item.get("role"), "content": item.get("content")}


def _add(message: dict[str, Any], item: Item, where: str) -> None:
    """Add an item to the message of an answer."""
    if item["type"] == "reasoning":
        parts = item.get("content") or []
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in _list(where, parts)]
        if not all(isinstance(text, str) for text in texts):
            raise invalid(f"{where}.content", f"Got {where}.content={parts!r} but expected parts with a text")
        if texts:
            message["reasoning_content"] = "".join(map(str, texts))
    elif item["type"] == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
    else:
        content = _list(where, item.get("content"))
        message["content"] = [*(message["content"] or ()), *content]


def _list(where: str, content: object) -> list[Any]:
    if not isinstance(content, list):
        raise invalid(f"{where}.content", f"Got {where}.content={content!r} but expected a text or a list of parts")
    return content
