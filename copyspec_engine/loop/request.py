"""One request on its way through the engine: what is asked, its row, its drafting, its answer and its counts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from copyspec_engine.chat.detokenizer import TextStream
from copyspec_engine.chat.reply import ReplyParser
from copyspec_engine.drafting.drafter import Drafter
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.grammar.state import GrammarState
from copyspec_engine.kv.slots import KVSequence, Owner
from copyspec_engine.memory.conversation import Session, SessionMemory
from copyspec_engine.memory.index import Span
from copyspec_engine.provenance.trail import CopyTrail, cut
from copyspec_engine.sampling.processors import Bans, TokenCounts
from copyspec_engine.sampling.verify import Verdict
from copyspec_engine.values.config import DrafterConfig, DraftModelUse, GenerationRequest
from copyspec_engine.values.outputs import (
    NOT_COPIED,
    DraftStats,
    FinishReason,
    GenerationOutput,
    Segment,
    StreamChunk,
    Timing,
    TokenLogprob,
    Usage,
)

__all__ = ["Answer", "Asked", "Drafting", "Progress", "Request"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the engine, made ready in the caller's thread."""

    call: GenerationRequest
    num_prompt_tokens: int
    max_total_tokens: int
    """The request ends when its text has this many tokens, the prompt's counted."""
    eos_token_ids: frozenset[int]
    """Sampling one of these ends the answer."""
    drafter: DrafterConfig
    seed: int
    prediction_ids: Sequence[int] = ()
    """A text that the answer is expected to repeat."""
    deadline_s: float = math.inf
    """When it ends at the latest, on the clock `time.perf_counter`."""
    cache_salt: str | None = None
    """Whose KV it may share, besides that of its conversation."""
    bans: Bans | None = None
    """Tokens that may not come; None: all may."""


@dataclass(slots=True, eq=False)
class Drafting:
    """What a request copies from, and who drafts for it."""

    draft_model_use: DraftModelUse = "never"
    """What the draft model is asked for; "never" where there is none, or it failed."""
    session: Session | None = None
    """Set after the first admission, with the next two."""
    memory: SessionMemory | None = None
    """The session's own, or its part of the pool that the request names."""
    drafter: Drafter | None = None
    """Finished when the request ends."""
    texts: list[Span] = field(default_factory=list)
    """What it has added to the memory."""

    def observe(self, draft: DraftTree, verdict: Verdict) -> None:
        """Take in what a pass gave."""
        if self.memory is None:
            return
        if self.drafter is not None:
            with self.memory.noting(self.texts):
                self.drafter.observe(draft, verdict.accepted, verdict.tokens)
        if verdict.alternatives is not None:
            self.memory.alternatives.add(verdict.alternatives)


@dataclass(slots=True, eq=False)
class Answer:
    """What is written: text, its parts, and where it came from."""

    text: TextStream
    grammar: GrammarState | None = None
    """What it must look like."""
    reply: ReplyParser | None = None
    """Takes it apart, if the request asks for it."""
    counts: TokenCounts = field(default_factory=TokenCounts)
    """Of the tokens of prompt and answer, brought up to date before they are penalised."""
    finish_reason: FinishReason | None = None
    segments: list[Segment] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_ends: list[int] = field(default_factory=list)
    """Characters that were complete after each token."""
    trail: CopyTrail = field(default_factory=CopyTrail)

    @property
    def is_complete(self) -> bool:
        """A stop text or the grammar ends it."""
        return self.text.stopped or (self.grammar is not None and self.grammar.is_terminated)

    def push(self, token: int, *, copied: bool, is_end: bool) -> list[Segment]:
        """The text that is certain after one more token; one that ends the answer has no text."""
        segments = [] if is_end else self.text.push(token, copied=copied)
        self.text_ends.append(self.text.num_characters)
        if self.grammar is not None:
            self.grammar.advance((token,))
        return segments


@dataclass(slots=True, eq=False)
class Progress:
    """What a request took so far. Times are on the clock `time.perf_counter`."""

    num_cached_tokens: int = 0
    """Of the prompt, found in the KV that was kept."""
    num_prefill_passes: int = 0
    draft_lengths: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    asked_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0
    """Of its first admission; 0: it waits for it."""
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def draft_stats(self) -> DraftStats:
        return DraftStats(
            num_forward_passes=len(self.accepted_lengths),
            num_prefill_passes=self.num_prefill_passes,
            num_draft_tokens=sum(self.draft_lengths),
            num_accepted_tokens=sum(self.accepted_lengths),
            draft_lengths=tuple(self.draft_lengths),
            accepted_lengths=tuple(self.accepted_lengths),
        )

    def timing(self) -> Timing:
        if not self.started_s:
            return Timing()
        first, last = self.first_token_s or self.started_s, self.last_token_s or self.started_s
        return Timing(self.started_s - self.asked_s, first - self.asked_s, last - self.asked_s)


@dataclass(slots=True, eq=False)
class Request:
    """A request's state. Only the engine's loop thread touches it once it is queued."""

    asked: Asked
    sequence: KVSequence
    """Prompt and sampled tokens, and their KV."""
    answer: Answer
    drafting: Drafting = field(default_factory=Drafting)
    progress: Progress = field(default_factory=Progress)
    number: int = field(default_factory=itertools.count().__next__)
    """Its own, where the caller's request_id may come again."""

    @property
    def id(self) -> str:
        """The caller's, which no other request has while this one is in flight."""
        return self.asked.call.request_id

    @property
    def session_id(self) -> str | None:
        """The id of its conversation, if it is of one."""
        return self.asked.call.session_id

    @property
    def begins_with(self) -> list[Owner]:
        """Whose kept KV its prompt may begin with: its conversation's, and that of the one which it continues."""
        return [name for name in (self.session_id, self.asked.call.continues) if name is not None]

    @property
    def kept_as(self) -> Owner | None:
        """Whose its KV is once it is over; None: nobody's."""
        if self.session_id is None:
            return None if self.asked.cache_salt is None else self.number
        session = self.drafting.session
        return self.session_id if session is not None and session.keeps_kv else None

    @property
    def max_draft_tokens(self) -> int:
        """Draft nodes that fit, of whatever shape: each takes a slot, and one more token is sampled behind them."""
        return self.asked.max_total_tokens - len(self.sequence.token_ids) - 1

    # ---- its answer ------------------------------------------------------------------------------------------------

    def write(self, verdict: Verdict) -> list[Segment]:
        """Add sampled tokens until one of them ends the answer; the text that is certain then.

        What lies behind that token is dropped from the verdict, as if it had never been drafted.
        """
        answer, progress = self.answer, self.progress
        progress.last_token_s = time.perf_counter()
        progress.first_token_s = progress.first_token_s or progress.last_token_s
        segments: list[Segment] = []
        count = 0
        for token, copied in zip(verdict.tokens, _copied(verdict), strict=True):
            count += 1
            self.sequence.token_ids.append(token)
            is_end = token in self.asked.eos_token_ids
            segments += answer.push(token, copied=copied, is_end=is_end)
            if is_end or answer.is_complete:
                answer.finish_reason = "stop"
            elif len(self.sequence.token_ids) >= self.asked.max_total_tokens:
                answer.finish_reason = "length"
            if answer.finish_reason is not None:
                segments += answer.text.flush()
                break
        verdict.accepted, verdict.tokens = verdict.accepted[:count], verdict.tokens[:count]
        verdict.runs = cut(verdict.runs, len(verdict.accepted))
        answer.trail.note(len(answer.text_ends) - count, verdict.runs)
        return segments

    def chunk(
        self, segments: list[Segment], token_ids: tuple[int, ...] = (), logprobs: tuple[TokenLogprob, ...] = ()
    ) -> StreamChunk:
        """What the caller hears of a step, with the whole answer once it is finished."""
        answer = self.answer
        answer.segments += segments
        answer.logprobs += logprobs
        text = "".join(segment.text for segment in segments)
        deltas = () if answer.reply is None else tuple(answer.reply.feed(text))
        heard = logprobs if self.asked.call.sampling.logprobs else None
        chunk = StreamChunk(self.id, text, token_ids, _joined(segments), None, heard, deltas)
        return chunk if answer.finish_reason is None else self._last(chunk, answer.finish_reason)

    def _last(self, chunk: StreamChunk, finish_reason: FinishReason) -> StreamChunk:
        answer, prompt, token_ids = self.answer, self.asked.num_prompt_tokens, self.sequence.token_ids
        reply, deltas = (None, []) if answer.reply is None else answer.reply.finish()
        text = "".join(segment.text for segment in answer.segments)
        output = GenerationOutput(
            request_id=self.id,
            text=text,
            token_ids=tuple(token_ids[prompt:]),
            finish_reason=finish_reason,
            usage=Usage(prompt, self.progress.num_cached_tokens, len(token_ids) - prompt),
            draft_stats=self.progress.draft_stats(),
            timing=self.progress.timing(),
            segments=_joined(answer.segments),
            logprobs=tuple(answer.logprobs) if self.asked.call.sampling.logprobs else None,
            reply=reply,
            copies=answer.trail.copies(answer.text_ends, len(text)),
            prompt_token_ids=tuple(token_ids[:prompt]),
        )
        return replace(chunk, output=output, deltas=(*chunk.deltas, *deltas))


def _copied(verdict: Verdict) -> Iterator[bool]:
    """Of each token of a verdict, whether it was copied."""
    for run in verdict.runs:
        yield from (run.kind not in NOT_COPIED,) * run.num_tokens
    yield False  # the bonus token


def _joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind as one segment."""
    groups = itertools.groupby(segments, key=lambda segment: segment.copied)
    return tuple(Segment("".join(segment.text for segment in group), copied) for copied, group in groups)
