"""LangChain's standard suites on the scripted engine.

What is skipped, and why:
- tool calling and structured output: not there yet (`bind_tools` raises);
- images, PDFs, audio, Anthropic-style tool blocks: the model reads text only;
- `test_invoke_with_model_override` and its three siblings: a model is loaded weights, not a keyword of a call;
- `test_init_from_env`: no option comes from an environment variable;
- `test_serdes`: only classes of LangChain's own packages can be loaded from its JSON form;
- `test_stream_time`: it replays recorded HTTP traffic, and there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from copyspec_engine import Engine
from copyspec_engine.testing import scripted_engine
from langchain_copyspec import ChatCopySpec


class Capabilities:
    """What both suites must know about `ChatCopySpec`."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCopySpec

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False


class TestUnit(Capabilities, ChatModelUnitTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        params = super().standard_chat_model_params
        # An unknown option raises, and a local model has no key.
        del params["api_key"]
        return params


class TestIntegration(Capabilities, ChatModelIntegrationTests):
    scripted: Engine

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _scripted_engine(cls) -> Iterator[None]:
        with scripted_engine(lambda _prompt: "Hello! How can I help?") as cls.scripted:
            yield

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.scripted}
