"""The engine: one loop in one thread, with sync and async front doors.

Callers on any thread submit requests and read chunks; only the loop thread touches sequences, memory, the KV pool and
the model. A request that fails takes nobody with it; an error that stops the loop reaches every caller.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import secrets
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from copyspec_engine.bans import Bans
from copyspec_engine.chat_format import ChatFormat
from copyspec_engine.config import Combine, EngineConfig, GenerationRequest, NoDrafter, SamplingParams
from copyspec_engine.detokenizer import answer_stream
from copyspec_engine.errors import (
    ConfigError,
    ContextOverflowError,
    RequestFailedError,
)
from copyspec_engine.explanation import Explanation
from copyspec_engine.grammar import GrammarCompiler
from copyspec_engine.grammar_options import Grammar
from copyspec_engine.handle import RequestHandle
from copyspec_engine.loop import EngineLoop
from copyspec_engine.memory_view import ConversationMemory
from copyspec_engine.metrics import EngineMetrics
from copyspec_engine.model_runner import LoadedModel, load_model
from copyspec_engine.outputs import EngineInfo, GenerationOutput, StreamChunk
from copyspec_engine.progress import OnProgress
from copyspec_engine.provenance import explain
from copyspec_engine.replies import Form, ReplyParser
from copyspec_engine.sequence import Sequence

__all__ = ["Engine", "RequestHandle", "shared_engine"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_PROMPT_END = 64
"""Tokens at the end of a prompt in which the answer's beginning is looked for."""

_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """Serves one model. Thread-safe; use it as a context manager or call `close` when done.

    Args:
        config: what to load; default: the bundled model.
        model: a model that is loaded already (tests); then `config.model` only names it.
        on_progress: told of each phase of loading as it begins, in the engine's thread.

    Raises:
        ModelLoadError, UnsupportedModelError: see `load_model`.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        model: LoadedModel | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._config = config or EngineConfig()
        load = partial(load_model, self._config, on_progress) if model is None else lambda: model
        self._loop = EngineLoop(self._config, load, partial(_unshare, self._config, weakref.ref(self)))
        self._model, self._core = self._loop.model, self._loop.core
        # The loop's thread must not keep us alive: an engine that everybody has let go of ends it.
        weakref.finalize(self, self._loop.end).atexit = False
        self._grammars = GrammarCompiler(
            self._model.tokenizer, self._model.runner.vocab_size, self._model.eos_token_ids
        )
        self._chat_format = self._model.tokenizer.chat_format()
        _open_engines.add(self)

    # ---- front doors, any thread -------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def info(self) -> EngineInfo:
        model, draft, combination = self._model, self._model.draft, self._core.combination
        return EngineInfo(
            model=model.name,
            architecture=model.architecture,
            device=model.device,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            num_parameters=model.num_parameters,
            num_kv_slots=model.num_slots,
            kv_bytes_per_token=model.kv_bytes_per_token,
            step_cost=model.step_cost,
            quantization=model.quantization,
            model_source=model.source,
            exact=self._config.exact,
            drafting_error=model.drafting_error,
            execution=model.execution,
            execution_error=model.execution_error,
            draft_model=None if draft is None else draft.name,
            draft_model_source="" if draft is None else draft.source,
            draft_model_step_cost=() if draft is None else draft.step_cost,
            draft_model_error=None if combination is None else combination.error,
            sampling_defaults=model.defaults.options,
            sampling_defaults_not_done=model.defaults.not_done,
            memory_path=self._config.memory_path if self._core.file is not None else None,
            memory_error=self._core.memory_error,
            tool_calling=self._chat_format.tool_calling,
            versions={
                "copyspec": _copyspec_version(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": importlib.metadata.version("transformers"),
            },
        )

    @property
    def chat_format(self) -> ChatFormat:
        """How the model's chat template writes tool calls and reasoning."""
        return self._chat_format

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of raw text, behind those special tokens that the tokenizer begins a text with, but once."""
        return self._model.tokenizer.encode(text, special_tokens=special_tokens)

    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without special tokens or with their names in it."""
        return self._model.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize(self, request: GenerationRequest) -> list[int]:
        """The token ids that the model would read for a request.

        Raises:
            ConfigError: the chat template refuses the messages, or a token is not in the model's vocabulary.
        """
        if request.messages is not None:
            kept = self._core.exact_tokens
            known = (*kept.of(request.session_id), *kept.of(request.continues))
            tokenizer = self._model.tokenizer
            ids = tokenizer.render(request.messages, request.tools, request.chat_template_kwargs, known)
            return self._known_text("messages", ids)
        if request.prompt is not None:
            return self._known_text("prompt", self.encode(request.prompt))
        ids = list(request.prompt_token_ids or ())
        self._check_ids("prompt_token_ids", ids)
        return ids

    def _known_text(self, name: str, ids: list[int]) -> list[int]:
        """The ids of a text, which its tokenizer may have made of tokens that the model does not have.

        Raises:
            ConfigError: one of them is beyond the model's embedding.
        """
        limit = self._model.runner.vocab_size - 1
        if max(ids, default=0) > limit:
            bad = next(token for token in ids if token > limit)
            text = self.decode([bad], skip_special_tokens=False)
            raise ConfigError(
                f"Got {name} with {text!r} (token {bad}) but the model's own tokens end at {limit}: its tokenizer "
                "holds more than it was trained on. Leave that text out"
            )
        return ids

    def _check_ids(self, name: str, ids: Seq[int]) -> None:
        limit = self._model.runner.vocab_size - 1
        bad = next((token for token in ids if not 0 <= token <= limit), None)
        if bad is not None:
            raise ConfigError(f"Got {name} with {bad} but expected ids from 0 to {limit}")

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Queue a request; tokenising and checks happen here, in the caller's thread. Never waits for a place.

        Raises:
            ConfigError: the input cannot be tokenised, a token id is not in the vocabulary, its grammar is not one, or
                its request_id is in use.
            CopySpecError: it has a grammar, but the extra "grammar" is not installed.
            ContextOverflowError: it needs more tokens than the context or the KV pool holds.
            EngineBusyError: too many requests wait already.
            EngineStoppedError: the engine takes no more requests.
        """
        sequence = self._prepare(request)
        self._loop.places.take(sequence.number)
        return self._begin(request, sequence)

    def _begin(self, request: GenerationRequest, sequence: Sequence) -> RequestHandle:
        """Queue a request that has a place."""
        handle = RequestHandle(request.request_id)
        self._loop.enqueue(sequence, handle.sink)
        handle.on_close(partial(self._abandon, sequence))
        if request.explain:
            handle.on_last(partial(self._explained, request))
        return handle

    def stream(self, request: GenerationRequest) -> RequestHandle:
        """Chunks as they are decoded; closing or dropping the iterator cancels.

        Where too many requests wait already this waits too, for as long as the request's `timeout_s` allows. Raises as
        `submit` does, and EngineBusyError when that is over.
        """
        sequence = self._prepare(request)
        self._loop.wait(sequence)
        return self._begin(request, sequence)

    def generate(self, request: GenerationRequest) -> GenerationOutput:
        """The whole answer. Waits and raises as `stream` does."""
        with self.stream(request) as handle:
            return handle.result()

    async def astream(self, request: GenerationRequest) -> AsyncGenerator[StreamChunk, None]:
        """Chunks as they are decoded. Closing the iterator or cancelling the task cancels the request.

        Waits and raises as `stream` does, without blocking the event loop.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[StreamChunk | Exception] = asyncio.Queue()
        sequence = await asyncio.to_thread(self._prepare, request)
        await self._loop.wait_async(sequence)
        self._loop.enqueue(sequence, partial(_put_threadsafe, loop, items))
        try:
            while True:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                if item.is_last and request.explain:
                    item = await asyncio.to_thread(self._explained, request, item)
                yield item
                if item.is_last:
                    return
        finally:
            self._loop.abandon(sequence)

    async def agenerate(self, request: GenerationRequest) -> GenerationOutput:
        """The whole answer, without blocking the event loop."""
        async with contextlib.aclosing(self.astream(request)) as chunks:
            async for chunk in chunks:
                if chunk.output is not None:
                    return chunk.output
        raise RequestFailedError(f"Request {request.request_id} ended without an answer")

    def cancel(self, request_id: str) -> bool:
        """Stop a request at the next step; its reader gets what was written. False if it is not running (any more)."""
        return self._loop.cancel(request_id)

    def forget(self, session_id: str) -> bool:
        """Erase a session's texts, in memory, in shared pools and on disk, and its KV; False if there was nothing.

        A call of the session that is in flight goes on and keeps nothing.

        Raises:
            MemoryFileError: the texts are erased in memory, but not on disk. Call again to try again.
            EngineStoppedError: the engine was closed.
        """
        return self._loop.call(partial(self._core.forget, session_id))

    def explain(self, request: GenerationRequest, output: GenerationOutput) -> Explanation:
        """Where the answer `output` to `request` was copied from, in messages and characters.

        Runs in the caller's thread, and needs nothing of the conversation any more.
        """
        return explain(self._model.tokenizer, request, output)

    def _explained(self, request: GenerationRequest, last: StreamChunk) -> StreamChunk:
        """An answer's last chunk with its explanation; without, if that fails: the answer is worth more."""
        assert last.output is not None
        try:
            explanation = self.explain(request, last.output)
        except Exception:
            logger.exception("where the answer to request %s came from could not be made out", request.request_id)
            return last
        return replace(last, output=replace(last.output, explanation=explanation))

    def memory(self, session_id: str) -> ConversationMemory:
        """What a conversation remembers; it need not exist. Its methods raise EngineStoppedError once we are closed."""
        return ConversationMemory(
            session_id,
            partial(self._loop.call, partial(self._core.look, session_id)),
            partial(self._model.tokenizer.decode, skip_special_tokens=False),
            partial(self.forget, session_id),
        )

    def forget_pool(self, name: str) -> bool:
        """Erase the texts of a shared pool, in memory and on disk; False if there is none. Raises as `forget` does."""
        return self._loop.call(partial(self._core.forget_pool, name))

    def metrics(self) -> EngineMetrics:
        """What runs and waits now, and counts since the engine was made, taken between two steps.

        Raises:
            EngineStoppedError: the engine was closed.
        """
        return self._loop.call(self._core.metrics)

    def close(self) -> None:
        """Stop the loop; unfinished requests raise EngineStoppedError. Safe to call twice.

        The model's memory is free once nobody holds the engine any more.
        """
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- between the front doors and the loop ------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> Sequence:
        """Tokenise and check a request."""
        self._loop.check_running()
        model = self._model
        token_ids = self.tokenize(request)
        if not token_ids:
            raise ConfigError("Got an empty prompt: the text gives no tokens")
        self._check_ids("logit_bias", [token for token, _ in request.sampling.logit_bias])
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            self._check_ids(name, getattr(request.sampling, name))
        room = min(model.max_model_len, model.num_slots) - len(token_ids)
        params = model.defaults.applied(request.sampling, len(token_ids), room)
        request = request.model_copy(update={"sampling": params})
        wanted = len(token_ids) + (params.max_tokens or 1)
        if wanted > model.max_model_len:
            raise ContextOverflowError(wanted, model.max_model_len)
        if wanted > model.num_slots:
            raise ContextOverflowError(wanted, model.num_slots, "the KV pool (kv_cache_tokens)")
        limit = min(model.max_model_len, model.num_slots)
        reply = self._reply_parser(request, token_ids) if request.parse_reply else None
        ends = (frozenset() if params.ignore_eos else model.eos_token_ids) | frozenset(params.stop_token_ids)
        ends |= model.tokenizer.special_ids(params.stop)  # which have no text in which they could be found
        return Sequence(
            request=request,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_total_tokens=wanted if params.max_tokens else limit,
            eos_token_ids=ends,
            drafting=(request.drafter or self._config.drafter) if model.drafting_error is None else NoDrafter(),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            text=answer_stream(model.tokenizer, request, token_ids, params.stop),
            reply=reply,
            combine=self._combine(request),
            prediction_ids=self._known_text("prediction", self.encode(request.prediction or "", special_tokens=False)),
            deadline_s=math.inf if request.timeout_s is None else time.perf_counter() + request.timeout_s,
            cache_salt=request.cache_salt or self._config.cache_salt,
            bans=self._bans(params, ends, len(token_ids)),
            grammar=None if request.grammar is None else self._grammars.begin(self._placed(request.grammar, reply)),
        )

    def _bans(self, params: SamplingParams, ends: frozenset[int], num_prompt_tokens: int) -> Bans | None:
        """What may not come in the answer to a request.

        Raises:
            ConfigError: a bad word has an id that is not in the vocabulary, or nothing would be left to write.
        """
        words = {word for word in params.bad_words if isinstance(word, tuple)}
        texts = [word for word in params.bad_words if isinstance(word, str)]
        for text in (*texts, *(f" {text.lstrip()}" for text in texts)):
            words.add(tuple(self.encode(text, special_tokens=False)))
        words.discard(())
        self._check_ids("bad_words", [token for word in words for token in word])
        most = len({*params.suppress_tokens, *params.begin_suppress_tokens, *ends, *(word[-1] for word in words)})
        if most >= self._model.runner.vocab_size:
            raise ConfigError(f"Got options that ban {most} tokens, all that the model has: ban fewer")
        bans = Bans(params, words, ends, num_prompt_tokens)
        return None if bans.is_empty else bans

    def _abandon(self, sequence: Sequence) -> None:
        """Nobody will read this request any more. Whoever holds its handle holds the engine by this."""
        self._loop.abandon(sequence)

    def _combine(self, request: GenerationRequest) -> Combine:
        """How a request puts copies and the draft model together."""
        wanted = request.combine or self._config.combine
        if self._model.draft is not None:
            return wanted
        if request.combine not in (None, "copy-only") and self._model.drafting_error is None:
            raise ConfigError(f"Got combine={wanted!r} but no draft model: set EngineConfig(draft_model=...)")
        return "copy-only"

    def _placed(self, grammar: Grammar, reply: ReplyParser | None) -> Grammar:
        """The grammar of an answer that is taken apart holds for its text or calls, not for what precedes them."""
        calls = grammar.tools
        if reply is None or grammar.start_after is not None or (calls is not None and calls.is_free):
            return grammar
        start_after = self._chat_format.text_begin if calls is None else ""
        if reply.is_reasoning and self._chat_format.reasoning is not None:
            start_after = self._chat_format.reasoning[1]
        return grammar.model_copy(update={"start_after": start_after}) if start_after else grammar

    def _reply_parser(self, request: GenerationRequest, prompt_ids: Seq[int]) -> ReplyParser:
        prompt = self._model.tokenizer.decode(prompt_ids[-_PROMPT_END:], skip_special_tokens=False)
        grammar = request.grammar
        form: Form = "free"
        calls = None if grammar is None else grammar.tools
        if calls is not None and calls.answer_schema is not None:
            form = "either"
        elif grammar is not None and calls is None and grammar.start_after is None:
            form = "text"
        tools = request.tools or (() if calls is None else calls.tools)
        return ReplyParser(self._chat_format, prompt, tools, form=form)


def _copyspec_version() -> str:
    try:
        return importlib.metadata.version("copyspec")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _put_threadsafe(
    loop: asyncio.AbstractEventLoop, items: asyncio.Queue[StreamChunk | Exception], item: StreamChunk | Exception
) -> None:
    loop.call_soon_threadsafe(items.put_nowait, item)


def _unshare(config: EngineConfig, engine: weakref.ref[Engine]) -> None:
    """An engine has stopped: the next who asks for its config gets a new one."""
    with _registry_lock:
        if config in _shared and _shared[config] is engine():
            del _shared[config]


_shared: dict[EngineConfig, Engine] = {}
_shared_locks: dict[EngineConfig, threading.Lock] = {}
_registry_lock = threading.Lock()


def shared_engine(config: EngineConfig | None = None, on_progress: OnProgress | None = None) -> Engine:
    """This process's engine for a config, loaded on first use; equal configs share one. Thread-safe, may block.

    Args:
        config: what to load; default: the bundled model.
        on_progress: as for `Engine`; not called if the engine is there already.
    """
    config = config or EngineConfig()
    with _registry_lock:
        lock = _shared_locks.setdefault(config, threading.Lock())
    with lock:
        with _registry_lock:
            engine = _shared.get(config)
        if engine is None or engine._loop.is_over:
            engine = Engine(config, on_progress=on_progress)
            with _registry_lock:
                _shared[config] = engine
        return engine


@atexit.register
def _close_all() -> None:
    """Let loop threads end before the interpreter takes their libraries away."""
    for engine in list(_open_engines):
        engine.close()


def _after_fork() -> None:
    """A forked child has no loop threads: its engines say so instead of waiting for ever, and locks start afresh."""
    global _registry_lock
    _registry_lock = threading.Lock()
    _shared.clear()
    _shared_locks.clear()
    for engine in list(_open_engines):
        engine._loop.abandon_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
