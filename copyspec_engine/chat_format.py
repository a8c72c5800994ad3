"""How a model's chat template writes tool calls and reasoning: what to parse in an answer, what to ask of a grammar.

A tokenizer that ships a response template of its own is read with that. For the others there is a registry of the known
families, told apart by what their chat templates write.
"""

from __future__ import annotations

from typing import Any, cast

from pydantic import JsonValue

from copyspec_engine.errors import ConfigError
from copyspec_engine.grammar_options import CallLayout, Grammar, ToolCalls
from copyspec_engine.options import Options

__all__ = ["FORMATS", "ChatFormat", "find_chat_format"]


class ChatFormat(Options):
    """How an assistant's message is written in a chat template."""

    name: str
    assistant: str
    """What the last assistant message of a prompt begins with; text behind it is part of the answer."""
    calls: CallLayout | None = None
    """How tool calls are written; None: nobody knows."""
    reasoning: tuple[str, str] | None = ("<think>", "</think>")
    """What opens and closes reasoning; None: there is none."""
    own_template: dict[str, JsonValue] | None = None
    """The tokenizer's own response template, in transformers' form."""

    def response_template(self) -> dict[str, Any]:
        """What transformers' `ResponseParser` needs: the parts of an answer, none of them parsed further."""
        if self.own_template is not None:
            return cast("dict[str, Any]", self.own_template)
        fields: dict[str, Any] = {"content": {"content": "text"}}
        if self.reasoning is not None:
            begin, end = self.reasoning
            fields["thinking"] = {"open": begin, "close": end, "content": "text"}
        if self.calls is not None:
            fields["tool_calls"] = {"open": self.calls.begin, "repeats": True, "content": "text"}
            if self.calls.end:
                fields["tool_calls"]["close"] = self.calls.end
        return {"start_anchor": self.assistant, "fields": fields}

    def grammar(self, tools: tuple[dict[str, JsonValue], ...], tool_choice: str, *, parallel: bool = True) -> Grammar:
        """A grammar under which an answer calls `tools` in this format.

        Args:
            tools: OpenAI-style function schemas.
            tool_choice: "auto", "required" or a function's name.
            parallel: more than one call in an answer.

        Raises:
            ConfigError: the tools are not function schemas, or the format is not known.
        """
        if self.calls is None:
            raise ConfigError(
                f"Got tool_choice={tool_choice!r} but how this model writes tool calls is not known: leave the choice "
                "to the model, or use one with a known chat template"
            )
        layout = self.calls.model_dump()
        return Grammar(tools=ToolCalls(tools=tools, tool_choice=tool_choice, parallel=parallel, **layout))


FORMATS: tuple[tuple[str, ChatFormat], ...] = (
    ("<tool_call>", ChatFormat(name="hermes", assistant="<|im_start|>assistant", calls=CallLayout())),
)
"""(what a chat template of the family holds, its format), the most telling first."""

_PLAIN = ChatFormat(name="plain", assistant="<|im_start|>assistant")


def find_chat_format(chat_template: str | None, response_template: dict[str, Any] | None = None) -> ChatFormat:
    """The format of a chat template, by what it writes; one without tool calls if none is known.

    Args:
        chat_template: Jinja source.
        response_template: the tokenizer's own, if it ships one.
    """
    known = (fmt for mark, fmt in FORMATS if chat_template is not None and mark in chat_template)
    found = next(known, _PLAIN)
    return found if response_template is None else found.model_copy(update={"own_template": response_template})
