"""Messages as chat templates want them: one form comes in, each family's own goes out."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Sequence
from typing import Any

from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.values.errors import ConfigError, UnsupportedModelError

__all__ = ["for_template"]

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_LETTERS = string.ascii_letters + string.digits
_MEDIA = {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Under which keys a message's reasoning may come."""


def for_template(messages: Sequence[dict[str, Any]], chat_format: ChatFormat) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, changed where the family's templates would fail or leave something out.

    Texts in parts become one text; arguments take the template's form, whether they came as objects or as JSON; ids
    and reasoning become what it reads; results name their function; a message with several calls becomes several where
    a template writes one only.
    """
    names: dict[str, str] = {}
    prepared: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        ready = dict(message)
        if not isinstance(message.get("role"), str):
            raise ConfigError(f"Got messages[{position}] with role={message.get('role')!r} but expected a text")
        if "content" in message:
            ready["content"] = _text(message["content"], f"messages[{position}]")
        if message.get("tool_calls"):
            ready["tool_calls"] = _calls(message["tool_calls"], f"messages[{position}]", chat_format)
            ready["content"] = ready.get("content") or ""
            names |= {call["id"]: call["function"]["name"] for call in ready["tool_calls"] if "id" in call}
        if message.get("tool_call_id") is not None:
            ready["tool_call_id"] = _id(message["tool_call_id"], chat_format)
            if message.get("name") is None and ready["tool_call_id"] in names:
                ready["name"] = names[ready["tool_call_id"]]
        reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
        if reasoning is not None:
            ready |= dict.fromkeys(("reasoning_content", chat_format.reasoning_key), reasoning)
        prepared.append(ready)
    one_by_one = chat_format.calls is not None and not chat_format.calls.repeats
    return _apart(prepared) if one_by_one else prepared


def _text(content: object, where: str) -> str | None:
    """A message's content as one text.

    Raises:
        ConfigError: it is neither a text nor a list of parts that are texts.
        UnsupportedModelError: a part is an image or the like: a template would write a placeholder for it, and the
            model answer as if it had seen it.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ConfigError(f"Got {where} with content={content!r} but expected a text, or a list of text parts")
    return "".join(_part(part, f"{where}, content[{place}]") for place, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if isinstance(part, dict) and isinstance(kind, str):
        if kind in _MEDIA:
            raise UnsupportedModelError(f"Got a message with a part of type {kind!r} but only text can be read")
        if isinstance(part.get("text"), str):
            return str(part["text"])
    raise ConfigError(f'Got {where} = {part!r} but expected a text part: {{"type": "text", "text": ...}}')


def _calls(calls: object, where: str, chat_format: ChatFormat) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise ConfigError(f"Got {where} with tool_calls={calls!r} but expected a list of calls")
    for call in calls:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(f"Got {where} with a tool call {call!r} but expected a dict with its function's name")
        if not isinstance(call.get("id"), str | int | None):
            raise ConfigError(f"Got {where} with a tool call of id={call['id']!r} but expected a text")
    return [_call(call, chat_format) for call in calls]


def _call(call: dict[str, Any], chat_format: ChatFormat) -> dict[str, Any]:
    function = dict(call.get("function") or {key: call[key] for key in ("name", "arguments") if key in call})
    arguments = function.get("arguments")
    if chat_format.arguments == "json" and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments or {}, ensure_ascii=False)
    elif chat_format.arguments == "object":
        function["arguments"] = _object(arguments)
    ready = {"type": "function", "function": function}
    return ready if call.get("id") is None else {"id": _id(call["id"], chat_format), **ready}


def _object(arguments: object) -> object:
    """Arguments as an object; those of a malformed call stay as they were written."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def _id(call_id: object, chat_format: ChatFormat) -> object:
    """The id of a call, or nine letters and digits that stand for it."""
    if not chat_format.short_ids or (isinstance(call_id, str) and _SHORT_ID.fullmatch(call_id)):
        return call_id
    digest = hashlib.blake2b(str(call_id).encode(), digest_size=9).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest)


def _apart(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, with its result behind it."""
    single: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if any(message is result for result in results):
            continue
        if len(calls) < 2:
            single.append(message)
            continue
        behind = messages[at + 1 :]
        end = next((i for i, other in enumerate(behind) if other.get("role") != "tool"), len(behind))
        left = behind[:end]
        for number, call in enumerate(calls):
            first = message if number == 0 else {"role": message["role"], "content": ""}
            answers = [other for other in left if other.get("tool_call_id") == call.get("id")]
            if any(other.get("id") == call.get("id") for other in calls[number + 1 :]):  # one result for each of them
                answers = answers[:1]
            left = [other for other in left if not any(other is answer for answer in answers)]
            single += [{**first, "tool_calls": [call]}, *answers]
            results += answers
    return single
