"""`ChatCopySpec`: the engine as a LangChain chat model.

The engine's stream is the one primitive: `invoke` joins it, and the async methods use the engine's async front door.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from copyspec_engine import (
    ConfigError,
    Explanation,
    GenerationRequest,
    StreamChunk,
)
from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.adapters.model import LocalModel
from copyspec_engine.adapters.remote import AnyEngine
from langchain_copyspec._calls import (
    BoundModel,
    ConversationalModel,
    PreparedCall,
    astream_call,
    session_of,
    stream_call,
    with_session,
)
from langchain_copyspec._messages import PROVIDER, ReplyWriter, explain, to_engine_messages
from langchain_copyspec._options import (
    CallOptions,
    Tool,
    ToolOptions,
    convert_tools,
    deciding,
    deciding_config,
    json_schema_of,
)
from langchain_copyspec._profile import model_profile
from langchain_copyspec._structured import Method, answer_parser, call_parser, with_raw

if TYPE_CHECKING:
    from copyspec_engine import ConversationMemory

__all__ = ["ChatCopySpec"]


class ChatCopySpec(CallOptions, LocalModel, ConversationalModel):
    """Chat model on this machine that drafts answers by copying from the conversation and verifies every token.

    The answer is token for token that of plain decoding. Weights are loaded on first use, not by the constructor, and
    shared by all models of the process with the same options of the engine (`model` to `tool_prompt`).

    A conversation that is named keeps its texts and its KV cache over calls. It is named by, in this order: the keyword
    `session_id` of the call; `thread_id`, `session_id` or `conversation_id` in the `configurable` part of its config,
    then in the config's metadata; the innermost `with conversation(id)`; the field `session_id`. A call that names none
    goes on, with the KV, from the one that its messages begin with, the last answer included; else it stands alone, so
    that one model serves many users and none meets what another has said.

    All options but those of the engine and `streaming` are also keywords of a call (`invoke`, `stream`, `bind`
    ...), for that call. `model` there names any model, loaded on first use as by `ChatCopySpec(model=..., device=...,
    dtype=...)` with this model's device and dtype; the name of this model changes nothing.

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

    called: ClassVar[str | None] = None
    beside: ClassVar[tuple[str, ...]] = ("stop_sequences",)

    streaming: bool = False
    """True: `invoke` streams too, so that callbacks see each chunk. False, if given: nothing streams."""

    # What LangChain asks about a model

    @property
    def _llm_type(self) -> str:
        return PROVIDER

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What decides the answer, for traces and cache keys: the conversation does not."""
        return {"model": self.model, "engine": self._deciding_engine(None), **self.deciding()}

    def _deciding_engine(self, model: str | None) -> dict[str, Any]:
        """What decides the answers of the engine, or of that of another model, as plain values."""
        if self.base_url is not None:
            named = model or (self.model if "model" in self.model_fields_set else None)
            return {"base_url": self.base_url, "model": named}
        return deciding_config(self._engine_config(model))

    @override
    def _resolve_model_profile(self) -> ModelProfile | None:
        return model_profile(self._known)

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **options: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self.stop if stop is None else stop, **options)
        return {**params, "ls_provider": PROVIDER}

    @override
    def _get_invocation_params(self, stop: list[str] | None = None, **options: Any) -> dict[str, Any]:
        return super()._get_invocation_params(stop=self.stop if stop is None else stop, **deciding(options))

    @override
    def _get_llm_string(self, stop: list[str] | None = None, **options: Any) -> str:
        """What decides the answer, as it is in force for a call, however the call says it."""
        model = options.pop("model", None)
        chosen, tools = self.for_call(stop, options)
        key = {
            "output_version": self.output_version,
            "engine": self._deciding_engine(model),
            **chosen.deciding(),
            **tools.model_dump(),
        }
        return json.dumps(key, sort_keys=True)

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
        tools: Sequence[Tool] | None = None,
        *,
        config: RunnableConfig | None = None,
        **options: Any,
    ) -> int:
        """Exactly the prompt tokens of a call with `messages` in this conversation; loads the model if no one has.

        Args:
            messages: of the call.
            tools: of the call, as the prompt tells of them.
            config: of the call, which may name the conversation.
            options: others of the call, as for `invoke`.
        """
        if not messages:
            return 0
        if tools is not None:
            options["tools"] = tools
        asked = self._asked(messages, None, with_session(config, options))
        engine = self._get_engine(asked.model)
        return len(engine.tokenize(self._call(engine, asked).request))

    # Tools and objects

    @override
    def bind(self, **options: Any) -> BoundModel:  # type: ignore[override]  # LangChain's own class is private
        """This model with options of its calls."""
        return BoundModel(bound=self, kwargs=options, config={})

    @override
    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **options: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools that it may call.

        Args:
            tools: functions, classes, tools or schemas.
            tool_choice: "auto" (the default): the model decides; "any", "required" or True: it calls at least one;
                a tool's name, or OpenAI's or Anthropic's dict with it: it calls that one; "none" or False: it is told
                of none, and what it writes like a call is text. A call that is asked for needs the extra
                "grammar".
            parallel_tool_calls: False: at most one call in an answer; needs the extra "grammar".
            strict: True: arguments fit their schemas in every detail, or the call raises; needs the extra "grammar".
                None: they fit as far as a grammar can express it, where the extra is installed. False: with "auto",
                the model writes what it likes.
            options: more options of a call.

        Raises:
            ConfigError: a tool that cannot be read, or a choice that is not among the tools.
        """
        given = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls, "strict": strict}
        bound = {"tools": convert_tools(tools), **{name: value for name, value in given.items() if value is not None}}
        ToolOptions(**bound)
        return self.bind(**bound, **options)

    @override
    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Method = "json_schema",
        strict: bool | None = None,
        **options: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """This model with answers that are objects; streams give the object as far as it is written.

        Args:
            schema: a Pydantic class (answers are its instances), or a TypedDict, a JSON schema or an OpenAI function
                schema (answers are dicts).
            include_raw: give {"raw": message, "parsed": object, "parsing_error": exception or None} and do not raise;
                streams give them as they come.
            method: "json_schema": the answer is JSON that fits the schema, by grammar; "function_calling": it is a
                call of a tool with that schema, so that the prompt tells of it; "json_mode": it is any JSON object,
                and the prompt should say which. All need the extra "grammar".
            strict: True: what a grammar cannot express of the schema raises; otherwise it is left to the model.
            options: more options of a call.

        Raises:
            ConfigError: a schema that cannot be read, an unknown method, or `strict` with "json_mode".
        """
        shown = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        options = {"ls_structured_output_format": shown, **options}
        if method == "function_calling":
            name = convert_tools([schema])[0]["function"]["name"]
            llm = self.bind_tools([schema], tool_choice=name, parallel_tool_calls=False, strict=strict, **options)
            parser = call_parser(schema, name)
        elif method == "json_schema":
            form = {"schema": json_schema_of(schema), "strict": bool(strict)}
            llm = self.bind(response_format={"type": "json_schema", "json_schema": form}, **options)
            parser = answer_parser(schema)
        elif method == "json_mode" and strict is None:
            llm = self.bind(response_format={"type": "json_object"}, **options)
            parser = answer_parser(schema)
        else:
            raise ConfigError(
                f"Got method={method!r} with strict={strict!r} but expected json_schema, function_calling, or "
                "json_mode without strict: it knows no schema"
            )
        return with_raw(llm, parser) if include_raw else llm | parser

    # Looking back

    @staticmethod
    def explain(message: AIMessage) -> Explanation:
        """Where an answer's text was copied from, span by span: which message of its call, and which character there.

        Takes what `invoke` returns, and the sum of the chunks of a stream. What stands in no message of the call comes
        from the conversation's memory. Of a call with `include_explanation=True` it tells more: of reasoning and tool
        calls too, and what stands around a place in the conversation's memory. `rich.print` shows it in colour.

        Raises:
            ConfigError: the message is no whole answer of ours, or its text was changed.
        """
        return explain(message)

    def memory(self, session_id: str | None = None, config: RunnableConfig | None = None) -> ConversationMemory:
        """What a conversation remembers, to look at, export or clear: the one that a call would name.

        Loads the model if no one has.

        Raises:
            ConfigError: nothing names one.
        """
        return self._memory(self._session(session_id, session_of(config)))

    # Generation

    @override
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, options)
        engine = self._get_engine(asked.model)
        call = self._call(engine, asked)
        *_, last = stream_call(engine, call)
        return self._result(engine, call, asked, last)

    @override
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, options)
        engine = await self._aget_engine(asked.model)
        call = self._call(engine, asked)
        async with aclosing(astream_call(engine, call)) as chunks:
            *_, last = [chunk async for chunk in chunks]
        return self._result(engine, call, asked, last)

    @override
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked = self._asked(messages, stop, options)
        engine = self._get_engine(asked.model)
        call = self._call(engine, asked)
        writer = self._writer(engine, call, asked)
        with closing(stream_call(engine, call)) as chunks:
            for chunk in chunks:
                if chunk.is_last:
                    self._answer(engine, call, asked, chunk)
                yield from writer.generations(chunk)

    @override
    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        asked = self._asked(messages, stop, options)
        engine = await self._aget_engine(asked.model)
        call = self._call(engine, asked)
        writer = self._writer(engine, call, asked)
        async with aclosing(astream_call(engine, call)) as chunks:
            async for chunk in chunks:
                if chunk.is_last:
                    self._answer(engine, call, asked, chunk)
                for made in writer.generations(chunk):
                    yield made

    def _asked(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> _AskedCall:
        model = options.pop("model", None)
        if model is not None and (not isinstance(model, str) or not model):
            raise ConfigError(f"Got model={model!r} but expected the name of a model or a folder")
        session_id = self._session(options.pop("session_id", None), session_of(None))
        chosen, tools = self.for_call(stop, {**options, "session_id": session_id})
        return _AskedCall(None if model == self.model else model, to_engine_messages(messages), chosen, tools)

    def _call(self, engine: AnyEngine, asked: _AskedCall) -> PreparedCall:
        talk = self._conversations.begin(asked.options.session_id, asked.messages, asked.shown)
        return PreparedCall(asked.request(engine, talk), talk, asked.options)

    def _result(self, engine: AnyEngine, call: PreparedCall, asked: _AskedCall, last: StreamChunk) -> ChatResult:
        """The whole answer, and the figures that callbacks look for beside it."""
        assert last.output is not None, "the last chunk has the whole answer"
        message = self._answer(engine, call, asked, last)
        told = self._writer(engine, call, asked).figures(last.output)
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=told)], llm_output=told)

    def _answer(self, engine: AnyEngine, call: PreparedCall, asked: _AskedCall, last: StreamChunk) -> AIMessage:
        """The whole answer, with which the conversation can be continued."""
        message = self._writer(engine, call, asked).message(last)
        call.talk.answered(to_engine_messages((message,))[-1])
        return message

    def _writer(self, engine: AnyEngine, call: PreparedCall, asked: _AskedCall) -> ReplyWriter:
        return ReplyWriter(engine, call, self._name_of(engine, asked.model), blocks=self.output_version == "v1")


@dataclass(frozen=True)
class _AskedCall:
    """What one call asks for, checked before any model is loaded."""

    model: str | None
    """None: that of the chat model."""
    messages: tuple[dict[str, Any], ...]
    options: CallOptions
    tools: ToolOptions

    @property
    def shown(self) -> dict[str, Any]:
        """What else than the messages the prompt is made of."""
        tools, template = self.tools.offered, self.options.chat_template_kwargs
        return {"model": self.model, "tools": tools, "chat_template_kwargs": template or {}}

    def request(self, engine: AnyEngine, talk: Talk) -> GenerationRequest:
        """The request for an engine."""
        return GenerationRequest(
            messages=self.messages,
            tools=self.tools.offered,
            grammar=self.tools.grammar(engine),
            parse_reply=True,
            **self.options.request_options(),
            **talk.request_options(),
        )
