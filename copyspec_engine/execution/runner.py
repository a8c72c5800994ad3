"""The model and its KV: loads any transformers decoder and runs verify passes over it.

A decoder qualifies if its attention goes through the attention interface and gives, piece by piece over our KV slots,
the logits that it gives in one piece by itself: that is checked once when it loads, on the real weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from copyspec_engine.chat.template import ChatTemplate, given_template
from copyspec_engine.chat.tokenizer import ChatTokenizer, HFTokenizer
from copyspec_engine.chat.vocabulary import refuse_other_vocabulary
from copyspec_engine.drafting.cost import Points, undisturbed
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import calibration
from copyspec_engine.execution.accelerator import device_name, has_float64, memory_of
from copyspec_engine.execution.attention import (
    ATTENTION_NAME,
    KVBatch,
    KVRow,
    KVStore,
    Row,
    Slots,
    on_device,
    slots_of,
)
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
from copyspec_engine.execution.cuda_graphs import StaticPasses
from copyspec_engine.execution.exact_passes import EXACT_WIDTHS, agreeing_widths
from copyspec_engine.execution.float32_head import decide_in_float32
from copyspec_engine.execution.generation_defaults import GenerationDefaults, read_defaults
from copyspec_engine.execution.ordered_attention import OrderedRow
from copyspec_engine.execution.packing import Piece
from copyspec_engine.execution.peft_adapter import base_of_adapter, merge_adapter, tokenizer_path
from copyspec_engine.execution.self_check import Checked, check_equivalence
from copyspec_engine.execution.stateful import StatefulRunner, check_state
from copyspec_engine.execution.weight_counts import counting_weights
from copyspec_engine.models import ModelFolder, locate_model
from copyspec_engine.models.gguf import is_converted
from copyspec_engine.values.config import EngineConfig
from copyspec_engine.values.errors import CopySpecError, ModelLoadError, UnsupportedModelError
from copyspec_engine.values.outputs import Execution
from copyspec_engine.values.progress import LoadPhase, LoadProgress, OnProgress
from copyspec_engine.values.tokens import TokenArray

__all__ = ["LoadedModel", "ModelRunner", "Runner", "load_model", "prepare", "read_tokenizer"]

logger = logging.getLogger(__name__)

STEP_WIDTHS = (1, 2, 16, 4, 64, 8, 32, 256, 128)
"""Tokens of the passes that are measured, from coarse to fine: the curve's first step decides about most drafts."""
_LEAST_WIDTHS = 4
"""How many of them are measured on the slowest model."""
_CALIBRATION_CONTEXT = 256

_loading = threading.Lock()
"""transformers builds models under process-wide settings: two at once spoil each other."""


class Runner(Protocol):
    """What the engine needs of a model."""

    @property
    def vocab_size(self) -> int: ...

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all pieces; the logits that they want, in order, shape (sum of num_logits, vocabulary)."""
        ...

    def release(self, key: str) -> None:
        """A row is over (`Piece.key`): whatever is kept of it alone can go. It may be unknown here."""
        ...


class ModelRunner:
    """Forward passes of a transformers decoder over our KV slots.

    Args:
        model: in evaluation mode, on its device, with the attention implementation "copyspec".
        num_slots: token slots of the KV pool.
        exact_widths: fill passes up to one of these numbers of tokens, ascending, and sum in an order that a token's
            own path decides, so that its bits depend on nothing else (exact_passes.py); None: as is fastest.
        execution: how passes run, see `EngineInfo.execution`; those for a GPU not in exact mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        exact_widths: tuple[int, ...] | None = None,
        execution: Execution = "eager",
    ) -> None:
        self._model = model
        self._device = model.device
        self._vocab_size = vocab_size(model)
        self._store = KVStore(num_slots)
        self._exact_widths = exact_widths
        self._passes: StaticPasses | None = None
        if execution in ("paged", "graphs", "compiled"):
            self._passes = StaticPasses(model, self._store, use_graphs=execution != "paged")

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def store(self) -> KVStore:
        return self._store

    @property
    def capture_error(self) -> str | None:
        """Why passes are not captured any more; None if they are, or never were."""
        return None if self._passes is None else self._passes.capture_error

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        if self._exact_widths is None:
            logits = self.run(pieces)
        else:
            logits = torch.cat([self.run(those) for those in _side_by_side(pieces, self._exact_widths[-1])])
        return logits if has_float64(self._device) else logits.cpu()  # in which tokens are drawn

    def release(self, key: str) -> None:
        """Nothing to do: the pool's slots are all that a row has, and whoever took them gives them back."""

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all pieces in one pass; the logits they want, in order, shape (sum of num_logits, vocabulary).

        They are good until the next pass.
        """
        if self._passes is not None:
            return self._passes.run(pieces)
        ids = [token for piece in pieces for token in piece.ids]
        written = len(ids)
        ids += [0] * (self._filled(written) - written)
        rows: list[Row] = []
        for piece in pieces:
            rows.append(self._row(piece, rows[-1].stop if rows else 0))
        wanted = [
            row.stop - 1 - i for row, piece in zip(rows, pieces, strict=True) for i in reversed(range(piece.num_logits))
        ]
        positions = torch.cat([row.new_positions for row in rows])
        if written < len(ids):
            positions = F.pad(positions, (0, len(ids) - written))
        result = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=self._to_keep(wanted, len(ids)),
            kv_batch=KVBatch(
                store=self._store,
                write=self._index(np.concatenate([piece.slots[piece.base : piece.context] for piece in pieces])),
                written=written,
                rows=rows,
                device=self._device,
            ),
        )
        logits: torch.Tensor = result.logits[0]  # from some models those of every token
        return logits[wanted] if len(logits) == len(ids) else logits[: len(wanted)]

    def _filled(self, count: int) -> int:
        """Tokens of a pass that reads `count`."""
        return count if self._exact_widths is None else next(width for width in self._exact_widths if width >= count)

    def _to_keep(self, wanted: Sequence[int], width: int) -> torch.Tensor | int:
        """Which of a pass's tokens the head reads, filled up as a pass is; 0: all `width` of them."""
        count = self._filled(len(wanted))
        if count == width:
            return 0
        return torch.tensor([*wanted, *[0] * (count - len(wanted))], dtype=torch.long, device=self._device)

    def _row(self, piece: Piece, start: int) -> Row:
        if self._exact_widths is not None:
            return OrderedRow.of(piece, start, self._exact_widths[0], self._device)
        new, draft, visible = len(piece.ids), piece.draft, None
        positions = torch.arange(piece.context)
        if not draft.is_chain:
            positions[piece.base :] = torch.from_numpy(piece.positions())
            visible = torch.from_numpy(draft.visible(new - len(draft))).to(self._device)
        slots = self._index(piece.slots[: piece.context])
        return KVRow(start, new, slots, positions.to(self._device), visible)

    def _index(self, slots: TokenArray) -> Slots:
        return on_device(slots_of(slots), self._device)

    def measure_step_cost(
        self, context: int, room: int, widths: Sequence[int] = STEP_WIDTHS, budget_s: float = 1.0
    ) -> Points:
        """Least seconds of passes of `widths` tokens behind `context` others; uses the pool's first `room` slots.

        Must run before any request: it writes over those slots. Goes round all widths for as long as `budget_s` lasts,
        so that a burst of other load cannot spoil one of them. On a slow model it stops at the first few, at least
        four, which is why `widths` go from coarse to fine.
        """
        slots = np.arange(room, dtype=np.int64)
        self._time_pass(slots, context, 1)  # the first pass of all makes the KV tensors
        deadline = time.perf_counter() + budget_s
        least: dict[int, float] = {}
        widest = room if self._exact_widths is None else self._exact_widths[-1]
        for width in (width for width in widths if width <= widest and context + width <= room):
            if len(least) >= min(_LEAST_WIDTHS, len(widths)) and time.perf_counter() > deadline:
                break
            seconds = self._time_pass(slots, context, width)
            if self._device.type != "cpu" or seconds < budget_s / 10:  # a width's first pass pays for set-up
                deadline += seconds if self._passes is not None else 0.0  # there it takes most of the budget
                seconds = self._time_pass(slots, context, width)
            least[width] = seconds
        while time.perf_counter() + sum(least.values()) < deadline:
            for width, seconds in least.items():
                least[width] = min(seconds, self._time_pass(slots, context, width))
        return undisturbed(sorted((least | self._stairs(least)).items()))

    def _stairs(self, seconds: Mapping[int, float]) -> dict[int, float]:
        """Where passes are filled up: what the narrowest one takes that is filled up to each measured width."""
        widths = (0, *(self._exact_widths or ()))
        return {below + 1: seconds[width] for below, width in pairwise(widths) if below and width in seconds}

    def _time_pass(self, slots: TokenArray, context: int, width: int) -> float:
        clock = _clock(self._device)
        begin = clock()
        self.run([Piece(slots, context, [0] * width, DraftTree(), num_logits=width)]).argmax(-1).tolist()
        return clock() - begin


def _side_by_side(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces in passes of at most `most` tokens."""
    those: list[Piece] = []
    for piece in pieces:
        if those and sum(len(other.ids) for other in those) + len(piece.ids) > most:
            yield those
            those = []
        those.append(piece)
    yield those


def _clock(device: torch.device) -> Callable[[], float]:
    """The clock for a pass: on a CPU that of this thread's own work, which stands still while others have the core.

    The calling thread does its share of every parallel region, so that its work takes as long as the pass would on a
    machine that does nothing else. Windows counts it in steps of 16 ms, which is too coarse.
    """
    return time.thread_time if device.type == "cpu" and os.name == "posix" else time.perf_counter


@dataclass(slots=True)
class LoadedModel:
    """A model that is ready to serve, with the facts the engine needs of it."""

    runner: Runner
    tokenizer: ChatTokenizer
    name: str
    architecture: str
    device: str
    dtype: str
    max_model_len: int
    eos_token_ids: frozenset[int]
    num_parameters: int
    num_slots: int
    kv_bytes_per_token: int
    source: str = ""
    """Where its files come from; empty for one that was in memory already."""
    step_cost: tuple[tuple[int, float], ...] = ()
    """Empty if it was not measured because nothing is drafted."""
    cost_is_measured: bool = False
    """It was measured, and so may be corrected, rather than given."""
    drafting_error: str | None = None
    """Why nothing is drafted and no KV is reused; None for most models."""
    check_difference: float | None = None
    """See `EngineInfo`."""
    exact_widths: tuple[int, ...] | None = None
    """Tokens of its passes where bits must not depend on what else is read, see `EngineConfig.exact`; None: any."""
    execution: Execution = "eager"
    execution_error: str | None = None
    """See `EngineInfo`."""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What the checkpoint says of calls that do not say otherwise."""
    quantization: str | None = None
    """See `EngineInfo`."""
    draft: LoadedModel | None = None
    """A smaller model with the same vocabulary and as many slots, which drafts."""

    @property
    def exact_width(self) -> int | None:
        """Most tokens that one request may have in a pass; None: any number."""
        return None if self.exact_widths is None else self.exact_widths[-1]


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
    draft = None if config.draft is None else _read(config.of_draft(config.draft), on_progress)
    with _load_failures(config):
        beside = None if draft is None else (draft.model, draft.tokenizer)
        loaded = prepare(model.model, model.tokenizer, config, on_progress, beside)
    _note_origin(loaded, model, config)
    if draft is not None and loaded.draft is not None:
        _note_origin(loaded.draft, draft, config)
    return loaded


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a model."""

    model: PreTrainedModel
    """On its device."""
    tokenizer: ChatTokenizer
    origin: ModelFolder


def _note_origin(loaded: LoadedModel, read: _Read, config: EngineConfig) -> None:
    loaded.source = read.origin.source
    loaded.quantization = read.origin.quantization or config.quantization


def _read(config: EngineConfig, on_progress: OnProgress | None) -> _Read:
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
        return _Read(model, _read_tokenizer(path, base, config), origin)


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
    draft: tuple[PreTrainedModel, ChatTokenizer] | None = None,
) -> LoadedModel:
    """Make a model that is in memory ready to serve, with its draft model if there is one (see `load_model`)."""
    served = _check(model, config, on_progress)
    if config.draft is None or draft is None or served.reason is not None:
        return _ready(model, tokenizer, config, served, on_progress)
    own = config.of_draft(config.draft)
    refuse_other_vocabulary(config.model, tokenizer, own.model, draft[1])
    beside = _check(draft[0], own, on_progress, decides=False)
    if beside.reason is not None:
        raise UnsupportedModelError(f"Got draft={own.model!r} but it cannot draft: {beside.reason}")
    if beside.num_parameters >= served.num_parameters:
        logger.warning(
            "The draft model %s has %d weights and the model %d: its drafts cost more than they can save",
            own.model,
            beside.num_parameters,
            served.num_parameters,
        )
    shared = draft[0].device == model.device
    loaded = _ready(model, tokenizer, config, served, on_progress, beside.bytes_per_token if shared else 0)
    own = own.model_copy(update={"kv_cache_tokens": loaded.num_slots})
    loaded.draft = _ready(*draft, own, beside, on_progress)
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
    model: PreTrainedModel, config: EngineConfig, on_progress: OnProgress | None, *, decides: bool = True
) -> _Served:
    """Check how a model can be served; one that only drafts does not decide about tokens."""
    refuse_unsupported(config.model, model.config)
    refuse_unreadable_tokens(config.model, model)
    reason = why_no_rollback(model)
    if reason is not None and config.exact:
        raise UnsupportedModelError(f"Got exact=True but {config.model} keeps a state instead of KV: {reason}")
    num_parameters = model.num_parameters()  # before tied weights are laid out apart
    with _phase("check", "checking", config, on_progress):
        if decides:
            decide_in_float32(model, config.model)
        if reason is None:
            tried = EXACT_WIDTHS if config.exact else None
            checked = check_equivalence(model, config, partial(ModelRunner, model, exact_widths=tried))
            widths = _exact_widths(model, config, checked) if tried else None
            return _Served(checked, checked.bytes_per_token, None, None, num_parameters, widths)
        stateful, bytes_per_token = check_state(model, config.model)
        logger.warning("%s runs without drafting: %s", config.model, reason)
        return _Served(Checked(0), bytes_per_token, stateful, reason, num_parameters)


def _exact_widths(model: PreTrainedModel, config: EngineConfig, checked: Checked) -> tuple[int, ...]:
    """The widths that agree: those that a cost curve of the same model and machine was measured for, else tried."""
    if config.step_cost == "measured":
        facts = _facts(model, config.model) | {"execution": checked.execution}
        for curve in calibration.kept_curves():
            widths = tuple(map(int, re.findall(r"\d+", curve.facts.get("exact", ""))))
            if widths and facts.items() <= curve.facts.items() and set(widths) <= set(EXACT_WIDTHS):
                return widths
    return agreeing_widths(config.model, vocab_size(model), partial(ModelRunner, model))


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
    limit = longest_context(model.config.get_text_config(), config.model)
    max_model_len, checked = min(config.max_model_len or limit, limit), served.checked
    bytes_per_token = served.bytes_per_token
    num_slots = _num_slots(config.kv_cache_tokens, max_model_len, bytes_per_token + bytes_beside, model.device)
    runner: Runner = served.stateful or ModelRunner(model, num_slots, served.exact_widths, checked.execution)
    step_cost, is_measured = config.points or (), False
    if not step_cost and isinstance(runner, ModelRunner):
        is_measured = True
        with _phase("measure", "measuring", config, on_progress):
            step_cost = _measured_cost(runner, model, config, min(num_slots, max_model_len), served)
    return LoadedModel(
        runner=runner,
        tokenizer=tokenizer,
        name=config.model,
        architecture=type(model).__name__,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids(model, tokenizer),
        num_parameters=served.num_parameters,
        num_slots=num_slots,
        kv_bytes_per_token=bytes_per_token,
        step_cost=step_cost,
        cost_is_measured=is_measured,
        drafting_error=served.reason,
        exact_widths=served.exact_widths,
        execution=checked.execution,
        execution_error=checked.error,
        check_difference=checked.difference,
        defaults=GenerationDefaults()
        if config.generation_config == "ignore"
        else read_defaults(model.generation_config, config.model, vocab_size(model)),
    )


@contextlib.contextmanager
def _phase(phase: LoadPhase, doing: str, config: EngineConfig, on_progress: OnProgress | None) -> Iterator[None]:
    """Tell of a phase of loading as it begins, and log how long it took."""
    if on_progress is not None:
        on_progress(LoadProgress(phase, f"{doing} {config.model}"))
    start = time.perf_counter()
    yield
    logger.info("%s %s took %.1f s", doing, config.model, time.perf_counter() - start)


def _measured_cost(
    runner: ModelRunner, model: PreTrainedModel, config: EngineConfig, room: int, served: _Served
) -> Points:
    """What passes cost here: from the cache, or measured and kept there (see `EngineConfig.step_cost`)."""
    context = min(_CALIBRATION_CONTEXT, room // 2)
    measure = partial(runner.measure_step_cost, context, room)
    facts = _facts(model, config.model)
    facts |= {"context": str(context), "max_width": str(min(room - context, max(STEP_WIDTHS)))}
    facts |= {"execution": served.checked.execution, "exact": str(served.exact_widths)}
    if config.step_cost == "remeasure":
        points = measure(budget_s=5.0)
        calibration.keep(facts, points)
        return points
    return calibration.kept_or_measured(facts, measure, check=partial(measure, budget_s=0.1))


def _facts(model: PreTrainedModel, name: str) -> dict[str, str]:
    """All of model and machine that a pass's cost and its order of sums depend on; weights by their shapes and type."""
    device = model.device
    on_cpu = device.type == "cpu"
    return {
        "model": name,
        "architecture": type(model).__name__,
        "config": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
        "parameters": str(sum(parameter.numel() for parameter in model.parameters())),
        "device": device_name(device),
        "threads": f"{torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}" if on_cpu else "",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": ATTENTION_NAME,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _num_slots(wanted: int | None, max_model_len: int, bytes_per_token: int, device: torch.device) -> int:
    """Slots of the KV pool: what was asked for, else four contexts or a quarter of the free memory if that is less.

    Raises:
        ModelLoadError: what was asked for is more than the free memory.
    """
    free, _ = memory_of(device)
    if wanted is None:
        return max(min(4 * max_model_len, free // 4 // max(bytes_per_token, 1)), 256)
    if wanted * bytes_per_token > free:
        raise ModelLoadError(
            f"Got kv_cache_tokens={wanted} but {wanted * bytes_per_token / 2**30:,.1f} GiB for them is more than the "
            f"{free / 2**30:,.1f} GiB that are free on {device}"
        )
    return wanted
