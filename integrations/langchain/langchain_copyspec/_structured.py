"""Answers as objects: the three methods of `with_structured_output`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    JsonOutputToolsParser,
    PydanticToolsParser,
)
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.utils.pydantic import TBaseModel, is_basemodel_subclass

from copyspec_engine.adapters.answers import cut_off, is_whole_json

__all__ = ["Method", "answer_parser", "call_parser", "with_raw"]

Method = Literal["json_schema", "function_calling", "json_mode"]


def _refuse_cut_off(result: list[Generation], *, is_call: bool) -> None:
    """LangChain's JSON reader completes what is cut off: half a text would pass for the whole one."""
    message = result[0].message if isinstance(result[0], ChatGeneration) else None
    if not isinstance(message, AIMessage) or message.usage_metadata is None:
        return
    reason, tokens = message.response_metadata.get("finish_reason"), message.usage_metadata["output_tokens"]
    error = cut_off(reason, tokens, "a whole object")
    if error is not None and not (message.tool_calls or is_whole_json(str(message.text))):
        raise OutputParserException(error, llm_output=str(message.text))
    is_half = bool(message.invalid_tool_calls) if is_call else not _is_json(str(message.text))
    if reason == "stop" and is_half and not message.tool_calls:  # grammars end with the object, so nothing else did
        raise OutputParserException(
            f"Got an answer that stop or stop_token_ids ended after {tokens} tokens but expected a whole object: leave "
            "them out",
            llm_output=str(message.text),
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Whole(BaseOutputParser[Any]):
    """A parser that takes no object which is cut off."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:  # noqa: ANN401 - any object
        _refuse_cut_off(result, is_call=isinstance(self, JsonOutputToolsParser))
        return super().parse_result(result, partial=partial)


class _WholeJson(_Whole, JsonOutputParser):
    pass


class _WholeObject(_Whole, PydanticOutputParser[TBaseModel]):
    pass


class _WholeJsonCall(_Whole, JsonOutputKeyToolsParser):
    pass


class _WholeObjectCall(_Whole, PydanticToolsParser):
    pass


def answer_parser(schema: dict[str, Any] | type) -> BaseOutputParser[Any]:
    """Reads an answer that is JSON: an instance for a Pydantic class, else a dict."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _WholeObject(pydantic_object=schema)
    return _WholeJson()


def call_parser(schema: dict[str, Any] | type, name: str) -> BaseOutputParser[Any]:
    """Reads the arguments of the answer's first call of `name`."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _WholeObjectCall(tools=[schema], first_tool_only=True)
    return _WholeJsonCall(key_name=name, first_tool_only=True)


class _RawResult(dict[str, Any]):
    """A part of a streamed result: adding the next one adds its message, and replaces everything else."""

    def __add__(self, other: dict[str, Any]) -> _RawResult:
        both = _RawResult({**self, **other})
        if "raw" in self and "raw" in other:
            both["raw"] = self["raw"] + other["raw"]
        return both


class _WithRaw(Runnable[AIMessage, dict[str, Any]]):
    """Reads a message, whole or while it comes, and keeps it beside the object or the reason why there is none."""

    def __init__(self, parser: BaseOutputParser[Any]) -> None:
        self._parser = parser

    def invoke(self, input: AIMessage, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        return self._call_with_config(lambda message: {"raw": message, **self._read(message)}, input, config, **kwargs)

    def transform(
        self,
        input: Iterator[AIMessage],
        config: RunnableConfig | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Iterator[dict[str, Any]]:
        yield from self._transform_stream_with_config(input, self._results, config, **kwargs)

    async def atransform(
        self,
        input: AsyncIterator[AIMessage],
        config: RunnableConfig | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> AsyncIterator[dict[str, Any]]:
        async for result in self._atransform_stream_with_config(input, self._aresults, config, **kwargs):
            yield result

    def _results(self, messages: Iterator[AIMessage]) -> Iterator[dict[str, Any]]:
        whole, parsed = None, None
        for message in messages:
            whole = message if whole is None else cast("AIMessage", whole + message)
            result, parsed = self._part(message, whole, parsed)
            yield result
        if whole is not None:
            yield _RawResult(self._read(whole))

    async def _aresults(self, messages: AsyncIterator[AIMessage]) -> AsyncIterator[dict[str, Any]]:
        whole, parsed = None, None
        async for message in messages:
            whole = message if whole is None else cast("AIMessage", whole + message)
            result, parsed = self._part(message, whole, parsed)
            yield result
        if whole is not None:
            yield _RawResult(self._read(whole))

    def _part(self, message: AIMessage, whole: AIMessage, last: object) -> tuple[dict[str, Any], object]:
        """What one more chunk gives: itself, and the object so far where it has grown."""
        result = _RawResult(raw=message)
        parsed = self._read(whole, partial=True)["parsed"]
        if parsed is None or parsed == last:
            return result, last
        result["parsed"] = parsed
        return result, parsed

    def _read(self, message: AIMessage, *, partial: bool = False) -> dict[str, Any]:
        try:
            parsed = self._parser.parse_result([ChatGeneration(message=message)], partial=partial)
        except Exception as error:  # whatever it is, the caller asked to be handed it
            return {"parsed": None, "parsing_error": error}
        return {"parsed": parsed, "parsing_error": None}


def with_raw(
    model: Runnable[LanguageModelInput, AIMessage], parser: BaseOutputParser[Any]
) -> Runnable[LanguageModelInput, dict[str, Any]]:
    """Gives {"raw": message, "parsed": object or None, "parsing_error": exception or None}.

    Streams give {"raw": chunk} for each chunk, with "parsed" wherever the object has grown, and at last the final
    "parsed" and "parsing_error"; adding them up gives what `invoke` gives.
    """
    return model | _WithRaw(parser)
