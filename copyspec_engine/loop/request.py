"""One request on its way through the engine: what is asked, its row, its drafting, its answer and its counts."""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from copyspec_engine.chat.detokenizer import TextStream
from copyspec_engine.chat.reply import ReplyParser
from copyspec_engine.drafting.drafter import Drafter
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.grammar.state import GrammarState
from copyspec_engine.kv.slots import KVSequence, Owner
from copyspec_engine.memory.conversation import Session, SessionMemory
from copyspec_engine.memory.index import Span
from copyspec_engine.provenance.repeats import count_repeated
from copyspec_engine.provenance.trail import CopyTrail, cut
from copyspec_engine.sampling.processors import Bans, TokenCounts
from copyspec_engine.sampling.verify import Verdict
from copyspec_engine.values.config import DrafterConfig, DraftModelUse, GenerationRequest
from copyspec_engine.values.outputs import (
    Copy,
    CopySource,
    DraftStats,
    EndedBy,
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
    stop_names: Mapping[int, str | int]
    """What the caller called those of them that it named: ids, and stop texts that are special tokens."""
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
    ended_by: EndedBy | None = None
    stop_reason: str | int | None = None
    segments: list[Segment] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_ends: list[int] = field(default_factory=list)
    """Characters that were complete after each token."""
    trail: CopyTrail = field(default_factory=CopyTrail)

    def stop(self, ended_by: EndedBy, reason: str | int | None = None) -> None:
        """It has come to its end."""
        self.finish_reason, self.ended_by, self.stop_reason = "stop", ended_by, reason

    def push(self, token: int, source: CopySource | None, *, is_end: bool) -> list[Segment]:
        """The text that is certain after one more token; one that ends the answer has no text."""
        segments = [] if is_end else self.text.push(token, source)
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
    prepared_s: float = field(default_factory=time.perf_counter)
    """When its prompt was tokens, and it was checked."""
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
            return Timing(prepare_s=self.prepared_s - self.asked_s)
        first, last = self.first_token_s or self.started_s, self.last_token_s or self.started_s
        asked = self.asked_s
        return Timing(self.started_s - asked, first - asked, last - asked, self.prepared_s - asked)


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
    on_end: Callable[[StreamChunk | Exception], None] | None = None
    """Told of its last chunk, or of what it failed with, whether anybody reads it or not; must not raise or block."""

    @property
    def id(self) -> str:
        """The caller's, which no other request has while this one is in flight."""
        return self.asked.call.request_id

    @property
    def session_id(self) -> str | None:
        """The id of its conversation, if it is of one."""
        return self.asked.call.session_id

    @property
    def account(self) -> str | None:
        """For whom all that is kept of it counts."""
        return self.asked.call.owner

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
        for token, source in zip(verdict.tokens, self._sources(verdict), strict=True):
            count += 1
            self.sequence.token_ids.append(token)
            segments += answer.push(token, source, is_end=token in self.asked.eos_token_ids)
            self._end_behind(token)
            if answer.finish_reason is not None:
                segments += answer.text.flush()
                break
        verdict.accepted, verdict.tokens = verdict.accepted[:count], verdict.tokens[:count]
        verdict.runs = cut(verdict.runs, len(verdict.accepted))
        answer.trail.note(len(answer.text_ends) - count, verdict.runs)
        return segments

    def _end_behind(self, token: int) -> None:
        """End the answer if this token, which it holds now, was its last one."""
        answer, asked = self.answer, self.asked
        if token in asked.eos_token_ids:
            name = asked.stop_names.get(token)
            answer.stop("eos" if name is None else "stop_token" if isinstance(name, int) else "stop_text", name)
        elif answer.text.stopped_by is not None:
            answer.stop("stop_text", answer.text.stopped_by)
        elif answer.grammar is not None and answer.grammar.is_terminated:
            answer.stop("grammar")
        elif len(self.sequence.token_ids) >= asked.max_total_tokens:
            answer.finish_reason = "length"

    def _sources(self, verdict: Verdict) -> list[CopySource | None]:
        """Of each token of a verdict, where it was drafted from, as far as that is known before the answer is over."""
        memory, sources = self.drafting.memory, list[CopySource | None]()
        for run in verdict.runs:
            if run.kind == "block":
                of_prompt = min(max(self.asked.num_prompt_tokens - run.offset, 0), run.num_tokens)
                sources += ["prompt"] * of_prompt
                sources += ["answer"] * (run.num_tokens - of_prompt)
            elif run.text is not None and memory is not None and self.is_others(run.text, memory):
                sources += ["pool"] * run.num_tokens
            else:
                sources += [cast("CopySource", run.kind)] * run.num_tokens
        return [*sources, None]  # the bonus token

    def is_others(self, text: Span, memory: SessionMemory) -> bool:
        """Whether a text is of a pool and may be another caller's: all calls without a session are one part of it."""
        return self.asked.call.memory_pool is not None and (self.texts_owner is None or not memory.has(text))

    @property
    def texts_owner(self) -> str | None:
        """Whose texts a pool keeps those of the call as; None: nobody's who could come back for them."""
        return self.session_id if self.asked.call.keep_texts else None

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
        copies = answer.trail.copies(answer.text_ends, len(text))
        output = GenerationOutput(
            request_id=self.id,
            text=text,
            token_ids=tuple(token_ids[prompt:]),
            finish_reason=finish_reason,
            usage=self._usage(text, "" if reply is None else reply.reasoning),
            draft_stats=self.progress.draft_stats(),
            timing=self.progress.timing(),
            segments=_segments(text, copies),
            logprobs=tuple(answer.logprobs) if self.asked.call.sampling.logprobs else None,
            reply=reply,
            copies=copies,
            prompt_token_ids=tuple(token_ids[:prompt]),
            ended_by=answer.ended_by,
            stop_reason=answer.stop_reason,
        )
        return replace(chunk, output=output, deltas=(*chunk.deltas, *deltas))

    def _usage(self, text: str, reasoning: str) -> Usage:
        """The counts of the whole answer, of which `reasoning` is a part."""
        num_prompt_tokens, prediction = self.asked.num_prompt_tokens, self.asked.prediction_ids
        written = self.sequence.token_ids[num_prompt_tokens:]
        num_repeated = count_repeated(prediction, written) if prediction else 0
        return Usage(
            prompt_tokens=num_prompt_tokens,
            cached_tokens=self.progress.num_cached_tokens,
            completion_tokens=len(written),
            reasoning_tokens=_num_reasoning_tokens(text, reasoning, self.answer.text_ends),
            accepted_prediction_tokens=num_repeated,
            rejected_prediction_tokens=len(prediction) - num_repeated,
        )


def _joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind as one segment."""
    groups = itertools.groupby(segments, key=lambda segment: segment.source)
    return tuple(Segment("".join(segment.text for segment in group), source) for source, group in groups)


def _segments(text: str, copies: Iterable[Copy]) -> tuple[Segment, ...]:
    """A whole text in pieces by where it was drafted from."""
    pieces, end = [], 0
    for copy in copies:
        pieces += [Segment(text[end : copy.text_start]), Segment(text[copy.text_start : copy.text_stop], copy.source)]
        end = copy.text_stop
    return _joined([piece for piece in (*pieces, Segment(text[end:])) if piece.text])


def _num_reasoning_tokens(text: str, reasoning: str, text_ends: Sequence[int]) -> int:
    """Tokens of an answer up to the one that completes its reasoning, which may stand there in several pieces."""
    if not reasoning:
        return 0
    end = 0
    for piece in (reasoning,) if reasoning in text else reasoning.splitlines():
        at = text.find(piece, end)
        end = end if at < 0 else at + len(piece)
    return min(bisect_left(text_ends, end) + 1, len(text_ends))
