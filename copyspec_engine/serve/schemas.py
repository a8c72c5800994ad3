"""What answers look like, for the OpenAPI document: tests and `make conformance` hold what is answered to it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ERRORS",
    "OLLAMA_ERRORS",
    "ChatCompletion",
    "ConversationDeleted",
    "ConversationExport",
    "ConversationImported",
    "ConversationList",
    "ConversationMemory",
    "ErrorAnswer",
    "ExplainedAnswers",
    "HealthStatus",
    "ItemList",
    "ModelInfo",
    "ModelList",
    "NamedConversation",
    "NamedConversationDeleted",
    "OllamaChatAnswer",
    "OllamaErrorAnswer",
    "OllamaGenerateAnswer",
    "OllamaModelList",
    "OllamaModelShown",
    "OllamaRunningList",
    "OllamaVersion",
    "ReadyStatus",
    "ResponseDeleted",
    "ResponseObject",
    "ServerVersion",
    "TextCompletion",
    "TextOfTokens",
    "TokensOfText",
    "answers",
]


_STREAMED: dict[str, dict[str, Any]] = {
    "text/event-stream": {
        "type": "object",
        "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
        "required": ["data"],
    },
    "application/x-ndjson": {"type": "string"},
}
"""What a stream of each media type is made of."""


def answers(
    kind: type[BaseModel], *, stream: str | None = None, links: Mapping[str, str] = MappingProxyType({})
) -> dict[int | str, dict[str, Any]]:
    """What a route says of the answers to calls that went well.

    Args:
        kind: of a whole one.
        stream: the media type of one in pieces.
        links: operations that go on with its `id`, and the names that it has there.
    """
    streamed = {} if stream is None else {"content": {stream: {"schema": _STREAMED[stream]}}}
    told = {name: {"operationId": name, "parameters": {at: "$response.body#/id"}} for name, at in links.items()}
    linked = {"links": told} if told else {}
    return {200: {"model": kind, "description": "The answer", **streamed, **linked}}


class _Answer(BaseModel):
    """Fields that have a default are there only where they say something."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


# ---- errors


class ErrorDetails(_Answer):
    """What went wrong."""

    message: str
    """For people; names the value and the fix."""
    type: str
    param: str | None
    """The field of the body that is to blame."""
    code: str
    """For programs."""


class ErrorAnswer(_Answer):
    """An error in OpenAI's form."""

    error: ErrorDetails


class OllamaErrorAnswer(_Answer):
    """An error in Ollama's form."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The call cannot be as it is"},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot answer"},
}
"""What a route says of calls that failed."""
OLLAMA_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**said, "model": OllamaErrorAnswer} for status, said in ERRORS.items()
}
"""The same for paths of Ollama."""


# ---- choices


class Usage(_Answer):
    """Counts of tokens; the answers to a call share their prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class TopLogprob(_Answer):
    """One of the likeliest tokens at a place."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that was written."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """The tokens of a message."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(_Answer):
    """A function and its arguments."""

    name: str
    arguments: str
    """JSON, if the answer was not cut."""


class ToolCall(_Answer):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    """null only beside calls."""
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(_Answer):
    """One answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    copyspec: dict[str, Any] = {}
    """What was asked for in the body's object of this name."""


class ChatCompletion(_Answer):
    """The next message of a chat; in a stream the data of events are chunks of it."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(_Answer):
    """The tokens of a text, by their places."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The token itself among them."""
    text_offset: list[int]


class TextChoice(_Answer):
    """One text that goes on with a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    copyspec: dict[str, Any] = {}
    """What was asked for in the body's object of this name."""


class TextCompletion(_Answer):
    """How a text goes on; in a stream the data of events are pieces of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


# ---- responses and conversations


class OutputItem(_Answer):
    """A part of a response: what was said, reasoned or called."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponseUsage(_Answer):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(_Answer):
    """A response; in a stream each event is named, and the last one has it whole."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: dict[str, str] | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str = ""
    copyspec: dict[str, Any] = {}
    """What was asked for in the body's object of this name."""


class ResponseDeleted(_Answer):
    """A response that is kept no longer."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ConversationItem(_Answer):
    """Something that was said."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str
    type: Literal["message", "function_call", "function_call_output", "reasoning"]


class ItemList(_Answer):
    """Items, a page of them."""

    object: Literal["list"]
    data: list[ConversationItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class NamedConversation(_Answer):
    """A conversation that responses go on with."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class NamedConversationDeleted(_Answer):
    """One that was erased."""

    id: str
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


# ---- models and tokens


class ModelInfo(_Answer):
    """A model, under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    copyspec: dict[str, Any]


class ModelList(_Answer):
    """What calls may name."""

    object: Literal["list"]
    data: list[ModelInfo]


class TokensOfText(_Answer):
    """The tokens of a text or of a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] = []


class TextOfTokens(_Answer):
    """The text of tokens."""

    prompt: str


# ---- what is remembered


class ConversationMemory(_Answer):
    """What a conversation remembers, in numbers."""

    id: str
    object: Literal["copyspec.conversation"]
    num_tokens: int | None
    """None: they were not read back since the server began."""
    last_used_at: float | None
    """Seconds since 1970; None: before the server began, or by another one with the same memory."""
    num_texts: int = 0
    """Told of one conversation alone."""
    num_bytes: int = 0
    """Told of one conversation alone."""


class ConversationList(_Answer):
    """All that are remembered."""

    object: Literal["list"]
    data: list[ConversationMemory]


class ConversationExport(_Answer):
    """All that a conversation remembers."""

    session_id: str
    fingerprint: dict[str, Any]
    """Of tokenizer and chat template."""
    texts: list[dict[str, Any]]
    num_bytes: int


class ConversationImported(_Answer):
    """How much was added to a conversation."""

    id: str
    object: Literal["copyspec.conversation.imported"]
    num_texts: int


class ConversationDeleted(_Answer):
    """One that was erased."""

    id: str
    object: Literal["copyspec.conversation.deleted"]
    deleted: Literal[True]


class ExplainedChoice(_Answer):
    """Where one answer was copied from."""

    index: int
    text: str
    spans: list[dict[str, Any]]
    copied_share: float


class ExplainedAnswers(_Answer):
    """Where the answers to a call were copied from."""

    id: str
    object: Literal["copyspec.explanation"]
    choices: list[ExplainedChoice]


# ---- the server


class HealthStatus(_Answer):
    """Whether the server lives."""

    status: Literal["ok", "dead"]


class ReadyStatus(_Answer):
    """Whether it takes calls."""

    status: Literal["ready", "loading", "draining", "dead"]
    in_flight: int = 0


class ServerVersion(_Answer):
    """What the server is."""

    version: str
    model: str


# ---- Ollama


class OllamaFunctionCall(_Answer):
    """A function and its arguments."""

    index: int
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(_Answer):
    """A call of a function."""

    id: str
    function: OllamaFunctionCall


class OllamaMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    thinking: str = ""
    tool_calls: list[OllamaToolCall] = []


class OllamaAnswer(_Answer):
    """What each line of an answer has; durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] = "stop"
    logprobs: list[TokenLogprob] = []
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class OllamaChatAnswer(OllamaAnswer):
    """The next message of a chat; a stream is lines of these."""

    message: OllamaMessage


class OllamaGenerateAnswer(OllamaAnswer):
    """The answer to a prompt; a stream is lines of these."""

    response: str
    thinking: str = ""
    tool_calls: list[OllamaToolCall] = []
    context: list[int] = []


class OllamaModel(_Answer):
    """A model, under one of its names."""

    name: str
    model: str
    size: int
    digest: str
    details: dict[str, Any]


class OllamaListedModel(OllamaModel):
    """One that is there."""

    modified_at: str
    capabilities: list[str]


class OllamaModelList(_Answer):
    """The models that are there."""

    models: list[OllamaListedModel]


class OllamaRunningModel(OllamaModel):
    """One that is loaded."""

    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunningList(_Answer):
    """The models that are loaded."""

    models: list[OllamaRunningModel]


class OllamaModelShown(_Answer):
    """What is known of a model."""

    modelfile: str
    parameters: str
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(_Answer):
    """The version of copyspec."""

    version: str
