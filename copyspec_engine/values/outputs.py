"""What a call gives back: chunks while it runs, then the whole answer with its counts and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from copyspec_engine.values.explanation import NOT_COPIED, CopySource, Explanation

__all__ = [
    "Copy",
    "DraftStats",
    "EngineInfo",
    "Execution",
    "FinishReason",
    "GenerationOutput",
    "InvalidToolCall",
    "Reply",
    "ReplyDelta",
    "Segment",
    "StreamChunk",
    "Timing",
    "TokenLogprob",
    "ToolCall",
    "Usage",
]

Execution = Literal["eager", "packed", "paged", "graphs", "compiled"]
FinishReason = Literal["stop", "length", "cancelled", "timeout"]
"""stop: an end-of-sequence id, a stop text or the end of the grammar; length: max_tokens or the context is full;
cancelled: by the caller; timeout: it took longer than its `timeout_s`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the answer's text, and whether its tokens were accepted from a copied draft."""

    text: str
    copied: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens of an answer in a row that were drafted from places in a row, in one forward pass.

    `answer.token_ids[start:stop]` stands in the source at `offset`. Between the copies of two passes lies at least one
    token that the model wrote by itself.
    """

    start: int
    stop: int
    """Tokens of the answer, 0 <= start < stop."""
    text_start: int
    text_stop: int
    """The characters of the answer's text that these tokens complete; equal if there are none (half a character, an
    end-of-sequence id, text behind a stop text)."""
    source: CopySource
    offset: int | None = None
    """Tokens from the source's beginning: that of the prompt, the answer, the prediction or the stored text; None for
    "pool", whose texts are nobody's to look at, "grammar", "frequent", "draft_model" and "recycled"."""
    stored_text: int | None = None
    """The number of the stored text in `Engine.memory`, for the sources that begin with "earlier_"."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    """Tokens around the place in the stored text, at most 64 each; none if it was forgotten meanwhile."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held a token of the answer to be, by its own logits before any sampling option."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability, at most 0."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely tokens there, the likeliest first; as many as `top_logprobs`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that the model asks for."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A call that cannot be carried out: malformed, or cut off by the end of the answer."""

    id: str
    name: str | None
    arguments: str
    """What was written, as it was."""
    error: str
    is_open: bool = False
    """The answer ended before it did."""


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """What a piece of an answer adds to one of its parts."""

    kind: Literal["text", "reasoning", "tool_call"]
    text: str = ""
    """More text or reasoning, or more of a call's arguments as JSON."""
    index: int = 0
    """Which of the answer's tool calls this belongs to, from 0."""
    id: str | None = None
    """With the first delta of a call, as its name."""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer in its parts."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one call."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was reused from an earlier call of the session."""
    completion_tokens: int = 0
    """Sampled tokens, the end-of-sequence token included."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class DraftStats:
    """How the answer's tokens came about."""

    num_forward_passes: int = 0
    """Forward passes that sampled a token (the last prompt chunk's pass is one of them)."""
    num_prefill_passes: int = 0
    """Forward passes that only read prompt tokens."""
    num_draft_tokens: int = 0
    """Draft tokens offered for verification."""
    num_accepted_tokens: int = 0
    """Tokens of the answer that came from accepted drafts, whatever their source."""
    draft_lengths: tuple[int, ...] = ()
    """Draft tokens offered in each forward pass, in order."""
    accepted_lengths: tuple[int, ...] = ()
    """Accepted draft tokens of each forward pass, in order."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock seconds of one call, from `Engine.stream` on."""

    queue_s: float = 0.0
    """Until the first forward pass began."""
    ttft_s: float = 0.0
    """Until the first token was sampled."""
    total_s: float = 0.0
    """Until the last token was sampled."""


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A whole answer. Joining the chunks of a stream gives the same."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    draft_stats: DraftStats
    timing: Timing
    segments: tuple[Segment, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`; None unless the request asked for them."""
    reply: Reply | None = None
    """The answer in its parts; None unless the request asked for them (`parse_reply`)."""
    copies: tuple[Copy, ...] = ()
    """Where its drafted tokens came from, in order; together exactly `draft_stats.num_accepted_tokens` tokens."""
    explanation: Explanation | None = None
    """The same in messages and characters; None unless the request asked for it (`explain`). See also
    `Engine.explain`."""
    prompt_token_ids: tuple[int, ...] = field(default=(), repr=False)
    """What the model has read."""

    @property
    def tokens_per_forward(self) -> float:
        """Sampled tokens per forward pass; 1.0 for plain decoding."""
        return self.usage.completion_tokens / max(self.draft_stats.num_forward_passes, 1)

    @property
    def copied_share(self) -> float:
        """Share of the answer's tokens that were copied, 0 to 1: those of a draft model are not."""
        others = sum(copy.stop - copy.start for copy in self.copies if copy.source in NOT_COPIED)
        return (self.draft_stats.num_accepted_tokens - others) / max(self.usage.completion_tokens, 1)

    @property
    def tokens_per_s(self) -> float:
        return self.usage.completion_tokens / self.timing.total_s if self.timing.total_s else 0.0


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one step added to an answer. The last chunk has `output`, the whole answer, and may have no text."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    """`text` in pieces that were copied or not."""
    output: GenerationOutput | None = field(default=None)
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`; None unless the request asked for them."""
    deltas: tuple[ReplyDelta, ...] = ()
    """What the step added to the answer's parts; empty unless the request asked for them (`parse_reply`)."""

    @property
    def is_last(self) -> bool:
        return self.output is not None


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
    else works, and on a GPU with exact=True. "packed": so on a CPU, with float32 weights in oneDNN's layout. "paged":
    kernels on a GPU read keys and values in place. "graphs": so, and replayed as CUDA graphs. "compiled": so, of layers
    that torch.compile has fused."""
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
    """The file that keeps conversations' texts; None if there is none, or if it could not be opened."""
    memory_error: str | None = None
    """Why the file could not be opened."""
    tool_calling: Literal["by template", "by prompt"] | None = None
    """How the model is told of tools: by its chat template, or in a message where the template leaves them out; None:
    it is not."""
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
        return self.exact or self.dtype == "float32"

    @property
    def lossless(self) -> str:
        """What is promised of an answer beside plain decoding, in a sentence."""
        return self.promised(self.dtype, exact=self.exact)

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
