"""What integrations into other frameworks share: options of a model and its calls, choice of engine, answer metadata.

Public, so that an integration of one's own can stand on it as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from copyspec_engine.adapters.conversations import Conversations, Talk, conversation, current_conversation
from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.engine.engine import Engine
from copyspec_engine.engine.model_facts import ModelFacts, read_model_facts
from copyspec_engine.values.config import (
    DrafterConfig,
    EngineConfig,
    GenerationRequest,
    Prediction,
    SamplingParams,
    explain_errors,
)
from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.explanation import CopiedSpan, Explanation
from copyspec_engine.values.nesting import check_nesting
from copyspec_engine.values.options import Documented
from copyspec_engine.values.outputs import GenerationOutput, InvalidToolCall, Reply, Segment, TokenLogprob

if TYPE_CHECKING:
    from copyspec_engine.chat.tokenizer import ChatTokenizer

__all__ = [
    "ENGINE_OPTIONS",
    "AdapterOptions",
    "ChatFormat",
    "Conversations",
    "ModelFacts",
    "Talk",
    "adopt_engine",
    "answer_metadata",
    "call_error",
    "check_nesting",
    "clear_errors",
    "conversation",
    "current_conversation",
    "cut_off",
    "explain_metadata",
    "is_whole_json",
    "logprobs_metadata",
    "model_facts",
    "prompt_length",
    "segment_metadata",
    "tool_metadata",
    "without_conversation",
]


class AdapterOptions(Documented):
    """What may be set for a model and again for one call; None keeps the engine's default."""

    model_config = ConfigDict(extra="forbid")

    called: ClassVar[str | None] = None
    """What errors call the owner of the options; default: the class."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of options that are taken along with these, for advice about one that is not known."""

    temperature: float | None = None
    """0 is greedy decoding; default: what the checkpoint's generation_config.json says, as for all options of sampling,
    else 0."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities reach this sum, above 0 and up to 1 (the default)."""
    top_k: int | None = None
    """Keep this many of the most likely tokens, at least 1; default: all."""
    min_p: float | None = None
    """Keep tokens at least this many times as likely as the most likely one, 0 (the default) to 1."""
    repetition_penalty: float | None = None
    """Above 1 (the default) makes tokens of prompt and answer less likely, as in transformers."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that the answer holds, -2 to 2; default: 0."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit for each time that the answer holds it, -2 to 2; default: 0."""
    logit_bias: dict[int, float] | None = None
    """What is added to the logits of token ids, -100 (never) to 100 (always)."""
    suppress_tokens: list[int] | None = None
    """Token ids that never come."""
    begin_suppress_tokens: list[int] | None = None
    """Token ids that the answer does not begin with."""
    bad_words: list[str | list[int]] | None = None
    """Texts, or runs of token ids, that do not come."""
    no_repeat_ngram_size: int | None = None
    """No run of this many tokens comes twice in prompt and answer; default: any may."""
    logprobs: bool | None = None
    """Give the natural log-probability of each token of the answer."""
    top_logprobs: int | None = None
    """Give those of this many most likely tokens at each place too, up to 20; needs `logprobs`."""
    seed: int | None = None
    """The same seed gives the same answer; default: a fresh one for each call."""
    max_tokens: int | None = None
    """Most tokens to generate, at least 1; default: up to the end of the context."""
    min_tokens: int | None = None
    """Tokens before which no id ends the answer; default: 0."""
    stop: list[str] | None = None
    """Texts that end the answer and are not part of it; one string is accepted too."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the answer besides the model's own."""
    ignore_eos: bool | None = None
    """Go on after the model's own end-of-sequence ids."""
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the engine ends the answer; default: no limit."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What else the chat template reads ({"enable_thinking": False}, say)."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """Calls with the same salt share the KV of what their prompts have in common, over conversations."""
    drafter: DrafterConfig | None = None
    """Where drafts come from: "adaptive", "copyspec", "draft-model" or "none", or an object with options; default: the
    engine's."""
    session_id: str | None = Field(default=None, min_length=1)
    """The conversation, whose texts and KV cache are kept over calls, for all who name it; default: the one whose
    messages, the last answer included, those of the call begin with, else none."""
    memory_pool: str | None = Field(default=None, min_length=1)
    """A pool of texts that several conversations copy from and add to. What others have put in is never shown, but
    how fast an answer comes tells of it; default: each conversation has only its own."""
    prediction: Prediction | None = None
    """A text that the answer will repeat in large part; {"type": "content", "content": ...} is accepted too."""
    include_segments: bool = False
    """Attach the pieces of what was written, and whether each was copied, as `segments`."""
    include_token_ids: bool = False
    """Attach the answer's `token_ids`."""
    include_explanation: bool = False
    """Attach all of what `explain` can tell: of all that was written, calls and reasoning too, which is attached
    as `written`, and with up to 60 characters around what was copied from elsewhere in a conversation that is named.
    Without it, `explain` tells of the text of the answer, and quotes nothing."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(type(self), called=self.called, beside=self.beside):
            super().__init__(**options)

    @model_validator(mode="before")
    @classmethod
    def _one_stop(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "stop": [options["stop"]]} if isinstance(options.get("stop"), str) else options

    @model_validator(mode="after")
    def _check_options(self) -> AdapterOptions:
        GenerationRequest(messages=[{}], **self.request_options())
        return self

    def sampling(self) -> SamplingParams:
        """The sampling options for the engine."""
        names = SamplingParams.model_fields
        return SamplingParams(**{name: value for name in names if (value := getattr(self, name)) is not None})

    def request_options(self) -> dict[str, Any]:
        """The options of a `GenerationRequest` besides its input and its session."""
        return {
            "sampling": self.sampling(),
            "memory_pool": self.memory_pool,
            "prediction": self.prediction,
            "drafter": self.drafter,
            "chat_template_kwargs": self.chat_template_kwargs or {},
            "cache_salt": self.cache_salt,
            "timeout_s": self.timeout,
            "explain": True,
        }


ENGINE_OPTIONS = ("model", "device", "dtype", "chat_template", "tool_prompt")
"""Options of an `EngineConfig` that an integration's model has too."""


def adopt_engine(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with those of the engine (or its config) in them that models have too, if there is one.

    Raises:
        ConfigError: one of them is given too and differs.
    """
    engine = options.get("engine")
    config = engine.config if isinstance(engine, Engine) else engine
    if not isinstance(config, EngineConfig):
        return options
    adopted = {name: getattr(config, name) for name in ENGINE_OPTIONS}
    for name, value in adopted.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"Got {name}={options[name]!r} but the engine has {name}={value!r}: leave {name} out, or pass no engine"
            )
    return {**options, **adopted}


def model_facts(engine: Engine | EngineConfig) -> ModelFacts | None:
    """What is known of a model without loading it; None if it is not on this machine.

    An engine knows its own context and chat format, whatever files there are.
    """
    if not isinstance(engine, Engine):
        return read_model_facts(engine)
    return ModelFacts(engine.info.max_model_len, engine.chat_format)


def prompt_length(engine: Engine | EngineConfig, request: GenerationRequest) -> int:
    """Tokens of the prompt of a request outside of any conversation; by a config, no weights are loaded for it.

    Raises:
        ConfigError: the chat template refuses the messages.
        ModelLoadError: the tokenizer cannot be read.
    """
    if isinstance(engine, Engine):
        return len(engine.tokenize(request.model_copy(update={"session_id": None})))
    tokenizer = _tokenizer(engine)
    if request.messages is None:
        return len(tokenizer.encode(request.prompt or ""))
    return len(tokenizer.render(request.messages, request.tools, request.chat_template_kwargs))


@lru_cache(maxsize=8)
def _tokenizer(config: EngineConfig) -> ChatTokenizer:
    from copyspec_engine.execution.runner import read_tokenizer

    return read_tokenizer(config)


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


def tool_metadata(engine: Engine, request: GenerationRequest) -> dict[str, Any]:
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
    """Pieces of a text and whether each was copied, as plain values."""
    return [{"text": segment.text, "copied": segment.copied} for segment in segments]


def logprobs_metadata(engine: Engine, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
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


@contextmanager
def clear_errors(owner: type[BaseModel], *, called: str | None = None, beside: Iterable[str] = ()) -> Iterator[None]:
    """Raise pydantic's validation errors as one `ConfigError` that names each option, its value, and what to do.

    Args:
        owner: whose options are checked.
        called: the owner's name in the text; default: that of the class.
        beside: names of options that are taken along with the owner's.
    """
    try:
        yield
    except ValidationError as error:
        raise ConfigError(explain_errors(owner, error, called=called, beside=beside)) from None
