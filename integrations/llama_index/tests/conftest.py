from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse

from copyspec_engine import Engine, EngineConfig, shared_engine

Replies = Sequence[str] | Callable[[str], str]
MakeEngine = Callable[..., Engine]
Response = ChatResponse | CompletionResponse


@pytest.fixture(scope="module")
def bundled(fixed_pass_cost: None) -> Engine:
    """The model that ships with the engine."""
    return shared_engine(EngineConfig(model="bundled"))


class Ways:
    """Every way to ask: eight methods, and what each gives as a list of responses."""

    CHAT = ("chat", "achat", "stream_chat", "astream_chat")
    COMPLETE = ("complete", "acomplete", "stream_complete", "astream_complete")
    ALL = CHAT + COMPLETE
    ASYNC = ("achat", "astream_chat", "acomplete", "astream_complete")

    @staticmethod
    async def ask(llm: Any, way: str, text: str | list[ChatMessage], **options: Any) -> list[Response]:
        messages = [ChatMessage(text)] if isinstance(text, str) else text
        given = getattr(llm, way)(messages if "chat" in way else text, **options)
        if way in Ways.ASYNC:
            given = await given
        if isinstance(given, AsyncGenerator):
            return [response async for response in given]
        return list(given) if "stream" in way else [given]

    @staticmethod
    def text(response: Response) -> str:
        return response.text if isinstance(response, CompletionResponse) else response.message.content or ""


@pytest.fixture
def ways() -> type[Ways]:
    return Ways


def call_text(tool: str, **arguments: Any) -> str:
    """How the scripted model writes a call."""
    return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"


@pytest.fixture
def write_call() -> Callable[..., str]:
    return call_text
