"""Ollama's own Python client, LangChain's ChatOllama and LlamaIndex' Ollama, over a socket, as their users have them.

What LangChain's standard suite skips: images, PDFs and audio, which the model here does not read; the choice of a tool
and Anthropic's inputs, which `ChatOllama` does not have; and recorded HTTP traffic, of which there is none.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import ollama
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_ollama import ChatOllama
from langchain_tests.integration_tests import ChatModelIntegrationTests
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, ThinkingBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.ollama import Ollama
from pydantic import BaseModel

from copyspec_engine import Engine, EngineConfig
from copyspec_engine.testing import scripted_engine
from integrations.langchain.tests.test_standard import scripted
from tests.serve.servers import serving

MakeEngine = Callable[..., Engine]
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # these clients leave their sockets open

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'


def answers(prompt: str) -> str:
    """What a model would answer to the questions of these tests."""
    *_, last = prompt.removesuffix("<|im_start|>assistant\n").split("<|im_start|>")
    if last.startswith("tool"):
        return "It is seven."
    if "think" in last:
        return "<think>\nhm, so\n</think>\n\nIt is four."
    if "person" in last:
        return '{"name":"Ann","age":3}'
    return CALL if "3 + 4" in last else "Grüße, " + last.partition("\n")[2].removesuffix("<|im_end|>\n").upper()


@pytest.fixture(autouse=True)
def _sockets_end_with_their_test() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def url(make_engine: MakeEngine) -> Iterator[str]:
    with serving(make_engine(answers)) as url:
        yield url


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one of them.
        b: the other one.
    """
    return a + b


class Person(BaseModel):
    """A person."""

    name: str
    age: int


# ---- Ollama's own client


def test_ollamas_client_chats_calls_and_reasons(url: str) -> None:
    with ollama.Client(url) as client:
        hi: list[Any] = [{"role": "user", "content": "ann"}]
        whole = client.chat("scripted", hi, options={"temperature": 0, "num_ctx": 4096}, keep_alive="5m")
        parts = list(client.chat("scripted", hi, stream=True))
        assert whole.message.content == "".join(part.message.content or "" for part in parts) == "Grüße, ANN"
        assert (parts[-1].done, parts[-1].done_reason, parts[-1].eval_count) == (True, "stop", whole.eval_count)
        question: list[Any] = [{"role": "user", "content": "3 + 4"}]
        message = client.chat("scripted", question, tools=[add]).message
        (call,) = message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("add", {"a": 3, "b": 4})
        result = {"role": "tool", "tool_name": "add", "content": str(add(**call.function.arguments))}
        assert client.chat("scripted", [*question, message, result], tools=[add]).message.content == "It is seven."
        thought = client.chat("scripted", [{"role": "user", "content": "think"}], think=True).message
        assert (thought.thinking, thought.content) == ("hm, so", "It is four.")
        person = client.chat("scripted", [{"role": "user", "content": "a person"}], format=Person.model_json_schema())
        assert Person.model_validate_json(person.message.content or "") == Person(name="Ann", age=3)


async def test_ollamas_client_generates_lists_and_is_told_what_is_wrong(url: str) -> None:
    async with ollama.AsyncClient(url) as client:
        first = await client.generate("scripted", "one")
        second = [part async for part in await client.generate("scripted", "two", context=first.context, stream=True)]
        assert (first.response, "".join(part.response or "" for part in second)) == ("Grüße, ONE", "Grüße, TWO")
        assert [model.model for model in (await client.list()).models] == ["scripted:latest"]
        assert [model.context_length for model in (await client.ps()).models] == [8192]
        shown = await client.show("scripted")
        assert shown.capabilities == ["completion", "tools", "thinking"]
        assert (shown.modelinfo or {})["scripted.context_length"] == 8192
        for wrong in (client.chat("other", []), client.pull("scripted"), client.delete("x"), client.embed("x", "y")):
            with pytest.raises(ollama.ResponseError) as error:
                await wrong
            assert error.value.status_code == 404
            assert len(error.value.error) > 20
        with pytest.raises(ollama.ResponseError, match="stop the server"):
            await client.generate("scripted", keep_alive=0)


# ---- LlamaIndex


async def test_llama_index_talks_as_with_ollama(url: str) -> None:
    llm = Ollama("scripted", base_url=url, temperature=0.0, thinking=False, keep_alive="5m")
    assert llm.metadata.context_window == 8192
    hi = [ChatMessage("be kind", role=MessageRole.SYSTEM), ChatMessage("ann")]
    whole = llm.chat(hi)
    streamed = [*llm.stream_chat(hi)][-1]
    awaited = await llm.achat(hi)
    async for last in await llm.astream_chat(hi):
        streamed_async = last
    said = [answer.message.content for answer in (whole, streamed, awaited, streamed_async)]
    assert said == ["Grüße, ANN"] * 4
    assert llm.complete("bo").text == [*llm.stream_complete("bo")][-1].text == "Grüße, BO"
    assert whole.raw["usage"]["completion_tokens"] == len("Grüße, ANN".encode()) + 1
    assert llm.as_structured_llm(Person).chat([ChatMessage("a person")]).raw == Person(name="Ann", age=3)
    with pytest.raises(ollama.ResponseError, match=r"messages\[0\].images"):
        llm.chat([ChatMessage(blocks=[ImageBlock(image=b"aGk=")])])


def test_llama_index_calls_tools_and_shows_reasoning(url: str) -> None:
    tool, llm = FunctionTool.from_defaults(add), Ollama("scripted:latest", base_url=url, thinking=True)
    answer = llm.chat_with_tools([tool], "3 + 4")
    (call,) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("add", {"a": 3, "b": 4})
    assert llm.predict_and_call([tool], "3 + 4").response == "7"
    result = ChatMessage("7", role=MessageRole.TOOL)
    assert llm.chat([ChatMessage("3 + 4"), answer.message, result]).message.content == "It is seven."
    blocks = llm.chat([ChatMessage("think")]).message.blocks
    assert [block.content for block in blocks if isinstance(block, ThinkingBlock)] == ["hm, so"]


# ---- LangChain


def test_langchain_finds_the_model_and_takes_its_reasoning_apart(url: str) -> None:
    model = ChatOllama(model="scripted", base_url=url, validate_model_on_init=True, reasoning=True)
    answer = model.invoke("think")
    assert (answer.content, answer.additional_kwargs["reasoning_content"]) == ("It is four.", "hm, so")
    with pytest.raises(ValueError, match="scripted:latest"):
        ChatOllama(model="other", base_url=url, validate_model_on_init=True)


class TestChatOllama(ChatModelIntegrationTests):
    url: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _served(cls) -> Iterator[None]:
        with scripted_engine(scripted, EngineConfig(model="scripted")) as engine, serving(engine) as cls.url:
            yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOllama

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "scripted", "base_url": self.url}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "scripted:latest"

    @property
    def has_tool_choice(self) -> bool:
        return False
