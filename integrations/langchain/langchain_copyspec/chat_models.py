"""`ChatCopySpec`: the engine as a LangChain chat model.

The engine's stream is the one primitive: `invoke` joins it, and the async methods use the engine's async front door.
Not covered: tool calling and structured output.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import override

from copyspec_engine import (
    ConversationMemory,
    Engine,
    EngineConfig,
    Explanation,
    GenerationRequest,
    StreamChunk,
    shared_engine,
)
from copyspec_engine.adapters import adopt_engine, clear_errors
from langchain_copyspec._calls import Call, astream_call, stream_call
from langchain_copyspec._convert import PROVIDER, to_ai_message, to_ai_message_chunk, to_engine_messages
from langchain_copyspec._explain import explain
from langchain_copyspec._options import CallOptions, session_of

__all__ = ["ChatCopySpec"]


class ChatCopySpec(CallOptions, BaseChatModel):
    """Chat model on this machine that drafts answers by copying from the conversation and verifies every token.

    The answer is token for token that of plain decoding. Weights are loaded on first use, not by the constructor, and
    shared by all models of the process with the same `model`, `device` and `dtype`.

    A conversation keeps its texts and its KV cache over calls. Which one a call belongs to is decided by, in this
    order: the keyword `session_id` of the call; `thread_id`, `session_id` or `conversation_id` in the `configurable`
    part of its config, then in the config's metadata; the field `session_id`; the instance.

    All options but `model`, `device`, `dtype`, `engine` and `streaming` are also keywords of a call (`invoke`,
    `stream`, `bind` ...), for that call.

    Example:
        ```python
        from langchain_copyspec import ChatCopySpec

        llm = ChatCopySpec(max_tokens=200)
        answer = llm.invoke("Hello!", config={"configurable": {"thread_id": "1"}})
        answer.usage_metadata, answer.response_metadata["copyspec"]
        ```

    Raises:
        ConfigError: an unknown option, or a value out of range.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str = "bundled"
    """Hub name or local folder of a decoder; "bundled" is the small model that ships with the engine."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is float32 on a CPU and the checkpoint's own type on a GPU."""
    engine: Engine | EngineConfig | None = Field(default=None, exclude=True, repr=False)
    """An engine to use, or the configuration of one to share: it decides `model`, `device` and `dtype`. Pickling keeps
    the configuration only."""
    streaming: bool = False
    """True: `invoke` streams too, so that callbacks see each chunk. False, if given: nothing streams."""

    _instance_session_id: str = PrivateAttr(default_factory=lambda: f"instance-{uuid.uuid4().hex}")

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(type(self).__name__):
            super().__init__(**options)

    @model_validator(mode="before")
    @classmethod
    def _adopt_engine(cls, options: dict[str, Any]) -> dict[str, Any]:
        return adopt_engine(options)

    @model_validator(mode="after")
    def _check_engine_config(self) -> ChatCopySpec:
        self._engine_config()
        return self

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        engine = None if self.engine is None else self._engine_config()
        return {**state, "__dict__": {**state["__dict__"], "engine": engine}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatCopySpec:
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    # What LangChain asks about a model

    @property
    def _llm_type(self) -> str:
        return PROVIDER

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What decides the answer, for traces and cache keys: the conversation does not."""
        options = self.model_dump(
            include={"model", "device", "dtype", "drafter", "temperature", "top_p", "top_k", "seed", "max_tokens"}
        )
        return {**options, "stop": self.stop}

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **options: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self.stop if stop is None else stop, **options)
        return {**params, "ls_provider": PROVIDER}

    @override
    def _get_invocation_params(self, stop: list[str] | None = None, **options: Any) -> dict[str, Any]:
        return super()._get_invocation_params(stop=self.stop if stop is None else stop, **_deciding(options))

    @override
    def _get_llm_string(self, stop: list[str] | None = None, **options: Any) -> str:
        return super()._get_llm_string(stop=stop, **_deciding(options))

    @override
    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of `text`; loads the model if no one has."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._get_engine().encode(text)

    @override
    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Exactly the prompt tokens of a call with `messages`; loads the model if no one has.

        `tools` are counted as the model's chat template writes them.
        """
        if not messages:
            return 0
        schemas = tuple(convert_to_openai_tool(tool) for tool in tools) if tools else None
        return len(self._get_engine().tokenize(GenerationRequest(messages=to_engine_messages(messages), tools=schemas)))

    @override
    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **options: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Not there yet.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"Got {len(tools)} tools but ChatCopySpec has no tool calling and no structured output yet: ask for text, "
            "or use another model for this step"
        )

    # The conversation: a config reaches these methods, but not those that generate

    @override
    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **_with_session(config, options))

    @override
    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **_with_session(config, options))

    @override
    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, stop=stop, **_with_session(config, options))

    @override
    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **options: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, stop=stop, **_with_session(config, options))

    @override
    def stream_events(self, input: Any, config: RunnableConfig | None = None, **options: Any) -> Any:
        return super().stream_events(input, config, **_with_session(config, options))

    @override
    def astream_events(self, input: Any, config: RunnableConfig | None = None, **options: Any) -> Any:
        return super().astream_events(input, config, **_with_session(config, options))

    # Looking back

    @staticmethod
    def explain(message: AIMessage) -> Explanation:
        """Where an answer was copied from, span by span: which message of its call, and which character there.

        Takes what `invoke` returns, and the sum of the chunks of a stream. What stands in no message of the call comes
        from the conversation's memory, and is shown with some text around it. `rich.print` shows it in colour.

        Raises:
            ConfigError: the message is no whole answer of ours, or its text was changed.
        """
        return explain(message)

    def memory(self, session_id: str | None = None, config: RunnableConfig | None = None) -> ConversationMemory:
        """What a conversation remembers, to look at, export or clear: the one that a call would belong to.

        Loads the model if no one has.
        """
        found = session_id or session_of(config) or self.session_id or self._instance_session_id
        return self._get_engine().memory(found)

    # Generation

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, options)
        *_, last = stream_call(self._get_engine(), call)
        return self._result(call, last)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, options)
        async with aclosing(astream_call(await self._aget_engine(), call)) as chunks:
            *_, last = [chunk async for chunk in chunks]
        return self._result(call, last)

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, options)
        first = True
        with closing(stream_call(self._get_engine(), call)) as chunks:
            for chunk in chunks:
                if chunk.text or chunk.is_last:
                    yield self._chunk(call, chunk, first=first)
                    first = False

    @override
    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._call(messages, stop, options)
        first = True
        async with aclosing(astream_call(await self._aget_engine(), call)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.is_last:
                    yield self._chunk(call, chunk, first=first)
                    first = False

    def _call(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> Call:
        session_id = options.pop("session_id", None) or session_of(None) or self.session_id
        chosen = self.for_call(stop, {**options, "session_id": session_id or self._instance_session_id})
        request = GenerationRequest(
            messages=to_engine_messages(messages),
            session_id=chosen.session_id,
            **chosen.request_options(),
        )
        return Call(request, chosen.timeout, chosen.max_retries, chosen.include_segments)

    def _result(self, call: Call, last: StreamChunk) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=to_ai_message(last, self.model, call))])

    def _chunk(self, call: Call, chunk: StreamChunk, *, first: bool) -> ChatGenerationChunk:
        return ChatGenerationChunk(message=to_ai_message_chunk(chunk, self.model, call, first=first))

    # Engine

    def _engine_config(self) -> EngineConfig:
        if isinstance(self.engine, Engine):
            return self.engine.config
        return self.engine or EngineConfig(model=self.model, device=self.device, dtype=self.dtype)

    def _get_engine(self) -> Engine:
        """The engine; loads the model if no one has."""
        return self.engine if isinstance(self.engine, Engine) else shared_engine(self._engine_config())

    async def _aget_engine(self) -> Engine:
        """`_get_engine` in a thread: loading takes seconds, and the event loop must go on."""
        return self.engine if isinstance(self.engine, Engine) else await asyncio.to_thread(self._get_engine)


def _deciding(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call without those that only decide what it may copy, which never changes an answer."""
    return {name: value for name, value in options.items() if name not in ("session_id", "memory_pool", "prediction")}


def _with_session(config: RunnableConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the conversation that `config` names, unless they name one."""
    if options.get("session_id") is not None:
        return options
    session_id = session_of(config)
    return options if session_id is None else {**options, "session_id": session_id}
