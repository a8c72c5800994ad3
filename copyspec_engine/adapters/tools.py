"""What all integrations make of tools and of objects: which grammars answers keep to."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from copyspec_engine.engine.engine import Engine
from copyspec_engine.values.grammar import Grammar, check_nesting, tool_choice_of

__all__ = ["calls_grammar", "check_nesting", "closed", "guides_calls", "has_grammars", "tool_choice_of"]


def has_grammars() -> bool:
    """Whether the extra "grammar" is installed."""
    return importlib.util.find_spec("llguidance") is not None


def guides_calls(engine: Engine) -> bool:
    """Whether calls that a model begins of its own free will can be held to their schemas."""
    return engine.chat_format.calls is not None and has_grammars()


def calls_grammar(
    engine: Engine, tools: Iterable[dict[str, Any]], choice: str, *, parallel: bool, strict: bool = False
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


def closed(grammar: Grammar, *, strict: bool = False) -> Grammar:
    """The grammar with objects of just the properties that their schemas name, as classes and functions take them.

    Args:
        grammar: of JSON schemas.
        strict: refuse what cannot be expressed of a schema, rather than leave it out.
    """
    return grammar.model_copy(update={"closed": True, "lenient": not strict})
