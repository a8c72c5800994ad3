"""Where an answer was copied from, by what came with it: it holds after pickling and out of a checkpoint too."""

from __future__ import annotations

from langchain_core.messages import AIMessage

from copyspec_engine import ConfigError, Explanation
from copyspec_engine.adapters.answers import explain_metadata

__all__ = ["explain"]


def explain(message: AIMessage) -> Explanation:
    """The copied spans of an answer.

    Raises:
        ConfigError: the message is no whole answer of ours, or its text was changed.
    """
    if not isinstance(message, AIMessage):
        raise ConfigError(f"Got message={message!r} but expected the AIMessage that a call returned")
    return explain_metadata(message.response_metadata.get("copyspec"), str(message.text))
