"""Calls: invoke, stream, batch and their async forms say the same; options, stops, counts, errors, cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import langchain_core.exceptions
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.prompts import ChatPromptTemplate

import copyspec_engine
from copyspec_engine import ConfigError, Engine, EngineConfig, RequestFailedError
from langchain_copyspec import ChatCopySpec, ContextOverflowError, RequestTimeoutError

MakeEngine = Callable[..., Engine]
Stopped = Callable[[Engine], Awaitable[bool]]

DOCUMENT = "".join(f"- item {number}: all work and no play makes a dull list\n" for number in range(12))


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


async def everyhow(llm: ChatCopySpec, text: Any, **options: Any) -> dict[str, AIMessage]:
    """The answer through every path."""
    return {
        "invoke": llm.invoke(text, **options),
        "ainvoke": await llm.ainvoke(text, **options),
        "stream": joined(list(llm.stream(text, **options))),
        "astream": joined([chunk async for chunk in llm.astream(text, **options)]),
        "batch": llm.batch([text], **options)[0],
        "abatch": (await llm.abatch([text], **options))[0],
        "streaming": ChatCopySpec(**{**dict(llm), "streaming": True}).invoke(text, **options),
    }


async def test_every_path_gives_the_same_answer(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: DOCUMENT), drafter="none")
    answers = await everyhow(llm, "Repeat the list.")
    assert {answer.text for answer in answers.values()} == {DOCUMENT}
    for answer in answers.values():
        metadata = answer.response_metadata
        assert (metadata["model_name"], metadata["model_provider"]) == ("scripted", "copyspec")
        assert metadata["finish_reason"] == "stop"
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_tokens"] == len(DOCUMENT) + 1
        assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + len(DOCUMENT) + 1
        assert metadata["copyspec"]["num_forward_passes"] == len(DOCUMENT) + 1


def test_text_fields_come_with_one_chunk_each(echo: Engine) -> None:
    chunks = list(ChatCopySpec(engine=echo).stream("hello"))
    assert len(chunks) > 1
    assert [chunk.response_metadata.get("model_provider") for chunk in chunks] == ["copyspec"] + [None] * (
        len(chunks) - 1
    )
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert ["finish_reason" in chunk.response_metadata for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]


def test_an_empty_answer_is_an_answer(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(["", ""]))
    assert llm.invoke("hi").text == ""
    (chunk,) = llm.stream("hi")
    assert (chunk.text, chunk.chunk_position, chunk.response_metadata["model_provider"]) == ("", "last", "copyspec")


async def test_a_second_turn_reuses_the_prefix_and_copies(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: DOCUMENT))
    first = await llm.ainvoke([HumanMessage("Write the list.")])
    second = await llm.ainvoke([HumanMessage("Write the list."), first, HumanMessage("Again.")])
    assert second.text == DOCUMENT
    assert first.usage_metadata is not None
    assert second.usage_metadata is not None
    assert first.usage_metadata["input_token_details"] == {"cache_read": 0}
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"] - 1
    stats = second.response_metadata["copyspec"]
    assert stats["copied_share"] > 0.5
    assert stats["tokens_per_forward"] > 2
    assert 0 <= stats["ttft_s"] <= stats["total_s"]


async def test_drafting_never_changes_an_answer(make_engine: MakeEngine) -> None:
    engine = make_engine(lambda prompt: DOCUMENT)
    for drafter in ("adaptive", "copyspec", "none"):
        answer = ChatCopySpec(engine=engine).invoke(f"Repeat:\n{DOCUMENT}", drafter=drafter)
        assert answer.text == DOCUMENT
        assert (answer.response_metadata["copyspec"]["num_accepted_tokens"] == 0) == (drafter == "none")


async def test_stop_ends_every_path_before_the_stop_text(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: DOCUMENT))
    answers = await everyhow(llm, "Repeat the list.", stop=["\n- item 3"])
    assert {answer.text for answer in answers.values()} == {DOCUMENT.partition("\n- item 3")[0]}


@pytest.mark.parametrize("name", ["stop", "stop_sequences"])
def test_the_stop_of_a_call_replaces_the_fields(make_engine: MakeEngine, name: str) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "one two three"), stop=" two")
    assert llm.invoke("count").text == "one"
    assert llm.invoke("count", **{name: [" three"]}).text == "one two"
    assert llm.bind(stop=["one"]).invoke("count").text == ""


def test_options_of_a_call_replace_the_fields(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "x" * 50), max_tokens=5)
    assert llm.invoke("go").text == "x" * 5
    answer = llm.bind(max_tokens=7).invoke("go")
    assert answer.text == "x" * 7
    assert answer.response_metadata["finish_reason"] == "length"
    assert llm.invoke("go", max_tokens=None).text == "x" * 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"max_token": 3}, "unknown option max_token=3 for a call of ChatCopySpec: use max_tokens"),
        ({"tool_choise": "auto"}, "use tool_choice"),
        ({"model": ""}, "model=''"),
        ({"tool_choice": "any"}, "tool_choice='required' but expected tools"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"timeout": -1}, "timeout=-1"),
        ({"drafter": "fast"}, "drafter='fast'"),
        ({"include_segments": "some"}, "include_segments='some'"),
        ({"session_id": ""}, "session_id='' but expected at least 1 character"),
        ({"chat_template": "{{ x }}"}, "use chat_template of ChatCopySpec"),
    ],
)
async def test_a_bad_option_of_a_call_raises_by_name_and_value(echo: Engine, options: Any, named: str) -> None:
    llm = ChatCopySpec(engine=echo)
    with pytest.raises(ConfigError, match=named):
        llm.invoke("hi", **options)
    with pytest.raises(ConfigError, match=named):
        [chunk async for chunk in llm.astream("hi", **options)]


async def test_no_messages_raise(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo)
    with pytest.raises(ConfigError, match="no messages"):
        llm.invoke([])
    with pytest.raises(ConfigError, match="no messages"):
        await llm.ainvoke([])


async def test_empty_and_odd_messages_are_messages(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo)
    assert llm.invoke([HumanMessage("")]).text == ""
    assert llm.invoke([HumanMessage([])]).text == ""
    assert (
        llm.invoke([AIMessage("a"), AIMessage("b"), SystemMessage("c"), HumanMessage("d"), HumanMessage("e")]).text
        == "E"
    )
    for wrong in (5, [5], [("nobody", 5)]):
        with pytest.raises((ValueError, NotImplementedError)):
            llm.invoke(wrong)  # type: ignore[arg-type]
        with pytest.raises((ValueError, NotImplementedError)):
            await llm.ainvoke(wrong)  # type: ignore[arg-type]


async def test_calls_wait_for_their_turn_however_many_there_are(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "word " * 20, max_running=1, max_waiting=1, drafter="none"))
    assert {answer.text for answer in await llm.abatch(["go"] * 12)} == {"word " * 20}
    assert {answer.text for answer in llm.batch(["go"] * 12)} == {"word " * 20}
    found = await asyncio.gather(*(llm.ainvoke("go", timeout=1e-9) for _ in range(6)), return_exceptions=True)
    assert any(isinstance(error, copyspec_engine.EngineBusyError) for error in found)


async def test_a_prompt_beyond_the_context_raises_for_both_sides(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(["never"], max_model_len=64))
    for error in (
        ContextOverflowError,
        copyspec_engine.ContextOverflowError,
        langchain_core.exceptions.ContextOverflowError,
    ):
        with pytest.raises(error, match="holds 64") as raised:
            llm.invoke("x" * 100)
        assert raised.value.max_tokens == 64  # type: ignore[attr-defined]
        with pytest.raises(error):
            await llm.ainvoke("x" * 100)
        with pytest.raises(error):
            list(llm.stream("x" * 100))


async def test_segments_are_the_answer_in_pieces(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: "Here it is:\n" + DOCUMENT), include_segments=True)
    for answer in (await everyhow(llm, f"Repeat:\n{DOCUMENT}")).values():
        segments = answer.response_metadata["copyspec"]["segments"]
        assert "".join(segment["text"] for segment in segments) == answer.text
    segments = llm.invoke(f"Repeat:\n{DOCUMENT}", session_id="new").response_metadata["copyspec"]["segments"]
    assert {segment["copied"] for segment in segments} == {True, False}
    assert "segments" not in llm.invoke("hi", include_segments=False).response_metadata["copyspec"]


# Concurrency


def test_a_batch_answers_in_order(echo: Engine) -> None:
    texts = [f"question {number}" for number in range(8)]
    assert [answer.text for answer in ChatCopySpec(engine=echo).batch(texts)] == [text.upper() for text in texts]


async def test_an_async_batch_answers_in_order(echo: Engine) -> None:
    texts = [f"question {number}" for number in range(8)]
    answers = await ChatCopySpec(engine=echo).abatch(texts)
    assert [answer.text for answer in answers] == [text.upper() for text in texts]


async def test_the_event_loop_goes_on_while_the_model_loads(monkeypatch: pytest.MonkeyPatch, echo: Engine) -> None:
    def load_slowly(config: EngineConfig, _on_progress: object) -> Engine:
        time.sleep(0.5)
        return echo

    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", load_slowly)
    llm = ChatCopySpec()
    for call in (llm.ainvoke("hi"), llm.astream("hi").__anext__()):
        task = asyncio.ensure_future(call)
        longest = await longest_pause_until(task)
        assert (await task).text in ("HI", "H")
        assert longest < 0.4


async def longest_pause_until(task: asyncio.Future[Any]) -> float:
    longest, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


async def test_closing_a_stream_cancels_its_request(slow: Engine, stopped_early: Stopped) -> None:
    chunks = ChatCopySpec(engine=slow).stream("go")
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert await stopped_early(slow)


async def test_leaving_an_async_stream_cancels_its_request(slow: Engine, stopped_early: Stopped) -> None:
    async for _ in ChatCopySpec(engine=slow).astream("go"):
        break
    assert await stopped_early(slow)


@pytest.mark.parametrize("how", ["ainvoke", "astream", "abatch", "chain"])
async def test_cancelling_the_task_cancels_its_request(slow: Engine, stopped_early: Stopped, how: str) -> None:
    llm = ChatCopySpec(engine=slow)

    async def read() -> list[Any]:
        return [chunk async for chunk in llm.astream("go")]

    calls: dict[str, Callable[[], Any]] = {
        "ainvoke": lambda: llm.ainvoke("go"),
        "astream": read,
        "abatch": lambda: llm.abatch(["go"]),
        "chain": lambda: (llm | StrOutputParser()).ainvoke("go"),
    }
    task = asyncio.ensure_future(calls[how]())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stopped_early(slow)


# Time limits and retries


async def test_a_call_beyond_its_timeout_ends_in_the_engine_and_raises(slow: Engine, stopped_early: Stopped) -> None:
    llm = ChatCopySpec(engine=slow, timeout=0.1)
    with pytest.raises(RequestTimeoutError, match=r"timeout=0\.1"):
        llm.invoke("go")
    with pytest.raises(TimeoutError):
        await llm.ainvoke("go")
    with pytest.raises(TimeoutError):
        list(llm.stream("go", timeout=0.05))
    assert slow.metrics().finished["timeout"] == 3
    assert await stopped_early(slow)


def test_an_answer_in_time_is_kept_however_slowly_it_is_read(echo: Engine) -> None:
    chunks = ChatCopySpec(engine=echo, timeout=0.2).stream("hello")
    first = next(chunks)
    time.sleep(0.4)
    assert joined([first, *chunks]).text == "HELLO"


@pytest.mark.filterwarnings("ignore")
async def test_a_failed_request_is_tried_again_as_often_as_asked(make_engine: MakeEngine) -> None:
    attempts = []

    def fail_twice(prompt: str) -> str:
        attempts.append(prompt)
        if len(attempts) % 5 != 0:
            raise RuntimeError("out of memory")
        return "done"

    llm = ChatCopySpec(engine=make_engine(fail_twice))
    with pytest.raises(RequestFailedError, match="out of memory"):
        llm.invoke("go")
    attempts.clear()
    assert llm.invoke("go", max_retries=4).text == "done"


# What LangChain builds on


def test_exact_token_counts(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo)
    messages = [SystemMessage("be brief"), HumanMessage("häh?")]
    answer = llm.invoke(messages)
    assert answer.usage_metadata is not None
    assert llm.get_num_tokens_from_messages(messages) == answer.usage_metadata["input_tokens"]
    assert llm.get_token_ids("hä") == list("hä".encode())
    assert llm.get_num_tokens("hä") == 3
    assert llm.get_num_tokens_from_messages([]) == 0


def test_tokens_are_counted_as_a_call_with_its_options_reads_them(echo: Engine) -> None:
    messages: list[BaseMessage] = [SystemMessage("be brief"), HumanMessage("häh?")]

    def real(model: Any, **options: Any) -> int:
        return int(model.invoke(messages, **options).usage_metadata["input_tokens"])

    def look(place: str) -> str:
        """Look there."""
        return place

    llm = ChatCopySpec(engine=echo, max_tokens=1)
    plain = llm.get_num_tokens_from_messages(messages)
    bound = llm.bind_tools([look], tool_choice="none")
    assert plain == bound.get_num_tokens_from_messages(messages) == real(bound)  # type: ignore[attr-defined]
    bound = llm.bind_tools([look])
    counted = bound.get_num_tokens_from_messages(messages)  # type: ignore[attr-defined]
    assert plain < counted == real(bound) == llm.get_num_tokens_from_messages(messages, tools=[look])
    again = bound.with_config(tags=["t"]).bind(temperature=0.5)
    assert again.get_num_tokens_from_messages(messages) == counted  # type: ignore[attr-defined]
    named = llm.with_config(configurable={"thread_id": "t"})
    assert named.get_num_tokens_from_messages(messages) == plain  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="use max_tokens"):
        llm.get_num_tokens_from_messages(messages, max_new_tokens=5)


def test_histories_are_trimmed_by_exact_counts(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo)
    messages = [HumanMessage("x" * 50), AIMessage("y" * 50), HumanMessage("last")]
    limit = llm.get_num_tokens_from_messages(messages[1:])
    assert trim_messages(messages, max_tokens=limit, token_counter=llm, strategy="last") == messages[1:]
    assert trim_messages(messages, max_tokens=limit - 1, token_counter=llm, strategy="last") == messages[2:]


async def test_a_chain_streams_the_text(echo: Engine) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "say {word}")]) | ChatCopySpec(engine=echo) | StrOutputParser()
    assert chain.invoke({"word": "yes"}) == "SAY YES"
    assert "".join(chain.stream({"word": "yes"})) == "SAY YES"
    assert "".join([text async for text in chain.astream({"word": "yes"})]) == "SAY YES"


def test_callbacks_see_every_chunk_once(echo: Engine) -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            self.seen.append(token)

    for llm in (ChatCopySpec(engine=echo), ChatCopySpec(engine=echo, streaming=True)):
        handler = Tokens()
        for _ in llm.stream("hello", config={"callbacks": [handler]}):
            pass
        assert "".join(handler.seen) == "HELLO"
    handler = Tokens()
    llm.invoke("hello", config={"callbacks": [handler]})
    assert "".join(handler.seen) == "HELLO"


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
async def test_callbacks_are_told_the_figures_of_an_answer(echo: Engine, how: str) -> None:
    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: LLMResult, **_: Any) -> None:
            self.result = response

    handler = Ends()
    llm, options = ChatCopySpec(engine=echo, session_id="notes"), {"config": {"callbacks": [handler]}}
    if how == "stream":
        list(llm.stream("hello", **options))
    elif how == "astream":
        [_ async for _ in llm.astream("hello", **options)]
    else:
        answer = llm.invoke("hello", **options) if how == "invoke" else await llm.ainvoke("hello", **options)
        assert answer.response_metadata["copyspec"]["session_id"] == "notes"
    (generation,) = handler.result.generations[0]
    assert isinstance(generation, ChatGeneration)
    metadata = generation.message.response_metadata
    figures = {name: value for name, value in metadata["copyspec"].items() if name not in ("session_id", "copies")}
    told = {"model_name": "scripted", "finish_reason": "stop", "copyspec": figures}
    assert generation.generation_info == told
    assert handler.result.llm_output == (None if "stream" in how else told)
    assert {"copied_share", "tokens_per_forward", "num_forward_passes", "ttft_s"} <= set(figures)


def test_a_cache_answers_for_every_conversation(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(["first", "second"]), cache=InMemoryCache())
    assert llm.invoke("hi", session_id="a").text == "first"
    assert llm.invoke("hi", session_id="b").text == "first"
    assert llm.invoke("hi", temperature=0.5).text == "second"


def test_output_version_v1_gives_text_blocks(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo, output_version="v1")
    assert llm.invoke("hi").content == [{"type": "text", "text": "HI"}]
    assert joined(list(llm.stream("hi"))).content == [{"type": "text", "text": "HI", "index": 0}]
