"""What all options have in common: they are frozen, take known names only, and say in one line what is wrong.

An error also says what to use in place of an option that is not known: by other libraries' names for ours, and by the
nearest spelling.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema
from pydantic_core.core_schema import DictSchema, ListSchema, TupleSchema

from copyspec_engine.values.errors import ConfigError

__all__ = [
    "Documented",
    "Options",
    "advice",
    "declared",
    "explain_errors",
    "is_secret",
]


_NAMES = {
    "model": "model_name model_id model_path model_name_or_path pretrained_model_name_or_path repo_id checkpoint",
    "dtype": "torch_dtype precision data_type",
    "device": "n_gpu_layers num_gpu gpu_layers use_gpu device_id",
    'device="all"': "device_map tensor_parallel_size num_gpus tensor_split main_gpu",
    'quantization="int8"': "load_in_8bit load_in_4bit quantization_config quantize quantization_bit",
    "max_model_len": "num_ctx n_ctx context_window context_size context_length max_context_length max_seq_len "
    "max_seq_length max_model_length model_max_length max_position_embeddings max_input_tokens max_total_tokens",
    "kv_cache_tokens": "gpu_memory_utilization kv_cache_size max_cache_len num_gpu_blocks",
    "max_running": "max_num_seqs max_batch_size batch_size n_parallel num_parallel",
    "max_prefill_tokens": "max_num_batched_tokens n_batch num_batch prefill_chunk_size",
    "draft_model": "draft assistant_model speculative_model draft_model_name",
    "draft_model=DraftModel(name, max_tokens=...)": "max_draft_model_tokens num_speculative_tokens "
    "num_assistant_tokens draft_max",
    "draft_model=DraftModel(name, device=...)": "draft_model_device",
    "draft_model=DraftModel(name, step_cost=...)": "draft_model_step_cost",
    "drafter=AdaptiveDrafter(draft_model_use=...)": "combine",
    "memory_tokens": "max_session_tokens max_pool_tokens max_pools",
    'step_cost="remeasure"': "calibrate",
    "max_draft_tokens": "prompt_lookup_num_tokens num_draft_tokens",
    "max_tokens": "max_new_tokens max_length max_completion_tokens max_output_tokens max_tokens_to_sample max_gen_len "
    "max_gen_tokens num_predict n_predict num_output num_tokens n_tokens output_tokens",
    "temperature": "do_sample temp sampling_temperature",
    "repetition_penalty": "repeat_penalty rep_penalty",
    "stop": "stop_sequences stop_sequence stop_strings stop_words stop_texts stopping_criteria",
    "stop_token_ids": "eos_token_id eos_token_ids stop_tokens",
    "min_tokens": "min_new_tokens min_length min_completion_tokens",
    "bad_words": "bad_words_ids banned_strings banned_words",
    "suppress_tokens": "banned_tokens",
    "seed": "random_seed random_state generator",
    "logprobs": "output_scores output_logits return_logprobs",
    "top_logprobs": "n_probs num_logprobs logprobs_num",
    "timeout timeout_s": "timeout timeout_s request_timeout timeout_seconds timeout_sec max_time time_limit",
    "base_url": "api_base api_url endpoint endpoint_url server_url",
    "api_key": "openai_api_key token",
    "session_id": "thread_id conversation_id chat_id session slot_id",
    "prediction": "predicted_output predicted_outputs",
    "sampling": "sampling_params sampling_parameters gen_kwargs",
    "response_format grammar": "format guided_json output_schema response_schema structured_outputs",
    "regex": "guided_regex",
    "choice": "guided_choice choices",
    "lark": "guided_grammar gbnf",
    "tools": "functions",
    "tool_choice": "function_call",
    'chat_template_kwargs={"enable_thinking": ...}': "enable_thinking think thinking reasoning",
    "chat_template": "template prompt_template",
    "chat_template_kwargs": "template_kwargs",
    "prompt": "input inputs text question",
    "prompt_token_ids": "input_ids prompt_ids token_ids",
}
"""Our names, the first that the options have, and what others call them. What stands behind "=" is a value to give."""

_NEEDLESS = {
    "the model runs in this process, or behind base_url": "api_version api_type host port headers default_headers "
    "organization huggingfacehub_api_token client http_client async_client proxies user max_connections",
    "the model stays loaded until its engine is closed": "keep_alive",
    "nothing is printed; the logger copyspec_engine says what is going on": "verbose disable_log_stats",
    "a call gives one answer, ask several times with one cache_salt for more": "n num_return_sequences",
    "a call gives one answer, by greedy decoding or sampling": "best_of num_beams num_beam_groups "
    "early_stopping length_penalty use_beam_search",
    "of what narrows sampling there are top_k, top_p and min_p": "typical_p tfs_z mirostat mirostat_tau mirostat_eta "
    "epsilon_cutoff eta_cutoff top_a xtc_threshold xtc_probability dry_multiplier",
    "repetition_penalty, presence_penalty and frequency_penalty count single tokens": "repeat_last_n "
    "encoder_repetition_penalty",
    "a method of its own streams": "stream streaming",
    "torch.set_num_threads or OMP_NUM_THREADS decides it": "n_threads num_threads num_thread threads cpu_threads",
    "the hub's variables HF_HOME and HF_TOKEN decide it": "cache_dir download_dir hf_token use_auth_token",
    "the tokenizer is the model's own": "tokenizer tokenizer_name tokenizer_mode tokenizer_kwargs",
    "attention is the engine's own": "attn_implementation use_flash_attention flash_attn",
    "the KV cache is the engine's own": "use_cache past_key_values cache_implementation enable_prefix_caching",
    "each option goes by its own name": "model_kwargs generate_kwargs generation_kwargs additional_kwargs "
    "pipeline_kwargs extra_body options",
    "there is no choice of revisions: name the folder of the one that is wanted": "revision",
}
"""Why some options of others have no like here."""

_OURS = {name: ours for ours, names in _NAMES.items() for name in names.split()}
_REASONS = {name: reason for reason, names in _NEEDLESS.items() for name in names.split()}
_LIKENESS = 0.75
_MAX_DEPTH = 2


def is_secret(name: str) -> bool:
    """Whether the value of such an option should not be shown."""
    return bool(re.search(r"api_?key|secret|password|auth|(hf|api)_?token|credential|headers", name, re.IGNORECASE))


def advice(name: str, target: type[BaseModel], homes: Iterable[type[BaseModel]], beside: Iterable[str] = ()) -> str:
    """What to do about an option `name` that `target` does not have.

    Args:
        name: as it was given.
        target: the options among which it was given.
        homes: other classes whose options it may be.
        beside: names of options that are taken along with its own.
    """
    homes = tuple(homes)
    own = {field: field for field in (*target.model_fields, *beside)}
    elsewhere = {field: field for home in homes for field in home.model_fields}
    known = {**elsewhere, **_REASONS, **_OURS, **own}
    wanted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    alike = get_close_matches(wanted, known, n=1, cutoff=_LIKENESS)
    found = known[alike[0]] if alike else None
    if found is None:
        return f"expected one of {', '.join(own)}"
    if found in _NEEDLESS:
        return f"leave it out, {found}"
    return _instead(found, target, homes, own)


def _instead(ours: str, target: type[BaseModel], homes: tuple[type[BaseModel], ...], own: Mapping[str, str]) -> str:
    """Where one of our options is set: in the class, in an object that it takes, or elsewhere."""
    for text in ours.split() if "=" not in ours else (ours,):
        name = text.split("=")[0]
        if name in own:
            return f"use {text}"
        value = text if "=" in text else f"{text}=..."
        for depth in range(1, _MAX_DEPTH + 1):
            if path := next(_paths(name, value, target, depth), None):
                return f"use {path}"
        if home := next((home for home in homes if name in home.model_fields), None):
            return f"use {text} of {home.__name__}"
    return f"expected one of {', '.join(own)}"


def _paths(name: str, value: str, target: type[BaseModel], depth: int) -> Iterator[str]:
    """How `value` of option `name` is set in an object `depth` steps below it."""
    for field, info in target.model_fields.items():
        for kind in _models(info.annotation):
            if any(other.is_required() for other in kind.model_fields.values()):
                continue  # which would have to be given too
            inner = [value] if depth == 1 and name in kind.model_fields else []
            if depth > 1:
                inner += _paths(name, value, kind, depth - 1)
            yield from (f"{field}={kind.__name__}({text})" for text in inner)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401 - any type, also a union of some
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


_MODULES = ("copyspec_engine.values.config", "copyspec_engine.values.grammar")
_OPTIONS = "\n\nOptions:\n"
_INDENT = " " * 8
_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_MAX_SHOWN = 300
"""Characters of a value in an error: a whole prompt would hide what is wrong."""


_COLLECTIONS = {
    name
    for name, kind in (("list", ListSchema), ("tuple", TupleSchema), ("dict", DictSchema))
    if "fail_fast" in kind.__annotations__  # of dicts not in every version of pydantic
}


def _end_at_first_error(schema: Any) -> None:  # noqa: ANN401 - any part of a schema
    """Have the collections in a schema of pydantic's checked up to the first wrong value only."""
    if isinstance(schema, dict):
        if schema.get("type") in _COLLECTIONS:
            schema["fail_fast"] = True
        for part in schema.values():
            _end_at_first_error(part)
    elif isinstance(schema, list):
        for part in schema:
            _end_at_first_error(part)


class Documented(BaseModel):
    """Options of which `help` shows each with its type, default, range, and what is said below it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    told_by: ClassVar[tuple[type[BaseModel], ...]] = ()
    """Whose fields of the same names tell of those that have no text of their own."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401
        """What pydantic checks. One wrong value of a collection is told of: a million take it half a minute."""
        schema = handler(source)
        _end_at_first_error(schema)
        return schema

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:  # noqa: ANN401 - as pydantic has it
        for name, field in cls.model_fields.items():
            for other in cls.told_by if field.description is None else ():
                if name in other.model_fields:
                    field.description = other.model_fields[name].description
                    break
        own = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        lines = [
            f"    {name}: {declared(field)}\n"
            + textwrap.fill(" ".join(field.description.split()), 116, initial_indent=_INDENT, subsequent_indent=_INDENT)
            for name, field in cls.model_fields.items()
            if field.description
        ]
        cls.__doc__ = own + _OPTIONS + "\n".join(lines) if lines else own


def declared(field: FieldInfo) -> str:
    """The type of a field, its default and the range of its numbers, as one reads them."""
    ranges = [f"{sign} {getattr(rule, key)}" for rule in field.metadata for key, sign in _SIGNS if hasattr(rule, key)]
    within = f" ({', '.join(ranges)})" if ranges else ""
    default = field.default
    if field.is_required():
        return f"{_type_text(field.annotation)}, required{within}"
    if field.default_factory is not None:
        return f"{_type_text(field.annotation)}, made anew{within}"
    shown = f"{type(default).__name__}()" if isinstance(default, BaseModel) else repr(default)
    return f"{_type_text(field.annotation)} = {shown}{within}"


def _type_text(kind: Any) -> str:  # noqa: ANN401 - any type
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_text(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, inner))
    if kind in (None, NoneType, ...):
        return "None" if kind is not ... else "..."
    name = getattr(origin or kind, "__name__", str(kind))
    return f"{name}[{', '.join(map(_type_text, inner))}]" if inner and origin is not Callable else name


class Options(Documented):
    """Frozen options whose validation errors are `ConfigError`s that name the value."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:  # noqa: ANN401 - pydantic checks each value
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain_errors(type(self), error) from None


def explain_errors(
    target: type[BaseModel], error: ValidationError, *, called: str | None = None, beside: Iterable[str] = ()
) -> ConfigError:
    """What pydantic found, as one error with one line: `Got temperature=-1 but expected ...`.

    Args:
        target: the options that were checked.
        error: what pydantic raised.
        called: its name in the text; default: that of the class.
        beside: names of options that are taken along with its own.
    """
    lines, called = [], called or target.__name__
    homes = (*target.__subclasses__(), *_homes())
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"] if not str(part).endswith(("Drafter", "Validator()]")))
        expected = re.sub(r"^(Value error, |Input should be |\w+ should have )", "", problem["msg"])
        given = name if is_secret(name) else f"{name}={_shown(problem['input'])}"
        if problem["type"] == "extra_forbidden":
            lines.append(f"Got unknown option {given} for {called}: {advice(name, target, homes, beside)}")
        elif problem["type"] == "missing":
            lines.append(f"Got no {name} for {called} but it is required")
        elif not name or expected.startswith("Got "):  # the message of nested options or of a whole object
            lines.append(expected)
        else:
            lines.append(f"Got {given} but expected {expected}")
    places = [problem["loc"] for problem in error.errors(include_url=False)]
    return ConfigError("; ".join(dict.fromkeys(lines)), next((str(place[0]) for place in places if place), None))


def _shown(value: object) -> str:
    if isinstance(value, list | tuple | dict) and len(value) > _MAX_SHOWN:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def _homes() -> list[type[BaseModel]]:
    """All options that a caller may set; last those that cannot be set without others."""
    kinds = [kind for module in _MODULES for kind in Options.__subclasses__() if kind.__module__ == module]
    return sorted(kinds, key=lambda kind: any(field.is_required() for field in kind.model_fields.values()))
