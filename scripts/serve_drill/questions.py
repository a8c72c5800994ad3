"""What the clients of a drill ask: a bounded set of questions, each with the one right answer, measured beforehand.

Each tenant's texts hold a word of his own, which nothing that another tenant is told may hold.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from scripts.serve_drill.servers import TENANTS, key_of

__all__ = ["Answer", "Question", "Talk", "World", "secret_of", "world_of"]

_SYLLABLES = ("ka", "ro", "mi", "ve", "lu", "to", "za", "pe", "ni", "du", "so", "ga")
_THINGS = ("room", "train", "cake", "garden", "boat", "piano", "lamp", "bridge", "letter", "market")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NAMES = ("Olga", "Peter", "Maria", "Ivan", "Chen", "Amara", "Noor", "Tomas")
_TASKS = (
    "Repeat the notes.",
    "What is the password?",
    "Repeat the first line of the notes.",
    "Who comes on {day}?",
    "Write a sentence about the {thing}.",
)
_SCHEMA = {"type": "object", "properties": {"password": {"type": "string", "maxLength": 20}}, "required": ["password"]}


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: messages of a chat, or a raw text."""

    tenant: str
    max_tokens: int
    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the body of a chat says."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: the text, and "stop" or "length"."""

    text: str
    finish: str


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation: questions that each hold all that was said before, and their right answers."""

    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class World:
    """All that can be asked, by tenant."""

    talks: Mapping[str, Sequence[Talk]]
    raw: Mapping[str, Sequence[tuple[Question, Answer]]]
    """Texts to go on with."""
    forms: Mapping[str, Sequence[tuple[Question, Answer]]]
    """Chats whose answer has a form."""

    @property
    def num_answers(self) -> int:
        talks = (talk for own in self.talks.values() for talk in own)
        others = (pair for kind in (self.raw, self.forms) for own in kind.values() for pair in own)
        return sum(len(talk.answers) for talk in talks) + sum(1 for _ in others)


def secret_of(tenant: str) -> str:
    """The word that only this tenant's texts hold."""
    rng = random.Random(f"secret of {tenant}")
    return "".join(rng.choice(_SYLLABLES) for _ in range(5)).upper()


def world_of(url: str, model: str, seed: int, talks_each: int) -> World:
    """Make questions up, and have a server answer them plainly: one at a time, nothing drafted, nothing remembered.

    A conversation ends early where what was written would be read otherwise in another session than its own (see
    `EngineConfig.keep_token_ids`): what is right then depends on who is asked.

    Args:
        url: of a server that drafts nothing.
        model: its name.
        seed: of what is made up.
        talks_each: conversations of each tenant.
    """
    talks: dict[str, list[Talk]] = {name: [] for name in TENANTS}
    raw: dict[str, list[tuple[Question, Answer]]] = {name: [] for name in TENANTS}
    forms: dict[str, list[tuple[Question, Answer]]] = {name: [] for name in TENANTS}
    for tenant in TENANTS:
        rng = random.Random(f"{seed} {tenant}")
        with httpx.Client(base_url=url, headers=key_of(tenant), timeout=120) as http:
            plain = _Plain(http, model)
            for number in range(talks_each):
                talks[tenant].append(plain.talk(tenant, rng, number))
            for _ in range(talks_each // 2):
                continued = Question(tenant, rng.randint(8, 24), prompt=_notes(tenant, rng) + "- ")
                asked = ({"role": "user", "content": f"{_notes(tenant, rng)}\nGive the password as JSON."},)
                form = {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": _SCHEMA}}}
                formed = Question(tenant, 24, messages=asked, fields=form)
                raw[tenant].append((continued, plain.answer(continued)))
                forms[tenant].append((formed, plain.answer(formed)))
    return World(talks, raw, forms)


def _notes(tenant: str, rng: random.Random) -> str:
    lines = [f"The password is {secret_of(tenant)}."]
    number = rng.randint(2, 5)
    lines += [f"{rng.choice(_NAMES)} brings the {rng.choice(_THINGS)} on {rng.choice(_DAYS)}." for _ in range(number)]
    rng.shuffle(lines)
    return "# Notes\n" + "".join(f"- {line}\n" for line in lines)


class _Plain:
    """A server that is asked for right answers.

    Args:
        http: a client of it.
        model: its name.
    """

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http, self._model = http, model

    def answer(self, question: Question) -> Answer:
        """The right answer."""
        path = "/v1/chat/completions" if question.messages else "/v1/completions"
        asked = {"messages": question.messages} if question.messages else {"prompt": question.prompt}
        body = {"model": self._model, "temperature": 0, "max_tokens": question.max_tokens, **asked, **question.fields}
        choice = self._post(path, body)["choices"][0]
        return Answer(choice["message"]["content"] if question.messages else choice["text"], choice["finish_reason"])

    def talk(self, tenant: str, rng: random.Random, number: int) -> Talk:
        """A conversation of up to three turns."""
        said: list[dict[str, str]] = []
        questions, answers = [], []
        session = f"plain-{number}"
        for turn in range(3):
            task = rng.choice(_TASKS).format(day=rng.choice(_DAYS), thing=rng.choice(_THINGS))
            text = f"{_notes(tenant, rng)}\n{task}" if turn == 0 else task
            question = Question(tenant, rng.randint(8, 24), (*said, {"role": "user", "content": text}))
            if turn and not self._reads_alike(question, session):
                break
            answer = self.answer(question)
            self._post("/v1/chat/completions", self._chat(question), {"X-Session-ID": session})
            questions.append(question)
            answers.append(answer)
            said = [*question.messages, {"role": "assistant", "content": answer.text}]
        return Talk(tuple(questions), tuple(answers))

    def _chat(self, question: Question) -> dict[str, Any]:
        return {
            "model": self._model,
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "messages": question.messages,
        }

    def _reads_alike(self, question: Question, session: str) -> bool:
        """Whether the session that has written the answers before reads them as any other does."""
        body = {"messages": question.messages}
        own = self._post("/tokenize", body, {"X-Session-ID": session})
        return bool(own["tokens"] == self._post("/tokenize", body)["tokens"])

    def _post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401
        response = self._http.post(path, json=body, headers=headers)
        response.raise_for_status()
        return response.json()
