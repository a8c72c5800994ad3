"""A model's chat template: where its text comes from, how it is rendered, what it leaves out of a conversation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from copyspec_engine.chat.formats import ChatFormat, Part, find_chat_format
from copyspec_engine.chat.messages import for_template
from copyspec_engine.chat.template_sandbox import TemplateLimitError, compile_template, render_template
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.grammar import CallLayout

__all__ = ["ChatTemplate", "describe_template", "given_template"]


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
