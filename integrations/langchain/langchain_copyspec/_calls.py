"""One call to the engine: the conversation that it belongs to, its chunks, and what is raised where it fails.

LangChain gives a config to `invoke` and its kin, but not to the methods that generate: so these are overridden to hand
the conversation on as a keyword of the call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from langchain_core.exceptions import ContextOverflowError as LangChainContextOverflowError
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import RunnableBinding, RunnableConfig
from langchain_core.runnables.config import ensure_config, merge_configs
from typing_extensions import override

import copyspec_engine
from copyspec_engine import GenerationRequest, RequestFailedError, StreamChunk
from copyspec_engine.adapters.answers import without_conversation
from copyspec_engine.adapters.conversations import Talk, current_conversation, first_named
from copyspec_engine.adapters.remote import AnyEngine
from langchain_copyspec._options import CallOptions, Tool

if TYPE_CHECKING:
    from langchain_copyspec.chat_models import ChatCopySpec

__all__ = [
    "BoundModel",
    "ContextOverflowError",
    "ConversationalModel",
    "PreparedCall",
    "RequestTimeoutError",
    "astream_call",
    "langchain_errors",
    "session_of",
    "stream_call",
    "with_session",
]


class ContextOverflowError(copyspec_engine.ContextOverflowError, LangChainContextOverflowError):
    """The engine's overflow error, which is also LangChain's: middleware that shortens histories catches it."""


class RequestTimeoutError(copyspec_engine.CopySpecError, TimeoutError):
    """A call took longer than `timeout`; its request has been cancelled in the engine."""


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise the engine's context overflow as `ContextOverflowError`, with the same message and counts."""
    try:
        yield
    except copyspec_engine.ContextOverflowError as error:
        raise ContextOverflowError(error.num_tokens, error.max_tokens, error.what) from error


_SESSION_KEYS = ("thread_id", "session_id", "conversation_id")


def session_of(config: RunnableConfig | None) -> str | None:
    """The conversation that `config`, merged into that of the running chain or graph, names; None if it names none.

    A config goes before the innermost `with conversation(...)`.
    """
    merged = ensure_config(config)
    sources = (merged.get("configurable", {}), merged.get("metadata", {}))
    named = (source.get(key) for source in sources for key in _SESSION_KEYS)
    return first_named(*(str(value) for value in named if value not in (None, "")), current_conversation())


def with_session(config: RunnableConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the conversation that `config` names, unless they name one."""
    session_id = first_named(options.get("session_id"), session_of(config))
    return options if session_id is None else {**options, "session_id": session_id}


class ConversationalModel(BaseChatModel):
    """A chat model whose calls learn their conversation from the config, on every path."""

    @override
    def _convert_cached_generations(self, cache_val: list[Generation]) -> list[ChatGeneration]:
        """Answers out of a cache, which say nothing of the conversation that they were written in."""
        found = super()._convert_cached_generations(cache_val)
        for generation in found:
            metadata = generation.message.response_metadata
            if "copyspec" in metadata:
                metadata = {**metadata, "copyspec": without_conversation(metadata["copyspec"])}
                generation.message = generation.message.model_copy(update={"response_metadata": metadata})
        return found

    @override
    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **with_session(config, options))

    @override
    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **with_session(config, options))

    @override
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, stop=stop, **with_session(config, options))

    @override
    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, stop=stop, **with_session(config, options))

    @override
    def stream_events(self, input: Any, config: RunnableConfig | None = None, **options: Any) -> Any:
        return super().stream_events(input, config, **with_session(config, options))

    @override
    def astream_events(self, input: Any, config: RunnableConfig | None = None, **options: Any) -> Any:
        return super().astream_events(input, config, **with_session(config, options))


class BoundModel(RunnableBinding[LanguageModelInput, AIMessage]):  # type: ignore[no-redef]  # of a field and pydantic
    """LangChain's binding, which also counts tokens with what is bound."""

    @classmethod
    @override
    def lc_id(cls) -> list[str]:
        return RunnableBinding.lc_id()

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Tool] | None = None,
        **options: Any,  # noqa: ANN401 - those of a call
    ) -> int:
        """Exactly the prompt tokens of a call with `messages`; see `ChatCopySpec.get_num_tokens_from_messages`."""
        options = {**self.kwargs, **options, "config": merge_configs(self.config, options.get("config"))}
        if tools is not None:
            options["tools"] = tools
        return cast("ChatCopySpec", self.bound).get_num_tokens_from_messages(messages, **options)


@dataclass(frozen=True)
class PreparedCall:
    """A request and how to run it."""

    request: GenerationRequest
    talk: Talk
    options: CallOptions


def _check(call: PreparedCall, chunk: StreamChunk) -> StreamChunk:
    """The chunk, unless it ends the answer because the time was up."""
    if chunk.output is not None and chunk.output.finish_reason == "timeout":
        raise RequestTimeoutError(
            f"The answer was not finished after timeout={call.request.timeout_s} seconds: raise timeout, or lower "
            "max_tokens"
        )
    return chunk


def stream_call(engine: AnyEngine, call: PreparedCall) -> Generator[StreamChunk, None, None]:
    """The call's chunks; closing the generator cancels the request.

    Raises:
        ContextOverflowError: the prompt does not fit.
        RequestTimeoutError: the time was up.
        RequestFailedError: the engine failed more often than `max_retries`, or in the middle of the answer.
    """
    with langchain_errors():
        for attempt in range(call.options.max_retries + 1):
            started = False
            try:
                with engine.stream(call.request) as chunks:
                    for chunk in chunks:
                        yield _check(call, chunk)
                        started = True
                return
            except RequestFailedError:
                if started or attempt == call.options.max_retries:
                    raise


async def astream_call(engine: AnyEngine, call: PreparedCall) -> AsyncGenerator[StreamChunk, None]:
    """`stream_call` for an event loop."""
    with langchain_errors():
        for attempt in range(call.options.max_retries + 1):
            started = False
            try:
                async with aclosing(engine.astream(call.request)) as chunks:
                    async for chunk in chunks:
                        yield _check(call, chunk)
                        started = True
                return
            except RequestFailedError:
                if started or attempt == call.options.max_retries:
                    raise
