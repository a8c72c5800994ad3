"""What all integrations make of tools and of objects: which grammars answers keep to."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from copyspec_engine.adapters.remote import AnyEngine
from copyspec_engine.values.grammar import Grammar, check_nesting, tool_choice_of

__all__ = [
    "answer_grammar",
    "calls_grammar",
    "check_nesting",
    "closed",
    "guides_calls",
    "has_grammars",
    "tool_choice_of",
]


def has_grammars() -> bool:
    """Whether the extra "grammar" is installed."""
    return importlib.util.find_spec("llguidance") is not None


def guides_calls(engine: AnyEngine) -> bool:
    """Whether calls that a model begins of its own free will can be held to their schemas."""
    return engine.chat_format.calls is not None and has_grammars()


def calls_grammar(
    engine: AnyEngine, tools: Iterable[dict[str, Any]], choice: str, *, parallel: bool, strict: bool = False
) -> Grammar:
    """What holds an answer to well-formed calls.

    Args:
        engine: whose model knows how calls are written.
        tools: OpenAI-style function schemas.
        choice: "auto", "required" or a function's name.
        parallel: several calls in one answer.
        strict: see `closed`.

    Raises:
        ConfigError: calls are required of a model that writes them nobody knows how.
    """
    return closed(engine.chat_format.grammar(tuple(tools), choice, parallel=parallel), strict=strict)


def answer_grammar(
    engine: AnyEngine,
    tools: Iterable[dict[str, Any]] | None,
    choice: str,
    answer: Grammar | None,
    *,
    parallel: bool,
    strict: bool | None = None,
) -> Grammar | None:
    """What an answer must look like that calls tools, has a form, or may do either; None: whatever the model writes.

    Args:
        engine: whose model knows how calls are written.
        tools: OpenAI-style function schemas that the prompt tells of; None: of none.
        choice: "auto", "required" or a function's name.
        answer: the JSON form of an answer that calls nothing; None: it is free.
        parallel: several calls in one answer.
        strict: True: see `closed`; None: where nothing asks for a form calls are held to theirs as far as grammars can
            express it and are installed; False: then they are not.

    Raises:
        ConfigError: a form is asked for that cannot be had of this model.
    """
    if tools is None:
        return answer
    forced = choice != "auto"
    guided = (guides_calls(engine) if strict is None else strict) or not parallel
    if not forced and answer is None and not guided:
        return None
    calls = calls_grammar(engine, tools, choice, parallel=parallel, strict=bool(strict))
    if answer is not None and not forced and calls.tools is not None:
        either = calls.tools.model_copy(update={"answer_schema": answer.json_schema or {"type": "object"}})
        calls = calls.model_copy(update={"tools": either})
    return calls


def closed(grammar: Grammar, *, strict: bool = False) -> Grammar:
    """The grammar with objects of just the properties that their schemas name, as classes and functions take them.

    Args:
        grammar: of JSON schemas.
        strict: refuse what cannot be expressed of a schema, rather than leave it out.
    """
    return grammar.model_copy(update={"closed": True, "lenient": not strict})
