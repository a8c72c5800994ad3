"""`CopySpec`: the engine as a LlamaIndex LLM.

Every method makes one engine request; the async ones use the engine's async front door and never block the event loop.
Not covered: tool calling, and structured output other than through the prompt.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool
from pydantic import ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import override

from copyspec_engine import Engine, EngineConfig, GenerationOutput, GenerationRequest, StreamChunk, shared_engine
from copyspec_engine.adapters import adopt_engine, clear_errors
from llama_index.llms.copyspec._convert import chat_response, completion_response, to_engine_messages
from llama_index.llms.copyspec._options import CallOptions, no_tools

__all__ = ["CopySpec"]

Response = TypeVar("Response", ChatResponse, CompletionResponse)
Respond = Callable[[str, str | None, str, StreamChunk | GenerationOutput], Response]
"""Makes a response of (model, session_id, the text so far, the newest chunk or the whole output)."""


class CopySpec(CallOptions, FunctionCallingLLM):
    """LLM on this machine that drafts answers by copying from the conversation and verifies every token.

    The answer is token for token that of plain decoding. Weights are loaded on first use (or when `metadata` is read),
    not by the constructor, and shared by all LLMs of the process with the same `model`, `device` and `dtype`.

    A conversation keeps its texts and its KV cache over calls. A call belongs to the conversation that its keyword
    `session_id` names, else to that of the field `session_id`, else to one of the instance.

    The options from `temperature` to `session_id` are also keywords of each call, for that call. `raw["usage"]` of the
    last response has the token counts and `raw["copyspec"]` the draft statistics.

    Example:
        ```python
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.copyspec import CopySpec

        llm = CopySpec(max_tokens=200)
        response = llm.chat([ChatMessage(role="user", content="Hello!")], session_id="1")
        response.message.content, response.raw["usage"], response.raw["copyspec"]
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

    _instance_session_id: str = PrivateAttr(default_factory=lambda: f"instance-{uuid.uuid4().hex}")

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(type(self).__name__):
            super().__init__(**options)

    @model_validator(mode="before")
    @classmethod
    def _adopt_engine(cls, options: dict[str, Any]) -> dict[str, Any]:
        return adopt_engine(options)

    @model_validator(mode="after")
    def _check_engine_config(self) -> CopySpec:
        self._engine_config()
        return self

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self.engine, Engine):
            return self.model_copy(update={"engine": self._engine_config()}).__getstate__()
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CopySpec:
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    @classmethod
    @override
    def class_name(cls) -> str:
        return "CopySpec"

    @property
    @override
    def metadata(self) -> LLMMetadata:
        """What the model can do; loads it if no one has, as its context length is part of the answer."""
        context = self._get_engine().info.max_model_len
        return LLMMetadata(
            context_window=context,
            # LlamaIndex keeps this much of the context free of prompt; its own default may be more than there is.
            num_output=self.max_tokens or min(DEFAULT_NUM_OUTPUTS, context // 4),
            is_chat_model=True,
            is_function_calling_model=False,
            model_name=self.model,
        )

    @override
    def to_payload(self) -> dict[str, Any]:
        """What traces say of this LLM: its options. Unlike the base's it does not read `metadata`.

        LlamaIndex asks for it on the event loop before each async call, where loading the model would block.
        """
        return {"class_name": self.class_name(), **self.model_dump(exclude={"class_name", "system_prompt"})}

    # Calls

    @override
    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        return self._whole(self._chat_request(messages, options), chat_response)

    @override
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseGen:
        return self._parts(self._chat_request(messages, options), chat_response)

    @override
    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        return await self._awhole(self._chat_request(messages, options), chat_response)

    @override
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseAsyncGen:
        return self._aparts(self._chat_request(messages, options), chat_response)

    @override
    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        """Answer `prompt` as a user message; with `formatted` continue it as it is, without the chat template."""
        return self._whole(self._prompt_request(prompt, formatted, options), completion_response)

    @override
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponseGen:
        return self._parts(self._prompt_request(prompt, formatted, options), completion_response)

    @override
    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        return await self._awhole(self._prompt_request(prompt, formatted, options), completion_response)

    @override
    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **options: Any
    ) -> CompletionResponseAsyncGen:
        return self._aparts(self._prompt_request(prompt, formatted, options), completion_response)

    @override
    def _prepare_chat_with_tools(self, tools: Sequence[BaseTool], *_: Any, **__: Any) -> dict[str, Any]:
        raise no_tools(f"{len(tools)} tools")

    @override
    def get_tool_calls_from_response(self, response: ChatResponse, *_: Any, **__: Any) -> list[ToolSelection]:
        raise no_tools("a request for tool calls")

    # Requests

    def _chat_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> GenerationRequest:
        return GenerationRequest(messages=to_engine_messages(messages), **self._request_options(options))

    def _prompt_request(self, prompt: str, formatted: bool, options: dict[str, Any]) -> GenerationRequest:
        """A request to continue `prompt` if it is `formatted`, else to answer it."""
        if formatted:
            return GenerationRequest(prompt=prompt, **self._request_options(options))
        return GenerationRequest(messages=({"role": "user", "content": prompt},), **self._request_options(options))

    def _request_options(self, options: dict[str, Any]) -> dict[str, Any]:
        chosen = self.for_call(options)
        return {"session_id": chosen.session_id or self._instance_session_id, **chosen.request_options()}

    def _whole(self, request: GenerationRequest, respond: Respond[Response]) -> Response:
        output = self._get_engine().generate(request)
        return respond(self.model, request.session_id, output.text, output)

    async def _awhole(self, request: GenerationRequest, respond: Respond[Response]) -> Response:
        output = await (await self._aget_engine()).agenerate(request)
        return respond(self.model, request.session_id, output.text, output)

    def _parts(self, request: GenerationRequest, respond: Respond[Response]) -> Generator[Response, None, None]:
        engine, text = self._get_engine(), ""
        with engine.stream(request) as chunks:
            for chunk in chunks:
                text += chunk.text
                if chunk.text or chunk.is_last:
                    yield respond(self.model, request.session_id, text, chunk)

    async def _aparts(self, request: GenerationRequest, respond: Respond[Response]) -> AsyncGenerator[Response, None]:
        engine, text = await self._aget_engine(), ""
        async with aclosing(engine.astream(request)) as chunks:
            async for chunk in chunks:
                text += chunk.text
                if chunk.text or chunk.is_last:
                    yield respond(self.model, request.session_id, text, chunk)

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
