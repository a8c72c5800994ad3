"""What an engine says of itself: what it has loaded, what it has done since, and what it is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["EngineInfo", "EngineMetrics", "Execution", "Held", "SessionInfo"]

Execution = Literal["eager", "packed", "narrow", "paged", "graphs", "compiled"]


class Held(NamedTuple):
    """What requests hold of an engine; all of it is 0 once they are over. Rows that are kept for later do not count."""

    places: int
    """Of requests that run or wait, by the front door's book."""
    running: int
    waiting: int
    slots: int
    """Uses of KV slots that no kept row accounts for."""
    rows: int
    """What the model's runner keeps for requests besides KV."""
    draft_slots: int
    """As `slots`, of the draft model."""
    draft_rows: int
    """Requests that the draft model follows."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session whose texts are remembered."""

    session_id: str
    owner: str | None
    """Whom it counts for (`GenerationRequest.owner`)."""
    num_tokens: int | None
    """Of its texts, those in pools not counted; None: they are on disk only, and were not read since the start."""
    last_used_s: float | None
    """When its last call began, in seconds since 1970; None: before the start."""


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """A snapshot; counts are since the engine was made.

    `accepted_by_source` has the keys "prompt", "answer", "prediction", "frequent" (a frequent token, copied from
    nowhere), "grammar" (forced by it), "block" (drafts of the published algorithm), "draft_model" (written by one) and
    "recycled" (likely in an earlier pass).
    """

    num_running: int
    num_waiting: int
    num_kv_slots: int
    num_kv_slots_running: int
    """Held by running requests."""
    num_kv_slots_cached: int
    """Kept for later calls alone: free if they are needed."""
    num_sessions: int
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    draft_tokens: int
    draft_model_passes: int
    """Forward passes of the draft model, of however many requests each."""
    tokens_per_forward: float
    """Sampled tokens for each part that a request had in a forward pass; 1.0 for plain decoding, 0.0 before any."""
    accepted_by_source: dict[str, int]
    finished: dict[str, int]
    step_cost: tuple[tuple[int, float], ...]
    """(tokens, seconds) of a pass as reckoned now: measured at load, and corrected by what passes took since."""

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens whose KV was there already, 0 to 1."""
        return self.cached_tokens / max(self.prompt_tokens, 1)

    @property
    def kv_slots_in_use(self) -> float:
        """Share of the pool that running requests hold, 0 to 1."""
        return self.num_kv_slots_running / self.num_kv_slots

    @property
    def kv_slots_by_state(self) -> dict[str, int]:
        """How many of the pool are running, cached and free."""
        running, cached = self.num_kv_slots_running, self.num_kv_slots_cached
        return {"running": running, "cached": cached, "free": self.num_kv_slots - running - cached}

    def _repr_html_(self) -> str:
        """What notebooks show: the figures in words."""
        from copyspec_engine.values.html import table

        accepted = (f"{count:,} {source}" for source, count in self.accepted_by_source.items())
        finished = (f"{count:,} {reason}" for reason, count in self.finished.items())
        rows = {
            "requests": f"{self.num_running:,} running, {self.num_waiting:,} waiting",
            "finished": ", ".join(finished) or "none",
            "tokens per forward pass": f"{self.tokens_per_forward:.2f}",
            "prompt tokens": f"{self.prompt_tokens:,}, {self.prefix_hit_rate:.0%} of them reused",
            "tokens of answers": f"{self.completion_tokens:,}",
            "draft tokens": f"{self.draft_tokens:,}",
            "accepted, by source": ", ".join(accepted) or "none",
            "forward passes": f"{self.num_steps:,}",
            "KV slots": f"{self.num_kv_slots_running:,} running, {self.num_kv_slots_cached:,} kept, of "
            f"{self.num_kv_slots:,}",
            "sessions": f"{self.num_sessions:,}",
        }
        return table("Engine", rows)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine has loaded, and on what."""

    model: str
    architecture: str
    device: str
    dtype: str
    max_model_len: int
    num_parameters: int
    num_kv_slots: int
    kv_bytes_per_token: int
    step_cost: tuple[tuple[int, float], ...]
    """(tokens, seconds) of a verify pass, measured when the model was loaded or given by the caller; empty if nothing
    is drafted."""
    weight_bytes: int = 0
    """Bytes of the weights that are kept in `dtype`, or as a checkpoint of quantized weights has them."""
    narrow_weight_bytes: int = 0
    """Bytes of the weights that are kept in the fewer bits in which they came, see `EngineConfig.memory`."""
    quantization: str | None = None
    """How the weights are or were rounded: "int8", or the kind of a GGUF file ("GGUF Q4_K_M"), whose weights are used
    in `dtype`; None: not by what is known here."""
    model_source: str = ""
    """Where the model's files come from and which weights they hold, in words; empty for one that was in memory."""
    exact: bool = False
    """Whether a token has the same bits in passes of any width (`EngineConfig.exact`)."""
    drafting_error: str | None = None
    """Why this model runs without drafting, whatever drafter is asked for; None if it drafts."""
    execution: Execution = "eager"
    """How passes run. "eager": operation by operation, each request's keys and values gathered first; where nothing
    else works, and on a GPU with exact=True. "packed": so on a CPU, with float32 weights in oneDNN's layout. "narrow":
    so, and passes of up to 32 tokens as one compiled function that reads weights in the precision they came in.
    "paged": kernels on a GPU read keys and values in place. "graphs": so, and replayed as CUDA graphs. "compiled":
    so, of layers that torch.compile has fused."""
    execution_error: str | None = None
    """Why passes do not run faster; None if nothing stood in the way."""
    draft_model: str | None = None
    """The model that drafts where copying cannot; None if there is none."""
    draft_model_source: str = ""
    """As `model_source`, of the draft model."""
    draft_model_step_cost: tuple[tuple[int, float], ...] = ()
    """As `step_cost`, of the draft model."""
    draft_model_error: str | None = None
    """Why the draft model is not asked any more."""
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint's generation_config.json sets for calls that do not say otherwise, by the names of
    `SamplingParams`, besides min_length and max_length (tokens of prompt and answer)."""
    sampling_defaults_not_done: tuple[str, ...] = ()
    """What it sets and this engine does not do, as "num_beams=4"."""
    memory_path: str | None = None
    """The file or database that keeps conversations' texts; None if there is none, or if it could not be opened."""
    memory_error: str | None = None
    """Why it could not be opened, or does not answer now. What cannot be saved meanwhile is saved later."""
    tool_calling: Literal["by template", "by prompt"] | None = None
    """How the model is told of tools: by its chat template, or in a message where the template leaves them out; None:
    it is not."""
    kv_dtype: str = ""
    """What keys and values are kept in (`EngineConfig.kv_dtype`); empty: in `dtype`."""
    check_difference: float | None = None
    """Relative difference of its logits over our KV from its own, as it was loaded; None for a model without KV."""
    load_seconds: dict[str, float] = field(default_factory=dict)
    """What each phase of loading took, in seconds, by the names of `LoadProgress.phase`."""
    device_name: str = ""
    """What the device's maker calls it."""
    device_memory: tuple[int, int] = (0, 0)
    """(free, total) bytes of the device, as they are now."""
    cpu_threads: int = 1
    """Threads of a pass on a CPU."""
    cpu_features: str = ""
    """The widest vector instructions that torch uses, as "AVX512"."""
    system: str = ""
    """Operating system, its version, and the machine's architecture."""
    versions: dict[str, str] = field(default_factory=dict)
    """By the names of packages, and "python"; "not installed" for one that is not."""

    @property
    def is_lossless(self) -> bool:
        """Whether an answer has the tokens of plain decoding, whatever is drafted, reused or runs beside it."""
        return self.exact or (self.dtype == "float32" and not self.kv_dtype)

    @property
    def lossless(self) -> str:
        """What is promised of an answer beside plain decoding, in a sentence."""
        promised = self.promised(self.kv_dtype or self.dtype, exact=self.exact)
        return promised + (f"; KV in {self.kv_dtype} can give other tokens than in float32" if self.kv_dtype else "")

    @staticmethod
    def promised(dtype: str, *, exact: bool) -> str:
        """What `lossless` says of a dtype."""
        if exact:
            return "the tokens of plain decoding, to the last bit of arithmetic"
        if dtype == "float32":
            return "the tokens of plain decoding, but where rounding decides between two; exact=True rules that out"
        return (
            f"the tokens of plain decoding but for near ties between two tokens, which {dtype} may round the other way "
            "in a pass of another width; exact=True rules that out"
        )
