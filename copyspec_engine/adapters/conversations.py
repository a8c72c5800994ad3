"""Which conversation a call belongs to: the one that is named, else the one whose whole talk the call shows.

Several people may talk through one model object, so a call that names no conversation must not meet what others have
said. It goes on from the call whose messages and answer its own messages begin with; any other stands alone. What a
call leaves is the KV and the spelling of exactly that talk, never a text (see `GenerationRequest.keep_texts`), and it
stays as it is: everyone who shows the talk goes on from the same, whatever others have made of it, and cannot tell
whether there are any.

Whoever shows the whole talk is taken for one who took part in it. Where even the fact that somebody had the same talk
must stay unknown, name conversations.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from copyspec_engine.values.errors import ConfigError

__all__ = ["ConversationFinder", "Talk", "conversation", "current_conversation", "first_named"]

_MAX_STATES = 1024
_NORMALISED = ("content", "reasoning_content", "tool_calls", "tool_call_id", "name")

_conversation: ContextVar[str | None] = ContextVar("copyspec_conversation", default=None)


@contextmanager
def conversation(session_id: str) -> Iterator[None]:
    """Calls inside the `with` block belong to this conversation, in threads and tasks that take over the context too.

    What a call itself says of its conversation goes first.

    Raises:
        ConfigError: the id is no text or empty.
    """
    if not isinstance(session_id, str) or not session_id:
        raise ConfigError(f"Got session_id={session_id!r} but expected a text of at least one character")
    token = _conversation.set(session_id)
    try:
        yield
    finally:
        _conversation.reset(token)


def current_conversation() -> str | None:
    """The conversation of the innermost `with conversation(...)`; None outside of one."""
    return _conversation.get()


def first_named(*named: str | None) -> str | None:
    """The conversation of a call: the first that is named by what may name it, in order of precedence.

    That is the call itself, then its framework and the code around it in the integration's order, then its model. Where
    none of them does, what the call shows may (see `ConversationFinder.begin`).
    """
    return next((session_id for session_id in named if session_id is not None), None)


class ConversationFinder:
    """The conversations of one model object that can be found by what was said. Thread-safe.

    A copy, pickled or not, knows none of them.

    Args:
        max_states: of them; the one that was not used for longest is not found any more when there are more.
        prefix: what the ids of their sessions begin with.
    """

    def __init__(self, max_states: int = _MAX_STATES, prefix: str = "found-") -> None:
        self._max_states, self._prefix, self._secret = max_states, prefix, secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, str] = OrderedDict()
        """The session of the call that was answered last with all that was said so far, hashed, least recently used
        first."""

    def __reduce__(self) -> tuple[type[ConversationFinder], tuple[int, str]]:
        return type(self), (self._max_states, self._prefix)

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(
        self, named: str | None, messages: Sequence[Mapping[str, Any]] | None, shown: Mapping[str, Any] | None = None
    ) -> Talk:
        """The conversation of a call.

        Args:
            named: the id that the call or what is around it names; None: nothing does.
            messages: all that the call shows, as chat-template dicts; None: a raw prompt, which stands alone.
            shown: what else the prompt is made of (tools, say) and must be the same to go on with a conversation.
        """
        if named is not None or messages is None:
            return Talk({"session_id": named}, named)
        states = self._states_of(messages, shown)
        with self._lock:
            known = next((state.hash for state in reversed(states) if state.hash in self._sessions), None)
            found = None if known is None else self._sessions[known]
            if known is not None:
                self._sessions.move_to_end(known)
        # Nobody else has this id, and nobody is told it: what a call adds is only for those who show it.
        session_id = f"{self._prefix}{secrets.token_hex(16)}"
        options = {"session_id": session_id, "continues": found, "keep_texts": False}
        return Talk(options, None, lambda answer: self._keep(session_id, states[-1], answer))

    def _keep(self, session_id: str, state: _State, answer: Mapping[str, Any]) -> None:
        """A call has been answered: whoever shows its messages and the answer goes on from its session."""
        bare = {name: value for name, value in answer.items() if name != "reasoning_content"}
        with self._lock:
            for message in (answer, bare):
                said = self._next(state, message).hash
                self._sessions[said] = session_id
                self._sessions.move_to_end(said)
            while len(self._sessions) > self._max_states:
                self._sessions.popitem(last=False)

    def _states_of(self, messages: Sequence[Mapping[str, Any]], shown: Mapping[str, Any] | None) -> list[_State]:
        """What has been said after each message."""
        states = [_State(self._hash(b"", _plain(shown or {})), {})]
        for message in messages:
            states.append(self._next(states[-1], message))
        return states

    def _next(self, state: _State, message: Mapping[str, Any]) -> _State:
        call_ids = dict(state.call_ids)
        return _State(self._hash(state.hash, _said(message, call_ids)), call_ids)

    def _hash(self, before: bytes, said: str) -> bytes:
        content = before + said.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, key=self._secret, digest_size=24).digest()


class _State:
    """All that was said up to some message."""

    def __init__(self, hashed: bytes, call_ids: dict[str, int]) -> None:
        self.hash = hashed
        self.call_ids = call_ids
        """The tool calls so far by their ids, numbered: frameworks give ids of their own."""


class Talk:
    """A call's conversation.

    Args:
        options: of the `GenerationRequest`, which put it there.
        named: its id, if it was named; that of any other is nobody's to know.
        keep: takes the whole answer, by which the conversation is found again.
    """

    def __init__(
        self, options: Mapping[str, Any], named: str | None, keep: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.named = named
        self._options, self._keep = options, keep

    def request_options(self) -> dict[str, Any]:
        """The options of a `GenerationRequest` that put it into this conversation."""
        return dict(self._options)

    def answered(self, message: Mapping[str, Any]) -> None:
        """The call's whole answer, as the chat-template dict that a next call would show.

        A call without one, because it failed or nobody waited for its end, is not continued.
        """
        if self._keep is not None:
            self._keep(message)


def _said(message: Mapping[str, Any], call_ids: dict[str, int]) -> str:
    """What a message says, the same for all forms in which frameworks give it back; notes its calls in `call_ids`."""
    others = {name: value for name, value in message.items() if value and name not in _NORMALISED}
    said = {
        "content": _text(message.get("content")),
        "reasoning_content": str(message.get("reasoning_content") or "").strip(),
        "tool_calls": _calls(message.get("tool_calls") or (), call_ids),
        "tool_call_id": call_ids.get(str(message.get("tool_call_id"))),
        # Agents name who answered, and results are named by their calls.
        "name": None if message.get("role") in ("assistant", "tool") else message.get("name"),
    }
    return _plain({**others, **said})


def _text(content: Any) -> Any:  # noqa: ANN401 - whatever a template takes
    """Texts in parts as one, without the white space around it."""
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if all(isinstance(text, str | None) for text in texts):
        return "".join(text or "" for text in texts).strip()
    return content


def _calls(calls: Any, call_ids: dict[str, int]) -> list[Any]:  # noqa: ANN401 - whatever a caller shows
    """What calls say; what is none, which the engine will refuse, as it is."""
    parts = calls if isinstance(calls, list | tuple) else [calls]
    return [_call(call, call_ids) if isinstance(call, Mapping) else call for call in parts]


def _call(call: Mapping[str, Any], call_ids: dict[str, int]) -> object:
    call_ids.setdefault(str(call.get("id")), len(call_ids))
    function = call.get("function") or {}
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return [function.get("name"), _plain(arguments)]
    with suppress(ValueError, RecursionError):  # what is no JSON, or nested without end, is compared as it was written
        arguments = _plain(json.loads(arguments))
    return [function.get("name"), arguments]


def _plain(value: Any) -> str:  # noqa: ANN401 - anything
    return json.dumps(value, sort_keys=True, default=repr)
