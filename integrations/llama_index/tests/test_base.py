"""Calls: chat, complete, their streams and async forms say the same; options, stops, counts, errors, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index_instrumentation.dispatcher import instrument_tags
from pydantic import BaseModel

from copyspec_engine import AdaptiveDrafter, ConfigError, ContextOverflowError, Engine, EngineConfig
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion, conversation

MakeEngine = Callable[..., Engine]
Stopped = Callable[[Engine], Awaitable[bool]]
Response = ChatResponse | CompletionResponse

DOCUMENT = "".join(f"- item {number}: all work and no play makes a dull list\n" for number in range(12))


NUMBERS = " ".join(f"{number * 7919 % 9973:04d}" for number in range(60))
"""A text that does not repeat itself."""


def text_of(response: Response) -> str:
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""


async def read(stream: AsyncGenerator[Any, None]) -> list[Any]:
    return [response async for response in stream]


async def everyhow(llm: CopySpec | CopySpecCompletion, text: str, **options: Any) -> dict[str, list[Response]]:
    """The responses of every method."""
    messages = [ChatMessage(text)]
    return {
        "chat": [llm.chat(messages, **options)],
        "achat": [await llm.achat(messages, **options)],
        "stream_chat": list(llm.stream_chat(messages, **options)),
        "astream_chat": await read(await llm.astream_chat(messages, **options)),
        "complete": [llm.complete(text, **options)],
        "acomplete": [await llm.acomplete(text, **options)],
        "stream_complete": list(llm.stream_complete(text, **options)),
        "astream_complete": await read(await llm.astream_complete(text, **options)),
    }


async def test_every_method_gives_the_same_answer(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: DOCUMENT), drafter="none")
    for responses in (await everyhow(llm, "Repeat the list.")).values():
        raw = responses[-1].raw
        assert text_of(responses[-1]) == DOCUMENT
        assert (raw["model"], raw["finish_reason"]) == ("scripted", "stop")
        assert raw["usage"]["completion_tokens"] == len(DOCUMENT) + 1
        assert raw["usage"]["total_tokens"] == raw["usage"]["prompt_tokens"] + len(DOCUMENT) + 1
        assert raw["copyspec"]["num_forward_passes"] == len(DOCUMENT) + 1
        assert raw["copyspec"]["copied_share"] == 0


async def test_streams_carry_the_text_so_far_and_what_is_new(make_engine: MakeEngine) -> None:
    llm = CopySpec(
        engine=make_engine(lambda prompt: DOCUMENT),
        drafter=AdaptiveDrafter(max_draft_tokens=32),
        include_segments=True,
    )
    for name, responses in (await everyhow(llm, f"Repeat:\n{DOCUMENT}")).items():
        if "stream" not in name:
            continue
        assert len(responses) > 1
        text = ""
        for response in responses:
            text += response.delta or ""
            assert text_of(response) == text
        segments = [segment for response in responses for segment in response.raw["copyspec"]["segments"]]
        assert "".join(segment["text"] for segment in segments) == text == DOCUMENT
        assert ["usage" in response.raw for response in responses] == [False] * (len(responses) - 1) + [True]


async def test_segments_of_a_whole_answer_are_the_answer(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: "Here it is:\n" + DOCUMENT), include_segments=True)
    prompt = f"Repeat:\n{DOCUMENT}"
    for response in (llm.complete(prompt, session_id="a"), await llm.acomplete(prompt, session_id="b")):
        segments = response.raw["copyspec"]["segments"]
        assert "".join(segment["text"] for segment in segments) == response.text
        assert {segment["copied"] for segment in segments} == {True, False}


async def test_an_empty_answer_is_an_answer(make_engine: MakeEngine) -> None:
    for responses in (await everyhow(CopySpec(engine=make_engine(lambda prompt: "")), "hi")).values():
        assert [text_of(response) for response in responses] == [""]


async def test_a_second_turn_reuses_the_prefix_and_copies(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: DOCUMENT))
    first = await llm.achat([ChatMessage("Write the list.")])
    second = await llm.achat([ChatMessage("Write the list."), first.message, ChatMessage("Again.")])
    assert text_of(second) == DOCUMENT
    assert first.raw["usage"]["cached_tokens"] == 0
    assert second.raw["usage"]["cached_tokens"] >= first.raw["usage"]["total_tokens"] - 1
    assert second.raw["copyspec"]["copied_share"] > 0.5
    assert second.raw["copyspec"]["tokens_per_forward"] > 2


@pytest.mark.parametrize("options", [{"prediction": NUMBERS}, {"memory_pool": "team"}], ids=["prediction", "pool"])
async def test_an_answer_is_copied_from_its_prediction_or_a_shared_pool(
    make_engine: MakeEngine, options: dict[str, Any]
) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: NUMBERS))
    plain = llm.complete("hi", session_id="a")
    llm.complete("hi", session_id="b", **options)
    copied = await llm.acomplete("hi", session_id="c", **options)
    assert text_of(copied) == text_of(plain) == NUMBERS
    assert copied.raw["copyspec"]["num_forward_passes"] < plain.raw["copyspec"]["num_forward_passes"] / 2


async def test_the_order_of_conversations_is_keyword_field(echo: Engine) -> None:
    def session(response: Response) -> str:
        return str(response.raw["copyspec"]["session_id"])

    llm = CopySpec(engine=echo, session_id="field")
    for responses in (await everyhow(llm, "hi", session_id="keyword")).values():
        assert {session(response) for response in responses} == {"keyword"}
    for responses in (await everyhow(llm, "hi")).values():
        assert {session(response) for response in responses} == {"field"}
    assert session(CopySpec(engine=echo).complete("hi")) == "None"


async def test_the_code_around_a_call_names_its_conversation(echo: Engine) -> None:
    async def sessions(**options: Any) -> set[str]:
        answers = await everyhow(CopySpec(engine=echo, session_id="field"), "hi", **options)
        return {response.raw["copyspec"]["session_id"] for responses in answers.values() for response in responses}

    with instrument_tags({"session_id": "tag"}):
        assert await sessions() == {"tag"}
        with conversation("block"):
            assert await sessions() == {"block"}
            assert await sessions(session_id="keyword") == {"keyword"}
    assert await sessions() == {"field"}
    with pytest.raises(ConfigError, match="session_id=''"), conversation(""):
        pass


async def test_stop_ends_every_method_before_the_stop_text(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: DOCUMENT))
    for responses in (await everyhow(llm, "Repeat the list.", stop="item 3")).values():
        assert text_of(responses[-1]) == DOCUMENT.partition("item 3")[0]


def test_options_of_a_call_replace_the_fields(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: "x" * 50), max_tokens=5)
    assert llm.complete("go").text == "x" * 5
    response = llm.complete("go", max_tokens=7, drafter="none")
    assert response.text == "x" * 7
    assert response.raw["finish_reason"] == "length"
    assert llm.complete("go", max_tokens=None).text == "x" * 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"max_token": 3}, "unknown option max_token=3 for a call of CopySpec: use max_tokens"),
        ({"tool_choise": "auto"}, "use tool_choice"),
        ({"drafter": "fast"}, "drafter='fast'"),
        ({"session_id": 3}, "session_id=3"),
        ({"session_id": ""}, "session_id='' but expected at least 1 character"),
        ({"system_prompt": "Be brief"}, "use system_prompt of CopySpec"),
    ],
)
async def test_a_bad_option_of_a_call_raises_by_name_and_value(echo: Engine, options: Any, named: str) -> None:
    llm = CopySpec(engine=echo)
    with pytest.raises(ConfigError, match=named):
        llm.chat([ChatMessage("hi")], **options)
    with pytest.raises(ConfigError, match=named):
        await llm.astream_complete("hi", **options)


async def test_bad_messages_raise(echo: Engine) -> None:
    with pytest.raises(ConfigError, match="no messages"):
        CopySpec(engine=echo).chat([])
    with pytest.raises(ConfigError, match="no messages"):
        await CopySpec(engine=echo).achat([])


async def test_a_prompt_beyond_the_context_raises(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(["never"], max_model_len=64))
    with pytest.raises(ContextOverflowError, match="holds 64"):
        llm.complete("x" * 100)
    with pytest.raises(ContextOverflowError, match="holds 64"):
        await llm.achat([ChatMessage("x" * 100)])
    with pytest.raises(ContextOverflowError, match="holds 64"):
        list(llm.stream_complete("x" * 100))


def test_a_prompt_is_a_user_message_unless_it_is_formatted(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: prompt))
    assert llm.complete("hi").text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert llm.complete("hi", formatted=True).text == "hi"


# Concurrency


async def test_concurrent_calls_get_their_own_answers(echo: Engine) -> None:
    llm = CopySpec(engine=echo)
    responses = await asyncio.gather(*(llm.acomplete(f"question {number}") for number in range(8)))
    assert [response.text for response in responses] == [f"QUESTION {number}" for number in range(8)]


@pytest.mark.parametrize("how", ["achat", "acomplete", "astream_chat", "astream_complete"])
async def test_the_event_loop_goes_on_while_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, echo: Engine, how: str
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def load_slowly(config: EngineConfig, _on_progress: object) -> Engine:
        begun.set()
        assert may_go_on.wait(20), "the event loop stood still"
        return echo

    monkeypatch.setattr("copyspec_engine.adapters.model.shared_engine", load_slowly)
    llm = CopySpec()

    async def call() -> str:
        response = await getattr(llm, how)([ChatMessage("hi")] if "chat" in how else "hi")
        return text_of((await read(response))[-1] if "stream" in how else response)

    task = asyncio.ensure_future(call())
    while not begun.is_set():
        await asyncio.sleep(0.005)
    may_go_on.set()
    assert await task == "HI"


async def test_closing_a_stream_cancels_its_request(slow: Engine, stopped_early: Stopped) -> None:
    responses = CopySpec(engine=slow).stream_complete("go")
    next(responses)
    responses.close()
    assert await stopped_early(slow)


async def test_leaving_an_async_stream_cancels_its_request(slow: Engine, stopped_early: Stopped) -> None:
    async for _ in await CopySpec(engine=slow).astream_complete("go"):
        break
    assert await stopped_early(slow)


@pytest.mark.parametrize("how", ["acomplete", "astream_complete"])
async def test_cancelling_the_task_cancels_its_request(slow: Engine, stopped_early: Stopped, how: str) -> None:
    llm = CopySpec(engine=slow)

    async def call() -> None:
        if how == "acomplete":
            await llm.acomplete("go")
        else:
            await read(await llm.astream_complete("go"))

    task = asyncio.ensure_future(call())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await stopped_early(slow)


# What LlamaIndex builds on


def test_the_token_counter_reads_the_engines_counts(echo: Engine) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [])
    llm = CopySpec(engine=echo, callback_manager=CallbackManager([counter]))
    usage = llm.chat([ChatMessage("hi")]).raw["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]
    for response in llm.stream_chat([ChatMessage("hi")]):
        last = response
    assert counter.total_llm_token_count == usage["total_tokens"] + last.raw["usage"]["total_tokens"]


async def test_predict_goes_through_chat_with_the_system_prompt(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: prompt), system_prompt="be brief")
    rendered = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt = PromptTemplate("{word}")
    assert llm.predict(prompt, word="hi") == rendered
    assert await llm.apredict(prompt, word="hi") == rendered
    assert "".join(llm.stream(prompt, word="hi")) == rendered
    assert "".join([text async for text in await llm.astream(prompt, word="hi")]) == rendered


async def test_structured_prediction_goes_through_the_prompt(make_engine: MakeEngine) -> None:
    class Point(BaseModel):
        x: int
        y: int

    llm = CopySpec(engine=make_engine(lambda prompt: '{"x": 1, "y": 2}'))
    assert llm.structured_predict(Point, PromptTemplate("a point")) == Point(x=1, y=2)
    assert await llm.astructured_predict(Point, PromptTemplate("a point")) == Point(x=1, y=2)


def memory_of(llm: CopySpec) -> ChatMemoryBuffer:
    """A memory without the default one's database, whose open connection warns in whichever test comes next."""
    return ChatMemoryBuffer.from_defaults(llm=llm)


async def test_a_chat_engine_keeps_one_conversation(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: DOCUMENT))
    chat_engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory_of(llm))
    assert str(chat_engine.chat("Write the list.")) == DOCUMENT
    response = await chat_engine.achat("Again.")
    assert str(response) == DOCUMENT
    stream = chat_engine.stream_chat("Again.")
    assert "".join(stream.response_gen) == DOCUMENT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's workflows list pydantic's old names
async def test_a_react_agent_calls_a_tool_through_text(make_engine: MakeEngine) -> None:
    replies = [
        'Thought: I need to use a tool.\nAction: add\nAction Input: {"a": 1, "b": 2}',
        "Thought: I can answer without using any more tools.\nAnswer: three",
    ]
    llm = CopySpec(engine=make_engine(replies))
    add = FunctionTool.from_defaults(lambda a, b: a + b, name="add", description="adds two numbers")
    assert str(await ReActAgent(tools=[add], llm=llm).run("1 + 2?", memory=memory_of(llm))) == "three"


# Raw text


def written(messages: Sequence[ChatMessage]) -> str:
    return "".join(f"[{message.role.value}] {message.content}\n" for message in messages) + "[assistant]"


async def test_messages_to_prompt_writes_the_prompts_of_chats(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: prompt), messages_to_prompt=written)
    for responses in (await everyhow(llm, "hi")).values():
        assert text_of(responses[-1]) == "[user] hi\n[assistant]"
        assert responses[-1].raw["usage"]["prompt_tokens"] == llm.count_tokens([ChatMessage("hi")])
    assert llm.complete("hi", formatted=True).text == "hi"
    chat = [ChatMessage(role="system", content="s"), ChatMessage("hi")]
    assert (await llm.achat(chat)).message.content == written(chat)
    assert "".join(str(part.delta) for part in llm.stream_chat(chat)) == written(chat)


async def test_completion_to_prompt_writes_the_prompts_of_completions(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: prompt), completion_to_prompt=lambda prompt: f"<{prompt}>")
    for name, responses in (await everyhow(llm, "hi")).items():
        assert (text_of(responses[-1]) == "<hi>") == ("complete" in name)
    assert llm.complete("hi", formatted=True).text == "hi"
    assert llm.count_tokens("hi") == 4
    assert llm.count_tokens("hi", formatted=True) == 2
    assert llm.count_tokens([ChatMessage("hi")]) == CopySpec(engine=llm.engine).count_tokens([ChatMessage("hi")])


def test_a_model_whose_prompts_a_function_writes_takes_no_tools(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: prompt), messages_to_prompt=written)
    assert not llm.metadata.is_function_calling_model
    add = FunctionTool.from_defaults(lambda a, b: a + b, name="add", description="adds two numbers")
    with pytest.raises(ConfigError, match="neither messages_to_prompt nor completion_to_prompt"):
        llm.chat_with_tools([add], "1 + 2?")


async def test_objects_are_written_behind_a_prompt_of_ones_own(make_engine: MakeEngine) -> None:
    class Sum(BaseModel):
        total: int

    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return '{"total": 3}'

    llm = CopySpec(engine=make_engine(reply), messages_to_prompt=written)
    prompt = PromptTemplate("Add {what}.")
    assert llm.structured_predict(Sum, prompt, what="1 and 2") == Sum(total=3)
    assert await llm.astructured_predict(Sum, prompt, what="1 and 2") == Sum(total=3)
    assert list(llm.stream_structured_predict(Sum, prompt, what="1 and 2"))[-1] == Sum(total=3)
    assert all(text.startswith("[user] Add 1 and 2.\n") and text.endswith("\n[assistant]") for text in prompts)


async def test_completion_sends_the_prompt_as_it_is(make_engine: MakeEngine) -> None:
    llm = CopySpecCompletion(llm=CopySpec(engine=make_engine(lambda prompt: prompt)))
    assert not llm.metadata.is_chat_model
    for name, responses in (await everyhow(llm, "hi")).items():
        assert text_of(responses[-1]) == ("user: hi\nassistant: " if "chat" in name else "hi")
        assert responses[-1].raw["usage"]["prompt_tokens"] == len(text_of(responses[-1]))


def test_completion_uses_its_own_prompt_functions(make_engine: MakeEngine) -> None:
    llm = CopySpecCompletion(
        llm=CopySpec(engine=make_engine(lambda prompt: prompt)), completion_to_prompt=lambda prompt: f"<{prompt}>"
    )
    assert llm.complete("hi").text == "<hi>"
    assert llm.complete("hi", formatted=True).text == "hi"
    with pytest.raises(ConfigError, match=r"max_token=3 for CopySpecCompletion: use llm=CopySpec\(max_tokens=...\)"):
        CopySpecCompletion(max_token=3)
    with pytest.raises(ConfigError, match="unknown option max_token=3"):
        llm.complete("hi", max_token=3)


def test_completion_counts_each_call_once(make_engine: MakeEngine) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [])
    llm = CopySpecCompletion(
        llm=CopySpec(engine=make_engine(lambda prompt: "yes")), callback_manager=CallbackManager([counter])
    )
    assert llm.complete("hi").raw["usage"]["total_tokens"] == counter.total_llm_token_count


# Where nothing names the conversation


def usage(response: Response) -> dict[str, int]:
    return dict(response.raw["usage"])


async def test_who_shows_the_whole_talk_goes_on_with_its_kv(make_engine: MakeEngine) -> None:
    llm, asked = CopySpec(engine=make_engine(lambda prompt: NUMBERS)), [ChatMessage("Write it.")]
    firsts = (llm.chat(asked), await llm.achat(asked), [*llm.stream_chat(asked)][-1])
    for first in firsts:
        assert usage(first)["cached_tokens"] == 0
        again = llm.chat([*asked, ChatMessage(NUMBERS, role="assistant"), ChatMessage("Again.")])
        assert usage(again)["cached_tokens"] >= usage(first)["total_tokens"] - 1
        assert again.raw["copyspec"]["session_id"] is None


def test_callers_of_one_llm_meet_nothing_of_each_other(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: NUMBERS), include_explanation=True)
    llm.chat([ChatMessage(f"{NUMBERS} Ann's PIN is swordfish.")])
    found = [llm.chat([ChatMessage(f"{NUMBERS} Ann's PIN is {guess}.")]) for guess in ("swordfish", "swordfist")]
    assert [usage(response)["cached_tokens"] for response in found] == [0, 0]
    stranger = llm.complete("hi")
    assert "swordfish" not in str(stranger.raw)
    assert not any(span.source.startswith("earlier") for span in llm.explain(stranger).spans)


def test_a_raw_prompt_stands_alone(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: "ok"))
    found = [llm.complete("Once upon a time", formatted=True) for _ in range(2)]
    assert [usage(response)["cached_tokens"] for response in found] == [0, 0]


def test_what_comes_with_a_response_is_small_unless_it_is_asked_for(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: NUMBERS))
    small = llm.complete(f"Repeat: {NUMBERS}").raw["copyspec"]
    assert not {"token_ids", "written", "segments"} & small.keys()
    assert "token_ids" in llm.complete("hi", include_token_ids=True).raw["copyspec"]
