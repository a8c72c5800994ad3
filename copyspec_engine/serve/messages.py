"""Messages and tools in OpenAI's form, checked, as the engine's chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copyspec_engine.adapters.tools import tool_choice_of
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.errors import ApiError, invalid

__all__ = ["checked_choice", "checked_messages", "checked_tools"]

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
"""What chat templates read of a message."""
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts of a content, and where their text is."""
_MEDIA = {
    *("audio", "document", "file", "image", "image_url", "input_audio", "input_file", "input_image", "media"),
    *("video", "video_url"),
}


def checked_messages(
    messages: Sequence[Mapping[str, Any]], config: ServeConfig
) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a call for the engine, one for one; and the names of fields in them that change nothing.

    Raises:
        ApiError: one of them is none, or holds something else than text.
    """
    if not messages:
        raise invalid("messages", "Got messages=[] but expected at least one message", "empty_array")
    if len(messages) > config.max_messages:
        raise invalid(
            "messages", f"Got {len(messages)} messages but expected {config.max_messages} at most", "array_too_long"
        )
    ignored: dict[str, None] = {}
    return [_message(f"messages[{at}]", message, ignored) for at, message in enumerate(messages)], list(ignored)


def _message(where: str, message: Mapping[str, Any], ignored: dict[str, None]) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{where}.role", f"Got {where}.role={role!r} but expected one of {', '.join(_ROLES)}")
    for name in ("function_call", "audio"):
        if name in given:
            raise invalid(
                f"{where}.{name}", f"Got {where}.{name} but expected tool_calls and text", "unsupported_parameter"
            )
    content = _text(f"{where}.content", given.get("content"))
    refusal = given.pop("refusal", None)
    if refusal is not None:
        content = (content or "") + _string(f"{where}.refusal", refusal)
    calls = given.get("tool_calls")
    if content is None and not (role == "assistant" and calls):
        raise invalid(f"{where}.content", f"Got {where} without content but expected a text", "missing_parameter")
    ready: dict[str, Any] = {"role": _ROLES[role], "content": content}
    if calls is not None:
        ready["tool_calls"] = _calls(f"{where}.tool_calls", calls)
    if role == "tool" and "tool_call_id" not in given:
        raise invalid(f"{where}.tool_call_id", f"Got {where} of a tool without tool_call_id", "missing_parameter")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in given:
            ready[name] = _string(f"{where}.{name}", given[name])
    ignored.update(dict.fromkeys(f"messages[].{name}" for name, value in given.items() if name not in _KEYS and value))
    return ready


def _text(where: str, content: object) -> str | None:
    """A content as one text; null stays null."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"Got {where}={content!r} but expected a text or a list of parts")
    return "".join(_part(f"{where}[{at}]", part) for at, part in enumerate(content))


def _part(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and isinstance(kind, str):
        if kind in _TEXTS:
            return _string(f"{where}.{_TEXTS[kind]}", part.get(_TEXTS[kind]))
        if kind in _MEDIA:
            raise ApiError(
                400,
                "unsupported_content",
                f"Got {where} of type {kind!r} but expected text: the model reads text only. Leave the part out, or "
                "describe it in words",
                where,
            )
    raise invalid(where, f'Got {where}={part!r} but expected {{"type": "text", "text": ...}}')


def _string(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise invalid(where, f"Got {where}={value!r} but expected a text")
    return value


def _calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise invalid(where, f"Got {where}={calls!r} but expected a list of calls")
    ready = []
    for at, call in enumerate(calls):
        function = (
            call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
        )
        if not isinstance(function, dict):
            raise invalid(
                f"{where}[{at}]",
                f'Got {where}[{at}]={call!r} but expected {{"id": ..., "type": "function", "function": '
                '{"name": ..., "arguments": ...}}',
            )
        inside = f"{where}[{at}].function"
        named = {name: _string(f"{inside}.{name}", function.get(name)) for name in ("name", "arguments")}
        ready.append({"id": _string(f"{where}[{at}].id", call.get("id")), "type": "function", "function": named})
    return ready


def checked_tools(tools: Sequence[Mapping[str, Any]], config: ServeConfig) -> tuple[list[dict[str, Any]], bool]:
    """Function schemas as chat templates take them; and whether one of them asks to be kept to strictly.

    Raises:
        ApiError: one of them is no function.
    """
    if len(tools) > config.max_tools:
        raise invalid("tools", f"Got {len(tools)} tools but expected {config.max_tools} at most", "array_too_long")
    ready, strict = [], False
    for at, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function":
            raise invalid(
                f"tools[{at}].type",
                f"Got tools[{at}] of type {tool.get('type')!r} but expected 'function': the server has none of its own",
                "unsupported_parameter",
            )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise invalid(f"tools[{at}].function", f"Got tools[{at}]={tool!r} but expected a function with a name")
        strict |= function.get("strict") is True
        ready.append({"type": "function", "function": {k: v for k, v in function.items() if k != "strict"}})
    return ready, strict


def checked_choice(given: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]) -> str:
    """Which tools an answer may call: "auto", "none", "required" or the name of one of `tools`.

    Raises:
        ApiError: it is none of these.
    """
    choice = "auto" if given is None else tool_choice_of(given)
    names = [tool["function"]["name"] for tool in tools]
    known = ("auto", "none", *(("required", *names) if names else ()))
    if not isinstance(choice, str) or choice not in known:
        raise invalid("tool_choice", f"Got tool_choice={given!r} but expected one of {', '.join(known)}")
    return choice
