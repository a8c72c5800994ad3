"""Loads a model, checks that it can be served, and makes it ready.

A decoder qualifies if its attention goes through the attention interface and gives, piece by piece over our KV slots,
the logits that it gives in one piece by itself: that is checked once when it loads, on the real weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from copyspec_engine.chat.template import ChatTemplate, given_template
from copyspec_engine.chat.tokenizer import ChatTokenizer, HFTokenizer, refuse_other_vocabulary
from copyspec_engine.compiled import counting_compilations
from copyspec_engine.execution import calibration
from copyspec_engine.execution.accelerator import memory_of
from copyspec_engine.execution.checkpoint import (
    eos_token_ids,
    load_failure,
    longest_context,
    read_model,
    refuse_unreadable_tokens,
    refuse_unsupported,
    resolve_device,
    vocab_size,
    why_no_rollback,
)
from copyspec_engine.execution.exact_passes import EXACT_WIDTHS, agreeing_widths
from copyspec_engine.execution.float32_head import decide_in_float32
from copyspec_engine.execution.generation_defaults import GenerationDefaults, read_defaults
from copyspec_engine.execution.narrow_decoder import MOST_TOKENS
from copyspec_engine.execution.narrow_loading import count_weights, narrow_weights, weight_bytes
from copyspec_engine.execution.narrow_weights import NarrowWeight
from copyspec_engine.execution.pass_cost import facts_of, find_pass_cost
from copyspec_engine.execution.peft_adapter import base_of_adapter, merge_adapter, tokenizer_path
from copyspec_engine.execution.rounded_cost import warn_where_slower
from copyspec_engine.execution.runner import LoadedModel, ModelRunner, Runner
from copyspec_engine.execution.self_check import Checked, check_equivalence, kv_dtype_of
from copyspec_engine.execution.stateful import StatefulRunner, check_state
from copyspec_engine.execution.weight_counts import counting_weights
from copyspec_engine.models import ModelFolder, locate_model
from copyspec_engine.models.gguf import is_converted
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import CopySpecError, ModelLoadError, UnsupportedModelError
from copyspec_engine.values.info import EngineInfo
from copyspec_engine.values.progress import LoadPhase, LoadProgress, OnProgress

__all__ = ["ReadModel", "load_model", "prepare", "read_tokenizer"]

logger = logging.getLogger(__name__)

_loading = threading.Lock()
"""transformers builds models under process-wide settings: two at once spoil each other."""


def load_model(config: EngineConfig, on_progress: OnProgress | None = None) -> LoadedModel:
    """Load weights and tokenizer, check that the architecture can be served, and size the KV pool.

    Args:
        config: what to load.
        on_progress: told of each phase as it begins, in this thread.

    Raises:
        ModelLoadError: the folder or name does not exist, cannot be read, or does not fit in memory.
        UnsupportedModelError: not a decoder, or one whose passes over our KV differ from its own.
        CopySpecError: a package that the options need is not installed.
    """
    model = _read(config, on_progress)
    draft = None if config.draft_model is None else _read(config.of_draft(config.draft_model), on_progress)
    with _load_failures(config):
        if config.quantization is not None and model.model.device.type == "cpu":
            warn_where_slower(model.model, config.model)
        loaded = prepare(model.model, model.tokenizer, config, on_progress, draft, model.weights)
    _give_back_memory()
    assert model.origin is not None
    quantization = model.origin.quantization or config.quantization
    loaded.info = replace(loaded.info, model_source=model.origin.source, quantization=quantization)
    if draft is not None and draft.origin is not None and loaded.draft is not None:
        loaded.info = replace(loaded.info, draft_model_source=draft.origin.source)
    return loaded


@dataclass(frozen=True, slots=True)
class ReadModel:
    """What was read of a model."""

    model: PreTrainedModel
    """On its device."""
    tokenizer: ChatTokenizer
    origin: ModelFolder | None = None
    weights: Path | None = None
    """The folder that its weights are from; None: they have changed since, or came from elsewhere."""


def _read(config: EngineConfig, on_progress: OnProgress | None) -> ReadModel:
    if config.chat_template is not None:
        ChatTemplate(given_template(config.chat_template), {})  # refused before anything is fetched or read
    device, origin = resolve_device(config), _folder(config.model, on_progress)
    path = str(origin.path)
    with _load_failures(config, path):
        base = _base_folder(path, config, on_progress)
        with (
            _loading,
            _phase("read", "reading the weights of", config, on_progress),
            counting_weights(f"reading the weights of {config.model}", on_progress),
        ):
            model = read_model(base or path, device, config)
            if base is not None:
                model = merge_adapter(model, path)
        return ReadModel(model, _read_tokenizer(path, base, config), origin, Path(path) if base is None else None)


def read_tokenizer(config: EngineConfig) -> ChatTokenizer:
    """The tokenizer of a model, without its weights.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
        UnsupportedModelError: it is not a fast one.
    """
    path = str(_folder(config.model).path)
    with _load_failures(config, path):
        return _read_tokenizer(path, _base_folder(path, config), config)


def _read_tokenizer(path: str, base: str | None, config: EngineConfig) -> ChatTokenizer:
    words = tokenizer_path(path, base)
    auto: Any = AutoTokenizer  # for some architectures it takes another tokenizer than the folder's
    reader = PreTrainedTokenizerFast if is_converted(words) else auto
    tokenizer = reader.from_pretrained(words, trust_remote_code=config.trust_remote_code)
    return HFTokenizer(tokenizer, chat_template=config.chat_template, tool_prompt=config.tool_prompt)


def _folder(name: str, on_progress: OnProgress | None = None) -> ModelFolder:
    """Where a model is read from; fetched and converted before, if need be."""
    found = locate_model(name, on_progress)
    with _loading:
        return found.as_folder(on_progress)


def _base_folder(path: str, config: EngineConfig, on_progress: OnProgress | None = None) -> str | None:
    """The folder of the model that an adapter changes; None if `path` is no adapter."""
    base = base_of_adapter(path, config)
    return None if base is None else str(_folder(base, on_progress).path)


@contextlib.contextmanager
def _load_failures(config: EngineConfig, path: str = "") -> Iterator[None]:
    """Say of whatever goes wrong what to do about it."""
    try:
        yield
    except CopySpecError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            raise ModelLoadError(
                f"{config.model} does not fit in the memory of {resolve_device(config)}: use a smaller model, "
                "dtype='bfloat16' or another device"
            ) from error
        raise ModelLoadError(load_failure(config.model, path, error)) from error


def prepare(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    config: EngineConfig,
    on_progress: OnProgress | None = None,
    draft: ReadModel | None = None,
    weights: Path | None = None,
) -> LoadedModel:
    """Make a model that is in memory ready to serve, with its draft model if there is one (see `load_model`)."""
    served = _check(model, config, on_progress, weights)
    if config.draft_model is None or draft is None or served.reason is not None:
        return _ready(model, tokenizer, config, served, on_progress)
    own = config.of_draft(config.draft_model)
    refuse_other_vocabulary(config.model, tokenizer, own.model, draft.tokenizer)
    beside = _check(draft.model, own, on_progress, draft.weights, decides=False)
    if beside.reason is not None:
        raise UnsupportedModelError(f"Got draft_model={own.model!r} but it cannot draft: {beside.reason}")
    if beside.num_parameters >= served.num_parameters:
        logger.warning(
            "The draft model %s has %d weights and the model %d: its drafts cost more than they can save",
            own.model,
            beside.num_parameters,
            served.num_parameters,
        )
    shared = draft.model.device == model.device
    loaded = _ready(model, tokenizer, config, served, on_progress, beside.bytes_per_token if shared else 0)
    own = own.model_copy(update={"kv_cache_tokens": loaded.info.num_kv_slots})
    loaded.draft = _ready(draft.model, draft.tokenizer, own, beside, on_progress)
    loaded.info = replace(loaded.info, draft_model=own.model, draft_model_step_cost=loaded.draft.info.step_cost)
    return loaded


@dataclass(frozen=True, slots=True)
class _Served:
    """How a model can be served."""

    checked: Checked
    bytes_per_token: int
    stateful: StatefulRunner | None
    reason: str | None
    """Why nothing can be taken back from what it has read."""
    num_parameters: int
    exact_widths: tuple[int, ...] | None = None


def _check(
    model: PreTrainedModel,
    config: EngineConfig,
    on_progress: OnProgress | None,
    weights: Path | None,
    *,
    decides: bool = True,
) -> _Served:
    """Check how a model can be served; one that only drafts does not decide about tokens."""
    refuse_unsupported(config.model, model.config)
    refuse_unreadable_tokens(config.model, model)
    reason = why_no_rollback(model)
    if reason is not None and config.kv_dtype != "auto":
        raise UnsupportedModelError(
            f"Got kv_dtype={config.kv_dtype!r} but {config.model} keeps a state instead of KV: {reason}"
        )
    if reason is not None and config.exact:
        raise UnsupportedModelError(f"Got exact=True but {config.model} keeps a state instead of KV: {reason}")
    num_parameters = count_weights(model)  # before tied weights are laid out apart

    def told(count: int) -> None:
        if on_progress is not None:
            text = f"compiling what {config.model} needs, once after an installation"
            on_progress(LoadProgress("check", text, done=count, unit="it"))

    with _phase("check", "checking", config, on_progress), counting_compilations(told):
        if decides:
            decide_in_float32(model, config.model)
        if reason is None:
            tried = EXACT_WIDTHS if config.exact else None
            make_runner = partial(ModelRunner, model, exact_widths=tried)
            checked = check_equivalence(model, config, make_runner, _narrow_weights(model, weights))
            widths = _exact_widths(model, config, checked) if tried else None
            return _Served(checked, checked.bytes_per_token, None, None, num_parameters, widths)
        stateful, bytes_per_token = check_state(model, config.model)
        logger.warning("%s runs without drafting: %s", config.model, reason)
        return _Served(Checked(0), bytes_per_token, stateful, reason, num_parameters)


def _narrow_weights(model: PreTrainedModel, folder: Path | None) -> dict[str, NarrowWeight]:
    """Weights in the precision that they came in, where passes of few tokens can read them."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return {}
    return narrow_weights(model, folder)


def _exact_widths(model: PreTrainedModel, config: EngineConfig, checked: Checked) -> tuple[int, ...]:
    """The widths that agree: those that a cost curve of the same model and machine was measured for, else tried."""
    kv_dtype = kv_dtype_of(config, model)
    if checked.narrow is not None:  # all passes are narrow then: a token's bits are its own in these
        make_runner = partial(ModelRunner, model, execution=checked.execution, narrow=checked.narrow, kv_dtype=kv_dtype)
        return agreeing_widths(config.model, vocab_size(model), make_runner, widths=(MOST_TOKENS,))
    if config.step_cost == "measured":
        facts = facts_of(model, config.model) | {"execution": checked.execution}
        for curve in calibration.kept_curves():
            widths = tuple(map(int, re.findall(r"\d+", curve.facts.get("exact", ""))))
            if widths and facts.items() <= curve.facts.items() and set(widths) <= set(EXACT_WIDTHS):
                return widths
    return agreeing_widths(config.model, vocab_size(model), partial(ModelRunner, model, kv_dtype=kv_dtype))


def _ready(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    config: EngineConfig,
    served: _Served,
    on_progress: OnProgress | None,
    bytes_beside: int = 0,
) -> LoadedModel:
    """A checked model with its KV pool, and what its passes cost.

    Args:
        model: in memory.
        tokenizer: its own.
        config: what was asked for.
        served: what the check found.
        on_progress: see `load_model`.
        bytes_beside: what else a token takes on this device, in the KV of a draft model.
    """
    wide_bytes, narrow_bytes = _weight_bytes(model, config, served)
    limit = longest_context(model.config.get_text_config(), config.model)
    max_model_len, checked = min(config.max_model_len or limit, limit), served.checked
    token_bytes = served.bytes_per_token + bytes_beside
    num_slots = choose_num_slots(config.kv_cache_tokens, max_model_len, token_bytes, model.device)
    kv_dtype = None if served.stateful else kv_dtype_of(config, model)
    runner: Runner = served.stateful or ModelRunner(
        model, num_slots, served.exact_widths, checked.execution, checked.narrow, kv_dtype
    )
    step_cost, is_measured = config.points or (), False
    if not step_cost and isinstance(runner, ModelRunner):
        is_measured = True
        with _phase("measure", "measuring", config, on_progress):
            step_cost = find_pass_cost(runner, model, config, min(num_slots, max_model_len), checked.execution)
    defaults = _sampling_defaults(model, config)
    info = EngineInfo(
        model=config.model,
        architecture=type(model).__name__,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        num_parameters=served.num_parameters,
        weight_bytes=wide_bytes,
        narrow_weight_bytes=narrow_bytes,
        num_kv_slots=num_slots,
        kv_bytes_per_token=served.bytes_per_token,
        kv_dtype=str(kv_dtype or "").removeprefix("torch."),
        step_cost=step_cost,
        exact=config.exact,
        drafting_error=served.reason,
        execution=checked.execution,
        execution_error=checked.error,
        sampling_defaults=defaults.options,
        sampling_defaults_not_done=defaults.not_done,
        tool_calling=tokenizer.chat_format().tool_calling,
        check_difference=checked.difference,
    )
    return LoadedModel(
        runner, tokenizer, info, eos_token_ids(model, tokenizer), is_measured, served.exact_widths, defaults
    )


def _weight_bytes(model: PreTrainedModel, config: EngineConfig, served: _Served) -> tuple[int, int]:
    """Bytes of the weights, and of those of them that are kept in fewer bits."""
    narrow = served.checked.narrow
    wide_bytes, narrow_bytes = weight_bytes(model, [] if narrow is None else narrow.weights)
    logger.info(
        "%s: weights take %.1f MB, and in fewer bits %.1f MB", config.model, wide_bytes / 1e6, narrow_bytes / 1e6
    )
    return wide_bytes, narrow_bytes


def _sampling_defaults(model: PreTrainedModel, config: EngineConfig) -> GenerationDefaults:
    """What the checkpoint says of sampling, unless that is to be ignored."""
    if config.generation_config == "ignore":
        return GenerationDefaults()
    return read_defaults(model.generation_config, config.model, vocab_size(model))


@contextlib.contextmanager
def _phase(phase: LoadPhase, doing: str, config: EngineConfig, on_progress: OnProgress | None) -> Iterator[None]:
    """Tell of a phase of loading as it begins, and log how long it took."""
    if on_progress is not None:
        on_progress(LoadProgress(phase, f"{doing} {config.model}"))
    start = time.perf_counter()
    yield
    logger.info("%s %s took %.1f s", doing, config.model, time.perf_counter() - start)


def _give_back_memory() -> None:
    """Let the system have what was freed on the way: glibc keeps some 40 MB of it else."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def choose_num_slots(wanted: int | None, max_model_len: int, bytes_per_token: int, device: torch.device) -> int:
    """Slots of the KV pool: what was asked for, else four contexts or a quarter of the free memory if that is less.

    Raises:
        ModelLoadError: what was asked for is more than the free memory.
    """
    free, _ = memory_of(device)
    if wanted is None:
        return max(min(4 * max_model_len, free // 4 // max(bytes_per_token, 1)), 256)
    if wanted * bytes_per_token > free:
        raise ModelLoadError(
            f"Got kv_cache_tokens={wanted} but {wanted * bytes_per_token / 1e9:,.1f} GB for them is more than the "
            f"{free / 1e9:,.1f} GB that are free on {device}"
        )
    return wanted
