"""An engine behind a URL: what `copyspec serve` answers, with those methods of `Engine` that integrations use.

It speaks OpenAI's API by OpenAI's own client, and asks for each chunk as the server's engine has made it. Which
conversation a call belongs to is decided as in process, but that the server finds the one that nobody names.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn, cast
from urllib.parse import quote
from weakref import WeakKeyDictionary

from copyspec_engine.adapters.wire import chunk_from_json
from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.engine.engine import Engine, RequestHandle
from copyspec_engine.engine.telemetry import trace_headers
from copyspec_engine.values.config import GenerationRequest, drafter_of
from copyspec_engine.values.errors import (
    ConfigError,
    ContextOverflowError,
    CopySpecError,
    EngineBusyError,
    EngineStoppedError,
    RequestFailedError,
    missing_extra,
)
from copyspec_engine.values.grammar import Grammar
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk

if TYPE_CHECKING:
    import openai

    from copyspec_engine import ConversationMemory

__all__ = ["AnyEngine", "RemoteEngine", "RemoteModel", "shared_remote", "without_password"]

_KEY_THAT_IS_NONE = "none"
"""OpenAI's client insists on one."""


@dataclass(frozen=True)
class RemoteModel:
    """What a server tells of its model."""

    model: str
    """Its name there."""
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    chat_format: ChatFormat
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint says of sampling."""


def without_password(url: str) -> str:
    """A URL without who asks, for texts that somebody reads."""
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", url)


class RemoteEngine:
    """A model that `copyspec serve` serves. Thread-safe; nothing is asked of the server before the first call.

    Args:
        base_url: of the server, as OpenAI's clients take it: "http://127.0.0.1:8000/v1", with or without "/v1".
        api_key: one of the server's; default: none, for a server without keys.
        model: its name there; default: the server's only model.
        options: others of `openai.OpenAI` and `openai.AsyncOpenAI`, as `timeout` and `max_retries`.

    Raises:
        CopySpecError: the extra "client" is not installed.
        ConfigError: `base_url` is no URL of a server.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        model: str | None = None,
        **options: Any,  # noqa: ANN401 - those of the clients
    ) -> None:
        if not re.match(r"https?://[^/]", base_url):
            raise ConfigError(
                f"Got base_url={base_url!r} but expected that of a server, such as 'http://127.0.0.1:8000/v1'",
                "base_url",
            )
        try:
            import openai
        except ImportError:
            raise missing_extra("openai", "client") from None
        self.base_url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        key = api_key or _KEY_THAT_IS_NONE
        self._client = openai.OpenAI(base_url=self.base_url, api_key=key, **options)
        self._make_async_client = partial(openai.AsyncOpenAI, base_url=self.base_url, api_key=key, **options)
        self._async_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = WeakKeyDictionary()
        """By event loop: a connection dies with the loop that it was made in."""
        self._model = model
        self._token_texts: dict[int, str] = {}
        """Texts of tokens whose log-probabilities were told."""

    def __repr__(self) -> str:
        named = "" if self._model is None else f", model={self._model!r}"
        return f"RemoteEngine({without_password(self.base_url)!r}{named})"

    # ---- what it is --------------------------------------------------------------------------------------------

    @cached_property
    def info(self) -> RemoteModel:
        """The server's model.

        Raises:
            ConfigError: the server has no model of this name, or the key is wrong.
            RequestFailedError: no copyspec server answers there.
        """
        with self._errors():
            served = list(self._client.models.list())
        named = next((model for model in served if self._model in (None, model.id)), None)
        if named is None:
            raise ConfigError(
                f"Got model={self._model!r} but {self.base_url} has {', '.join(model.id for model in served)}", "model"
            )
        facts = (named.model_extra or {}).get("copyspec")
        if not isinstance(facts, dict):
            raise RequestFailedError(
                f"{self.base_url} answers, but is no copyspec server: use ChatOpenAI or OpenAILike with others"
            )
        return RemoteModel(
            named.id, facts["max_model_len"], ChatFormat(**facts["chat_format"]), facts["sampling_defaults"]
        )

    @property
    def has_info(self) -> bool:
        """Whether `info` is known; else it asks the server, and waits."""
        return "info" in vars(self)

    @property
    def chat_format(self) -> ChatFormat:
        """How the model's chat template writes tool calls and reasoning."""
        return self.info.chat_format

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """As `Engine.encode`."""
        told = self._post("/tokenize", {"prompt": text, "add_special_tokens": special_tokens})
        return list(told["tokens"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As `Engine.decode`."""
        if len(token_ids) == 1 and not skip_special_tokens and token_ids[0] in self._token_texts:
            return self._token_texts[token_ids[0]]
        body = {"tokens": list(token_ids), "skip_special_tokens": skip_special_tokens}
        return str(self._post("/detokenize", body)["prompt"])

    def tokenize(self, request: GenerationRequest) -> list[int]:
        """As `Engine.tokenize`, outside of any conversation."""
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.messages is None:
            return self.encode(request.prompt or "")
        body = {
            "messages": list(map(_message, request.messages)),
            "tools": request.tools,
            "chat_template_kwargs": request.chat_template_kwargs,
        }
        return list(self._post("/tokenize", {name: value for name, value in body.items() if value})["tokens"])

    def memory(self, session_id: str) -> ConversationMemory:
        """As `Engine.memory`."""
        from copyspec_engine.adapters.remote_memory import RemoteMemory

        return RemoteMemory(session_id, self._ask_about)

    # ---- calls -------------------------------------------------------------------------------------------------

    def stream(self, request: GenerationRequest) -> RemoteHandle:
        """As `Engine.stream`; nothing is sent before the first chunk is asked for."""
        return RemoteHandle(self, request)

    def generate(self, request: GenerationRequest) -> GenerationOutput:
        """As `Engine.generate`."""
        with self.stream(request) as handle:
            return handle.result()

    async def astream(self, request: GenerationRequest) -> AsyncGenerator[StreamChunk, None]:
        """As `Engine.astream`."""
        asked = self._asked(request)
        with self._errors():
            stream = await self._async_client().chat.completions.create(**asked)
            told: list[Any] = []
            async with stream:
                async for event in stream:
                    chunk = self._chunk(event, told)
                    if chunk is not None:
                        yield chunk
                        if chunk.is_last:
                            return
        raise _broken_off(request)

    async def agenerate(self, request: GenerationRequest) -> GenerationOutput:
        """As `Engine.agenerate`."""
        async with aclosing(self.astream(request)) as chunks:
            async for chunk in chunks:
                if chunk.output is not None:
                    return chunk.output
        raise _broken_off(request)

    def _async_client(self) -> openai.AsyncOpenAI:
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            self._async_clients[loop] = self._make_async_client()
        return self._async_clients[loop]

    def chunks(self, request: GenerationRequest) -> Iterator[StreamChunk]:
        """The chunks of a call; closing the iterator ends the call, and the model stops writing."""
        asked, told = self._asked(request), list[Any]()
        with self._errors(), self._client.chat.completions.create(**asked) as stream:
            for event in stream:
                chunk = self._chunk(event, told)
                if chunk is not None:
                    yield chunk
                    if chunk.is_last:
                        return
        raise _broken_off(request)

    def _asked(self, request: GenerationRequest) -> dict[str, Any]:
        """The arguments of the client's method.

        Raises:
            ConfigError: something is asked for that this API cannot say.
        """
        if request.messages is None:
            raise ConfigError("Got a prompt without messages but a server is asked by messages only", "prompt")
        if request.memory_pool is not None:
            raise ConfigError(
                f"Got memory_pool={request.memory_pool!r} with base_url: whom a server's conversations share texts "
                "with is up to the server",
                "memory_pool",
            )
        named = request.session_id if request.keep_texts else None  # else the server finds the conversation itself
        sampling = {name: getattr(request.sampling, name) for name in request.sampling.model_fields_set}
        if "temperature" not in {*sampling, *self.info.sampling_defaults}:
            sampling["temperature"] = request.sampling.temperature
        if "logit_bias" in sampling:
            sampling["logit_bias"] = {str(token): bias for token, bias in sampling["logit_bias"]}
        own: dict[str, Any] = {"chunks": True, "explain": request.explain, "timeout_s": request.timeout_s}
        if request.drafter is not None:
            own["drafter"] = drafter_of(request.drafter).model_dump(mode="json")
        if request.tools and request.grammar is None:
            own["guided"] = False
        is_strict = request.grammar is not None and request.grammar.tools is not None and not request.grammar.lenient
        body = {
            **_form(request.grammar),
            **sampling,
            "tools": None if request.tools is None else [_tool(tool, strict=is_strict) for tool in request.tools],
            "chat_template_kwargs": request.chat_template_kwargs,
            "prompt_cache_key": request.cache_salt,
            "prediction": request.prediction and {"type": "content", "content": request.prediction},
            "copyspec": {name: value for name, value in own.items() if value is not None},
        }
        given = {name: value for name, value in body.items() if value is not None and value != {}}
        return {
            "model": self.info.model,
            "messages": list(map(_message, request.messages)),
            "stream": True,
            "extra_headers": {
                **trace_headers(),
                **({} if named is None else {"X-Session-ID": quote(named, safe=" ")}),
            },
            "extra_body": given,
        }

    def _chunk(self, event: openai.types.chat.ChatCompletionChunk, told: list[Any]) -> StreamChunk | None:
        """What an event says; None: nothing yet.

        Args:
            event: of the stream.
            told: log-probabilities of tokens whose chunk is still to come, with the tokens' texts.
        """
        for choice in event.choices:
            told += (choice.logprobs and choice.logprobs.content) or ()
            said = (choice.model_extra or {}).get("copyspec") or {}
            if "chunk" in said:
                chunk = chunk_from_json(said["chunk"])
                for found, shown in zip(chunk.logprobs or (), told, strict=False):
                    self._token_texts[found.token_id] = shown.token
                    for (token_id, _), other in zip(found.top, shown.top_logprobs, strict=False):
                        self._token_texts[token_id] = other.token
                told.clear()
                return chunk
        return None

    # ---- what is no chat ---------------------------------------------------------------------------------------

    def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._errors():
            # Not cast to dict[str, Any]: Python 3.10 takes that for a class, and the client then fails on it.
            return cast("Mapping[str, Any]", self._client.post(self._url(path), body=body, cast_to=object))

    def _url(self, path: str) -> str:
        return self.base_url.removesuffix("/v1") + path

    def _ask_about(self, method: str, path: str, body: Any = None) -> Any:  # noqa: ANN401 - any JSON value
        """What the server says of a conversation; None: it knows none of this name."""
        import openai

        options: Any = {} if body is None else {"body": body}
        try:
            with self._errors(but=openai.NotFoundError):
                return getattr(self._client, method)(self._url(path), cast_to=object, **options)
        except openai.NotFoundError:
            return None

    @contextmanager
    def _errors(self, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Raise what the client raises as the engine's own errors.

        Args:
            but: is raised as it is.
        """
        import openai

        try:
            yield
        except but:
            raise
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RequestFailedError(
                f"{self.base_url} cannot be reached ({type(cause).__name__}: {cause}): is `copyspec serve` running "
                "there?"
            ) from error
        except openai.APIError as error:
            _raise(error)


class RemoteHandle(RequestHandle):
    """A running request of a server; see `RequestHandle`."""

    def __init__(self, engine: RemoteEngine, request: GenerationRequest) -> None:
        super().__init__(request.request_id)
        self._chunks = engine.chunks(request)

    def __next__(self) -> StreamChunk:
        if isinstance(self._last, Exception):
            raise self._last
        try:
            item = next(self._chunks)
        except StopIteration:
            raise
        except Exception as error:
            self._last = error
            raise
        if item.is_last:
            self._last = item
        return item

    def close(self) -> None:
        """End the request unless it is finished."""
        if hasattr(self, "_chunks"):
            self._chunks.close()  # type: ignore[attr-defined]  # it is a generator


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a chat template in OpenAI's form: the arguments of calls as JSON."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _tool(tool: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """A function schema, marked as one to be kept to in every detail if it is."""
    return {**tool, "function": {**tool["function"], "strict": True}} if strict else dict(tool)


_LOOSE = {"whitespace_flexible": True}
"""As in process, where a server would leave no white space between the parts of JSON."""


def _form(grammar: Grammar | None) -> dict[str, Any]:
    """What an answer must look like, in OpenAI's terms.

    Raises:
        ConfigError: these have no words for it.
    """
    if grammar is None:
        return {}
    if grammar.tools is not None:
        calls = grammar.tools
        is_name = calls.tool_choice not in ("auto", "required")
        choice = {"type": "function", "function": {"name": calls.tool_choice}} if is_name else calls.tool_choice
        form = {} if calls.answer_schema is None else _json_form(calls.answer_schema, strict=not grammar.lenient)
        return {"tool_choice": choice, "parallel_tool_calls": calls.parallel, **form}
    if grammar.json_object:
        return _json_form({"type": "object"}, strict=False)
    if grammar.json_schema is not None:
        return _json_form(grammar.json_schema, strict=not grammar.lenient)
    raise ConfigError("Got a grammar that is no JSON with base_url: OpenAI's API knows JSON and tool calls", "grammar")


def _json_form(schema: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    named = {"name": "answer", "schema": {"x-guidance": _LOOSE, **schema}, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _broken_off(request: GenerationRequest) -> RequestFailedError:
    return RequestFailedError(f"The answer to request {request.request_id} broke off: the server has stopped")


_OVERFLOW = re.compile(r"Got a request of (\d+) tokens but (.+?) holds (\d+)")
_BUSY = re.compile(r"Got a request while (\d+)")


def _raise(error: openai.APIError) -> NoReturn:
    """The engine's error that the server's stands for."""
    body = error.body if isinstance(error.body, dict) else {}
    message, code, status = str(body.get("message") or error.message), error.code, getattr(error, "status_code", 500)
    overflow, busy = _OVERFLOW.match(message), _BUSY.match(message)
    if overflow is not None:
        raise ContextOverflowError(int(overflow[1]), int(overflow[3]), overflow[2]) from error
    if busy is not None:
        raise EngineBusyError(int(busy[1])) from error
    if code == "not_installed":
        raise CopySpecError(message) from error
    if status in (400, 401, 403, 404, 413, 422):
        raise ConfigError(message, error.param) from error
    if status == 503:
        raise EngineStoppedError(RuntimeError(message)) from error
    raise RequestFailedError(message) from error


AnyEngine = Engine | RemoteEngine
"""What answers a framework's calls."""


@lru_cache(maxsize=64)
def shared_remote(base_url: str, api_key: str | None, model: str | None) -> RemoteEngine:
    """This process's way to a server's model; calls that say the same share one, with its connections."""
    return RemoteEngine(base_url, api_key, model)
