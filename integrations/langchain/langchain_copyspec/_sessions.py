"""Which conversation a call belongs to.

LangChain gives a config to `invoke` and its kin, but not to the methods that generate: so these are overridden to hand
the conversation on as a keyword of the call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from typing_extensions import override

from copyspec_engine.adapters.answers import without_conversation
from copyspec_engine.adapters.conversations import current_conversation, first_named

__all__ = ["ConversationalModel", "session_of", "with_session"]

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
