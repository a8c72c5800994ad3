"""A chat's next message: what is asked of the engine for it, and the message that its chunks make."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.adapters.tools import answer_grammar
from copyspec_engine.engine.engine import Engine
from copyspec_engine.serve.conversations import Caller, salt_of
from copyspec_engine.serve.sampling import seeded
from copyspec_engine.serve.service import Service
from copyspec_engine.values.config import GenerationRequest, SamplingParams
from copyspec_engine.values.grammar import Grammar
from copyspec_engine.values.outputs import GenerationOutput, ReplyDelta, StreamChunk, TokenLogprob

__all__ = [
    "ChatAnswer",
    "ChatQuestion",
    "Effort",
    "json_grammar",
    "reasoning_template",
    "told_logprobs",
    "usage_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatQuestion:
    """What a call asks, in the engine's terms, whatever form it came in."""

    messages: Sequence[dict[str, Any]]
    sampling: SamplingParams
    tools: Sequence[dict[str, Any]] | None = None
    """Function schemas that the prompt tells of; None: of none."""
    tool_choice: str = "auto"
    """"auto", "required" or the name of a function."""
    parallel: bool = True
    """Several calls in one answer."""
    strict: bool | None = None
    """Calls fit their schemas in every detail; None: as far as grammars can express it, False: as the model likes."""
    answer: Grammar | None = None
    """The form of an answer that calls nothing."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template reads."""
    named: str | None = None
    """The conversation, as the client names it."""
    partition: str | None = None
    """See `Caller.talk`."""
    cache_key: str | None = None
    """By which calls share KV, as the client says it."""
    n: int = 1
    """Answers."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Options of `GenerationRequest` that are as the call says them."""

    def asked(self, service: Service, caller: Caller, call_id: str) -> tuple[list[GenerationRequest], list[Talk]]:
        """The requests for the engine, one for each answer, and the conversations that they belong to.

        Raises:
            ConfigError: a value is out of range, or a form cannot be had of this model.
            CopySpecError: it has a form, and the extra "grammar" is not installed.
        """
        grammar = answer_grammar(
            service.engine,
            self.tools,
            self.tool_choice,
            self.answer,
            parallel=self.parallel,
            strict=self.strict,
        )
        salt = salt_of(caller.tenant, self.cache_key)
        if self.n > 1 and salt is None:
            salt = secrets.token_hex(16)  # the choices of this call share their prompt, with nobody else
        shown = {"tools": self.tools, "template": dict(self.template)}
        requests, talks = [], []
        for number in range(self.n):
            talk = caller.talk(self.named, self.messages, partition=self.partition, shown=shown)
            requests.append(
                GenerationRequest(
                    messages=self.messages,
                    tools=self.tools,
                    grammar=grammar,
                    chat_template_kwargs=dict(self.template),
                    sampling=seeded(self.sampling, number),
                    parse_reply=True,
                    cache_salt=salt,
                    request_id=f"{call_id}-{number}",
                    **{"timeout_s": service.config.timeout_s, **self.others},
                    **talk.request_options(),
                )
            )
            talks.append(talk)
        return requests, talks


_COMPACT = {"whitespace_flexible": False}
"""White space between the parts of JSON would have no end with small models."""


def json_grammar(schema: Mapping[str, Any] | None = None, *, strict: bool = False) -> Grammar:
    """The form of an answer that is JSON.

    Args:
        schema: that it fits; None: any object.
        strict: refuse what cannot be expressed of the schema, rather than leave it out.
    """
    if schema is None:
        return Grammar(json_schema={"type": "object", "x-guidance": _COMPACT})
    return Grammar(json_schema={"x-guidance": _COMPACT, **schema}, closed=True, lenient=not strict)


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def reasoning_template(effort: Effort | None) -> dict[str, Any]:
    """What chat templates read of how much to reason; "none" switches it off where a template can."""
    if effort is None:
        return {}
    return {"enable_thinking": False} if effort == "none" else {"enable_thinking": True, "reasoning_effort": effort}


class ChatAnswer:
    """One answer as the message of a chat, made of the chunks in which it comes.

    A whole answer and a streamed one are the same deltas.

    Args:
        talk: the conversation that goes on with it.
    """

    def __init__(self, talk: Talk) -> None:
        self.text = self.reasoning = ""
        self.calls: dict[int, dict[str, str]] = {}
        """The calls' "id", "name" and "arguments", by their indices."""
        self.output: GenerationOutput | None = None
        self._talk = talk

    def take(self, chunk: StreamChunk) -> list[ReplyDelta]:
        """What a chunk adds to the message; nothing of it is empty but the arguments of a call that begins."""
        deltas = [delta for delta in chunk.deltas if delta.text or delta.kind == "tool_call"]
        for delta in deltas:
            self._add(delta)
        if chunk.output is not None:
            self.output = chunk.output
            last = list(self._rest(chunk.output))
            for delta in last:
                self._add(delta)
            deltas += last
            if chunk.output.finish_reason != "cancelled":
                self._talk.answered(self.message())
        return deltas

    @property
    def finish_reason(self) -> str:
        """Why the answer ended, in OpenAI's terms."""
        assert self.output is not None, "the answer is not over"
        if self.output.finish_reason != "stop":
            return "length"
        return "tool_calls" if self.calls else "stop"

    def message(self) -> dict[str, Any]:
        """The message so far, in OpenAI's form."""
        calls = [self.calls[index] for index in sorted(self.calls)]
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls
            ]
        return message

    def _add(self, delta: ReplyDelta) -> None:
        if delta.kind == "text":
            self.text += delta.text
        elif delta.kind == "reasoning":
            self.reasoning += delta.text
        else:
            call = self.calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"], call["name"] = call["id"] or delta.id or "", call["name"] or delta.name or ""
            call["arguments"] += delta.text

    def _rest(self, output: GenerationOutput) -> Iterable[ReplyDelta]:
        """What no delta has said: calls without arguments, and what was written for calls without a name."""
        assert output.reply is not None, "every request asks for the parts"
        told = {call["id"] for call in self.calls.values()}
        index = 1 + max(self.calls, default=-1)
        for call in output.reply.tool_calls:
            if call.id not in told:
                yield ReplyDelta("tool_call", json.dumps(call.arguments, ensure_ascii=False), index, call.id, call.name)
                index += 1
        for invalid in output.reply.invalid_tool_calls:
            if invalid.id in told:
                continue
            if invalid.name is None:
                yield ReplyDelta("text", invalid.arguments)
            else:
                yield ReplyDelta("tool_call", invalid.arguments, index, invalid.id, invalid.name)
                index += 1


def told_logprobs(engine: Engine, chunk: StreamChunk) -> Sequence[TokenLogprob]:
    """The log-probabilities of a chunk's tokens, without that of the one which has ended the answer."""
    told = chunk.logprobs or ()
    is_end = chunk.output is not None and chunk.output.finish_reason == "stop" and bool(told)
    return told[:-1] if is_end and not engine.decode([told[-1].token_id]) else told


def usage_of(outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """The counts of a call's answers, which share a prompt, in OpenAI's form."""
    prompt, cached = outputs[0].usage.prompt_tokens, outputs[0].usage.cached_tokens
    written = sum(output.usage.completion_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            name: sum(getattr(output.usage, name) for output in outputs)
            for name in ("reasoning_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
        },
    }
