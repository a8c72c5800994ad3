"""The integrations over a server: the same answers and metadata as in process, by one option more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from llama_index.core.llms import ChatMessage
from pydantic import BaseModel

from copyspec_engine import (
    ConfigError,
    ContextOverflowError,
    Engine,
    EngineBusyError,
    EngineConfig,
    GenerationRequest,
    RequestFailedError,
    SamplingParams,
)
from copyspec_engine.adapters.remote import RemoteEngine
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.testing import held_by, scripted_engine
from langchain_copyspec import ChatCopySpec
from llama_index.llms.copyspec import CopySpec
from tests.serve.servers import serving

pytestmark = pytest.mark.enable_socket
TEXT = "The ferry leaves at nine, says Ann; the ferry leaves at nine. \U0001f6a2 "


def reply(prompt: str) -> str:
    """Calls the tool that is told of, writes JSON, thinks, or repeats the last message."""
    last = prompt.split("<|im_start|>")[-2].partition("\n")[2].removesuffix("\n").removesuffix("<|im_end|>")
    if last == "weather":
        return 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    if last == "json":
        return '{"name": "Ann", "age": 7}'
    if last == "think":
        return "<think>Let me see.</think>Yes."
    if last == "for ever":
        return "and on " * 1500
    return last * 3


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with scripted_engine(reply, EngineConfig(model="scripted", max_model_len=16_000)) as engine:
        yield engine


@pytest.fixture(scope="module")
def base_url(engine: Engine) -> Iterator[str]:
    with serving(engine) as address:
        yield f"{address}/v1"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


def weather(city: str) -> str:
    """What the weather is like.

    Args:
        city: where.
    """
    return f"sunny in {city}"


def plain(value: Any) -> Any:
    """What must be equal of messages and metadata: all but times, ids, and what is reused of a cache."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        left_out = ("_s", "id", "_id", "cache_read", "cached_tokens", "num_prefill_passes", "model_name")
        return {name: plain(inner) for name, inner in value.items() if not name.endswith(left_out)}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


Ask = Callable[[ChatCopySpec], Any]
CHATS: dict[str, Ask] = {
    "invoke": lambda llm: llm.invoke(TEXT),
    "stream": lambda llm: sum_of(llm.stream(TEXT)),
    "ainvoke": lambda llm: asyncio.run(llm.ainvoke(TEXT)),
    "reasoning": lambda llm: llm.invoke("think"),
    "a tool": lambda llm: llm.bind_tools([weather]).invoke("weather"),
    "a tool, in pieces": lambda llm: sum_of(llm.bind_tools([weather]).stream("weather")),
    "a forced tool": lambda llm: llm.bind_tools([weather], tool_choice="weather").invoke("weather"),
    "an object": lambda llm: llm.with_structured_output(Person, include_raw=True).invoke("json"),
    "a tool's result": lambda llm: llm.invoke(
        [
            HumanMessage("weather"),
            AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Bern"}, "id": "call_1"}]),
            ToolMessage("sunny", tool_call_id="call_1"),
        ]
    ),
    "log-probabilities": lambda llm: llm.invoke(TEXT, logprobs=True, top_logprobs=2, max_tokens=12),
    "sampling": lambda llm: llm.invoke(TEXT, temperature=0.9, seed=-3, top_p=0.9, top_k=7, stop=["nine"]),
    "a prediction": lambda llm: llm.invoke(TEXT, prediction=TEXT * 3, max_tokens=90),
    "all of the metadata": lambda llm: llm.invoke(
        TEXT, include_segments=True, include_token_ids=True, include_explanation=True
    ),
}


def sum_of(chunks: Iterator[Any]) -> Any:
    first, *rest = list(chunks)
    for chunk in rest:
        first += chunk
    return first


@pytest.mark.parametrize("name", CHATS)
def test_langchain_gets_what_it_gets_in_process(name: str, engine: Engine, base_url: str) -> None:
    near, far = (
        CHATS[name](ChatCopySpec(**where, drafter="copyspec"))  # which learns nothing from one call for the next
        for where in ({"engine": engine}, {"base_url": base_url})
    )
    assert plain(near) == plain(far)
    if isinstance(far, AIMessage):
        assert far.response_metadata["model_name"] == "scripted"
        assert ChatCopySpec.explain(far).spans == ChatCopySpec.explain(near).spans


def test_llama_index_gets_what_it_gets_in_process(engine: Engine, base_url: str) -> None:
    def ask(llm: CopySpec) -> Any:
        *_, streamed = llm.stream_chat([ChatMessage(TEXT)])
        chats = [llm.chat([ChatMessage(TEXT)]), streamed, llm.complete(TEXT)]
        return [plain(response.raw) for response in chats], [response.message.content for response in chats[:2]]

    assert ask(CopySpec(engine=engine, drafter="copyspec")) == ask(CopySpec(base_url=base_url, drafter="copyspec"))


def test_a_thread_is_a_conversation_of_the_server(base_url: str) -> None:
    llm = ChatCopySpec(base_url=base_url)
    config: Any = {"configurable": {"thread_id": "häfen 1/2"}}
    llm.invoke(TEXT, config)
    second = llm.invoke([HumanMessage(TEXT), AIMessage(TEXT * 3), HumanMessage("again")], config)
    assert second.usage_metadata["input_token_details"]["cache_read"] > len(TEXT)


def test_what_a_server_remembers_can_be_looked_at_taken_along_and_erased(engine: Engine, base_url: str) -> None:
    llm = ChatCopySpec(base_url=base_url)
    llm.invoke(TEXT, session_id="kept/here")
    near, far = engine.memory("default/kept/here"), llm.memory("kept/here")
    assert far.texts() == near.texts()
    assert (len(far), far.num_tokens, far.num_bytes) == (len(near), near.num_tokens, near.num_bytes)
    other = llm.memory("taken along")
    assert not other.texts()
    assert other.load(far.export()) == len(near)
    assert [text.text for text in other.texts()] == [text.text for text in near.texts()]
    with pytest.raises(ConfigError, match="owner='me'"):
        other.load(far.export(), owner="me")
    with pytest.raises(ConfigError, match="expected an object with fingerprint"):
        other.load("{}")
    assert far.clear()
    assert not far.clear()
    assert not near.texts()
    assert other.clear()


def test_tokens_are_those_of_the_server(engine: Engine, base_url: str) -> None:
    remote = RemoteEngine(base_url)
    request = GenerationRequest(messages=[{"role": "user", "content": TEXT}])
    assert remote.tokenize(request) == engine.tokenize(request)
    assert remote.encode("ferry") == engine.encode("ferry")
    ids = remote.encode("ferry \U0001f6a2")
    assert remote.decode(ids) == engine.decode(ids)
    llm = ChatCopySpec(base_url=base_url)
    assert llm.get_num_tokens_from_messages([HumanMessage(TEXT)]) == len(engine.tokenize(request))


def test_a_conversation_that_nobody_names_is_found_by_the_server(base_url: str) -> None:
    llm = ChatCopySpec(base_url=base_url)
    first = llm.invoke("Once there was a ferry.")
    second = llm.invoke([HumanMessage("Once there was a ferry."), first, HumanMessage("And then?")])
    assert second.usage_metadata["input_token_details"]["cache_read"] > len(first.text)


async def test_a_call_that_is_given_up_ends_in_the_server(engine: Engine, base_url: str) -> None:
    stream = ChatCopySpec(base_url=base_url, drafter="none").astream("for ever")
    await anext(stream)
    assert any(held_by(engine))
    await stream.aclose()
    for _ in range(500):
        if not any(await asyncio.to_thread(held_by, engine)):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the model still writes")


def test_one_model_answers_in_one_event_loop_after_the_other(base_url: str) -> None:
    llm = ChatCopySpec(base_url=base_url)
    assert [asyncio.run(llm.ainvoke("hi")).text for _ in range(3)] == ["hihihi"] * 3


def test_errors_are_those_of_the_engine(engine: Engine, base_url: str) -> None:
    llm = ChatCopySpec(base_url=base_url)
    with pytest.raises(ContextOverflowError, match="holds 16000") as overflow:
        llm.invoke("x" * 17_000)
    assert overflow.value.max_tokens == 16_000
    with pytest.raises(ConfigError, match="has scripted"):
        ChatCopySpec(base_url=base_url, model="other").invoke("hi")
    with pytest.raises(ConfigError, match="memory_pool='team' with base_url"):
        llm.invoke("hi", memory_pool="team")
    with pytest.raises(ConfigError, match="device='cpu' with base_url"):
        ChatCopySpec(base_url=base_url, device="cpu")
    with pytest.raises(ConfigError, match="base_url='nowhere'"):
        ChatCopySpec(base_url="nowhere")
    with pytest.raises(RequestFailedError, match="is `copyspec serve` running"):
        RemoteEngine("http://127.0.0.1:9", max_retries=0).generate(GenerationRequest(messages=[{"role": "user"}]))
    with serving(engine, ServeConfig(max_in_flight=1)) as other:
        remote = RemoteEngine(other, max_retries=0)
        request = GenerationRequest(messages=[{"role": "user", "content": "for ever"}], drafter="none")
        with remote.stream(request) as first:
            next(first)
            with pytest.raises((EngineBusyError, RequestFailedError), match="one key may have 1 at a time"):
                remote.generate(request)


def test_a_key_is_sent_and_never_shown(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPYSPEC_API_KEY", "secret-key")
    with serving(engine) as address:
        llm = ChatCopySpec(base_url=address, api_key="secret-key")
        assert llm.invoke("hi").text == "hihihi"
        for shown in (repr(llm), str(llm), json.dumps(llm.model_dump(), default=str)):
            assert "secret-key" not in shown
        with pytest.raises(ConfigError, match="wrong API key"):
            ChatCopySpec(base_url=address, api_key="another").invoke("hi")


def test_the_time_is_up_in_the_server_too(base_url: str) -> None:
    remote = RemoteEngine(base_url)
    messages = [{"role": "user", "content": "for ever"}]
    output = remote.generate(GenerationRequest(messages=messages, drafter="none", timeout_s=0.2))
    assert output.finish_reason == "timeout"
    sampling = SamplingParams(max_tokens=5)
    assert remote.generate(GenerationRequest(messages=messages, sampling=sampling)).text == "and o"
