"""What LlamaIndex, its agents and its engines rely on, each as a law; on the scripted model and on the bundled one."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import ThinkingBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import LLM, ChatMessage, CustomLLM, ImageBlock, TextBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.tools import FunctionTool
from pydantic import Field

from copyspec_engine import ConfigError, ContextOverflowError, Engine, EngineConfig
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

MakeEngine = Callable[..., Engine]

CHAT = ("chat", "achat", "stream_chat", "astream_chat")
COMPLETE = ("complete", "acomplete", "stream_complete", "astream_complete")
ALL = CHAT + COMPLETE
ASYNC = tuple(way for way in ALL if way.startswith("a"))
STREAMS = tuple(way for way in ALL if "stream" in way)

LIST = "".join(f"- item {number}: all work and no play makes a dull list\n" for number in range(12))
THOUGHT = "<think>\nhm, so\n</think>\n\nIt is four."
NOTES = "# Notes\n- Ann books the room\n- Bo brings the slides"


class Recorder(BaseEventHandler):
    """Keeps the names of events, and the events."""

    events: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    root, handler = get_dispatcher(), Recorder()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


# What kind of LLM it is


def test_the_main_class_is_a_function_calling_llm_and_the_other_a_custom_one() -> None:
    order = CopySpec.__mro__
    assert order.index(CopySpec) < order.index(FunctionCallingLLM) < order.index(LLM)
    assert issubclass(CopySpecCompletion, CustomLLM)
    assert not issubclass(CopySpec, CustomLLM)  # whose async methods block the event loop


@pytest.mark.parametrize("way", ALL)
def test_every_method_is_our_own(way: str) -> None:
    assert way in CopySpec.__dict__
    assert inspect.iscoroutinefunction(inspect.unwrap(getattr(CopySpec, way))) == (way in ASYNC)


@pytest.mark.parametrize("way", ASYNC)
def test_no_async_method_of_the_completion_view_is_the_blocking_one(way: str) -> None:
    assert way in CopySpecCompletion.__dict__


def test_the_support_of_required_tools_can_be_seen_in_the_signature() -> None:
    assert "tool_required" in inspect.signature(CopySpec._prepare_chat_with_tools).parameters


def test_the_context_is_that_of_the_models_own_configuration(bundled: Engine) -> None:
    before_loading = CopySpec(model="bundled", device="cpu").metadata
    assert before_loading.context_window == bundled.info.max_model_len
    assert before_loading == CopySpec(engine=bundled).metadata.model_copy(update={"model_name": "bundled"})
    assert CopySpec(engine=EngineConfig(model="bundled", max_model_len=100)).metadata.context_window == 100


# What every method does


@pytest.mark.parametrize("way", ALL)
async def test_every_method_gives_the_answer_its_counts_and_its_reason(ways: Any, make_engine: Any, way: str) -> None:
    responses = await ways.ask(CopySpec(engine=make_engine(lambda prompt: LIST)), way, "go")
    raw = responses[-1].raw
    assert ways.text(responses[-1]) == LIST
    assert (raw["model"], raw["finish_reason"]) == ("scripted", "stop")
    assert raw["usage"]["total_tokens"] == raw["usage"]["prompt_tokens"] + len(LIST) + 1
    assert raw["copyspec"]["num_forward_passes"] <= len(LIST) + 1


@pytest.mark.parametrize("way", ALL)
async def test_every_method_gives_the_tokens_of_plain_decoding(ways: Any, bundled: Engine, way: str) -> None:
    llm, answers = CopySpec(engine=bundled, max_tokens=60, include_token_ids=True), []
    for drafter in ("adaptive", "none"):
        asked: Any = [ChatMessage(NOTES), ChatMessage("Repeat the document.")]
        asked = asked if "chat" in way else f"Repeat this text:\n{NOTES}"
        last = (await ways.ask(llm, way, asked, drafter=drafter, session_id=f"{way} {drafter}"))[-1]
        answers.append((ways.text(last), last.raw["copyspec"]["token_ids"]))
        passes = last.raw["copyspec"]["tokens_per_forward"]
        assert (passes > 1) == (drafter == "adaptive")
    assert answers[0] == answers[1]
    assert answers[0][0] == NOTES


@pytest.mark.parametrize("way", STREAMS)
async def test_a_stream_carries_the_message_so_far_and_what_is_new(ways: Any, make_engine: Any, way: str) -> None:
    responses = await ways.ask(CopySpec(engine=make_engine(lambda prompt: f"  {LIST}"), drafter="none"), way, "go")
    text = ""
    for response in responses:
        text += response.delta
        assert ways.text(response) == text
    assert text == f"  {LIST}"
    assert len(responses) > 50
    assert ["usage" in response.raw for response in responses] == [False] * (len(responses) - 1) + [True]


@pytest.mark.parametrize("way", ALL)
async def test_events_come_in_order_and_once(ways: Any, echo: Engine, recorder: Recorder, way: str) -> None:
    responses = await ways.ask(CopySpec(engine=echo), way, "hi")
    kind = "LLMChat" if "chat" in way else "LLMCompletion"
    streamed = [f"{kind}InProgressEvent"] * len(responses) if "stream" in way else []
    assert recorder.names == [f"{kind}StartEvent", *streamed, f"{kind}EndEvent"]
    assert recorder.events[-1].response == responses[-1]
    assert len({event.span_id for event in recorder.events}) == 1


@pytest.mark.parametrize("way", ALL)
async def test_reasoning_is_no_part_of_the_text(ways: Any, make_engine: Any, way: str) -> None:
    responses = await ways.ask(CopySpec(engine=make_engine(lambda prompt: THOUGHT)), way, "2 + 2?")
    last = responses[-1]
    assert ways.text(last) == "It is four."
    if "chat" in way:
        assert last.message.blocks == [ThinkingBlock(content="hm, so"), TextBlock(text="It is four.")]
        if "stream" in way:
            assert "".join(r.additional_kwargs.get("thinking_delta", "") for r in responses) == "hm, so"
    else:
        assert last.additional_kwargs == {"thinking": "hm, so"}


@pytest.mark.parametrize("way", ALL)
async def test_logprobs_are_those_of_each_token_with_alternatives(ways: Any, bundled: Engine, way: str) -> None:
    llm = CopySpec(engine=bundled, max_tokens=8, logprobs=True, top_logprobs=3)
    responses = await ways.ask(llm, way, f"Repeat this text:\n{NOTES}")
    logprobs = [token for response in responses for token in response.logprobs or ()]
    assert len(logprobs) == responses[-1].raw["usage"]["completion_tokens"] == 8
    for own, *others in logprobs:
        assert 0 >= own.logprob >= max(other.logprob for other in others)
        assert len(others) == 2
        assert own.bytes == list(own.token.encode())


@pytest.mark.parametrize("way", ALL)
async def test_an_unknown_option_is_refused(ways: Any, echo: Engine, way: str) -> None:
    with pytest.raises(ConfigError, match="unknown option max_token=3"):
        await ways.ask(CopySpec(engine=echo), way, "hi", max_token=3)


@pytest.mark.parametrize("way", ALL)
async def test_a_prompt_that_does_not_fit_is_refused_with_both_counts(ways: Any, make_engine: Any, way: str) -> None:
    with pytest.raises(ContextOverflowError, match=r"request of \d+ tokens .* holds 64") as raised:
        await ways.ask(CopySpec(engine=make_engine(["never"], max_model_len=64)), way, "x" * 100)
    assert raised.value.max_tokens == 64


@pytest.mark.parametrize("way", CHAT)
async def test_an_image_is_refused_by_name(ways: Any, echo: Engine, way: str) -> None:
    message = ChatMessage(blocks=[TextBlock(text="see"), ImageBlock(url="http://127.0.0.1/x.png")])
    with pytest.raises(ConfigError, match=r"'image' in messages\[1\]"):
        await ways.ask(CopySpec(engine=echo), way, [ChatMessage("hi"), message])


@pytest.mark.parametrize("way", CHAT)
async def test_the_history_is_never_changed(ways: Any, make_engine: Any, write_call: Any, way: str) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: write_call("add", a=1)))
    history = [ChatMessage(role="system", content="s"), ChatMessage("hi")]
    before = [message.model_copy(deep=True) for message in history]
    await ways.ask(llm, way, history)
    assert history == before


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 0.7, "seed": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {70: -100}},
    {"stop_token_ids": [80]},
    {"ignore_eos": True},
    {"cache_salt": "app"},
    {"prediction": NOTES},
    {"memory_pool": "team"},
    {"timeout": 60},
    {"response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(reversed(options)))
def test_an_option_means_the_same_for_a_model_and_for_a_call(bundled: Engine, options: dict[str, Any]) -> None:
    messages = [ChatMessage(NOTES), ChatMessage("Repeat the document.")]
    of_model = CopySpec(engine=bundled, max_tokens=20, include_token_ids=True, **options).chat(messages)
    of_call = CopySpec(engine=bundled, max_tokens=20).chat(messages, include_token_ids=True, **options)
    assert of_model.raw["copyspec"]["token_ids"] == of_call.raw["copyspec"]["token_ids"]
    options = {**options, "include_token_ids": True, "drafter": "none"}
    plain = CopySpec(engine=bundled, max_tokens=20, **options).chat(messages)
    assert of_model.raw["copyspec"]["token_ids"] == plain.raw["copyspec"]["token_ids"]


def test_a_time_limit_ends_the_answer_and_says_so(make_engine: MakeEngine) -> None:
    response = CopySpec(engine=make_engine(lambda prompt: "word " * 1500), drafter="none").complete("go", timeout=0.1)
    assert response.raw["finish_reason"] == "timeout"
    assert len(response.text) < 5 * 1500


# Many at once, and going away


async def test_thirty_two_calls_at_once_get_their_own_answers(echo: Engine) -> None:
    llm = CopySpec(engine=echo)
    responses = await asyncio.gather(*(llm.achat([ChatMessage(f"question {number}")]) for number in range(32)))
    assert [response.message.content for response in responses] == [f"QUESTION {number}" for number in range(32)]
    assert (await asyncio.to_thread(echo.metrics)).finished == {"stop": 32}


async def idle(engine: Engine) -> bool:
    """Whether within three seconds nothing runs or waits and no running request holds a slot."""
    for _ in range(300):
        metrics = await asyncio.to_thread(engine.metrics)
        if not metrics.num_running and not metrics.num_waiting and not metrics.num_kv_slots_running:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize("way", ASYNC)
async def test_cancelling_a_task_frees_its_slots(ways: Any, make_engine: Any, way: str) -> None:
    engine = make_engine(lambda prompt: "word " * 1500, drafter="none")
    task = asyncio.ensure_future(ways.ask(CopySpec(engine=engine), way, "go"))
    while not (await asyncio.to_thread(engine.metrics)).num_kv_slots_running:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await idle(engine)
    assert engine.metrics().finished == {"cancelled": 1}


@pytest.mark.parametrize("way", STREAMS)
async def test_leaving_a_stream_frees_its_slots(make_engine: MakeEngine, way: str) -> None:
    engine = make_engine(lambda prompt: "word " * 1500, drafter="none")
    stream = getattr(CopySpec(engine=engine), way)([ChatMessage("go")] if "chat" in way else "go")
    if way in ASYNC:
        stream = await stream
        await anext(stream)
        await stream.aclose()
    else:
        next(stream)
        stream.close()
    assert await idle(engine)
    assert engine.metrics().finished == {"cancelled": 1}


@pytest.mark.parametrize("way", ASYNC)
async def test_the_event_loop_goes_on_while_an_answer_is_written(ways: Any, make_engine: Any, way: str) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(prompt: str) -> str:
        begun.set()
        assert may_go_on.wait(20), "the event loop stood still"
        return "word " * 300

    task = asyncio.ensure_future(ways.ask(CopySpec(engine=make_engine(slow)), way, "go"))
    while not begun.is_set():
        await asyncio.sleep(0.005)
    may_go_on.set()
    assert len(ways.text((await task)[-1])) == 1500


# What is built on it


async def test_the_token_counter_counts_whole_and_streamed_answers_alike(ways: Any, echo: Engine) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [])
    llm = CopySpec(engine=echo, callback_manager=CallbackManager([counter]))
    usages = [(await ways.ask(llm, way, "hi"))[-1].raw["usage"] for way in ALL]
    assert counter.prompt_llm_token_count == sum(usage["prompt_tokens"] for usage in usages)
    assert counter.completion_llm_token_count == sum(usage["completion_tokens"] for usage in usages)


def test_tokens_are_counted_as_the_prompt_will_have_them(bundled: Engine) -> None:
    llm, messages = CopySpec(engine=bundled, max_tokens=2), [ChatMessage(NOTES), ChatMessage("Repeat the document.")]
    assert llm.count_tokens(messages) == llm.chat(messages).raw["usage"]["prompt_tokens"]
    assert bundled.decode(llm.tokenizer(NOTES)) == NOTES


def test_tokens_are_counted_with_every_option_that_a_call_has(make_engine: MakeEngine) -> None:
    llm, chat = CopySpec(engine=make_engine(lambda prompt: "x"), max_tokens=2), [ChatMessage("hi")]
    tools = [FunctionTool.from_defaults(lambda a: a, name=name, description="tells") for name in ("one", "two")]
    calls: list[dict[str, Any]] = [
        {},
        {"tools": tools},
        {"tools": tools[:1]},
        {"tools": tools, "tool_choice": "none"},
        {"tools": tools, "tool_choice": "two"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"session_id": "s", "temperature": 0.5},
    ]
    counted = [llm.count_tokens(chat, **options) for options in calls]
    assert counted == [llm.chat(chat, **options).raw["usage"]["prompt_tokens"] for options in calls]
    assert counted[1] > counted[2] > counted[0] == counted[3]
    assert llm.count_tokens("hi") == llm.complete("hi").raw["usage"]["prompt_tokens"] == counted[0]
    for options in ({"max_new_tokens": 3}, {"tool_choice": "two"}):
        with pytest.raises(ConfigError):
            llm.count_tokens(chat, **options)


async def test_a_pickled_llm_answers_like_the_first(bundled: Engine) -> None:
    llm = CopySpec(engine=bundled, max_tokens=30, temperature=0.5, seed=3)
    loaded = pickle.loads(pickle.dumps(llm))
    asked = [ChatMessage(NOTES), ChatMessage("Repeat the document.")]
    assert (await loaded.achat(asked)).message == (await llm.achat(asked)).message


def test_traces_hold_options_and_no_engine(bundled: Engine) -> None:
    payload = CopySpec(engine=bundled, temperature=0.5).to_payload()
    assert (payload["class_name"], payload["temperature"]) == ("CopySpec", 0.5)
    assert "engine" not in payload
