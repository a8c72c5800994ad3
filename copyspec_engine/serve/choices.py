"""Answers as OpenAI's `choices`: what whole ones and streamed ones, messages and plain texts have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from copyspec_engine.adapters.answers import answer_metadata, segment_metadata
from copyspec_engine.adapters.model import AdapterOptions
from copyspec_engine.serve.call_body import CallBody, CopySpecOptions, StreamOptions
from copyspec_engine.serve.chat import usage_of
from copyspec_engine.serve.errors import ApiError
from copyspec_engine.serve.events import Event, obfuscated
from copyspec_engine.serve.service import Service
from copyspec_engine.values.outputs import GenerationOutput, StreamChunk

__all__ = ["ChoicesWriter", "told_at_end"]


class ChoicesWriter:
    """Writes the answers to a call, in events or as a whole.

    Args:
        service: whose model has written them.
        body: what was asked.
        call_id: what they call the call.
        number: of answers that are given.
    """

    whole_kind: ClassVar[str]
    event_kind: ClassVar[str]
    empty: ClassVar[Mapping[str, Any]]
    """What a choice of an event has that says nothing."""

    def __init__(self, service: Service, body: CallBody, call_id: str, number: int) -> None:
        self.obfuscate = False
        self._service, self._is_stream, self._options = service, bool(body.stream), body.options
        self._number = number
        self._head = {
            "id": call_id,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint,
        }
        options = body.stream_options
        self._with_usage = isinstance(options, StreamOptions) and bool(options.include_usage)

    def choice(self, index: int) -> dict[str, Any]:
        """Answer `index`, which is over, as a choice of a whole answer."""
        raise NotImplementedError

    @property
    def outputs(self) -> list[GenerationOutput]:
        """Of the answers that are over."""
        raise NotImplementedError

    # ---- a stream ----------------------------------------------------------------------------------------------

    def keep_alive(self) -> Event:
        """A choice that adds nothing."""
        return self._chunk([{"index": 0, **self.empty, "logprobs": None, "finish_reason": None}])

    def end(self) -> list[Event]:
        """The counts, where they were asked for."""
        return [{**self._chunk([]), "usage": usage_of(self.outputs)}] if self._with_usage else []

    def failed(self, error: ApiError) -> list[Event]:
        """The error, as clients look for it."""
        return [error.body()]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = {**self._head, "object": self.event_kind, "choices": choices}
        if self._with_usage:
            event["usage"] = None
        return obfuscated(event) if self.obfuscate and choices else event

    def _in_pieces(self, chunk: StreamChunk) -> dict[str, Any]:
        return {"segments": segment_metadata(chunk.segments)} if self._options.segments and chunk.segments else {}

    # ---- a whole answer ----------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """All answers at once."""
        choices = [self.choice(index) for index in range(self._number)]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage_of(self.outputs)}


def told_at_end(options: CopySpecOptions, output: GenerationOutput, *, is_whole: bool) -> dict[str, Any]:
    """What was asked of this server alone, of an answer that is over.

    Args:
        options: what was asked.
        output: the answer.
        is_whole: it did not come in pieces, each of which has told its own.
    """
    said: dict[str, Any] = {}
    if options.explain and output.explanation is not None:
        said["explanation"] = {"text": output.explanation.text, "spans": output.explanation.to_list()}
    if options.stats:
        said["stats"] = answer_metadata(replace(output, explanation=None), AdapterOptions())
    if options.segments and is_whole:
        said["segments"] = segment_metadata(output.segments)
    return said
