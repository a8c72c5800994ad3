"""Answers as objects: the three methods of `with_structured_output`."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import TBaseModel, is_basemodel_subclass

__all__ = ["Method", "answer_parser", "call_parser", "with_raw"]

Method = Literal["json_schema", "function_calling", "json_mode"]


def _refuse_cut_off(result: list[Generation]) -> None:
    """LangChain's JSON reader completes what is cut off: half a text would pass for the whole one."""
    message = result[0].message if isinstance(result[0], ChatGeneration) else None
    reason = message.response_metadata.get("finish_reason") if message is not None else None
    if reason == "length":
        raise OutputParserException(
            "Got an answer that was cut off at its maximum length but expected a whole object: raise max_tokens",
            llm_output=str(result[0].text),
        )


class _Whole(BaseOutputParser[Any]):
    """A parser that takes no object which is cut off."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:  # noqa: ANN401 - any object
        _refuse_cut_off(result)
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


def with_raw(
    model: Runnable[LanguageModelInput, AIMessage], parser: BaseOutputParser[Any]
) -> Runnable[LanguageModelInput, dict[str, Any]]:
    """Gives {"raw": message, "parsed": object or None, "parsing_error": exception or None}."""
    parsed: Any = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed: Any = RunnablePassthrough.assign(parsed=lambda _: None)
    reading: Any = parsed.with_fallbacks([failed], exception_key="parsing_error")
    raw: Any = RunnableMap(raw=model)
    return raw | reading  # type: ignore[no-any-return]
