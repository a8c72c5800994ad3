"""`CopySpecCompletion`: `CopySpec` for code that continues raw text instead of chatting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    astream_completion_response_to_chat_response,
    completion_response_to_chat_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from pydantic import ConfigDict, Field
from typing_extensions import override

from copyspec_engine.adapters.model import clear_errors
from llama_index.llms.copyspec._messages import ResponseWriter
from llama_index.llms.copyspec._options import CheckedCall
from llama_index.llms.copyspec._room import SHORT_CHATS
from llama_index.llms.copyspec._structured import GrammarStructuredLLM
from llama_index.llms.copyspec.base import CopySpec

__all__ = ["CopySpecCompletion"]


class CopySpecCompletion(GrammarStructuredLLM, CustomLLM):
    """A view of a `CopySpec` for base models: prompts go to the model as they are, without a chat template.

    `completion_to_prompt` and `messages_to_prompt` shape prompts and chats, as in every completion LLM. Calls take the
    options of `CopySpec`'s calls.

    Example:
        ```python
        from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

        llm = CopySpecCompletion(llm=CopySpec(max_tokens=20))
        llm.complete("Once upon a time").text
        ```
    """

    model_config = ConfigDict(extra="forbid")

    llm: CopySpec = Field(default_factory=CopySpec)
    """The model, its options and its conversation."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(type(self)):
            super().__init__(**options)

    @classmethod
    @override
    def class_name(cls) -> str:
        return "CopySpecCompletion"

    @property
    @override
    def metadata(self) -> LLMMetadata:
        """What the model can do; loads no weights. See `CopySpec.metadata`."""
        known, formats = self.llm.metadata, (self.messages_to_prompt, self.completion_to_prompt)
        calls = [partial(self._chat_call, chat) for chat in SHORT_CHATS]
        calls.append(partial(self._call, "-", False, {}))
        return known.model_copy(
            update={
                "num_output": self.llm._num_output(known.context_window, (self.class_name(), *formats), calls),
                "is_chat_model": False,
                "is_function_calling_model": False,
            }
        )

    @override
    def to_payload(self) -> dict[str, Any]:
        return {**self.llm.to_payload(), "class_name": self.class_name()}

    @override
    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        return self.llm._whole(self._call(prompt, formatted, options), ResponseWriter.completion)

    @override
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponseGen:
        return self.llm._parts(self._call(prompt, formatted, options), ResponseWriter.completion)

    @override
    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        call = self._call(prompt, formatted, await self.llm._with_session(options))
        return await self.llm._awhole(call, ResponseWriter.completion)

    @override
    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **options: Any
    ) -> CompletionResponseAsyncGen:
        call = self._call(prompt, formatted, await self.llm._with_session(options))
        return self.llm._aparts(call, ResponseWriter.completion)

    @override
    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        response = await self.acomplete(self._prompt(messages), formatted=True, **options)
        return completion_response_to_chat_response(response)

    @override
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseAsyncGen:
        responses = await self.astream_complete(self._prompt(messages), formatted=True, **options)
        return astream_completion_response_to_chat_response(responses)

    def _chat_call(self, messages: Sequence[ChatMessage]) -> CheckedCall:
        return self._call(self._prompt(messages), True, {})

    def _prompt(self, messages: Sequence[ChatMessage]) -> str:
        assert self.messages_to_prompt is not None, "set by a validator of the base class"
        return self.messages_to_prompt(messages)

    def _call(self, prompt: str, formatted: bool, options: dict[str, Any]) -> CheckedCall:
        if not formatted and self.completion_to_prompt is not None:
            prompt = self.completion_to_prompt(prompt)
        return self.llm._prompt_call(prompt, True, options)
