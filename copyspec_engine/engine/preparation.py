"""From a request to what the loop works on: its text as tokens, its options checked, its grammar compiled.

All of it happens in the caller's thread.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence

from copyspec_engine.chat.detokenizer import answer_stream
from copyspec_engine.chat.known_ids import KnownIds
from copyspec_engine.chat.reply import Form, ReplyParser
from copyspec_engine.execution.runner import LoadedModel
from copyspec_engine.grammar.state import GrammarCompiler
from copyspec_engine.kv.slots import KVSequence
from copyspec_engine.loop.request import Answer, Asked, Drafting, Progress, Request
from copyspec_engine.sampling.processors import Bans
from copyspec_engine.values.config import (
    DrafterConfig,
    DraftModelDrafter,
    EngineConfig,
    GenerationRequest,
    NoDrafter,
    SamplingParams,
    drafter_of,
)
from copyspec_engine.values.errors import ConfigError, ContextOverflowError, about
from copyspec_engine.values.grammar import Grammar

__all__ = ["Preparation"]

_PROMPT_END = 64
"""Tokens at the end of a prompt in which the answer's beginning is looked for."""


class Preparation:
    """Makes what the loop works on of requests to one model. Thread-safe.

    Args:
        config: of the engine.
        model: its model.
        known_ids: what the conversations' answers were sampled as.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel, known_ids: KnownIds) -> None:
        self._config, self._model, self._known_ids = config, model, known_ids
        self._grammars = GrammarCompiler(model.tokenizer, model.runner.vocab_size, model.eos_token_ids)
        self.chat_format = model.tokenizer.chat_format()

    def token_ids(self, request: GenerationRequest) -> list[int]:
        """See `Engine.tokenize`."""
        if request.messages is not None:
            kept = self._known_ids
            known = (*kept.of(request.session_id), *kept.of(request.continues))
            with about("messages"):
                ids = self._model.tokenizer.render(request.messages, request.tools, request.chat_template_kwargs, known)
            return self._known_text("messages", ids)
        if request.prompt is not None:
            return self._known_text("prompt", self._model.tokenizer.encode(request.prompt))
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
            text = self._model.tokenizer.decode([bad], skip_special_tokens=False)
            raise ConfigError(
                f"Got {name} with {text!r} (token {bad}) but the model's own tokens end at {limit}: its tokenizer "
                "holds more than it was trained on. Leave that text out",
                name,
            )
        return ids

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        limit = self._model.runner.vocab_size - 1
        bad = next((token for token in ids if not 0 <= token <= limit), None)
        if bad is not None:
            raise ConfigError(f"Got {name} with {bad} but expected ids from 0 to {limit}", name)

    def request(self, call: GenerationRequest) -> Request:
        """Tokenise and check a request. Raises as `Engine.stream` does of its input."""
        begun_s, model = time.perf_counter(), self._model
        token_ids = self.token_ids(call)
        if not token_ids:
            raise ConfigError("Got an empty prompt: the text gives no tokens", _input_of(call))
        self._check_ids("logit_bias", [token for token, _ in call.sampling.logit_bias])
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            self._check_ids(name, getattr(call.sampling, name))
        limit = min(model.info.max_model_len, model.info.num_kv_slots)
        params = model.defaults.applied(call.sampling, len(token_ids), limit - len(token_ids))
        call = call.model_copy(update={"sampling": params})
        wanted = len(token_ids) + (params.max_tokens or 1)
        if wanted > model.info.max_model_len:
            raise ContextOverflowError(wanted, model.info.max_model_len)
        if wanted > model.info.num_kv_slots:
            raise ContextOverflowError(wanted, model.info.num_kv_slots, "the KV pool (kv_cache_tokens)")
        reply = self._reply_parser(call, token_ids) if call.parse_reply else None
        drafter = self._drafter(call)
        # Special tokens have no text in which they could be found.
        named: dict[int, str | int] = {i: text for text in params.stop for i in model.tokenizer.special_ids((text,))}
        named |= {token: token for token in params.stop_token_ids}
        ends = (frozenset() if params.ignore_eos else model.eos_token_ids) | named.keys()
        asked = Asked(
            call=call,
            num_prompt_tokens=len(token_ids),
            max_total_tokens=wanted if params.max_tokens else limit,
            eos_token_ids=ends,
            stop_names=named,
            drafter=drafter,
            seed=secrets.randbits(63) if params.seed is None else params.seed % 2**63,
            prediction_ids=self._known_text(
                "prediction", model.tokenizer.encode(call.prediction or "", special_tokens=False)
            ),
            deadline_s=math.inf if call.timeout_s is None else time.perf_counter() + call.timeout_s,
            cache_salt=call.cache_salt,
            bans=self._bans(params, ends, len(token_ids)),
        )
        with about("grammar"):
            grammar = None if call.grammar is None else self._grammars.begin(self._placed(call.grammar, reply))
        answer = Answer(answer_stream(model.tokenizer, call, token_ids, params.stop), grammar=grammar, reply=reply)
        drafting = Drafting("never" if model.draft is None else drafter.draft_model_use)
        return Request(asked, KVSequence(token_ids), answer, drafting, Progress(asked_s=begun_s))

    def _bans(self, params: SamplingParams, ends: frozenset[int], num_prompt_tokens: int) -> Bans | None:
        """What may not come in the answer to a request.

        Raises:
            ConfigError: a bad word has an id that is not in the vocabulary, or nothing would be left to write.
        """
        words = {word for word in params.bad_words if isinstance(word, tuple)}
        texts = [word for word in params.bad_words if isinstance(word, str)]
        for text in (*texts, *(f" {text.lstrip()}" for text in texts)):
            words.add(tuple(self._model.tokenizer.encode(text, special_tokens=False)))
        words.discard(())
        self._check_ids("bad_words", [token for word in words for token in word])
        most = len({*params.suppress_tokens, *params.begin_suppress_tokens, *ends, *(word[-1] for word in words)})
        if most >= self._model.runner.vocab_size:
            raise ConfigError(f"Got options that ban {most} tokens, all that the model has: ban fewer", "bad_words")
        bans = Bans(params, words, ends, num_prompt_tokens)
        return None if bans.is_empty else bans

    def _drafter(self, request: GenerationRequest) -> DrafterConfig:
        """Where a request's drafts come from."""
        if self._model.info.drafting_error is not None:
            return NoDrafter()
        drafter = drafter_of(request.drafter or self._config.drafter)
        if isinstance(drafter, DraftModelDrafter) and self._model.draft is None:
            raise ConfigError(
                "Got drafter='draft-model' but no draft model: set EngineConfig(draft_model=...)", "drafter"
            )
        return drafter

    def _placed(self, grammar: Grammar, reply: ReplyParser | None) -> Grammar:
        """The grammar of an answer that is taken apart holds for its text or calls, not for what precedes them."""
        calls = grammar.tools
        if reply is None or grammar.start_after is not None or (calls is not None and calls.is_free):
            return grammar
        start_after = self.chat_format.text_begin if calls is None else ""
        if reply.is_reasoning and self.chat_format.reasoning is not None:
            start_after = self.chat_format.reasoning[1]
        return grammar.model_copy(update={"start_after": start_after}) if start_after else grammar

    def _reply_parser(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> ReplyParser:
        prompt = self._model.tokenizer.decode(prompt_ids[-_PROMPT_END:], skip_special_tokens=False)
        grammar = request.grammar
        form: Form = "free"
        calls = None if grammar is None else grammar.tools
        if calls is not None and calls.answer_schema is not None:
            form = "either"
        elif grammar is not None and calls is None and grammar.start_after is None:
            form = "text"
        tools = request.tools or (() if calls is None else calls.tools)
        return ReplyParser(self.chat_format, prompt, tools, form=form)


def _input_of(call: GenerationRequest) -> str:
    """By which field a request gives its prompt."""
    return next(name for name in ("messages", "prompt", "prompt_token_ids") if getattr(call, name) is not None)
