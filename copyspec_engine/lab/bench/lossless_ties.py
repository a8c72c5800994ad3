"""How near to a tie an answer was that came out otherwise: whether rounding can have decided it, or a mistake did."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from copyspec_engine import Engine, GenerationRequest, NoDrafter, SamplingParams
from copyspec_engine.lab.bench.lossless_cases import Turn
from copyspec_engine.lab.bench.lossless_rounds import Outcome

__all__ = ["Tie", "tie_of"]

_NUDGES = [2.0**exponent for exponent in range(-20, 3)]
"""What is added to a logit until plain decoding decides otherwise: doubled each time, up to 4."""
_MEASURED: dict[str, Any] = {"logprobs": True, "top_logprobs": 20}
_SESSION = "two halves of a text"


@dataclass(frozen=True, slots=True)
class Tie:
    """Where two answers part: how far apart their tokens are for plain decoding, and how exact its logits are."""

    nudge: float | None
    """What has to be added to the other token's logit for plain decoding to write something else too, rounded up to a
    power of 2: all that decides counts, noise, penalties, bans and filters too. None: more than 4."""
    rounding: float
    """How far log-probabilities of the likeliest tokens there move when plain decoding reads the same text at once, in
    two halves, or one token of the answer at a time."""

    def __str__(self) -> str:
        lacks = f"over {_NUDGES[-1]:g}" if self.nudge is None else f"at most {self.nudge:.2g}"
        return f"the other token's logit lacks {lacks}, rounding moves logits there by {self.rounding:.2g}"


def tie_of(engine: Engine, outcome: Outcome) -> Tie | None:
    """How near to a tie a difference is; None if the answers do not part at a token of both.

    All requests are plain ones, and nothing is left behind in the engine.
    """
    position, expected = outcome.position, outcome.expected.token_ids
    if outcome.got is None or position >= min(len(expected), len(outcome.got.token_ids)):
        return None
    other = outcome.got.token_ids[position]

    def is_enough(nudge: float) -> bool:
        ids = engine.generate(_nudged(outcome.turn, other, nudge)).token_ids
        return ids[: position + 1] != expected[: position + 1]

    at = bisect_left(_NUDGES, True, key=is_enough)
    nudge = _NUDGES[at] if at < len(_NUDGES) else None
    return Tie(nudge, _rounding(engine, outcome))


def _nudged(turn: Turn, token: int, nudge: float) -> GenerationRequest:
    bias = dict(turn.sampling.get("logit_bias", {}))
    bias[token] = bias.get(token, 0.0) + nudge
    return replace(turn, sampling={**turn.sampling, "logit_bias": bias}).plain


def _rounding(engine: Engine, outcome: Outcome) -> float:
    """How far the likeliest tokens' log-probabilities are apart when the text is read in three ways."""
    turn, position = outcome.turn, outcome.position
    text = [*turn.prompt_ids, *outcome.expected.token_ids[:position]]
    by_token = engine.generate(replace(turn, sampling={**turn.sampling, **_MEASURED}).plain)
    at_once = engine.generate(_reading(text))
    engine.generate(_reading(text[: (len(text) + 1) // 2], _SESSION))
    in_halves = engine.generate(_reading(text, _SESSION))
    engine.forget(_SESSION)
    places = (by_token, position), (at_once, 0), (in_halves, 0)
    first, *others = [dict(answer.logprobs[at].top) for answer, at in places if answer.logprobs]
    seen = [
        [logprob, *(other[token] for other in others)] for token, logprob in first.items() if _in_all(token, others)
    ]
    return max((max(logprobs) - min(logprobs) for logprobs in seen), default=0.0)


def _in_all(token: int, readings: Sequence[dict[int, float]]) -> bool:
    return all(token in reading for reading in readings)


def _reading(text: Sequence[int], session: str | None = None) -> GenerationRequest:
    return GenerationRequest(
        prompt_token_ids=list(text),
        session_id=session,
        drafter=NoDrafter(),
        sampling=SamplingParams(max_tokens=1, temperature=0.0, **_MEASURED),
    )
