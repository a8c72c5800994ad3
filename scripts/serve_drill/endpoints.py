"""How each endpoint is asked, and what its answers say, whole and in events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from scripts.serve_drill.questions import Answer, Question

__all__ = ["Endpoint", "Events", "asked", "whole"]

Endpoint = Literal["chat", "responses", "ollama", "completions", "generate"]
_PATHS: Mapping[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "ollama": "/api/chat",
    "completions": "/v1/completions",
    "generate": "/api/generate",
}
_FINISH = {"completed": "stop", "incomplete": "length"}


def asked(endpoint: Endpoint, model: str, question: Question, *, stream: bool) -> tuple[str, dict[str, Any]]:
    """The path and the body of a call."""
    body: dict[str, Any] = {"model": model, "stream": stream, **question.fields}
    if endpoint in ("ollama", "generate"):
        body["options"] = {"temperature": 0, "num_predict": question.max_tokens}
    else:
        body["temperature"] = 0
        body["max_output_tokens" if endpoint == "responses" else "max_tokens"] = question.max_tokens
    if endpoint == "generate":
        body |= {"prompt": question.prompt, "raw": True}
    elif endpoint == "completions":
        body["prompt"] = question.prompt
    else:
        body["input" if endpoint == "responses" else "messages"] = question.messages
    return _PATHS[endpoint], body


def whole(endpoint: Endpoint, told: Mapping[str, Any]) -> list[Answer]:
    """All answers of a call, which came as one JSON object."""
    if endpoint == "responses":
        parts = (part for item in told["output"] if item["type"] == "message" for part in item["content"])
        return [Answer("".join(part["text"] for part in parts), _FINISH.get(told["status"], told["status"]))]
    if endpoint in ("ollama", "generate"):
        return [Answer(_ollama_text(told), told["done_reason"])]
    return [
        Answer(choice["message"]["content"] if endpoint == "chat" else choice["text"], choice["finish_reason"])
        for choice in told["choices"]
    ]


def _ollama_text(told: Mapping[str, Any]) -> str:
    return str(told["message"]["content"] if "message" in told else told["response"])


class Events:
    """Reads a stream line by line.

    Args:
        endpoint: whose stream it is.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.error: str | None = None
        """The code of the error event that was the last one."""
        self.is_over = False
        """It has come to an end of its own: an error, or all that belongs to an answer."""
        self._endpoint: Endpoint = endpoint
        self._texts: dict[int, str] = {}
        self._finish: dict[int, str] = {}

    @property
    def answers(self) -> list[Answer]:
        """What was read so far."""
        return [Answer(text, self._finish.get(index, "")) for index, text in sorted(self._texts.items())]

    @property
    def has_finish(self) -> bool:
        """Some answer has said why it ended, or an error was told."""
        return bool(self._finish) or self.error is not None

    def take(self, line: str) -> None:
        """Read a line."""
        if self._endpoint in ("ollama", "generate"):
            if line:
                self._ollama(json.loads(line))
        elif line == "data: [DONE]":
            self.is_over = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            (self._response if self._endpoint == "responses" else self._choices)(event)

    def _failed(self, error: Mapping[str, Any] | str) -> None:
        self.error = error if isinstance(error, str) else str(error.get("code"))
        self.is_over = True

    def _ollama(self, event: Mapping[str, Any]) -> None:
        if "error" in event:
            self._failed(event["error"])
            return
        self._add(0, _ollama_text(event))
        if event["done"]:
            self._finish[0], self.is_over = event["done_reason"], True

    def _response(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        if kind == "response.output_text.delta":
            self._add(0, event["delta"])
        elif kind in ("response.completed", "response.incomplete"):
            self._add(0, "")
            self._finish[0], self.is_over = _FINISH[event["response"]["status"]], True
        elif kind in ("error", "response.failed"):
            self._failed(event.get("response", {}).get("error") or event)

    def _choices(self, event: Mapping[str, Any]) -> None:
        if "error" in event:
            self._failed(event["error"])
            return
        for choice in event["choices"]:
            text = choice["delta"].get("content") if self._endpoint == "chat" else choice["text"]
            self._add(choice["index"], text or "")
            if choice["finish_reason"]:
                self._finish[choice["index"]] = choice["finish_reason"]

    def _add(self, index: int, text: str) -> None:
        self._texts[index] = self._texts.get(index, "") + text
