"""What a chat template leaves out, written into the texts of messages: tools, their calls and results, system messages.

Calls are written as the model's family does where that is known, else as Hermes models do: JSON between `<tool_call>`
and `</tool_call>`, results between `<tool_response>` and `</tool_response>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.values.grammar import CallLayout

__all__ = ["needs_prompt", "system_in_users", "written_in_texts"]

Messages = list[dict[str, Any]]


def needs_prompt(messages: Messages, tools: Sequence[dict[str, Any]] | None, chat_format: ChatFormat) -> str | None:
    """What of tools would be left out ("tools", say), if anything."""
    given = {
        "tools": bool(tools),
        "calls": any(message.get("tool_calls") for message in messages),
        "results": any(message.get("role") == "tool" for message in messages),
    }
    return next((part for part, is_given in given.items() if is_given and part in chat_format.unwritten), None)


def written_in_texts(
    messages: Messages, tools: Sequence[dict[str, Any]] | None, chat_format: ChatFormat
) -> tuple[Messages, list[dict[str, Any]] | None]:
    """Messages and tools for the template, after what it leaves out has gone into the messages' texts.

    Args:
        messages: as `for_template` gives them; they are not changed.
        tools: OpenAI-style function schemas.
        chat_format: says what the template leaves out.
    """
    unwritten, layout = chat_format.unwritten, chat_format.calls
    if layout is None or layout.string_quote:
        layout = CallLayout()
    left = list(tools) if tools else None
    if "calls" in unwritten:
        messages = [_with_calls(message, layout) for message in messages]
    if "results" in unwritten:
        messages = _with_results(messages)
    if left and "tools" in unwritten:
        messages, left = _with_system(messages, _tool_prompt(left, layout, results="results" in unwritten)), None
    if "system" in unwritten:
        messages = system_in_users(messages)
    return messages, left


def _tool_prompt(tools: Sequence[dict[str, Any]], layout: CallLayout, *, results: bool) -> str:
    """What a system message says of tools, and of their results where these are written by us."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = {"name": "<function name>", "arguments": {"<argument>": "<value>"}}
    shown = "What a function returned is shown between <tool_response> and </tool_response>. " if results else ""
    each = "several of them" if layout.repeats else "only one of them"
    return (
        "You have functions at hand. Here are their signatures, as JSON, one on each line:\n"
        f"<tools>\n{signatures}\n</tools>\n\n"
        "Where a function helps with what the user asks, call it. A call names the function and gives its arguments, "
        f"and looks exactly like this; an answer may hold {each}:\n"
        f"{_written(example, layout, alone=True)}\n\n{shown}"
        "Where no function helps, answer in plain words."
    )


def _with_calls(message: dict[str, Any], layout: CallLayout) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call["function"] for call in calls]
    if layout.style == "array":
        objects = ", ".join(_object(function, layout) for function in functions)
        written = f"{layout.begin}[{objects}]{layout.end}"
    else:
        written = layout.between.join(_written(function, layout) for function in functions)
    written = layout.before + written + layout.after
    text = message.get("content") or ""
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": f"{text}\n{written}" if text else written}


def _written(function: dict[str, Any], layout: CallLayout, *, alone: bool = False) -> str:
    """One call; `alone` with what stands around all calls of an answer."""
    if layout.style == "named":
        arguments = _json(function.get("arguments"))
        head = layout.begin + str(function.get("name")) + layout.name_ends[0]
        written = head + arguments + layout.arguments_end + layout.end
    elif layout.style == "array":
        written = f"{layout.begin}[{_object(function, layout)}]{layout.end}"
    else:
        space = "\n" if layout.begin else ""
        written = layout.begin + space + _object(function, layout) + space + layout.end
    return layout.before + written + layout.after if alone else written


def _object(function: dict[str, Any], layout: CallLayout) -> str:
    arguments = _json(function.get("arguments"))
    return f'{{"{layout.name_key}": {_json(function.get("name"))}, "{layout.arguments_key}": {arguments}}}'


def _json(value: object) -> str:
    return json.dumps({} if value is None else value, ensure_ascii=False)


def _with_results(messages: Messages) -> Messages:
    """Results as messages of the user, those of one answer together."""
    written: Messages = []
    is_open = False
    for message in messages:
        if message.get("role") != "tool":
            written.append(message)
            is_open = False
            continue
        result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
        if is_open:
            written[-1]["content"] += f"\n{result}"
        else:
            written.append({"role": "user", "content": result})
        is_open = True
    return written


def _with_system(messages: Messages, text: str) -> Messages:
    """Messages of which the first is a system message that ends with a text."""
    if messages and messages[0].get("role") == "system":
        first = messages[0]
        said = f"{first['content']}\n\n{text}" if first.get("content") else text
        return [{**first, "content": said}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def system_in_users(messages: Messages) -> Messages:
    """System messages put in front of the user's message behind them, where none follows as one of the user's own."""
    written: Messages = []
    held: list[str] = []
    for message in messages:
        if message.get("role") == "system":
            held += [message["content"]] if message.get("content") else []
        elif held and message.get("role") == "user":
            written.append({**message, "content": "\n\n".join([*held, message.get("content") or ""])})
            held = []
        elif held and written:  # in the middle: what is said before an answer must stay before it
            written += [{"role": "user", "content": "\n\n".join(held)}, message]
            held = []
        else:
            written.append(message)
    return [*written, {"role": "user", "content": "\n\n".join(held)}] if held else written
