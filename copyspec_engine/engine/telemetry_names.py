"""What OpenTelemetry is told by which names: attributes of a call's span, instruments, and texts where they are wanted.

The names are those of OpenTelemetry's semantic conventions for generative AI, version 0.1.0, with "copyspec." before
what they do not know; the figures are those of `GenerationOutput` and `EngineMetrics`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from copyspec_engine.values.config import GenerationRequest, SamplingParams
from copyspec_engine.values.outputs import GenerationOutput

__all__ = [
    "ANSWERED",
    "ASKED",
    "COUNTERS",
    "DURATIONS",
    "GAUGES",
    "MEASURES",
    "SECONDS",
    "attributes_told",
    "by_source",
    "contents",
    "encodable",
    "instruments_told",
]

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4**power for power in range(14))
_PER_FORWARD = (1, 1.5, 2, 3, 5, 8, 12, 20, 40, 80, 160)
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)

GAUGES = {
    "running": ("Requests that are decoded.", "num_running"),
    "waiting": ("Requests that wait.", "num_waiting"),
    "sessions": ("Conversations that are remembered.", "num_sessions"),
}
"""What is so now: what it means, and where `EngineMetrics` has it."""
COUNTERS = {
    "prompt_tokens": ("Tokens of prompts.", "prompt_tokens"),
    "cached_tokens": ("Of these, those whose KV was reused.", "cached_tokens"),
    "completion_tokens": ("Tokens of answers.", "completion_tokens"),
    "draft_tokens": ("Tokens that were drafted.", "draft_tokens"),
    "forward_passes": ("Forward passes of the model, of however many requests.", "num_steps"),
    "draft_model_passes": ("Forward passes of the draft model.", "draft_model_passes"),
    "preemptions": ("Requests that gave way to others.", "num_preemptions"),
}
"""As `GAUGES`, of what is counted since the engine was made."""


# ---- attributes of a call's span -----------------------------------------------------------------------------------


ASKED: dict[str, tuple[str, Callable[[SamplingParams], Any]]] = {
    "gen_ai.request.max_tokens": ("Most tokens of the answer.", lambda params: params.max_tokens),
    "gen_ai.request.temperature": ("0 is greedy.", lambda params: params.temperature),
    "gen_ai.request.top_p": ("As in force for the call.", lambda params: params.top_p),
    "gen_ai.request.top_k": ("If there is one.", lambda params: params.top_k),
    "gen_ai.request.frequency_penalty": ("As in force.", lambda params: params.frequency_penalty),
    "gen_ai.request.presence_penalty": ("As in force.", lambda params: params.presence_penalty),
    "gen_ai.request.stop_sequences": ("Texts that end the answer, if any.", lambda params: params.stop or None),
    "gen_ai.request.seed": ("If one was given.", lambda params: params.seed),
}
"""What was asked: what it says, and its value, of which None is left out."""

ANSWERED: dict[str, tuple[str, Callable[[GenerationOutput], Any]]] = {
    "gen_ai.response.id": ("The call's `request_id`.", lambda output: output.request_id),
    "gen_ai.response.finish_reasons": (
        "One of stop, length, cancelled, timeout; error, where the call failed.",
        lambda output: (output.finish_reason,),
    ),
    "gen_ai.usage.input_tokens": ("Tokens of the prompt.", lambda output: output.usage.prompt_tokens),
    "gen_ai.usage.output_tokens": ("Tokens of the answer.", lambda output: output.usage.completion_tokens),
    "gen_ai.usage.cache_read.input_tokens": (
        "Of the prompt, those whose KV was reused.",
        lambda output: output.usage.cached_tokens,
    ),
    "gen_ai.usage.reasoning.output_tokens": (
        "Of the answer, those of its reasoning.",
        lambda output: output.usage.reasoning_tokens or None,
    ),
    "copyspec.copied_share": ("Share of the answer's tokens that were copied.", lambda output: output.copied_share),
    "copyspec.tokens_per_forward": ("1.0 for plain decoding.", lambda output: output.tokens_per_forward),
    "copyspec.forward_passes": (
        "Passes that gave the answer its tokens.",
        lambda output: output.draft_stats.num_forward_passes,
    ),
    "copyspec.prefill_passes": (
        "Passes that only read of the prompt.",
        lambda output: output.draft_stats.num_prefill_passes,
    ),
    "copyspec.draft_tokens": ("Tokens that were drafted.", lambda output: output.draft_stats.num_draft_tokens),
    "copyspec.accepted_tokens": (
        "Of these, those that the answer has; also by where they came from, as `copyspec.accepted_tokens.prompt`.",
        lambda output: output.draft_stats.num_accepted_tokens,
    ),
    "copyspec.queue_s": ("Seconds until the first pass began.", lambda output: output.timing.queue_s),
    "copyspec.ttft_s": ("Seconds until the first token.", lambda output: output.timing.ttft_s),
}
"""What came of it, in the same form."""

_BEGUN = {
    "gen_ai.operation.name": "chat, or text_completion for a raw prompt.",
    "gen_ai.provider.name": "Always copyspec.",
    "gen_ai.request.model": "The model, a folder by its last name.",
    "gen_ai.response.model": "The same, of a call that was answered.",
    "gen_ai.conversation.id": "The conversation, if the call names one.",
    "gen_ai.output.type": "json, where a grammar asks for it.",
}
_CONTENTS = {
    "error.type": "timeout, or the name of the error's class. Its text is told where contents are.",
    "gen_ai.input.messages": "What was asked, as JSON, where contents are told.",
    "gen_ai.output.messages": "The answer, as JSON, where contents are told.",
}


def attributes_told() -> dict[str, str]:
    """Every attribute of a call's span, and what it says."""
    told = {name: text for name, (text, _) in (*ASKED.items(), *ANSWERED.items())}
    return {**_BEGUN, **told, **_CONTENTS}


# ---- instruments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measure:
    """An instrument, and what a call that was answered adds to it."""

    kind: Literal["histogram", "counter"]
    name: str
    unit: str
    text: str
    value: Callable[[GenerationOutput], float]
    boundaries: Sequence[float] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    """More than the model's."""


def _prompt_tokens(output: GenerationOutput) -> int:
    return output.usage.prompt_tokens


def _completion_tokens(output: GenerationOutput) -> int:
    return output.usage.completion_tokens


def _cached_tokens(output: GenerationOutput) -> int:
    return output.usage.cached_tokens


def _reasoning_tokens(output: GenerationOutput) -> int:
    return output.usage.reasoning_tokens


def _ttft_s(output: GenerationOutput) -> float:
    return output.timing.ttft_s


def _queue_s(output: GenerationOutput) -> float:
    return output.timing.queue_s


def _s_per_token(output: GenerationOutput) -> float:
    return (output.timing.total_s - output.timing.ttft_s) / max(output.usage.completion_tokens - 1, 1)


DURATIONS = {
    "gen_ai.client.inference.duration": "Seconds from a call to its end; of failed calls too, with `error.type`.",
    "gen_ai.client.operation.duration": "The same, by the name that it had before.",
    "gen_ai.server.request.duration": "The same, as a server's.",
}
"""What calls take, answered or not."""
_USED = "gen_ai.client.inference.usage"
_OF_ONE = "gen_ai.client.inference.operation"
_BEFORE = "gen_ai.client.token.usage"
_BEFORE_TEXT = "Tokens of prompts and of answers, by the name that their histogram had before."
_TEXT = {"gen_ai.token.modality": "text"}
_IN, _OUT = {"gen_ai.token.type": "input"}, {"gen_ai.token.type": "output"}
MEASURES = (
    _Measure("counter", f"{_USED}.input_tokens", "{token}", "Tokens of prompts.", _prompt_tokens, None, _TEXT),
    _Measure("counter", f"{_USED}.output_tokens", "{token}", "Tokens of answers.", _completion_tokens, None, _TEXT),
    _Measure(
        "counter",
        f"{_USED}.cache_read.input_tokens",
        "{token}",
        "Tokens of prompts whose KV was reused.",
        _cached_tokens,
        None,
        _TEXT,
    ),
    _Measure(
        "counter",
        f"{_USED}.reasoning.output_tokens",
        "{token}",
        "Tokens of answers that are reasoning.",
        _reasoning_tokens,
        None,
        _TEXT,
    ),
    _Measure("histogram", f"{_OF_ONE}.input_tokens", "{token}", "Tokens of a prompt.", _prompt_tokens, _TOKENS),
    _Measure("histogram", f"{_OF_ONE}.output_tokens", "{token}", "Tokens of an answer.", _completion_tokens, _TOKENS),
    _Measure("histogram", _BEFORE, "{token}", _BEFORE_TEXT, _prompt_tokens, _TOKENS, _IN),
    _Measure("histogram", _BEFORE, "{token}", _BEFORE_TEXT, _completion_tokens, _TOKENS, _OUT),
    _Measure(
        "histogram",
        "gen_ai.server.time_to_first_token",
        "s",
        "Seconds from a call to the first token of its answer.",
        _ttft_s,
        _FIRST_TOKEN,
    ),
    _Measure(
        "histogram",
        "gen_ai.server.time_per_output_token",
        "s",
        "Seconds for each token of an answer behind the first.",
        _s_per_token,
        _PER_TOKEN,
    ),
    _Measure(
        "histogram",
        "copyspec.queue.duration",
        "s",
        "Seconds from a call to its first forward pass.",
        _queue_s,
        _FIRST_TOKEN,
    ),
    _Measure(
        "histogram",
        "copyspec.tokens_per_forward",
        "1",
        "Tokens per forward pass of an answer.",
        lambda output: output.tokens_per_forward,
        _PER_FORWARD,
    ),
    _Measure(
        "histogram",
        "copyspec.copied_share",
        "1",
        "Share of an answer's tokens that were copied.",
        lambda output: output.copied_share,
        _SHARES,
    ),
)
"""What an answer adds."""


def instruments_told() -> dict[str, tuple[str, str]]:
    """Every instrument: its kind, and what it tells."""
    told = {name: ("histogram", text) for name, text in DURATIONS.items()}
    told |= {measure.name: (measure.kind, measure.text) for measure in MEASURES}
    told |= {f"copyspec.{name}": ("gauge", text) for name, (text, _) in GAUGES.items()}
    told |= {"copyspec.kv_slots": ("gauge", "KV slots, one for each token, by state.")}
    told |= {f"copyspec.{name}": ("counter", text) for name, (text, _) in COUNTERS.items()}
    return told | {
        "copyspec.accepted_tokens": ("counter", "Accepted draft tokens by source."),
        "copyspec.finished": ("counter", "Answers by the reason of their end."),
    }


def by_source(output: GenerationOutput) -> dict[str, int]:
    """Attributes that say how many accepted draft tokens came from where."""
    counts: Counter[str] = Counter()
    for copy in output.copies:
        counts[copy.source] += copy.stop - copy.start
    return {f"copyspec.accepted_tokens.{source}": count for source, count in counts.items()}


# ---- texts ---------------------------------------------------------------------------------------------------------


def encodable(value: Any) -> Any:  # noqa: ANN401 - of an attribute
    """A value as exporters can send it: half a surrogate pair, which is no text of UTF-8, becomes "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return tuple(map(encodable, value)) if isinstance(value, tuple) else value


def contents(request: GenerationRequest, output: GenerationOutput | None) -> dict[str, str]:
    """What was said, in the conventions' form, as JSON; of a call that was refused, which may be anything, what can."""
    asked: Sequence[Any] = request.messages or ()
    if request.prompt is not None:
        asked = [{"role": "user", "content": request.prompt}]
    told: dict[str, Any] = {}
    if asked:
        said = (message if isinstance(message, Mapping) else {"content": message} for message in asked)
        told["gen_ai.input.messages"] = [{"role": message.get("role"), "parts": _parts(message)} for message in said]
    if output is not None:
        reply = output.reply
        calls = () if reply is None else reply.tool_calls
        written = {
            "content": output.text if reply is None else reply.text,
            "reasoning_content": "" if reply is None else reply.reasoning,
            "tool_calls": [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ],
        }
        answer = {"role": "assistant", "parts": _parts(written), "finish_reason": output.finish_reason}
        told["gen_ai.output.messages"] = [answer]
    return {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in told.items()}


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if message.get("role") == "tool":
        return [{"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}]
    parts: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        parts.append({"type": "reasoning", "content": message["reasoning_content"]})
    texts = content if isinstance(content, list | tuple) else [content] if content else []
    parts += [{"type": "text", "content": text.get("text") if isinstance(text, Mapping) else text} for text in texts]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            own = {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments")}
            parts.append({"type": "tool_call", **own})
    return parts
