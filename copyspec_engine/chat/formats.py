"""How a model's chat template writes tool calls and reasoning: what to parse in an answer, what to ask of a grammar.

A tokenizer that ships a response template of its own is read with that. For the others there is a registry of the known
families, told apart by what their chat templates write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal, cast

from pydantic import JsonValue

from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.grammar import CallLayout, Grammar, ToolCalls
from copyspec_engine.values.options import Options

__all__ = ["FORMATS", "REASONING_FIELDS", "ChatFormat", "Part", "find_chat_format"]

REASONING_FIELDS = ("thinking", "reasoning", "reasoning_content")
"""Names that response templates give to reasoning."""
Part = Literal["system", "tools", "calls", "results"]
"""A part of a conversation that a chat template may not know."""


class ChatFormat(Options):
    """How an assistant's message is written in a chat template."""

    name: str
    marks: tuple[str, ...] = ()
    """What every chat template of the family holds."""
    assistant: tuple[str, ...]
    """What an assistant's message begins behind; text behind the last of it in a prompt is part of the answer."""
    calls: CallLayout | None = None
    """How tool calls are written; None: nobody knows, or `parts` says how to read them."""
    reasoning: tuple[str, str] | None = ("<think>", "</think>")
    """What opens and closes reasoning; None: there is none, or `parts` says how to read it."""
    text_begin: str = ""
    """What is written between reasoning and text."""
    space_before_text: bool = False
    """The template writes a space before an answer's text, which is no part of it."""
    parts: dict[str, JsonValue] | None = None
    """The fields of an answer in transformers' form, where `calls` and `reasoning` do not say enough."""
    own_template: dict[str, JsonValue] | None = None
    """The tokenizer's own response template, in transformers' form."""
    arguments: Literal["object", "json"] = "object"
    """In which form the template takes the arguments of earlier calls: as an object, or written as JSON."""
    short_ids: bool = False
    """The template takes ids of nine letters and digits only."""
    reasoning_key: str = "reasoning_content"
    """Under which key of a message the template looks for reasoning."""
    prelude: str = ""
    """Jinja that is put before a template which does not know `tools`, calls or reasoning, and writes them for it."""
    unwritten: frozenset[Part] = frozenset()
    """What this model's template leaves out or refuses; it goes into the texts of messages instead."""
    takes_tools: bool = True
    """The model is told of tools, by its template or in a message."""
    is_chat: bool = True
    """There is a chat template."""

    @property
    def tool_calling(self) -> Literal["by template", "by prompt"] | None:
        """How the model is told of tools; None: it is not."""
        if not self.takes_tools:
            return None
        return "by prompt" if "tools" in self.unwritten else "by template"

    @property
    def reasons(self) -> bool:
        """Answers may have reasoning."""
        return any(name in self.response_template()["fields"] for name in REASONING_FIELDS)

    def marks_parts_with(self, token: str) -> bool:
        """A token of this name tells a part of an answer from others, or stands in one."""
        template = self.response_template()
        fields = template["fields"].values()
        # Where all text is in a part with marks, what begins an answer may also stand between two of them.
        spec = template if all("open" in field or "open_pattern" in field for field in fields) else template["fields"]
        calls = None if self.calls is None else self.calls.model_dump()
        written = json.dumps([spec, calls, self.reasoning, self.text_begin], ensure_ascii=False)
        return token in written.replace("\\", "")  # those of patterns and of JSON

    def response_template(self, names: Collection[str] = ()) -> dict[str, Any]:
        """What transformers' `ResponseParser` needs. But for a tokenizer's own template, it parses no part further.

        Args:
            names: of the functions that may be called; without a marker only these tell a call from other JSON.
        """
        if self.own_template is not None:
            return cast("dict[str, Any]", self.own_template)
        fields: dict[str, Any] = dict(self.parts or {"content": {"content": "text"}})
        if self.reasoning is not None:
            begin, end = self.reasoning
            fields["thinking"] = {"open": begin, "close": end, "content": "text"}
        if self.calls is not None and self.parts is None:
            fields |= _call_fields(self.calls, names)
        return {"start_anchor": list(self.assistant), "fields": fields}

    def grammar(self, tools: tuple[dict[str, JsonValue], ...], tool_choice: str, *, parallel: bool = True) -> Grammar:
        """A grammar under which an answer calls `tools` in this format.

        Args:
            tools: OpenAI-style function schemas.
            tool_choice: "auto", "required" or a function's name.
            parallel: more than one call in an answer, where the format has room for it.

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


def _call_fields(layout: CallLayout, names: Collection[str]) -> dict[str, Any]:
    """Where the calls of an answer are, and what ends all of them, as fields of a response template.

    A mark opens one only where something follows it that may be one: texts speak of such marks too.
    """
    calls: dict[str, Any] = {"repeats": True, "content": "text"}
    follows = _NAME_FOLLOWS if layout.style == "named" else _OBJECT_FOLLOWS
    if layout.begin:
        before = rf"(?:{re.escape(layout.before)}\s{{0,64}})?" if layout.before else ""
        calls["open_pattern"] = before + re.escape(layout.begin) + follows
    else:
        known = "|".join(map(re.escape, names)) or "(?!)"
        name = rf'"{re.escape(layout.name_key)}"\s*:\s*"(?:{known})"'
        bare = rf'(?=\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?{name})'
        calls["open_pattern"] = rf"\A\s{{0,64}}(?:<\|python_tag\|>{follows}|{bare})"
    if layout.end:
        calls["close"] = layout.end
    if not layout.after:
        return {"tool_calls": calls}
    behind_calls = rf"(?<={re.escape(layout.end)}\s{{0,64}}){re.escape(layout.after)}"
    return {"tool_calls": calls, "calls_end": {"open_pattern": behind_calls, "close_pattern": "", "content": "text"}}


_OBJECT_FOLLOWS = r'(?=\s{0,64}(?:\[\s{0,64})?\{\s{0,64}")'
_NAME_FOLLOWS = r"(?=\s{0,64}[\w.\-/]{1,128}\s{0,64}[^\w\s.\-/])"


def _calls_in_text(call: str, *, begin: str = "", end: str = "", between: str = "", head: str = "") -> str:
    """Jinja that writes calls and reasoning into the messages' texts.

    Args:
        call: one call, of the variable `call`, in Jinja.
        begin: before all of them.
        end: behind all of them.
        between: between two.
        head: Jinja of what precedes the message's text.
    """
    calls = f"{begin}{{%- for call in message.tool_calls -%}}{call}{{%- if not loop.last -%}}{between}{{%- endif -%}}"
    return (
        "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
        f"{{%- set text -%}}{head}{{{{- message.content -}}}}{{%- if message.tool_calls -%}}{calls}"
        f"{{%- endfor -%}}{end}{{%- endif -%}}{{%- endset -%}}"
        "{%- set ns.messages = ns.messages + [dict(message, content=text)] -%}"
        "{%- endfor -%}{%- set messages = ns.messages -%}"
    )


_CALL_OBJECT = "{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}"

_SMOLLM3 = ("{%- if tools and xml_tools is not defined -%}{%- set xml_tools = tools -%}{%- endif -%}") + _calls_in_text(
    "{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<tool_call>\\n' -}}" + _CALL_OBJECT + "{{- '\\n</tool_call>' -}}",
    head=(
        "{%- if message.role == 'assistant' and message.reasoning_content -%}"
        "{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n' -}}{%- endif -%}"
    ),
)

_PHI = (
    "{%- if tools -%}{%- set known = namespace(tools=[]) -%}"
    "{%- for tool in tools -%}{%- set known.tools = known.tools + [tool.function] -%}{%- endfor -%}"
    "{%- if messages[0].role != 'system' -%}{%- set messages = [{'role': 'system', 'content': ''}] + messages -%}"
    "{%- endif -%}{%- set messages = [dict(messages[0], tools=known.tools | tojson)] + messages[1:] -%}{%- endif -%}"
    + _calls_in_text(
        _CALL_OBJECT, begin="{{- '<|tool_call|>[' -}}", end="{{- ']<|/tool_call|>' -}}", between="{{- ', ' -}}"
    ).replace("dict(message, ", "dict(message, role='tool_response' if message.role == 'tool' else message.role, ")
)

_HARMONY: dict[str, JsonValue] = {
    "thinking": {"open": "<|channel|>analysis<|message|>", "close": ["<|end|>", "<|return|>"]},
    "preamble": {"open": "<|channel|>commentary<|message|>", "close": ["<|end|>", "<|return|>"]},
    "content": {"open": "<|channel|>final<|message|>", "close": ["<|return|>", "<|end|>"]},
    "tool_calls": {
        "open_pattern": r"(?:<\|channel\|>(?:commentary|analysis))? to=functions\.",
        "close": ["<|call|>", "<|end|>", "<|return|>"],
        "repeats": True,
    },
}

_CHATML = ("<|im_start|>assistant",)
_MISTRAL = ("[/INST]", "[/TOOL_RESULTS]")
_DEEPSEEK = ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>")
_LLAMA = ("<|start_header_id|>assistant<|end_header_id|>\n\n",)
_DEEPSEEK_CALLS = CallLayout(
    style="named",
    before="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    name_ends=("\n```json\n",),
    arguments_end="\n```",
    end="<｜tool▁call▁end｜>",
    after="<｜tool▁calls▁end｜>",
)
_MISTRAL_CALLS = CallLayout(style="named", begin="[TOOL_CALLS]", name_ends=("[ARGS]",), end="", between="")

FORMATS: tuple[ChatFormat, ...] = (
    ChatFormat(
        name="gpt-oss",
        marks=("<|channel|>", "<|message|>"),
        assistant=("<|start|>assistant",),
        calls=CallLayout(
            style="named",
            begin=" to=functions.",
            name_ends=("<|channel|>commentary json<|message|>", " <|constrain|>json<|message|>"),
            end="",
            repeats=False,
        ),
        parts=_HARMONY,
        text_begin="<|channel|>final<|message|>",
        reasoning=None,
        reasoning_key="thinking",
    ),
    ChatFormat(
        name="deepseek",
        marks=("<｜tool▁sep｜>", "```json"),
        assistant=_DEEPSEEK,
        calls=_DEEPSEEK_CALLS,
        arguments="json",
    ),
    ChatFormat(
        name="deepseek-v3.1",
        marks=("<｜tool▁sep｜>",),
        assistant=_DEEPSEEK,
        calls=_DEEPSEEK_CALLS.model_copy(
            update={
                "begin": "<｜tool▁call▁begin｜>",
                "name_ends": ("<｜tool▁sep｜>",),
                "arguments_end": "",
                "between": "",
            }
        ),
        arguments="json",
    ),
    ChatFormat(
        name="gemma4",
        marks=("<|tool_call>call:",),
        assistant=("<|turn>model\n", "<tool_response|>"),
        calls=CallLayout(
            style="named", begin="<|tool_call>call:", end="<tool_call|>", string_quote='<|"|>', between=""
        ),
        reasoning=("<|channel>thought\n", "<channel|>"),
    ),
    ChatFormat(
        name="functiongemma",
        marks=("<start_function_call>",),
        assistant=("<start_of_turn>model\n", "<end_function_response>"),
        calls=CallLayout(
            style="named",
            begin="<start_function_call>call:",
            end="<end_function_call>",
            string_quote="<escape>",
            between="",
        ),
        reasoning=None,
    ),
    ChatFormat(
        name="phi4",
        marks=("<|tool|>",),
        assistant=("<|assistant|>",),
        calls=CallLayout(style="array", begin="<|tool_call|>", end="<|/tool_call|>"),
        prelude=_PHI,
    ),
    ChatFormat(
        name="mistral-v11",
        marks=("[ARGS]", "[CALL_ID]"),
        assistant=_MISTRAL,
        calls=_MISTRAL_CALLS.model_copy(update={"id_begin": "[CALL_ID]"}),
        reasoning=("[THINK]", "[/THINK]"),
        short_ids=True,
    ),
    ChatFormat(
        name="mistral-v13",
        marks=("[ARGS]",),
        assistant=_MISTRAL,
        calls=_MISTRAL_CALLS,
        reasoning=("[THINK]", "[/THINK]"),
        short_ids=True,
    ),
    ChatFormat(
        name="mistral",
        marks=("[TOOL_CALLS]",),
        assistant=_MISTRAL,
        calls=CallLayout(style="array", begin="[TOOL_CALLS]", end=""),
        space_before_text=True,
        reasoning=("[THINK]", "[/THINK]"),
        short_ids=True,
    ),
    ChatFormat(
        name="qwen3-coder",
        marks=("<tool_call>", "<function="),
        assistant=_CHATML,
        parts={
            "content": {},
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
                },
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    ),
    ChatFormat(name="smollm3", marks=("xml_tools",), assistant=_CHATML, calls=CallLayout(), prelude=_SMOLLM3),
    ChatFormat(name="hermes", marks=("<tool_call>",), assistant=_CHATML, calls=CallLayout()),
    ChatFormat(
        name="llama3",
        marks=("<|start_header_id|>", '"parameters"'),
        assistant=_LLAMA,
        calls=CallLayout(begin="", end="", between="; ", arguments_key="parameters", repeats=False),
    ),
    ChatFormat(name="llama3-text", marks=("<|start_header_id|>",), assistant=_LLAMA),
    ChatFormat(
        name="smollm2",
        marks=("named SmolLM",),
        assistant=_CHATML,
        calls=CallLayout(style="array"),
    ),
    ChatFormat(name="gemma", marks=("<start_of_turn>",), assistant=("<start_of_turn>model\n",)),
)
"""The known families, the most telling marks first."""

_PLAIN = ChatFormat(name="plain", assistant=_CHATML)


def find_chat_format(chat_template: str | None, response_template: dict[str, Any] | None = None) -> ChatFormat:
    """The format of a chat template, by what it writes; one without tool calls if none is known.

    Args:
        chat_template: Jinja source.
        response_template: the tokenizer's own, if it ships one.
    """
    known = (fmt for fmt in FORMATS if chat_template is not None and all(mark in chat_template for mark in fmt.marks))
    found = next(known, _PLAIN)
    if found.reasoning is not None:
        marks, written = (*found.reasoning, found.reasoning_key), found.prelude + (chat_template or "")
        if not any(mark.strip() in written for mark in marks):  # of a model that does not reason they are text
            found = found.model_copy(update={"reasoning": None})
    return found if response_template is None else found.model_copy(update={"own_template": response_template})
