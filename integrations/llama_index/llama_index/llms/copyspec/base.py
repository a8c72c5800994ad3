"""`CopySpec`: the engine as a LlamaIndex LLM for chats, tools, agents and structured output.

Every method makes one engine request; the async ones use the engine's async front door and never block the event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import MessagesToPromptType, ToolSelection, default_completion_to_prompt
from llama_index.core.tools.types import BaseTool
from pydantic import ConfigDict, PrivateAttr, model_validator
from typing_extensions import override

from copyspec_engine import ConfigError, Explanation, GenerationRequest
from copyspec_engine.adapters.answers import explain_metadata
from copyspec_engine.adapters.conversations import Talk, first_named
from copyspec_engine.adapters.model import ChatFormat, LocalModel, model_facts
from copyspec_engine.adapters.remote import AnyEngine
from llama_index.llms.copyspec._messages import ResponseWriter, refuse_cut_off, to_engine_messages
from llama_index.llms.copyspec._options import CallOptions, CheckedCall, take_tools, to_function_schemas
from llama_index.llms.copyspec._room import SHORT_CHATS, tokens_around
from llama_index.llms.copyspec._sessions import named_session, step_session
from llama_index.llms.copyspec._structured import GrammarStructuredLLM

if TYPE_CHECKING:
    from copyspec_engine import ConversationMemory

__all__ = ["CopySpec"]

Response = TypeVar("Response", ChatResponse, CompletionResponse)
Respond = Callable[[ResponseWriter], Response]


class CopySpec(CallOptions, LocalModel, GrammarStructuredLLM, FunctionCallingLLM):
    """LLM on this machine that drafts answers by copying from the conversation and verifies every token.

    The answer is token for token that of plain decoding. Weights are loaded on first use, not by the constructor, and
    shared by all LLMs of the process with the same options of the engine (`model` to `tool_prompt`).

    A conversation that is named keeps its texts and its KV cache over calls. It is named by, in this order: the call's
    keyword `session_id`; `with conversation("id")`; `instrument_tags({"session_id": "id"})`; in a step of an agent or
    workflow, the run's context (async methods only); the field `session_id`. A call that names none goes on, with the
    KV, from the one that its messages begin with, the last answer included; else it stands alone, so that one LLM
    serves many users and none meets what another has said.

    A function given as `messages_to_prompt` writes the prompts of chats in place of the model's chat template, and one
    given as `completion_to_prompt` those of completions: the model goes on with what they give, and takes no tools.

    The options from `temperature` on are also keywords of each call, for that call. `raw["usage"]` of the last response
    has the token counts and `raw["copyspec"]` the draft statistics.

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

    called: ClassVar[str | None] = None
    beside: ClassVar[tuple[str, ...]] = ()

    _around: dict[Any, int] = PrivateAttr(default_factory=dict)
    """Tokens around the texts of a prompt, by what decides them."""

    @model_validator(mode="before")
    @classmethod
    def _without_class_name(cls, options: Any) -> Any:  # noqa: ANN401 - whatever the caller gave
        """LlamaIndex writes the name of the class beside the fields, and takes only the outermost one out again."""
        if not isinstance(options, dict):
            return options  # pydantic will say what is wrong
        return {name: value for name, value in options.items() if name != "class_name"}

    @classmethod
    @override
    def class_name(cls) -> str:
        return "CopySpec"

    @property
    @override
    def metadata(self) -> LLMMetadata:
        """What the model can do, by its own configuration and chat template.

        Agents ask for it on the event loop, so it is read from the model's small files, with `max_tokens` from those of
        its tokenizer too; only a model that is not on this machine yet is loaded for it.

        A prompt whose texts have `context_window - num_output` tokens fits, and leaves room for `max_tokens` more. So
        `num_output` is `max_tokens` and what stands around the texts of a prompt.
        """
        context, chat_format = self._facts()
        calls = [partial(self._chat_call, chat, {}) for chat in SHORT_CHATS]
        calls += [partial(self._prompt_call, "-", formatted, {}) for formatted in (False, True)]
        return LLMMetadata(
            context_window=context,
            num_output=self._num_output(context, (self.messages_to_prompt, self.completion_to_prompt), calls),
            # A base model goes on with a text: LlamaIndex then asks by `complete`, and so puts messages into one.
            is_chat_model=chat_format.is_chat or self._own_format() is not None,
            is_function_calling_model=chat_format.takes_tools and self._own_format() is None,
            model_name=self.model,
        )

    def _num_output(self, context: int, formats: tuple[Any, ...], calls: Iterable[Callable[[], CheckedCall]]) -> int:
        """How much of the context LlamaIndex keeps free of text; its own default may be more than there is.

        Args:
            context: of the model, in tokens.
            formats: functions that shape prompts.
            calls: make calls with as good as no text.
        """
        if self.max_tokens is None:
            return min(DEFAULT_NUM_OUTPUTS, context // 4)
        decides = (self._engine_config(), repr(self.chat_template_kwargs), *formats)
        if decides not in self._around:
            self._around[decides] = tokens_around(self._known, calls)
        return self.max_tokens + self._around[decides]

    def _facts(self) -> tuple[int, ChatFormat]:
        """The model's context in tokens, and what its chat template can do."""
        facts = model_facts(self._known)
        if facts is None or facts.max_model_len is None:
            engine = self._get_engine()
            return engine.info.max_model_len, engine.chat_format
        return facts.max_model_len, facts.chat_format

    @override
    def to_payload(self) -> dict[str, Any]:
        """What traces say of this LLM: its options."""
        return {"class_name": self.class_name(), **self.model_dump(exclude={"class_name", "system_prompt"})}

    # Tokens

    def tokenizer(self, text: str) -> list[int]:
        """The model's own token ids of `text`; loads the model if no one has.

        `Settings.tokenizer = llm.tokenizer` makes splitters, memories and counters count as the model does.
        """
        return self._get_engine().encode(text, special_tokens=False)

    def count_tokens(
        self,
        messages: str | Sequence[ChatMessage],
        tools: Sequence[BaseTool] = (),
        **options: Any,  # noqa: ANN401 - those of a call
    ) -> int:
        """Exactly the prompt tokens of a call of `chat` with `messages`, or of `complete` with a text.

        Loads the model if no one has.

        Args:
            messages: of the call.
            tools: that it offers.
            options: others of the call; `formatted=True` too, for a text.
        """
        if isinstance(messages, str):
            call = self._prompt_call(messages, options.pop("formatted", False), options)
        else:
            call = self._chat_call(messages, {"tools": tools, **options})
        engine = self._get_engine()
        return len(engine.tokenize(self._begin(engine, call)[0]))

    # What was copied, and what is remembered

    @staticmethod
    def explain(response: ChatResponse | CompletionResponse) -> Explanation:
        """Where an answer's text was copied from, span by span; `rich.print` shows it in colour.

        Takes a whole response, or the last one of a stream. The `source` of a span is one of:

        - "prompt": of this call, `message` from 0 and `offset` in characters of its content; no `message` in what the
          chat template writes around contents, and in a raw prompt;
        - "answer": what this answer said before, at `offset`;
        - "prediction": the one of this call, at `offset`;
        - "earlier_prompt", "earlier_answer", "earlier_prediction": a text of the conversation's memory that is not in
          this prompt;
        - "pool": what another caller put into the `memory_pool`, which is never shown;
        - "grammar": nothing else was allowed;
        - "frequent": a token that is just frequent, copied from no text.

        What is in no text of this call has no `offset`. Of a call with `include_explanation=True` it tells more: of
        reasoning and tool calls too, and with up to 60 characters `before` and `after` a place in the conversation's
        memory.

        Raises:
            ConfigError: this is no response, no whole one of ours, or its text was changed.
        """
        if not isinstance(response, ChatResponse | CompletionResponse):
            raise ConfigError(
                f"Got response of type {type(response).__name__} but expected a ChatResponse or CompletionResponse: "
                "what chat or complete gives, or the last one of a stream. What a query engine or an agent gives has "
                "only the text: its LLMChatEndEvent has the response"
            )
        text = response.text if isinstance(response, CompletionResponse) else response.message.content
        raw = response.raw if isinstance(response.raw, dict) else {}
        return explain_metadata(raw.get("copyspec"), text or "")

    def memory(self, session_id: str | None = None) -> ConversationMemory:
        """What a conversation remembers, to look at, export or clear: the one that a call would name.

        Loads the model if no one has.

        Raises:
            ConfigError: nothing names one.
        """
        return self._memory(self._session(session_id, named_session()))

    # Calls

    @override
    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        return self._whole(self._chat_call(messages, options), ResponseWriter.chat)

    @override
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseGen:
        return self._parts(self._chat_call(messages, options), ResponseWriter.chat)

    @override
    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        return await self._awhole(self._chat_call(messages, await self._with_session(options)), ResponseWriter.chat)

    @override
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseAsyncGen:
        return self._aparts(self._chat_call(messages, await self._with_session(options)), ResponseWriter.chat)

    @override
    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        """Answer `prompt`, as a user's message or as `completion_to_prompt` has it; if `formatted`, go on with it."""
        return self._whole(self._prompt_call(prompt, formatted, options), ResponseWriter.completion)

    @override
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponseGen:
        return self._parts(self._prompt_call(prompt, formatted, options), ResponseWriter.completion)

    @override
    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
        call = self._prompt_call(prompt, formatted, await self._with_session(options))
        return await self._awhole(call, ResponseWriter.completion)

    @override
    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **options: Any
    ) -> CompletionResponseAsyncGen:
        call = self._prompt_call(prompt, formatted, await self._with_session(options))
        return self._aparts(call, ResponseWriter.completion)

    # Tools

    @override
    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat` and its like.

        Args:
            tools: what may be called.
            user_msg: comes last.
            chat_history: comes first, and is not changed.
            verbose: for what the framework prints; nothing is printed here.
            allow_parallel_tool_calls: several calls in one answer.
            tool_required: at least one call; where `tool_choice` says otherwise, that goes first.
            tool_choice: "auto", "none", "required", "any" (the same), or a tool's name, also in OpenAI's form.
            options: more options of the call.
        """
        message = ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
        return {
            "messages": [*(chat_history or ()), *(() if message is None else (message,))],
            "tools": to_function_schemas(tools) or None,
            "tool_choice": tool_choice or ("required" if tool_required and tools else None),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **options,
        }

    @override
    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **_: Any
    ) -> list[ToolSelection]:
        """The complete calls of a response, streamed or whole; one that is still being written is not there yet.

        Raises:
            ConfigError: there is none because the answer was cut off, and `error_on_no_tool_call`.
            ValueError: there is none, and `error_on_no_tool_call`.
        """
        calls = [
            ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=block.tool_kwargs)
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock) and isinstance(block.tool_kwargs, dict)
        ]
        if not calls and error_on_no_tool_call:
            refuse_cut_off(response.raw, "a whole call")
            raise ValueError(f"Got no tool call but expected at least one; the answer was {response.message.content!r}")
        return calls

    # Requests

    async def _with_session(self, options: dict[str, Any]) -> dict[str, Any]:
        """`options` with the conversation of the workflow step around the call, if nothing else names one."""
        named = first_named(options.get("session_id"), named_session())
        return {**options, "session_id": await step_session()} if named is None else options

    def _chat_call(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> CheckedCall:
        """A call that answers `messages`."""
        tool_use, others = take_tools(options)
        return self._call(others, **self._written(messages), tool_use=tool_use)

    def _prompt_call(self, prompt: str, formatted: bool, options: dict[str, Any]) -> CheckedCall:
        """A call that answers `prompt`, or goes on with it if it is `formatted`."""
        # LlamaIndex puts defaults where none is given; this one changes nothing.
        write = None if self.completion_to_prompt is default_completion_to_prompt else self.completion_to_prompt
        if formatted or write is not None:
            return self._call(options, prompt=prompt if formatted or write is None else write(prompt))
        is_question = self._own_format() is None
        return self._call(options, **({"question": prompt} if is_question else self._written([ChatMessage(prompt)])))

    def _written(self, messages: Sequence[ChatMessage]) -> dict[str, Any]:
        """Messages for the chat template, or the prompt that the caller's own function makes of them."""
        write = self._own_format()
        return {"messages": to_engine_messages(messages)} if write is None else {"prompt": write(messages)}

    def _own_format(self) -> MessagesToPromptType | None:
        """The caller's function in place of the chat template; LlamaIndex's default is none."""
        return None if self.messages_to_prompt is messages_to_prompt else self.messages_to_prompt

    def _call(self, options: dict[str, Any], **asked: Any) -> CheckedCall:  # noqa: ANN401 - fields of `CheckedCall`
        options = {**options, "session_id": self._session(options.get("session_id"), named_session())}
        object_class = options.pop("object_class", None)
        chosen = self.for_call(options)
        return CheckedCall(options=chosen, response_format=chosen.response_format, object_class=object_class, **asked)

    def _begin(self, engine: AnyEngine, call: CheckedCall) -> tuple[GenerationRequest, Talk]:
        """The request, and its conversation."""
        request = call.request(engine)
        shown = {"tools": request.tools, "chat_template_kwargs": request.chat_template_kwargs}
        talk = self._conversations.begin(call.options.session_id, request.messages, shown)
        return request.model_copy(update=talk.request_options()), talk

    def _whole(self, call: CheckedCall, respond: Respond[Response]) -> Response:
        engine = self._get_engine()
        request, talk = self._begin(engine, call)
        return respond(
            ResponseWriter.whole(engine, self._name_of(engine), request, call, talk, engine.generate(request))
        )

    async def _awhole(self, call: CheckedCall, respond: Respond[Response]) -> Response:
        engine = await self._aget_engine()
        request, talk = self._begin(engine, call)
        return respond(
            ResponseWriter.whole(engine, self._name_of(engine), request, call, talk, await engine.agenerate(request))
        )

    def _parts(self, call: CheckedCall, respond: Respond[Response]) -> Generator[Response, None, None]:
        engine = self._get_engine()
        request, talk = self._begin(engine, call)
        answer = ResponseWriter(engine, self._name_of(engine), request, call, talk)
        with engine.stream(request) as chunks:
            for chunk in chunks:
                if answer.take(chunk):
                    yield respond(answer)

    async def _aparts(self, call: CheckedCall, respond: Respond[Response]) -> AsyncGenerator[Response, None]:
        engine = await self._aget_engine()
        request, talk = self._begin(engine, call)
        answer = ResponseWriter(engine, self._name_of(engine), request, call, talk)
        async with aclosing(engine.astream(request)) as chunks:
            async for chunk in chunks:
                if answer.take(chunk):
                    yield respond(answer)
