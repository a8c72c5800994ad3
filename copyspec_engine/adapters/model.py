"""The model of a framework: its options, and the engine that answers, in this process or behind a URL.

Options of calls are those of `SamplingParams` and `GenerationRequest`. Their names and types are listed here, so that
editors know them; what they do is told where the engine has them, which checks their values.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator
from typing_extensions import Self

from copyspec_engine.adapters.conversations import ConversationFinder, first_named
from copyspec_engine.adapters.remote import AnyEngine, RemoteEngine, shared_remote, without_password
from copyspec_engine.chat.formats import ChatFormat
from copyspec_engine.engine.engine import Engine, loaded_engine, shared_engine
from copyspec_engine.engine.model_facts import ModelFacts, read_model_facts
from copyspec_engine.values.config import (
    EngineConfig,
    GenerationRequest,
    GivenDrafter,
    ModelOptions,
    Prediction,
    SamplingParams,
)
from copyspec_engine.values.errors import ConfigError, CopySpecError
from copyspec_engine.values.options import Documented, explain_errors
from copyspec_engine.values.progress import OnProgress

if TYPE_CHECKING:
    from copyspec_engine import ConversationMemory
    from copyspec_engine.chat.tokenizer import ChatTokenizer

__all__ = [
    "AdapterOptions",
    "AnyEngine",
    "ChatFormat",
    "LocalModel",
    "ModelFacts",
    "clear_errors",
    "model_facts",
    "prompt_length",
]

logger = logging.getLogger(__name__)

_UNSHOWN = frozenset({"cache_salt", "chat_template", "chat_template_kwargs", "logit_bias", "prediction"})
"""Options that a model's repr leaves out: long ones, and one that opens what is shared."""


class AdapterOptions(Documented):
    """What may be set for a model and again for one call.

    None, the default of most, leaves an option as the checkpoint's generation_config.json has it, else as the engine.
    """

    model_config = ConfigDict(extra="forbid")

    called: ClassVar[str | None] = None
    """What errors call the class of the options; default: the class."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of options that are taken along with these, for advice about one that is not known."""
    told_by = (SamplingParams, GenerationRequest)

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words: list[str | list[int]] | None = None
    no_repeat_ngram_size: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the engine ends the answer; default: no limit."""
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    drafter: GivenDrafter | None = None
    session_id: str | None = Field(default=None, min_length=1)
    """The conversation, whose texts and KV cache are kept over calls, for all who name it; default: the one whose
    messages, the last answer included, those of the call begin with, else none."""
    memory_pool: str | None = None
    prediction: Prediction | None = None
    include_segments: bool = False
    """Attach the pieces of what was written, and whether each was copied, as `segments`."""
    include_token_ids: bool = False
    """Attach the answer's `token_ids`."""
    include_explanation: bool = False
    """Attach all of what `explain` can tell: of all that was written, calls and reasoning too, which is attached
    as `written`, and with up to 60 characters around what was copied from elsewhere in a conversation that is named.
    Without it, `explain` tells of the text of the answer, and quotes nothing."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        with clear_errors(type(self), called=self.called, beside=self.beside):
            super().__init__(**options)

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, options: dict[str, Any]) -> dict[str, Any]:
        single = {name: [options[name]] for name in ("stop", "bad_words") if isinstance(options.get(name), str)}
        return {**options, **single}

    @model_validator(mode="after")
    def _check_options(self) -> AdapterOptions:
        GenerationRequest(messages=[{}], **self.request_options())
        return self

    def sampling(self) -> SamplingParams:
        """The sampling options for the engine."""
        names = SamplingParams.model_fields
        return SamplingParams(**{name: value for name in names if (value := getattr(self, name)) is not None})

    def request_options(self) -> dict[str, Any]:
        """The options of a `GenerationRequest` besides its input and its session."""
        return {
            "sampling": self.sampling(),
            "memory_pool": self.memory_pool,
            "prediction": self.prediction,
            "drafter": self.drafter,
            "chat_template_kwargs": self.chat_template_kwargs or {},
            "cache_salt": self.cache_salt,
            "timeout_s": self.timeout,
            "explain": True,
        }


@contextmanager
def clear_errors(target: type[BaseModel], *, called: str | None = None, beside: Iterable[str] = ()) -> Iterator[None]:
    """Raise pydantic's validation errors as one `ConfigError` that names each option, its value, and what to do.

    Args:
        target: the options that are checked.
        called: its name in the text; default: that of the class.
        beside: names of options that are taken along with its own.
    """
    try:
        yield
    except ValidationError as error:
        raise explain_errors(target, error, called=called, beside=beside) from None


class LocalModel(AdapterOptions, ModelOptions):
    """What a framework's model has besides the framework's own: options, an engine, and the conversations it has had.

    Constructing one loads no weights. Models with the same options of the engine share one, which is loaded once.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine | EngineConfig | None = Field(default=None, exclude=True, repr=False)
    """An engine to use, or the configuration of one to share: it decides the options above. Pickling keeps the
    configuration only."""
    base_url: str | None = None
    """Address of a `copyspec serve` whose model answers, such as "http://127.0.0.1:8000/v1"; needs the extra "client".
    Then nothing is loaded here, `model` is a name of the server's (default: its only one), and the other options of the
    engine are the server's own."""
    api_key: SecretStr | None = Field(default=None, exclude=True)
    """A key of that server, if it has keys; neither serialised nor shown."""
    on_progress: OnProgress | None = Field(default=None, exclude=True, repr=False)
    """Told of the weights as they are loaded, in the thread that calls; what it raises ends the load. Default: a bar on
    a terminal or in a notebook. It decides no answer: it is not serialised, pickled or part of a cache's key."""

    _conversations: ConversationFinder = PrivateAttr(default_factory=ConversationFinder)

    @model_validator(mode="before")
    @classmethod
    def _adopt_engine(cls, options: Any) -> Any:  # noqa: ANN401 - whatever the caller gave
        return _with_options_of_engine(options) if isinstance(options, dict) else options

    @model_validator(mode="after")
    def _check_engine_config(self) -> Self:
        self._engine_config()
        if self.base_url is None and self.api_key is not None:
            raise ConfigError("Got api_key without base_url: it is a server's key", "api_key")
        if self.base_url is not None:
            others = {"engine", *ModelOptions.model_fields} - {"model"}
            given = sorted(name for name in others & self.model_fields_set if getattr(self, name) is not None)
            if given:
                raise ConfigError(
                    f"Got {given[0]}={getattr(self, given[0])!r} with base_url: that is up to the server, leave it out",
                    given[0],
                )
            self._remote(None)
        return self

    def __getstate__(self) -> dict[Any, Any]:
        if isinstance(self.engine, Engine) or self.on_progress is not None:
            engine = None if self.engine is None else self._engine_config()
            return self.model_copy(update={"engine": engine, "on_progress": None}).__getstate__()
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo |= {id(kept): kept for kept in (self.engine, self.on_progress)}
        return super().__deepcopy__(memo)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What was set of the options, none of it long or secret; frameworks' own fields say nothing of the model."""
        where = {"model": self.model} if self.base_url is None else {"base_url": without_password(self.base_url)}
        own = {**AdapterOptions.model_fields, **ModelOptions.model_fields}
        given = {name: getattr(self, name) for name, option in own.items() if getattr(self, name) != option.default}
        yield from ((name, value) for name, value in (where | given).items() if name not in _UNSHOWN)

    def load(self) -> Self:
        """Load the weights now rather than at the first call, and give this model back.

        Models with the same options of the engine share one that is loaded once, whatever thread asks first; then this
        does nothing.

        Raises:
            ModelLoadError, UnsupportedModelError: as `Engine` does. What `on_progress` raises.
        """
        self._get_engine()
        return self

    async def aload(self) -> Self:
        """As `load`, in a thread of its own, in which `on_progress` is told."""
        await self._aget_engine()
        return self

    @property
    def _known(self) -> AnyEngine | EngineConfig:
        """What tells of the model without loading it."""
        if self.base_url is not None:
            return self._remote(None)
        return self.engine if isinstance(self.engine, Engine) else self._engine_config()

    def _engine_config(self, model: str | None = None) -> EngineConfig:
        """The configuration of the engine, or of that of another model."""
        if model not in (None, self.model):
            return EngineConfig(model=model, device=self.device, dtype=self.dtype, tool_prompt=self.tool_prompt)
        if isinstance(self.engine, Engine):
            return self.engine.config
        return self.engine or EngineConfig(**{name: getattr(self, name) for name in ModelOptions.model_fields})

    def _remote(self, model: str | None) -> RemoteEngine:
        """The server's model, or another one of it."""
        assert self.base_url is not None
        key = None if self.api_key is None else self.api_key.get_secret_value()
        own = self.model if "model" in self.model_fields_set else None
        return shared_remote(self.base_url, key, own if model in (None, self.model) else model)

    def _get_engine(self, model: str | None = None) -> AnyEngine:
        """The engine, or that of another model; loads the model if no one has."""
        if self.base_url is not None:
            return self._remote(model)
        if isinstance(self.engine, Engine) and model in (None, self.model):
            return self.engine
        return shared_engine(self._engine_config(model), self.on_progress)

    async def _aget_engine(self, model: str | None = None) -> AnyEngine:
        """`_get_engine`, in a thread where it loads a model or asks a server: the event loop must go on."""
        if self.base_url is not None:
            engine = self._remote(model)
            if not engine.has_info:
                await asyncio.to_thread(lambda: engine.info)
            return engine
        if isinstance(self.engine, Engine) and model in (None, self.model):
            return self.engine
        loaded = loaded_engine(self._engine_config(model))
        return await asyncio.to_thread(self._get_engine, model) if loaded is None else loaded

    def _name_of(self, engine: AnyEngine, model: str | None = None) -> str:
        """What answers call the model: as it was asked for, and a server's only one as the server does."""
        is_unnamed = isinstance(engine, RemoteEngine) and model is None and "model" not in self.model_fields_set
        return engine.info.model if is_unnamed else model or self.model

    def _session(self, said: str | None, around: str | None) -> str | None:
        """The conversation of a call.

        Args:
            said: what the call says of it.
            around: what the framework, or the code around the call, says of it.
        """
        return first_named(said, around, self.session_id)

    def _memory(self, session_id: str | None) -> ConversationMemory:
        """What a conversation remembers; loads the model if no one has.

        Raises:
            ConfigError: nothing names one.
        """
        if not session_id:
            raise ConfigError("Got no conversation but expected its id: only one that is named keeps its texts")
        return self._get_engine().memory(session_id)


def _with_options_of_engine(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with those of the engine (or its config) in them that models have too, if there is one.

    Raises:
        ConfigError: one of them is given too and differs.
    """
    engine = options.get("engine")
    config = engine.config if isinstance(engine, Engine) else engine
    if not isinstance(config, EngineConfig):
        return options
    adopted = {name: getattr(config, name) for name in ModelOptions.model_fields}
    for name, value in adopted.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"Got {name}={options[name]!r} but the engine has {name}={value!r}: leave {name} out, or pass no engine"
            )
    return {**options, **adopted}


def model_facts(engine: AnyEngine | EngineConfig) -> ModelFacts | None:
    """What is known of a model without loading it; None if it is not on this machine, or its server does not answer.

    An engine knows its own context and chat format, whatever files there are.
    """
    if isinstance(engine, EngineConfig):
        return read_model_facts(engine)
    if isinstance(engine, RemoteEngine):
        try:
            return ModelFacts(engine.info.max_model_len, engine.chat_format)
        except CopySpecError as error:  # the first call will say it again
            logger.info("nothing is known of the model yet: %s", error)
            return None
    return ModelFacts(engine.info.max_model_len, engine.chat_format)


def prompt_length(engine: AnyEngine | EngineConfig, request: GenerationRequest) -> int:
    """Tokens of the prompt of a request outside of any conversation; by a config, no weights are loaded for it.

    Raises:
        ConfigError: the chat template refuses the messages.
        ModelLoadError: the tokenizer cannot be read.
    """
    if not isinstance(engine, EngineConfig):
        return len(engine.tokenize(request.model_copy(update={"session_id": None})))
    tokenizer = _tokenizer(engine)
    if request.messages is None:
        return len(tokenizer.encode(request.prompt or ""))
    return len(tokenizer.render(request.messages, request.tools, request.chat_template_kwargs))


@lru_cache(maxsize=8)
def _tokenizer(config: EngineConfig) -> ChatTokenizer:
    from copyspec_engine.execution.loading import read_tokenizer

    return read_tokenizer(config)
