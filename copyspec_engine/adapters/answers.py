"""What answers say of how they came about, as plain values for a framework's metadata, and what is wrong with some."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields, replace
from typing import Any

from copyspec_engine.adapters.model import AdapterOptions
from copyspec_engine.adapters.remote import AnyEngine
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.outputs import (
    CopiedSpan,
    Explanation,
    GenerationOutput,
    InvalidToolCall,
    Reply,
    Segment,
    TokenLogprob,
)

__all__ = [
    "answer_metadata",
    "call_error",
    "cut_off",
    "explain_metadata",
    "is_whole_json",
    "logprobs_metadata",
    "segment_metadata",
    "tool_metadata",
    "without_conversation",
]


def answer_metadata(output: GenerationOutput, options: AdapterOptions) -> dict[str, Any]:
    """How an answer came about, as plain values for a framework's response metadata; small, unless options say so."""
    stats = output.draft_stats
    return {
        **_sources(output, is_whole=options.include_explanation),
        "num_forward_passes": stats.num_forward_passes,
        "num_prefill_passes": stats.num_prefill_passes,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_accepted_tokens": stats.num_accepted_tokens,
        "tokens_per_forward": round(output.tokens_per_forward, 3),
        "copied_share": round(output.copied_share, 3),
        **({"token_ids": list(output.token_ids)} if options.include_token_ids else {}),
        "queue_s": round(output.timing.queue_s, 6),
        "ttft_s": round(output.timing.ttft_s, 6),
        "total_s": round(output.timing.total_s, 6),
    }


def _sources(output: GenerationOutput, *, is_whole: bool) -> dict[str, Any]:
    """Where it was copied from: the fields of each span, in order, without those at the end that say nothing."""
    if output.explanation is None:
        return {}
    reply = output.reply or Reply(output.text)
    if is_whole:
        told = output.explanation
    else:
        reasoned = output.text.find(reply.reasoning) + len(reply.reasoning)  # what was written before the text
        told = output.explanation.of_part(reply.text, reasoned)
    written = {} if reply.text == told.text else {"written": told.text}
    spans = told.spans if is_whole else (replace(span, before="", after="") for span in told.spans)
    return {**written, "copies": list(map(_row, spans))}


def without_conversation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `answer_metadata` of an answer that is handed to somebody else, out of a cache say: no id, no quotes."""
    kept = {name: value for name, value in metadata.items() if name != "session_id"}
    places = len(fields(CopiedSpan)) - 2
    return {**kept, "copies": [row[:places] for row in kept["copies"]]} if "copies" in kept else kept


def _row(span: CopiedSpan) -> list[Any]:
    row = list(astuple(span))
    while row[-1] in (None, ""):
        row.pop()
    return row


def tool_metadata(engine: AnyEngine, request: GenerationRequest) -> dict[str, Any]:
    """{"tool_calling": "by template" or "by prompt"}: how the model was told of tools, if the request has any."""
    return {"tool_calling": engine.chat_format.tool_calling} if request.tools else {}


def explain_metadata(metadata: Any, text: str) -> Explanation:  # noqa: ANN401 - it comes from anywhere
    """Where an answer was copied from, by the `answer_metadata` that came with it.

    Args:
        metadata: those values, after a round trip through JSON or pickle too.
        text: what the framework has of the answer.

    Raises:
        ConfigError: these are no such values, or not of this text.
    """
    if not isinstance(metadata, Mapping) or "copies" not in metadata:
        raise ConfigError("Got an answer that does not say where it came from but expected a whole one of copyspec's")
    try:
        spans = tuple(CopiedSpan(*row) for row in metadata["copies"])
    except TypeError as error:
        raise ConfigError(f"Got copies={metadata['copies']!r} but expected those of an answer: {error}") from None
    explanation = Explanation(metadata.get("written", text), spans)
    if spans and spans[-1].stop > len(explanation.text):
        raise ConfigError(
            f"Got an answer of {len(explanation.text)} characters with copies up to {spans[-1].stop}: its text was "
            "changed since it was written"
        )
    return explanation


_REMEDIES = {
    "length": "raise max_tokens, or shorten the prompt where the context is full",
    "timeout": "raise timeout",
    "cancelled": "ask again",
}


def cut_off(finish_reason: str | None, num_tokens: int, expected: str) -> str | None:
    """What is wrong with an answer that did not come to its end, and what to do; None: it did.

    Args:
        finish_reason: of the answer.
        num_tokens: that it has.
        expected: what it should have been.
    """
    if finish_reason not in _REMEDIES:
        return None
    return (
        f"Got an answer that was cut off after {num_tokens} tokens (finish_reason={finish_reason!r}) but expected "
        f"{expected}: {_REMEDIES[finish_reason]}"
    )


def call_error(call: InvalidToolCall, output: GenerationOutput) -> str:
    """Why a call of an answer cannot be carried out: what is malformed was perhaps just cut off."""
    reason = cut_off(output.finish_reason, output.usage.completion_tokens, "a whole call") if call.is_open else None
    return f"{reason} ({call.error})" if reason else call.error


def is_whole_json(text: str) -> bool:
    """Whether a text that may have been cut off is a whole JSON value: of a number nobody can tell."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, bool) or not isinstance(value, int | float)


def segment_metadata(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """Pieces of a text, whether each was copied and, if it was drafted, from where, as plain values."""
    return [
        {"text": segment.text, "copied": segment.copied} | ({"source": segment.source} if segment.source else {})
        for segment in segments
    ]


def logprobs_metadata(engine: AnyEngine, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities in OpenAI's form: {"content": [{"token", "bytes", "logprob", "top_logprobs"}, ...]}."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = engine.decode([token_id], skip_special_tokens=False)
        # A token that is part of a character has no text of its own.
        return {"token": token, "bytes": None if "\ufffd" in token else list(token.encode()), "logprob": logprob}

    return {
        "content": [
            {**entry(found.token_id, found.logprob), "top_logprobs": [entry(*pair) for pair in found.top]}
            for found in logprobs
        ]
    }
