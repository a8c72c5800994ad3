"""POST /v1/completions: a raw text goes on, without a chat template."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from copyspec_engine.adapters.conversations import Talk
from copyspec_engine.serve.bodies import documented, read_body
from copyspec_engine.serve.call_body import CallBody, StreamOptions, checked_number
from copyspec_engine.serve.chat import told_logprobs
from copyspec_engine.serve.choices import ChoicesWriter, told_at_end
from copyspec_engine.serve.conversations import Caller, salt_of
from copyspec_engine.serve.errors import by_names, invalid
from copyspec_engine.serve.events import SSE, Event, answer_of
from copyspec_engine.serve.sampling import seeded
from copyspec_engine.serve.schemas import TextCompletion, answers
from copyspec_engine.serve.service import Service, answer_headers
from copyspec_engine.values.config import GenerationRequest
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk, TokenLogprob

__all__ = ["CompletionBody", "completions_router"]

_DEFAULT_TOKENS = 16


_Prompt = str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=1)]


def _one_prompt(value: object) -> object:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    ids = isinstance(value, list) and all(type(token) is int for token in value)
    if not value or not (isinstance(value, str) or ids):
        raise ValueError("a text, a list of one text, or token ids, none of them empty: ask once for each prompt")
    return value


class CompletionBody(CallBody):
    """A text to go on with."""

    names: ClassVar[Mapping[str, str]] = {
        "prompt_token_ids": "prompt",
        "messages": "prompt",
        "top_logprobs": "logprobs",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "suffix": "the model writes behind its prompt only, so write what it is to fill in into the prompt",
    }

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt, json_schema_input_type=_Prompt)]
    """A text, a list of one text, or token ids."""
    stream_options: StreamOptions | None = None
    n: int | None = None
    """Answers to give; they are read from one prompt."""
    best_of: int | None = None
    """Answers to write, of which the `n` are given whose tokens the model held likeliest on average; default: n."""
    echo: bool | None = None
    """Begin each answer with the prompt; token ids as the text that they stand for."""
    logprobs: int | None = None
    """Give the log-probability of each token, and of this many of the likeliest ones there, 0 to 20."""
    max_tokens: int | None = None
    """Most tokens of an answer; default: 16, as OpenAI has it."""
    suffix: str | None = None

    def check(self, service: Service) -> None:
        super().check(service)
        number = checked_number("n", self.n, service)
        if checked_number("best_of", self.best_of, service, number) > number and self.stream:
            raise invalid(
                "best_of",
                f"Got best_of={self.best_of} for n={number} with stream but what is best is known at the end only: set "
                "stream to false",
            )
        if self.echo and self.logprobs is not None:
            raise invalid(
                "logprobs",
                f"Got logprobs={self.logprobs} with echo but tokens of prompts have none here: set echo to false",
                "unsupported_parameter",
            )

    def requests(self, service: Service, caller: Caller, call_id: str) -> tuple[list[GenerationRequest], Talk]:
        """What is asked of the engine, once for each answer to write, and the conversation that it belongs to.

        Raises:
            ApiError, ConfigError: a value is out of range.
        """
        number = checked_number("best_of", self.best_of, service, self.n or 1)
        talk = caller.talk(self.named(caller), None)
        with_logprobs = self.logprobs is not None or number > (self.n or 1)
        sampling = self.sampling(
            service,
            max_tokens=_DEFAULT_TOKENS if self.max_tokens is None else None,
            logprobs=with_logprobs or None,
            top_logprobs=self.logprobs,
        )
        salt = salt_of(caller.tenant, self.prompt_cache_key)
        if number > 1 and salt is None:
            salt = secrets.token_hex(16)  # the answers to this call share their prompt, with nobody else
        prompt = {"prompt" if isinstance(self.prompt, str) else "prompt_token_ids": self.prompt}
        requests = [
            GenerationRequest(
                sampling=seeded(sampling, at),
                cache_salt=salt,
                request_id=f"{call_id}-{at}",
                **prompt,
                **self.request_options(service),
                **talk.request_options(),
            )
            for at in range(number)
        ]
        return requests, talk


def completions_router(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        openapi_extra=documented(CompletionBody),
        responses=answers(TextCompletion, stream="text/event-stream", links={"explain": "call_id"}),
    )
    async def completions(request: Request) -> Response:
        """Go on with a text."""
        body = await read_body(request, CompletionBody, service.config)
        body.check(service)
        call_id = service.new_id("cmpl-", 32)
        with by_names(body.names):
            requests, talk = body.requests(service, service.caller(request), call_id)
        call = await service.begin(request, requests, body.names)
        writer = CompletionWriter(service, body, call_id, len(requests))
        headers, framing = answer_headers(talk, body.ignored()), SSE if body.stream else None
        return await answer_of(request, call, writer, framing, service.config, headers, body.include_obfuscation)

    return router


class CompletionWriter(ChoicesWriter):
    """Writes the answers to a call as plain texts.

    Args:
        service: whose model has written them.
        body: what was asked.
        call_id: what they call the call.
        number: of answers that are written.
    """

    whole_kind = event_kind = "text_completion"
    empty: ClassVar[Mapping[str, Any]] = {"text": ""}

    def __init__(self, service: Service, body: CompletionBody, call_id: str, number: int) -> None:
        super().__init__(service, body, call_id, body.n or 1)
        self._echo = ""
        if body.echo:
            prompt = body.prompt
            self._echo = prompt if isinstance(prompt, str) else service.engine.decode(prompt, skip_special_tokens=False)
        self._with_logprobs = body.logprobs is not None
        self._texts = [self._echo] * number
        self._begun = [False] * number
        self._entries: list[list[_Entry]] = [[] for _ in range(number)]
        """The log-probabilities that no event has had yet, each with the place of its token."""
        self._outputs: dict[int, GenerationOutput] = {}

    @property
    def outputs(self) -> list[GenerationOutput]:
        return [self._outputs[index] for index in sorted(self._outputs)]

    def events(self, index: int, chunk: StreamChunk) -> list[Event]:
        """What a chunk of answer `index` adds."""
        if self._with_logprobs:
            self._entries[index] += self._placed(index, chunk)
        self._texts[index] += chunk.text
        if chunk.output is not None:
            self._outputs[index] = chunk.output
        if not self._is_stream:
            return []
        said = self._in_pieces(chunk)
        events = [self._event(index, chunk.text, None, said)] if chunk.text or said else []
        if chunk.output is not None:
            said = told_at_end(self._options, chunk.output, is_whole=False)
            events.append(self._event(index, "", _finish_reason(chunk.output), said))
        return events

    def _placed(self, index: int, chunk: StreamChunk) -> list[_Entry]:
        """A chunk's log-probabilities, each with the place in the answer's text where its token begins."""
        at, end = len(self._texts[index]), len(self._texts[index]) + len(chunk.text)
        placed = []
        for told in told_logprobs(self._service.engine, chunk):
            token = self._token(told.token_id)
            placed.append((min(at, end), token, told))
            at += 0 if "\ufffd" in token else len(token)  # part of a character has no text of its own
        return placed

    def _token(self, token_id: int) -> str:
        return self._service.engine.decode([token_id], skip_special_tokens=False)

    def _event(self, index: int, text: str, finish: str | None, said: Mapping[str, Any]) -> Event:
        if not self._begun[index]:
            text, self._begun[index] = self._echo + text, True
        entries, self._entries[index] = self._entries[index], []
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs_of(entries) if entries else None,
            "finish_reason": finish,
            **({"copyspec": said} if said else {}),
        }
        return self._chunk([choice])

    def choice(self, index: int) -> dict[str, Any]:
        number = self._best[index]
        output = self._outputs[number]
        said = told_at_end(self._options, output, is_whole=True)
        return {
            "index": index,
            "text": self._texts[number],
            "logprobs": self._logprobs_of(self._entries[number]) if self._with_logprobs else None,
            "finish_reason": _finish_reason(output),
            **({"copyspec": said} if said else {}),
        }

    @property
    def _best(self) -> Sequence[int]:
        """The numbers of the answers, the best first where there is a choice."""
        numbers = range(len(self._texts))
        if len(numbers) == self._number:
            return numbers
        return sorted(numbers, key=lambda number: -_mean_logprob(self._outputs[number]))

    def _logprobs_of(self, entries: Sequence[_Entry]) -> dict[str, Any]:
        """In OpenAI's form for texts."""
        told = [entry for _, _, entry in entries]
        top = [
            {self._token(token_id): logprob for token_id, logprob in [*reversed(one.top), (one.token_id, one.logprob)]}
            for one in told
        ]
        return {
            "tokens": [token for _, token, _ in entries],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": top,
            "text_offset": [at for at, _, _ in entries],
        }


_Entry = tuple[int, str, TokenLogprob]


def _finish_reason(output: GenerationOutput) -> str:
    return "stop" if output.finish_reason == "stop" else "length"


def _mean_logprob(output: GenerationOutput) -> float:
    told = output.logprobs or ()
    return sum(one.logprob for one in told) / max(len(told), 1)
