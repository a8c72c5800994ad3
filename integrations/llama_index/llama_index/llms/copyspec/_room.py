"""How much of the context LlamaIndex must keep free of text, so that what it packs into prompts fits.

It counts the texts of a prompt, and adds nothing for what a chat template or a function of the caller's writes around
them: so that much more is kept free than the answer takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from typing_extensions import override

from copyspec_engine import ConfigError, EngineConfig
from copyspec_engine.adapters.model import prompt_length
from copyspec_engine.adapters.remote import AnyEngine
from llama_index.llms.copyspec._options import CheckedCall

__all__ = ["SHORT_CHATS", "PlainArguments", "tokens_around"]

SHORT_CHATS = tuple(
    [ChatMessage("-", role=role) for role in roles]
    for roles in (
        [MessageRole.USER],
        [MessageRole.SYSTEM, MessageRole.USER],
        [MessageRole.SYSTEM, MessageRole.SYSTEM, MessageRole.USER],  # `system_prompt` before that of a prompt template
    )
)
"""The chats that query engines ask for, with as good as no text."""

_SEAMS = 8
"""Tokens that a prompt may have more than its parts, of which LlamaIndex counts each alone."""


def tokens_around(engine: AnyEngine | EngineConfig, calls: Iterable[Callable[[], CheckedCall]]) -> int:
    """Most tokens that are in the prompts of calls beside their texts.

    Args:
        engine: that will get the calls, or its configuration.
        calls: make calls with as good as no text; those that cannot be made are left out.
    """
    return max((_length(engine, call) for call in calls), default=0) + _SEAMS


def _length(engine: AnyEngine | EngineConfig, call: Callable[[], CheckedCall]) -> int:
    try:
        return prompt_length(engine, call().without_answer())
    except ConfigError:  # the chat template refuses such a chat, and will say so when asked for one
        return 0


class PlainArguments(LLM):
    """An LLM whose prompt templates show a list of texts as these texts.

    LlamaIndex's `simple_summarize` packs one text and hands it on in a list, of which a template would show Python's
    own notation: longer than what was counted, and with escapes in it that nothing can be copied from.
    """

    @override
    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        return super()._get_prompt(prompt, **_plain(prompt_args))

    @override
    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        return super()._get_messages(prompt, **_plain(prompt_args))


def _plain(prompt_args: dict[str, Any]) -> dict[str, Any]:
    return {
        name: "\n".join(value)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        else value
        for name, value in prompt_args.items()
    }
