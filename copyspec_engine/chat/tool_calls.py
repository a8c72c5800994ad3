"""Tool calls read while they are written: each character is looked at once, however long the calls are.

What is between an answer's markers comes in pieces of any size. Names and arguments are told on as soon as they are
known; whether a call can be carried out is decided at its end.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from typing import Any

from copyspec_engine.values.grammar import CallLayout
from copyspec_engine.values.outputs import InvalidToolCall, ReplyDelta, ToolCall

__all__ = ["CallsReader", "PartialCall"]

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9
"""Some chat templates (Mistral's) take ids of exactly nine letters and digits."""
_MAX_HEAD = 400
"""Characters in which a name must have come to its arguments."""
_IN_STRING, _PLAIN, _SCALAR = re.compile(r'[^"\\]*'), re.compile(r'[^"{}\[\]]*'), re.compile(r"[^,}\]\s]*")
_NAME = re.compile(r"\s*([\w.\-/]+)")
_BETWEEN = " \t\r\n,;[]"
"""What may stand between the objects of calls."""
_BEHIND = " \t\r\n;`"
"""What may stand behind the arguments of a named call."""
_ARGUMENT_KEYS = ("arguments", "parameters")
"""Models take one for the other."""


class PartialCall:
    """One call as far as it is written.

    Args:
        index: which of the answer's calls it is.
        layout: how it is written; None: it comes as a whole.
    """

    def __init__(self, index: int, layout: CallLayout | None = None) -> None:
        self.index = index
        self.id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
        self.name: str | None = None
        self.raw: list[str] = []
        """All that was written of it."""
        self.error: str | None = None
        self._layout = layout
        self._arguments: list[str] = []
        self._parsed: Any = None
        self.is_told = False
        """Its name was told: from then on it is a call, whatever comes."""

    def named(self, name: object, call_id: str | None = None) -> list[ReplyDelta]:
        """The name is known."""
        if not isinstance(name, str) or self.is_told:
            return []
        self.name, self.id, self.is_told = name, call_id or self.id, True
        return [ReplyDelta("tool_call", "".join(self._arguments), self.index, self.id, name)]

    def argue(self, text: str) -> list[ReplyDelta]:
        """More of the arguments, as JSON."""
        self._arguments.append(text)
        return [ReplyDelta("tool_call", text, self.index)] if self.is_told and text else []

    def end(self) -> list[ReplyDelta]:
        """It is written wholly; without arguments it has none."""
        return [] if self._arguments else self.argue("{}")

    def result(self) -> ToolCall | InvalidToolCall:
        raw = "".join(self.raw).strip()
        try:
            arguments = self._checked(raw)
        except ValueError as error:  # json's, which are told apart from ours by their class
            kind = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
            return InvalidToolCall(self.id, self.name, raw, f"{kind}{error}")
        except RecursionError:
            return InvalidToolCall(self.id, self.name, raw, "not JSON: nested too deeply")
        assert self.name is not None
        return ToolCall(self.id, self.name, arguments)

    def _checked(self, raw: str) -> dict[str, Any]:
        """The arguments; ValueError if they cannot be used."""
        if self.error is not None:
            raise ValueError(self.error)
        if self._layout is not None and self._layout.style != "named":
            written = json.loads(raw)
            if not isinstance(written, dict) or not isinstance(written.get(self._layout.name_key), str):
                raise ValueError(f"no {self._layout.name_key!r} in the call")
        elif self.name is None:
            raise ValueError("no name in the call")
        arguments = json.loads("".join(self._arguments) or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("the arguments are no JSON object")
        return arguments


class CallsReader:
    """Reads what stands between the markers of one call, or of several.

    Args:
        layout: how calls are written.
        calls: the answer's calls so far; new ones are added.
    """

    def __init__(self, layout: CallLayout, calls: list[PartialCall]) -> None:
        self._layout, self._calls, self._first = layout, calls, len(calls)
        self._held = ""
        """A short text that is not understood yet."""
        self._skipped = ""
        """What came before a call, or behind one."""
        self._value = _Value()
        self._key: object = None
        self._token: list[str] = []
        self._is_named = layout.style == "named"
        self._state: Callable[[str], tuple[str, list[ReplyDelta]]] = self._head if self._is_named else self._between

    @property
    def num_held(self) -> int:
        """Characters that are read and in no call yet."""
        return len(self._held) + len(self._skipped)

    def feed(self, text: str) -> list[ReplyDelta]:
        """What more text adds to the calls, or, where it is none, to the answer's text."""
        deltas: list[ReplyDelta] = []
        while text:
            text, added = self._state(text)
            deltas += added
        return deltas

    def close(self) -> bool:
        """Nothing more comes: a call that was not ended stays as it is. False if none has a name: then it was none."""
        held, self._held = self._held, ""
        if not any(call.is_told for call in self._calls[self._first :]):
            del self._calls[self._first :]
            return False
        if held:
            call = self._open()
            call.raw.append(held)
            name = _NAME.match(held) if self._is_named else None
            call.name = name and name[1]
            call.error = "not JSON: no arguments" if self._is_named else None
        return True

    def _open(self) -> PartialCall:
        self._calls.append(PartialCall(len(self._calls), self._layout))
        return self._calls[-1]

    # ---- states: each takes text and gives back what it leaves of it ---------------------------------------------

    def _between(self, text: str) -> tuple[str, list[ReplyDelta]]:
        """Before a call, or behind one."""
        text = self._held + text
        rest = text.lstrip(_BEHIND if self._is_named else _BETWEEN)
        self._skipped += text[: len(text) - len(rest)]
        self._held = ""
        begin = self._layout.begin
        if begin and rest and (rest.startswith(begin) or begin.startswith(rest)):
            if len(rest) < len(begin):
                self._held = rest
                return "", []
            self._skipped = ""
            self._state = self._head if self._is_named else self._between
            return rest[len(begin) :], []
        if not rest:
            return "", []
        if rest[0] == "{" and not self._is_named:
            self._open().raw.append("{")
            self._skipped = ""
            self._state = self._before_key
            return rest[1:], []
        self._state = self._as_text if len(self._calls) > self._first and not self._layout.end else self._stray
        return rest, []

    def _head(self, text: str) -> tuple[str, list[ReplyDelta]]:
        """A name and what stands between it and the arguments."""
        self._held += text
        brace = self._held.find("{")
        if brace < 0 and len(self._held) < _MAX_HEAD:
            return "", []
        held, self._held = self._held, ""
        head, rest = held[: max(brace, 0)], held[max(brace, 0) :]
        name = _NAME.match(head)
        call = self._open()
        call.raw.append(head)
        if name is None or brace < 0:
            self._state = self._stray
            return rest, []
        call_id = re.search(re.escape(self._layout.id_begin) + r"(\w+)", head) if self._layout.id_begin else None
        quote = self._layout.string_quote
        self._state, self._value = self._arguments, _BareValue(quote) if quote else _Value()
        return rest, call.named(name[1], call_id and call_id[1])

    def _arguments(self, text: str) -> tuple[str, list[ReplyDelta]]:
        """The arguments of a named call."""
        end, ended = self._value.feed(text)
        self._calls[-1].raw.append(text[:end])
        if ended:
            self._state = self._between
        return text[end:], self._calls[-1].argue(self._value.written(text[:end]))

    def _before_key(self, text: str) -> tuple[str, list[ReplyDelta]]:
        """In a call's object, before a key or its end."""
        call, rest = self._calls[-1], text.lstrip(" \t\r\n,")
        call.raw.append(text[: len(text) - len(rest)])
        if rest.startswith("}"):
            call.raw.append("}")
            self._state = self._between
            return rest[1:], call.end()
        if rest:
            self._state, self._value, self._token = self._in_key if rest[0] == '"' else self._stray, _Value(), []
        return rest, []

    def _in_key(self, text: str) -> tuple[str, list[ReplyDelta]]:
        rest, ended = self._take(text)
        if ended:
            self._key, self._state = self._taken(), self._before_value
        return rest, []

    def _before_value(self, text: str) -> tuple[str, list[ReplyDelta]]:
        rest = text.lstrip(" \t\r\n:")
        self._calls[-1].raw.append(text[: len(text) - len(rest)])
        if rest:
            self._state, self._value, self._token = self._in_value, _Value(), []
        return rest, []

    def _in_value(self, text: str) -> tuple[str, list[ReplyDelta]]:
        call = self._calls[-1]
        rest, ended = self._take(text)
        is_arguments = self._key in (self._layout.arguments_key, *_ARGUMENT_KEYS)
        deltas = call.argue(text[: len(text) - len(rest)]) if is_arguments else []
        if ended:
            self._state = self._before_key
            if self._key == self._layout.name_key:
                deltas += call.named(self._taken())
        return rest, deltas

    def _stray(self, text: str) -> tuple[str, list[ReplyDelta]]:
        """What cannot be understood: together with it the last call is an invalid one."""
        call = self._calls[-1] if len(self._calls) > self._first else self._open()
        call.raw.append(self._skipped + text)
        self._skipped = ""
        if self._is_named:
            call.error = "not JSON: no arguments in braces, or more text behind them"
        return "", []

    def _as_text(self, text: str) -> tuple[str, list[ReplyDelta]]:
        """Behind calls that nothing closes: it is none."""
        return "", [ReplyDelta("text", text)]

    def _take(self, text: str) -> tuple[str, bool]:
        """Take what belongs to the value that is being read: what is left, and whether the value has ended."""
        end, ended = self._value.feed(text)
        self._calls[-1].raw.append(text[:end])
        if self._key != self._layout.arguments_key or self._state == self._in_key:
            self._token.append(text[:end])
        return text[end:], ended

    def _taken(self) -> object:
        """The value that was read, None if it is no JSON."""
        try:
            return json.loads("".join(self._token))
        except (ValueError, RecursionError):
            return None


class _Value:
    """Finds where a JSON value that comes in pieces ends; its first character is not white space."""

    def __init__(self) -> None:
        self._depth = 0
        self._begun = self._is_scalar = self._in_string = self._escaped = False

    def feed(self, text: str) -> tuple[int, bool]:
        """How much of a text belongs to the value, and whether it has ended there."""
        at = 0
        if not self._begun and text:
            self._begun, self._is_scalar = True, text[0] not in '"{['
        if self._is_scalar:
            match = _SCALAR.match(text)
            assert match is not None
            return match.end(), match.end() < len(text)
        while at < len(text):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            match = (_IN_STRING if self._in_string else _PLAIN).match(text, at)
            assert match is not None
            at = match.end() + 1
            if at <= len(text) and self._ends(text[at - 1]):
                return at, True
        return len(text), False

    def written(self, text: str) -> str:
        """A text that belongs to the value, as JSON."""
        return text

    def _ends(self, letter: str) -> bool:
        """Take a quote, a bracket or a backslash; whether the value ends with it."""
        if letter == "\\":
            self._escaped = True
            return False
        if letter == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if letter in "{[" else -1
        return not self._in_string and self._depth <= 0


class _BareValue(_Value):
    """Finds the end of a value whose keys stand bare, and its strings between two of one quote; writes it as JSON."""

    def __init__(self, quote: str) -> None:
        super().__init__()
        self._quote = quote
        self._held = ""
        """The beginning of a quote, perhaps."""
        self._word = ""
        self._json: list[str] = []

    def feed(self, text: str) -> tuple[int, bool]:
        before, text = len(self._held), self._held + text
        at, self._held = 0, ""
        while at < len(text):
            if self._in_string:
                at = self._read_string(text, at)
            elif text.startswith(self._quote, at):
                self._json.append('"')
                self._in_string, at = True, at + len(self._quote)
            elif self._quote.startswith(text[at : at + len(self._quote)]):
                self._held, at = text[at:], len(text)
            else:
                at += 1
                if self._ends(text[at - 1]):
                    return at - before, True
        return len(text) - before, False

    def written(self, text: str) -> str:  # noqa: ARG002 - it was read by `feed`
        written, self._json = "".join(self._json), []
        return written

    def _read_string(self, text: str, at: int) -> int:
        end = text.find(self._quote, at)
        if end < 0:
            held = next((n for n in range(len(self._quote) - 1, 0, -1) if text[at:].endswith(self._quote[:n])), 0)
            end = len(text) - held
            self._held = text[end:]
            self._json.append(json.dumps(text[at:end], ensure_ascii=False)[1:-1])
            return len(text)
        self._json.append(json.dumps(text[at:end], ensure_ascii=False)[1:])
        self._in_string = False
        return end + len(self._quote)

    def _ends(self, letter: str) -> bool:
        if letter not in "{}[],:":
            self._word += letter
            return False
        word, self._word = self._word.strip(), ""
        is_json = letter != ":" and re.fullmatch(r"true|false|null|-?\d+(\.\d+)?([eE][+-]?\d+)?", word)
        if word:
            self._json.append(word if is_json else json.dumps(word, ensure_ascii=False))
        self._json.append(letter)
        self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        return letter in "}]" and self._depth <= 0
