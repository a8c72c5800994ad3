"""From messages to a prompt's text: a chat template, the form of messages that it reads, and what it leaves out.

Messages come in one form; each family's own goes into its template. What a template leaves out is written into the
texts of messages instead: tools, their calls and results, system messages. Calls are then written as the model's family
does where that is known, else as Hermes models do: JSON between `<tool_call>` and `</tool_call>`, results between
`<tool_response>` and `</tool_response>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from copyspec_engine.chat.formats import ChatFormat, Part, find_chat_format
from copyspec_engine.chat.template_sandbox import TemplateLimitError, compile_template, render_template
from copyspec_engine.values.errors import ConfigError, UnsupportedModelError, about
from copyspec_engine.values.grammar import CallLayout

__all__ = [
    "ChatTemplate",
    "describe_template",
    "for_template",
    "given_template",
    "needs_prompt",
    "system_in_users",
    "written_in_texts",
]


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
            raise ConfigError(
                f"Got messages[{position}] with role={message.get('role')!r} but expected a text",
                f"messages[{position}].role",
            )
        if "content" in message:
            ready["content"] = _text(message["content"], position)
        if message.get("tool_calls"):
            ready["tool_calls"] = _calls(message["tool_calls"], position, chat_format)
            ready["content"] = ready.get("content") or ""
            names |= {call["id"]: call["function"]["name"] for call in ready["tool_calls"] if "id" in call}
        if message.get("tool_call_id") is not None:
            if not isinstance(message["tool_call_id"], str | int):
                raise ConfigError(
                    f"Got messages[{position}] with tool_call_id={message['tool_call_id']!r} but expected a text",
                    f"messages[{position}].tool_call_id",
                )
            ready["tool_call_id"] = _id(message["tool_call_id"], chat_format)
            if message.get("name") is None and ready["tool_call_id"] in names:
                ready["name"] = names[ready["tool_call_id"]]
        reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
        if reasoning is not None:
            ready |= dict.fromkeys(("reasoning_content", chat_format.reasoning_key), reasoning)
        prepared.append(ready)
    one_by_one = chat_format.calls is not None and not chat_format.calls.repeats
    return _apart(prepared) if one_by_one else prepared


def _text(content: object, position: int) -> str | None:
    """The content of the message at this position as one text.

    Raises:
        ConfigError: it is neither a text nor a list of parts that are texts.
        UnsupportedModelError: a part is an image or the like: a template would write a placeholder for it, and the
            model answer as if it had seen it.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ConfigError(
            f"Got messages[{position}] with content={content!r} but expected a text, or a list of text parts",
            f"messages[{position}].content",
        )
    return "".join(_part(part, f"messages[{position}].content[{place}]") for place, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if isinstance(part, dict) and isinstance(kind, str):
        if kind in _MEDIA:
            raise UnsupportedModelError(f"Got a message with a part of type {kind!r} but only text can be read")
        if isinstance(part.get("text"), str):
            return str(part["text"])
    raise ConfigError(f'Got {where}={part!r} but expected a text part: {{"type": "text", "text": ...}}', where)


def _calls(calls: object, position: int, chat_format: ChatFormat) -> list[dict[str, Any]]:
    where = f"messages[{position}]"
    with about(f"{where}.tool_calls"):
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
        function["arguments"] = _as_object(arguments)
    ready = {"type": "function", "function": function}
    return ready if call.get("id") is None else {"id": _id(call["id"], chat_format), **ready}


def _as_object(arguments: object) -> object:
    """Arguments as an object; those of a malformed call stay as they were written."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
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


def given_template(given: str) -> str:
    """The Jinja text that the option `chat_template` means: itself, or what is in the file of this path.

    Raises:
        ConfigError: it is neither.
    """
    if "{{" in given or "{%" in given:
        return given
    path = Path(os.path.expanduser(given))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no file, a name that cannot be one, not UTF-8
        raise ConfigError(
            f"Got chat_template={given[:200]!r} but expected Jinja text or the path of a file with it: {error}"
        ) from error


class ChatTemplate:
    """A template ready to be rendered, in any thread.

    Args:
        source: Jinja.
        variables: what it may read besides a call's own values: the names of special tokens.

    Raises:
        ConfigError: it is not Jinja, or wants too much at once.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._variables = {"documents": None, **variables}
        try:
            self._template = compile_template(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"Got a chat template that is not Jinja: line {error.lineno}: {error.message}. Mend it, or give "
                "another as chat_template="
            ) from error
        except Exception as error:  # it is nested too deeply for Jinja or Python, say
            raise ConfigError(
                f"Got a chat template that cannot be used: {type(error).__name__}: {error}. Give another as "
                "chat_template="
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        size: int,
    ) -> str:
        """The text of a conversation up to where the answer begins.

        Args:
            messages: with plain JSON values; keys whose value is None are left out.
            tools: OpenAI-style function schemas.
            options: more variables.
            size: of all of them, in characters.

        Raises:
            ConfigError: it takes too much time or memory.
            Exception: whatever the template raises.
        """
        shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
        own = {"messages": shown, "tools": list(tools) if tools else None, "add_generation_prompt": True}
        try:
            return render_template(self._template, {**self._variables, **options, **own}, size)
        except (TemplateLimitError, MemoryError) as error:
            raise ConfigError(
                f"The chat template was stopped: {error}. Shorten the messages, or give another as chat_template="
            ) from error


# ---- what a template leaves out --------------------------------------------------------------------------------------

_ASK = {"role": "user", "content": "probe-question"}
_RULE = {"role": "system", "content": "probe-rule"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "probe0000",
            "type": "function",
            "function": {"name": "probe_function", "arguments": {"probe_key": "probe-value"}},
        }
    ],
}
_RESULT = {"role": "tool", "name": "probe_function", "tool_call_id": "probe0000", "content": "probe-result"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A probe."}},
            "required": ["probe_key"],
        },
    },
}
_SIZE = 1000


def describe_template(
    source: str | None,
    variables: Mapping[str, Any],
    *,
    response_template: dict[str, Any] | None = None,
    tool_prompt: bool = True,
) -> ChatFormat:
    """How a template writes calls and reasoning, and what it leaves out, found by rendering it.

    Args:
        source: Jinja; None: there is no template.
        variables: as for `ChatTemplate`.
        response_template: the tokenizer's own, if it ships one.
        tool_prompt: what it leaves out of tools is written into messages.

    Raises:
        ConfigError: it is not Jinja.
    """
    found = find_chat_format(source, response_template)
    if source is None:
        return found.model_copy(update={"is_chat": False, "takes_tools": False})
    unwritten = _unwritten(ChatTemplate(found.prelude + source, variables), found)
    if "calls" in unwritten and found.calls is None:  # nobody knows how it wants them to be written
        unwritten |= {"tools"}
    if unwritten >= {"tools", "calls"}:  # then all that is said of tools has one form
        unwritten |= {"results"}
    found = found.model_copy(update={"unwritten": unwritten})
    if "tools" not in unwritten:
        return found
    if not tool_prompt:
        return found.model_copy(update={"takes_tools": False})
    is_known = found.calls is not None and not found.calls.string_quote
    return found if is_known else found.model_copy(update={"calls": CallLayout(), "parts": None, "own_template": None})


def _unwritten(template: ChatTemplate, chat_format: ChatFormat) -> frozenset[Part]:
    """The parts of a conversation that a template does not write."""

    def shows(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *texts: str) -> bool:
        try:
            written = template.render(for_template(messages, chat_format), tools, {}, _SIZE)
        except Exception:  # whatever it raises, it does not write them
            return False
        return all(text in written for text in texts)

    if not shows([_ASK], None):
        return frozenset()  # nothing can be said of a template that does not even take a question
    called = ("probe_function", "probe-value")
    tests: dict[Part, bool] = {
        "system": shows([_RULE, _ASK], None, "probe-rule", "probe-question"),
        "tools": shows([_ASK], [_TOOL], "probe_function"),
        "calls": shows([_ASK, _CALL], None, *called) or shows([_ASK, _CALL, _RESULT], [_TOOL], *called[1:]),
        "results": shows([_ASK, _CALL, _RESULT], None, "probe-result")
        or shows([_ASK, _CALL, _RESULT], [_TOOL], "probe-result"),
    }
    return frozenset(part for part, is_written in tests.items() if not is_written)


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
        messages = [_calls_written(message, layout) for message in messages]
    if "results" in unwritten:
        messages = _results_written(messages)
    if left and "tools" in unwritten:
        messages, left = _system_written(messages, _tool_prompt(left, layout, results="results" in unwritten)), None
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


def _calls_written(message: dict[str, Any], layout: CallLayout) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call["function"] for call in calls]
    if layout.style == "array":
        objects = ", ".join(_written_object(function, layout) for function in functions)
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
        written = f"{layout.begin}[{_written_object(function, layout)}]{layout.end}"
    else:
        space = "\n" if layout.begin else ""
        written = layout.begin + space + _written_object(function, layout) + space + layout.end
    return layout.before + written + layout.after if alone else written


def _written_object(function: dict[str, Any], layout: CallLayout) -> str:
    arguments = _json(function.get("arguments"))
    return f'{{"{layout.name_key}": {_json(function.get("name"))}, "{layout.arguments_key}": {arguments}}}'


def _json(value: object) -> str:
    return json.dumps({} if value is None else value, ensure_ascii=False)


def _results_written(messages: Messages) -> Messages:
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


def _system_written(messages: Messages, text: str) -> Messages:
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
