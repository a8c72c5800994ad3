"""Conversations of drills: they ask for stories, look at each word that comes back, and at who has sent it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from scripts.scale_drill.models import story

__all__ = ["Answer", "ModelTalk", "Talk", "at_once", "client_of"]

_CHAT = "/v1/chat/completions"


@dataclass(slots=True)
class Answer:
    """What came of one call."""

    text: str = ""
    status: int = 0
    has_begun: bool = False
    """Something of its stream has come."""
    tag: str = ""
    """Of the slot that has answered."""
    error: str = ""
    """Code of the error event or body, or "broken": the connection was."""
    is_whole: bool = False
    """It came to its end, by its own account."""
    began_s: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    copied: dict[str, int] = field(default_factory=dict)
    """Characters of a whole answer by their sources."""


class Talk:
    """One conversation.

    Args:
        name: of it, and of its stories.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.answers: list[Answer] = []

    @property
    def tag(self) -> str:
        """The slot that has answered last."""
        return self.answers[-1].tag

    async def ask(self, client: httpx.AsyncClient, words: int, *, stream: bool = True) -> Answer:
        """Ask for the first so many words of its story, and show nothing but this question."""
        answer = Answer()
        self.answers.append(answer)
        body = {**self._question(words), "stream": stream}
        if not stream:
            body["copyspec"] = {"segments": True}
        try:
            async with client.stream("POST", _CHAT, json=body, headers={"X-Session-ID": self.name}) as response:
                answer.status = response.status_code
                if stream and answer.status == 200:
                    await _read(answer, response)
                else:
                    _take(answer, json.loads(await response.aread()))
        except (httpx.HTTPError, ValueError) as error:
            answer.error = answer.error or f"broken: {type(error).__name__}"
        answer.seconds = time.monotonic() - answer.began_s
        return answer

    def _question(self, words: int) -> dict[str, Any]:
        """What is asked, and of whom."""
        return {
            "model": "scripted",
            "messages": [{"role": "user", "content": f"{words} words of story {self.name}."}],
        }

    async def forgotten(self, client: httpx.AsyncClient, *, shared: bool) -> str:
        """What of its whole answers the slot that has answered last does not remember; empty: all is there.

        Args:
            client: asks.
            shared: what other slots have answered has to be there, too.
        """
        response = await client.get(
            f"/v1/copyspec/conversations/{self.name}/export", headers={"X-Session-ID": self.name}
        )
        texts = [text["text"] for text in response.json().get("texts", ())]
        for answer in self.answers:
            there = any(answer.text in text for text in texts)
            if answer.is_whole and (shared or answer.tag == self.tag) and not there:
                return f"{self.name} has no {answer.text[:40]!r}... of {answer.tag} in {self.tag}"
        return ""

    def wrong(self, answer: Answer, words: int) -> str:
        """What is wrong with a whole answer; empty: nothing."""
        if not answer.is_whole or answer.text == story(self.name, words):
            return ""
        return f"{self.name} was told {answer.text[:80]!r} in {answer.tag}"


class ModelTalk(Talk):
    """One conversation with a real model, which is always asked the same, and answers it in so many tokens.

    Args:
        name: of it.
        model: that is asked.
    """

    def __init__(self, name: str, model: str) -> None:
        super().__init__(name)
        self._model = model

    def wrong(self, answer: Answer, words: int) -> str:  # noqa: ARG002 - tokens, which this cannot count
        """Whether it goes another way than the first whole answer did."""
        first = next(found.text for found in self.answers if found.is_whole or found is answer)
        shorter, longer = sorted((first, answer.text), key=len)
        if not answer.is_whole or longer.startswith(shorter):
            return ""
        return f"{self.name} was told {answer.text[:80]!r} in {answer.tag}, and {first[:80]!r} at first"

    def _question(self, words: int) -> dict[str, Any]:
        text = f"What should somebody by the name of {self.name} have for breakfast?"
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": words,
        }


async def _read(answer: Answer, response: httpx.Response) -> None:
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            answer.is_whole = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            answer.has_begun = True
            if "error" in event:
                answer.error = event["error"]["code"]
                continue
            answer.tag = _tag(event)
            answer.text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _take(answer: Answer, told: dict[str, Any]) -> None:
    if "error" in told:
        answer.error = told["error"]["code"]
        return
    answer.tag, answer.is_whole = _tag(told), True
    (choice,) = told["choices"]
    answer.text = choice["message"]["content"] or ""
    for segment in (choice.get("copyspec") or told.get("copyspec") or {}).get("segments", ()):
        source = segment.get("source") or "model"
        answer.copied[source] = answer.copied.get(source, 0) + len(segment["text"])


def _tag(told: dict[str, Any]) -> str:
    return str(told["id"]).partition("-")[2][:8]


def client_of(url: str) -> httpx.AsyncClient:
    """A client that may have any number of connections."""
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))


async def at_once(
    talks: Iterable[Talk],
    client: httpx.AsyncClient,
    words: int,
    *,
    most: int = 32,
    stream: bool = True,
    also: Callable[[Talk, Answer], None] = lambda _talk, _answer: None,
) -> list[Answer]:
    """Have all conversations ask once, so many of them at a time."""
    room = asyncio.Semaphore(most)

    async def ask(talk: Talk) -> Answer:
        async with room:
            answer = await talk.ask(client, words, stream=stream)
            also(talk, answer)
            return answer

    return list(await asyncio.gather(*map(ask, talks)))
