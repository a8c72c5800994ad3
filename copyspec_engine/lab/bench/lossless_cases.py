"""Random conversations for `copyspec bench lossless`: texts that are rewritten turn by turn, asked for in every way.

All that is random about a conversation comes from (seed, its number), so that a case can be run again alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from copyspec_engine import (
    AdaptiveDrafter,
    CopySpecDrafter,
    DrafterConfig,
    Engine,
    GenerationOutput,
    GenerationRequest,
    Grammar,
    NoDrafter,
    SamplingParams,
)

__all__ = ["LONGEST", "TURNS", "Ability", "Conversation", "Turn", "edited"]

TURNS = 4
"""Cases of a conversation, one behind the other."""
LONGEST = 240
"""Tokens of a prompt, beyond which a conversation begins anew with another text; answers come on top. Many are
content with less, so that there is room to keep their KV."""

_WORDS = (
    *("nails", "screws", "bread", "the", "lamp", "river", "paper", "green", "old", "seven", "box", "tea", "é", "naïve"),
    *("日本", "🙂", "cat", "sat", "on", "mat", "value", "item", "total", "self", "return", "print"),
)
_INSTRUCTIONS = (
    "Repeat the document.",
    'Replace "{0}" with "{1}".',
    "Append this line:\n{2}",
    "Prepend this line:\n{2}",
    "Delete the first line.",
    "Delete the last line.",
    "What does it say about {0}?",
)
"""As the bundled model's card words them; any other model makes of them what it can."""


@dataclass(frozen=True, slots=True)
class Ability:
    """What a model and the installation can do."""

    has_chat: bool
    """There is a chat template; else all prompts are raw text."""
    may_repeat_roles: bool
    """It takes two messages of a user in a row: a document and what to do with it."""
    has_grammars: bool
    longest: int = LONGEST
    """Tokens of a prompt, at most."""


@dataclass(slots=True)
class Turn:
    """One case: a prompt, how its answer is chosen, and how drafting is to go about it."""

    number: int
    prompt: dict[str, Any]
    """`messages` or `prompt_token_ids`, as the conversation sends them."""
    sampling: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Of the request with drafting only: session, pool, prediction and so on."""
    grammar: Grammar | None = None
    prompt_ids: list[int] = field(default_factory=list)
    """The prompt as the model reads it."""
    cancel_after: int | None = None
    """Chunks after which the answer is cancelled."""
    wants_stop: bool = False
    """A piece of the answer is to become a stop text."""
    wants_answer_as_prediction: bool = False
    features: list[str] = field(default_factory=list)

    @property
    def plain(self) -> GenerationRequest:
        """Plain decoding of the same prompt, with nothing in memory."""
        return GenerationRequest(
            prompt_token_ids=self.prompt_ids,
            drafter=NoDrafter(),
            grammar=self.grammar,
            sampling=SamplingParams(**self.sampling),
        )

    @property
    def drafted(self) -> GenerationRequest:
        """The same with drafting, in its session."""
        sampling = SamplingParams(**self.sampling)
        return GenerationRequest(**self.prompt, **self.options, grammar=self.grammar, sampling=sampling)


class Conversation:
    """Gives one turn after the other, each of which goes on with what was answered.

    Args:
        seed: of all conversations.
        number: of this one, from 0.
        engine: whose tokenizer and chat template make prompts.
        ability: see there.
    """

    def __init__(self, seed: int, number: int, engine: Engine, ability: Ability) -> None:
        self._rng = random.Random(f"{seed}/{number}")
        self._number, self._engine, self._ability = number, engine, ability
        self._is_chat = ability.has_chat and self._chance(0.7)
        self._longest = min(ability.longest, self._rng.choice((80, 120, ability.longest)))
        self._num_turns = 0
        self._text = ""
        self._messages: list[dict[str, Any]] = []
        self._last_asked = 0
        """Messages before the last question."""
        self._ids: list[int] = []

    @property
    def session(self) -> str:
        return f"conversation {self._number}"

    def next_turn(self, names: Sequence[str]) -> Turn:
        """The next case.

        Args:
            names: of pools and salts that the conversation may share with others.
        """
        number = self._number * TURNS + self._num_turns
        self._num_turns += 1
        features = ["chat" if self._is_chat else "raw"]
        sampling = self._sampling(features)
        options = self._options(names, features)
        prompt = self._ask(features, options.get("session_id"))
        turn = Turn(number, prompt, sampling, options, features=features)
        turn.prompt_ids = self._engine.tokenize(GenerationRequest(**prompt, session_id=options.get("session_id")))
        self._prompt_ids = turn.prompt_ids
        if self._ability.has_grammars and "ignore_eos" not in sampling and self._chance(0.2):
            turn.grammar = self._grammar()
            features.append("grammar")
        turn.wants_stop = self._noted(0.2, "stop", features)
        turn.wants_answer_as_prediction = "prediction" in features and self._chance(0.75)
        if self._noted(0.12, "cancel", features):
            turn.cancel_after = self._rng.randrange(1, 8)
        return turn

    def fit(self, turn: Turn, plain: GenerationOutput) -> bool:
        """Let a turn take up what plain decoding wrote; whether its plain answer is another one now.

        A draft is long and for the most part right where the answer itself, edited, is its source.
        """
        if turn.wants_answer_as_prediction and plain.text:
            turn.options["prediction"] = edited(self._rng, plain.text)
        if not turn.wants_stop or len(plain.text) < 2:
            return False
        at = self._rng.randrange(len(plain.text))
        turn.sampling["stop"] = (plain.text[at : at + self._rng.randrange(1, 6)], "never written")
        return True

    def take(self, output: GenerationOutput) -> None:
        """Go on behind an answer."""
        if self._is_chat:
            self._messages.append({"role": "assistant", "content": output.text})
        else:
            self._ids = [*self._prompt_ids, *output.token_ids]

    def _chance(self, share: float) -> bool:
        return self._rng.random() < share

    def _noted(self, share: float, feature: str, features: list[str]) -> bool:
        """Whether a feature is drawn, which is then noted."""
        if not self._chance(share):
            return False
        features.append(feature)
        return True

    # ---- prompts -----------------------------------------------------------------------------------------------

    def _ask(self, features: list[str], session: str | None) -> dict[str, Any]:
        """The prompt of the next turn: the talk goes on, branches off, or begins anew where it would get too long."""
        if (len(self._messages) > 2 or len(self._ids) > 20) and self._noted(0.2, "branch", features):
            del self._messages[self._last_asked :]
            del self._ids[self._rng.randrange(10, max(len(self._ids), 11)) :]
        self._last_asked = len(self._messages)
        prompt = self._with_next()
        ids = self._engine.tokenize(GenerationRequest(**prompt, session_id=session))
        if len(ids) > self._longest:
            self._messages, self._ids, self._text, self._last_asked = [], [], "", 0
            prompt = self._with_next()
        return prompt

    def _with_next(self) -> dict[str, Any]:
        """The prompt with another message, or with more raw text, that is about the text so far or about a new one."""
        rng, is_new = self._rng, not self._text or self._chance(0.25)
        if is_new:
            self._text = _document(rng)
        text = self._text
        if not self._is_chat:
            more = text[: rng.randrange(1, len(text) + 1)] if self._ids else text + "\n" + text[: len(text) // 3]
            self._ids += self._engine.encode(more, special_tokens=False)
            return {"prompt_token_ids": [*self._ids]}
        words = rng.choice(text.split()), rng.choice(_WORDS), edited(rng, rng.choice(text.split("\n")))
        contents = [text] * (is_new or not self._messages) + [rng.choice(_INSTRUCTIONS).format(*words)]
        if not self._ability.may_repeat_roles:
            contents = ["\n".join(contents)]
        self._messages += [{"role": "user", "content": content} for content in contents]
        return {"messages": [*self._messages]}

    # ---- how answers are chosen --------------------------------------------------------------------------------

    def _sampling(self, features: list[str]) -> dict[str, Any]:
        rng = self._rng
        sampling: dict[str, Any] = {"max_tokens": rng.choice((1, 4, 8, 12, 16, 20, 24, 48))}
        if self._noted(0.55, "seeded", features):
            sampling |= {"temperature": rng.choice((0.01, 0.3, 0.7, 1.0, 1.5)), "seed": rng.randrange(2**63)}
            filters: dict[str, Callable[[], float | int]] = {
                "top_k": lambda: rng.randrange(1, 60),
                "top_p": lambda: rng.choice((0.3, 0.9, 0.99)),
                "min_p": lambda: rng.choice((0.02, 0.2)),
            }
            sampling |= {name: draw() for name, draw in filters.items() if self._noted(0.25, name, features)}
        else:
            features.append("greedy")
        if self._noted(0.2, "penalties", features):
            sampling |= rng.choice(
                (
                    {"repetition_penalty": 1.3},
                    {"repetition_penalty": 0.8, "presence_penalty": 0.5},
                    {"frequency_penalty": 0.4},
                    {"presence_penalty": -0.9, "frequency_penalty": 0.2},
                )
            )
        if self._noted(0.15, "logit_bias", features):
            tokens = set(rng.choices(self._common_ids, k=rng.randrange(1, 6)))
            sampling["logit_bias"] = {token: rng.choice((-100, -2.5, 0.7, 3)) for token in sorted(tokens)}
        if self._noted(0.1, "stop_token_ids", features):
            sampling["stop_token_ids"] = tuple(rng.choices(self._common_ids, k=6))
        for name, share in (("ignore_eos", 0.15), ("logprobs", 0.1)):
            if self._noted(share, name, features):
                sampling[name] = True
        return sampling

    @cached_property
    def _common_ids(self) -> list[int]:
        """Tokens that texts here hold."""
        return self._engine.encode(_document(self._rng), special_tokens=False)

    def _options(self, names: Sequence[str], features: list[str]) -> dict[str, Any]:
        rng = self._rng
        options: dict[str, Any] = {"drafter": self._drafter(features)}
        if self._noted(0.75, "session", features):
            options["session_id"] = self.session
        for name in ("memory_pool", "cache_salt"):
            if self._noted(0.25, name, features):
                options[name] = rng.choice(names)
        if self._noted(0.45, "prediction", features):
            options["prediction"] = edited(rng, self._text or _document(rng))
        return options

    def _drafter(self, features: list[str]) -> DrafterConfig:
        rng = self._rng
        kinds: dict[str, DrafterConfig] = {
            "trees": AdaptiveDrafter(),
            "trees, recycled too": AdaptiveDrafter(recycle=True),
            "short trees": AdaptiveDrafter(max_draft_tokens=rng.choice((1, 5))),
            "blocks": CopySpecDrafter(min_match_tokens=rng.randrange(1, 4), block=rng.randrange(1, 14)),
        }
        name = rng.choice([*kinds, "trees", "trees"])
        features.append(name)
        return kinds[name]

    def _grammar(self) -> Grammar:
        rng = self._rng
        lines = [line for line in self._text.split("\n") if line]
        names = rng.sample(("name", "total", "item", "unit", "note", "é"), k=rng.randrange(1, 5))
        values: tuple[dict[str, Any], ...] = (
            {"type": "string", "maxLength": 12},
            {"type": "integer"},
            {"type": "boolean"},
            {"enum": [*_WORDS[:5], 7, None]},
            {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        )
        properties = {name: rng.choice(values) for name in names}
        required = [name for name in names if self._chance(0.7)]
        return rng.choice(
            (
                Grammar(choice=tuple(dict.fromkeys([*rng.choices(lines, k=3), *rng.choices(_WORDS, k=2)]))),
                Grammar(regex=rng.choice((r"[a-z ]{3,20}\.", r"(- [a-z]+: \d+\n){1,5}", r"[^\n]+\n[^\n]+"))),
                Grammar(lark='start: line ("\\n" line)*\nline: "- " /[a-z ]+/ (": " /[0-9]+/)?'),
                Grammar(json_schema={"type": "object", "properties": properties, "required": required}),
                Grammar(json_object=True),
            )
        )


def _document(rng: random.Random) -> str:
    """A few lines that look like each other, as documents have them."""
    kind, lines = rng.randrange(5), []
    first, second = rng.sample(_WORDS, 2)
    for number in range(rng.randrange(1, 5)):
        word, count = rng.choice(_WORDS), rng.randrange(100)
        lines.append(
            (
                f"- {first} {number}: {count} boxes of {word}",
                f"{first}_{number} = {second}({count}, '{word}')",
                f'{{"{first}": {count}, "{second}": "{word}"}}',
                f"The {first} {word} sat on the {second}, {count} times.",
                " ".join(rng.choices(_WORDS, k=6)),
            )[kind]
        )
    return "\n".join(lines)


def edited(rng: random.Random, text: str) -> str:
    """A text with one thing about it changed, so that a copy is wrong somewhere."""
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.randrange(8))
    return rng.choice((text, text[:at] + rng.choice(_WORDS) + text[end:], text[:at] + text[end:], text[at:])) or text
