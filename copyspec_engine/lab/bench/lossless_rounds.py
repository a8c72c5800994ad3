"""Runs random conversations with drafting, many at once, and compares every answer with plain decoding of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from copyspec_engine import (
    ConfigError,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    RequestFailedError,
    RequestHandle,
)
from copyspec_engine.lab.bench.lossless_cases import LONGEST, TURNS, Ability, Conversation, Turn

__all__ = ["AT_ONCE", "ROUND", "Outcome", "ability_of", "crowded", "rounds", "run_round"]

AT_ONCE = 8
"""Conversations that run together."""
ROUND = AT_ONCE * TURNS
"""Cases of a round: conversations that run together, in sessions, pools and salts of their own."""
_ROOM = 64
"""Tokens of an answer, at most, and one more."""
_CURVE = ((1, 1.0), (8, 1.1), (64, 1.6))
"""What drafting takes passes to cost: fixed, so that the same is drafted on every machine."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case, what plain decoding wrote, and what was written with drafting."""

    turn: Turn
    expected: GenerationOutput
    got: GenerationOutput | None
    """None if the request failed."""
    error: str = ""

    @property
    def is_same(self) -> bool:
        """The same tokens, text and end; an answer that was cancelled is the beginning of the plain one.

        Its text may end with half a character, or with half of the stop text that the plain one ends before.
        """
        if self.got is None:
            return False
        if self.got.finish_reason == "cancelled":
            texts = zip(self.expected.text, self.got.text.rstrip("\ufffd"), strict=False)
            ids = self.expected.token_ids[: len(self.got.token_ids)]
            return self.got.token_ids == ids and all(mine == other for mine, other in texts)
        mine, other = (
            (answer.token_ids, answer.text, answer.finish_reason, _logged_ids(answer))
            for answer in (self.expected, self.got)
        )
        return mine == other

    @property
    def features(self) -> list[str]:
        """What was asked for, and what became of it."""
        if self.got is None:
            return [*self.turn.features, "failed"]
        found = {
            "reused KV": self.got.usage.cached_tokens > 0,
            "accepted drafts": self.got.draft_stats.num_accepted_tokens > 0,
            "cancelled": self.got.finish_reason == "cancelled",
        }
        return [*self.turn.features, *(name for name, holds in found.items() if holds)]

    @property
    def position(self) -> int:
        """Tokens that both answers begin with."""
        expected, got = self.expected.token_ids, self.got.token_ids if self.got else ()
        pairs = enumerate(zip(expected, got, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(expected), len(got)))

    def described(self) -> dict[str, Any]:
        """What one needs to know of a difference, for the JSON file."""
        expected, got = self.expected.token_ids, self.got.token_ids if self.got else ()
        position = self.position
        return {
            "case": self.turn.number,
            "features": self.features,
            "sampling": {name: str(value) for name, value in self.turn.sampling.items()},
            "prompt_tokens": len(self.turn.prompt_ids),
            "position": position,
            "expected": expected[position : position + 8],
            "got": got[position : position + 8],
            "ends": [self.expected.finish_reason, self.got.finish_reason if self.got else self.error],
        }


def _logged_ids(answer: GenerationOutput) -> list[int] | None:
    return None if answer.logprobs is None else [found.token_id for found in answer.logprobs]


def crowded(config: EngineConfig) -> EngineConfig:
    """The config with little room, so that prompts are read in pieces beside others' answers, and requests give way."""
    return config.model_copy(
        update={
            "step_cost": _CURVE,
            "generation_config": "ignore",  # what a case says is all that counts
            "max_running": AT_ONCE - 2,
            "max_prefill_tokens": 96,
            "kv_cache_tokens": 3 * (LONGEST + _ROOM),
        }
    )


def ability_of(engine: Engine) -> Ability:
    """What there is to try with an engine.

    Raises:
        ConfigError: the model's context is too short for any conversation.
    """
    info = engine.info
    longest = min(LONGEST, info.max_model_len - _ROOM, info.num_kv_slots - _ROOM)
    if longest < _ROOM:
        raise ConfigError(f"Got {info.model} with a context of {info.max_model_len} tokens but expected {2 * _ROOM}")
    question: dict[str, Any] = {"role": "user", "content": "a"}
    has_chat = _renders(engine, question)
    return Ability(
        has_chat, has_chat and _renders(engine, question, question), find_spec("llguidance") is not None, longest
    )


def _renders(engine: Engine, *messages: dict[str, Any]) -> bool:
    try:
        engine.tokenize(GenerationRequest(messages=messages))
    except ConfigError:
        return False
    return True


def rounds(engine: Engine, seed: int, cases: int) -> Iterator[list[Outcome]]:
    """All outcomes of the cases 0 to cases - 1, a round at a time."""
    ability = ability_of(engine)
    for first in range(0, cases, ROUND):
        yield run_round(engine, ability, seed, first // ROUND)[: cases - first]


def run_round(engine: Engine, ability: Ability, seed: int, number: int) -> list[Outcome]:
    """The outcomes of the cases ROUND * number to ROUND * (number + 1) - 1, in this order.

    Plain decoding goes first, one request at a time. Nothing is left behind for the next round.
    """
    names = [f"{letter} of round {number}" for letter in "ab"]
    conversations = [
        Conversation(seed, conversation, engine, ability)
        for conversation in range(AT_ONCE * number, AT_ONCE * (number + 1))
    ]
    outcomes: list[Outcome] = []
    for _ in range(TURNS):
        turns = [conversation.next_turn(names) for conversation in conversations]
        plain = [_plain(engine, *pair) for pair in zip(conversations, turns, strict=True)]
        found = _together(engine, turns)
        for conversation, turn, expected, got in zip(conversations, turns, plain, found, strict=True):
            if isinstance(got, RequestFailedError):
                outcomes.append(Outcome(turn, expected, None, str(got)))
            else:
                outcomes.append(Outcome(turn, expected, got))
            conversation.take(outcomes[-1].got or expected)
    for conversation in conversations:
        engine.forget(conversation.session)
    for name in names:
        engine.forget_pool(name)
    return sorted(outcomes, key=lambda outcome: outcome.turn.number)


def _plain(engine: Engine, conversation: Conversation, turn: Turn) -> GenerationOutput:
    """Plain decoding of a turn, whose last details it decides."""
    plain = engine.generate(turn.plain)
    return engine.generate(turn.plain) if conversation.fit(turn, plain) else plain


def _together(engine: Engine, turns: Sequence[Turn]) -> list[GenerationOutput | RequestFailedError]:
    """The answers with drafting of turns that run at the same time."""
    handles = [engine.stream(turn.drafted) for turn in turns]
    for turn, handle in sorted(zip(turns, handles, strict=True), key=lambda pair: pair[0].cancel_after or 0):
        if turn.cancel_after is not None:
            _cancel_after(engine, handle, turn.cancel_after)
    return [_answer(handle) for handle in handles]


def _cancel_after(engine: Engine, handle: RequestHandle, chunks: int) -> None:
    try:
        for _, _chunk in zip(range(chunks), handle, strict=False):
            pass
    except RequestFailedError:
        return  # `_answer` hears of it too
    engine.cancel(handle.request_id)


def _answer(handle: RequestHandle) -> GenerationOutput | RequestFailedError:
    try:
        return handle.result()
    except RequestFailedError as error:
        return error
