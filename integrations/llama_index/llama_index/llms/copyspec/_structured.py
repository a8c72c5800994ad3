"""Structured prediction under a grammar: the answer is JSON of the wanted class, whatever the model.

In `PydanticProgramMode.DEFAULT` one call is made, held to the class's JSON schema, which the prompt shows too. Streams
give the object as far as it is written. The other program modes work as in every LLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, cast

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole, TextBlock
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from typing_extensions import override

from copyspec_engine import ConfigError, Grammar
from copyspec_engine.adapters.tools import closed
from llama_index.llms.copyspec._room import PlainArguments

__all__ = ["GrammarStructuredLLM"]

dispatcher = get_dispatcher(__name__)


class GrammarStructuredLLM(PlainArguments):
    """An LLM whose calls take `response_format`, and whose structured predictions use it."""

    @override
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object of `output_cls`.

        Raises:
            ConfigError: `output_cls` is no pydantic class, no grammar can be made of its schema, or the answer was
                cut off.
            ValidationError: a validator of the class refuses the answer.
        """
        options = self._options(output_cls, llm_kwargs)
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return cast("Model", super().structured_predict(output_cls, prompt, options, **prompt_args))
        dispatcher.event(_start(output_cls, prompt, prompt_args))
        if self.metadata.is_chat_model:
            result = _parse(output_cls, self.chat(self._asking_for(output_cls, prompt, prompt_args), **options))
        else:
            text = self._prompt_for(output_cls, prompt, prompt_args)
            result = _parse(output_cls, self.complete(text, formatted=True, **options))
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    @override
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` for an event loop."""
        options = self._options(output_cls, llm_kwargs)
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            result = await super().astructured_predict(output_cls, prompt, options, **prompt_args)
            return cast("Model", result)
        dispatcher.event(_start(output_cls, prompt, prompt_args))
        if self.metadata.is_chat_model:
            response = await self.achat(self._asking_for(output_cls, prompt, prompt_args), **options)
            result = _parse(output_cls, response)
        else:
            text = self._prompt_for(output_cls, prompt, prompt_args)
            result = _parse(output_cls, await self.acomplete(text, formatted=True, **options))
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    @override
    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | FlexibleModel, None, None]:
        """The object as it is written, each time something of it is new; the last one is whole.

        What is not valid yet comes as a `FlexibleModel`, whose missing fields are None.
        """
        options = self._options(output_cls, llm_kwargs)
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            yield from super().stream_structured_predict(output_cls, prompt, options, **prompt_args)
            return
        dispatcher.event(_start(output_cls, prompt, prompt_args))
        partial = _Partial(output_cls)
        responses: Generator[ChatResponse | CompletionResponse, None, None]
        if self.metadata.is_chat_model:
            responses = self.stream_chat(self._asking_for(output_cls, prompt, prompt_args), **options)
        else:
            text = self._prompt_for(output_cls, prompt, prompt_args)
            responses = self.stream_complete(text, formatted=True, **options)
        for response in responses:
            if partial.take(response):
                dispatcher.event(LLMStructuredPredictInProgressEvent(output=partial.value))
                yield partial.value
        dispatcher.event(LLMStructuredPredictEndEvent(output=partial.value))

    @override
    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """`stream_structured_predict` for an event loop."""
        options = self._options(output_cls, llm_kwargs)
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return cast(
                "AsyncGenerator[Model | FlexibleModel, None]",
                await super().astream_structured_predict(output_cls, prompt, options, **prompt_args),
            )

        async def objects() -> AsyncGenerator[Model | FlexibleModel, None]:
            dispatcher.event(_start(output_cls, prompt, prompt_args))
            partial = _Partial(output_cls)
            responses: AsyncGenerator[ChatResponse | CompletionResponse, None]
            if self.metadata.is_chat_model:
                responses = await self.astream_chat(self._asking_for(output_cls, prompt, prompt_args), **options)
            else:
                text = self._prompt_for(output_cls, prompt, prompt_args)
                responses = await self.astream_complete(text, formatted=True, **options)
            async for response in responses:
                if partial.take(response):
                    dispatcher.event(LLMStructuredPredictInProgressEvent(output=partial.value))
                    yield partial.value
            dispatcher.event(LLMStructuredPredictEndEvent(output=partial.value))

        return objects()

    def _options(self, output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """The options of a call whose answer is an object."""
        if not isinstance(output_cls, type) or not issubclass(output_cls, BaseModel):
            raise ConfigError(f"Got output_cls={output_cls!r} but expected a subclass of pydantic.BaseModel")
        options = {**(llm_kwargs or {}), "object_class": output_cls}
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return options
        form = closed(Grammar(json_schema=output_cls.model_json_schema()))
        return {**options, "response_format": form}

    def _asking_for(
        self, output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]
    ) -> list[ChatMessage]:
        """The prompt's messages, the last one followed by the schema; the template's own are not changed."""
        messages = self._get_messages(prompt, **prompt_args)
        schema = TextBlock(text=_schema_text(output_cls))
        if not messages or messages[-1].role != MessageRole.USER:
            return [*messages, ChatMessage(role=MessageRole.USER, blocks=[schema])]
        return [*messages[:-1], messages[-1].model_copy(update={"blocks": [*messages[-1].blocks, schema]})]

    def _prompt_for(self, output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> str:
        return f"{self._get_prompt(prompt, **prompt_args)}\n{_schema_text(output_cls)}"


class _Partial:
    """An object as far as its JSON is written."""

    def __init__(self, output_cls: type[Model]) -> None:
        self._output_cls, self._flexible = output_cls, create_flexible_model(output_cls)
        self._data: Any = None
        self.value: Any = self._flexible()

    def take(self, response: ChatResponse | CompletionResponse) -> bool:
        """True if `value` has changed, or is whole.

        Raises:
            ConfigError, ValidationError: the answer is over and no object; see `structured_predict`.
        """
        if "finish_reason" in (response.raw or {}):
            self.value = _parse(self._output_cls, response)
            return True
        try:
            data = from_json(_text(response), allow_partial="trailing-strings")
        except ValueError:  # not even the beginning of a value: white space, or a half of a number or escape
            return False
        if not isinstance(data, dict) or data == self._data:
            return False
        self._data = data
        try:
            self.value = self._output_cls.model_validate(data)
        except ValidationError:
            self.value = self._flexible.model_validate(data)
        return True


def _start(
    output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]
) -> LLMStructuredPredictStartEvent:
    return LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)


def _schema_text(output_cls: type[BaseModel]) -> str:
    return PydanticOutputParser(output_cls=output_cls).get_format_string(escape_json=False)


def _text(response: ChatResponse | CompletionResponse) -> str:
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""


def _parse(output_cls: type[Model], response: ChatResponse | CompletionResponse) -> Model:
    return output_cls.model_validate_json(_text(response))
