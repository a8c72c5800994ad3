"""Which conversation a call belongs to, on every path that a config can take."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage, messages_from_dict, messages_to_dict, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from copyspec_engine import Engine
from langchain_copyspec import ChatCopySpec

MakeEngine = Callable[..., Engine]

TEXT = " ".join(f"{number * 7919 % 9973:04d}" for number in range(60))
"""A text that does not repeat itself."""
THREAD: RunnableConfig = {"configurable": {"thread_id": "t-1"}}


def session(message: Any) -> str:
    return str(message.response_metadata["copyspec"]["session_id"])


@pytest.fixture
def llm(echo: Engine) -> ChatCopySpec:
    return ChatCopySpec(engine=echo)


async def test_a_thread_id_reaches_every_direct_path(llm: ChatCopySpec) -> None:
    sessions = {
        "invoke": session(llm.invoke("hi", THREAD)),
        "ainvoke": session(await llm.ainvoke("hi", THREAD)),
        "stream": session(list(llm.stream("hi", THREAD))[-1]),
        "astream": session([chunk async for chunk in llm.astream("hi", THREAD)][-1]),
        "batch": session(llm.batch(["hi"], THREAD)[0]),
        "abatch": session((await llm.abatch(["hi"], THREAD))[0]),
        "batch_as_completed": session(next(iter(llm.batch_as_completed(["hi"], THREAD)))[1]),
        "bind": session(llm.bind(temperature=0).invoke("hi", THREAD)),
        "with_config": session(llm.with_config(THREAD).invoke("hi")),
        "with_retry": session(llm.with_retry().invoke("hi", THREAD)),
        "streaming": session(ChatCopySpec(engine=llm.engine, streaming=True).invoke("hi", THREAD)),
        "disable_streaming": session(
            list(ChatCopySpec(engine=llm.engine, disable_streaming=True).stream("hi", THREAD))[-1]
        ),
    }
    assert sessions == dict.fromkeys(sessions, "t-1")


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_a_thread_id_reaches_event_streams(llm: ChatCopySpec) -> None:
    events = [event async for event in llm.astream_events("hi", THREAD, version="v2")]
    assert session(events[-1]["data"]["output"]) == "t-1"
    assert session(llm.stream_events("hi", THREAD, version="v3").output) == "t-1"
    stream = await llm.astream_events("hi", THREAD, version="v3")
    assert session(await stream.output) == "t-1"


async def test_a_thread_id_reaches_the_model_of_a_chain(llm: ChatCopySpec) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "{text}")]) | llm
    assert session(chain.invoke({"text": "hi"}, THREAD)) == "t-1"
    assert session(await chain.ainvoke({"text": "hi"}, THREAD)) == "t-1"
    assert session(list(chain.stream({"text": "hi"}, THREAD))[-1]) == "t-1"
    assert session([chunk async for chunk in chain.astream({"text": "hi"}, THREAD)][-1]) == "t-1"
    events = [event async for event in (chain | StrOutputParser()).astream_events({"text": "hi"}, THREAD)]
    outputs = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    assert [session(output) for output in outputs] == ["t-1"]


def test_a_thread_id_reaches_a_model_called_inside_a_function(llm: ChatCopySpec) -> None:
    assert session(RunnableLambda(lambda text: llm.invoke(text)).invoke("hi", THREAD)) == "t-1"
    generate = RunnableLambda(lambda text: llm.generate([[HumanMessage(text)]]).generations[0][0].message)
    assert session(generate.invoke("hi", THREAD)) == "t-1"


async def test_each_item_of_a_batch_has_its_own_conversation(llm: ChatCopySpec) -> None:
    configs: list[RunnableConfig] = [{"configurable": {"thread_id": f"t-{number}"}} for number in range(3)]
    assert [session(answer) for answer in llm.batch(["a", "b", "c"], configs)] == ["t-0", "t-1", "t-2"]
    assert [session(answer) for answer in await llm.abatch(["a", "b", "c"], configs)] == ["t-0", "t-1", "t-2"]


@pytest.mark.parametrize("name", ["thread_id", "session_id", "conversation_id"])
@pytest.mark.parametrize("part", ["configurable", "metadata"])
def test_three_names_in_two_parts_of_a_config_name_the_conversation(llm: ChatCopySpec, part: str, name: str) -> None:
    assert session(llm.invoke("hi", {part: {name: "c"}})) == "c"  # type: ignore[misc]


def test_the_order_is_keyword_config_field(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo, session_id="field")
    assert session(llm.invoke("hi", THREAD, session_id="keyword")) == "keyword"
    assert session(llm.bind(session_id="keyword").invoke("hi", THREAD)) == "keyword"
    assert session(llm.invoke("hi", {**THREAD, "metadata": {"thread_id": "metadata"}})) == "t-1"
    assert session(llm.invoke("hi")) == "field"
    assert session(ChatCopySpec(engine=echo).invoke("hi")) == "None"


def test_an_id_may_be_any_value_but_an_empty_one(llm: ChatCopySpec) -> None:
    assert session(llm.invoke("hi", {"configurable": {"thread_id": 7}})) == "7"
    assert session(llm.invoke("hi", {"configurable": {"thread_id": 0}})) == "0"
    assert session(llm.invoke("hi", {"configurable": {"thread_id": ""}})) == "None"
    assert session(llm.invoke("hi", {"configurable": {"thread_id": None}})) == "None"


def graph_of(llm: ChatCopySpec) -> Any:
    """Two nodes that call the model: one passes its config on, one leaves it to the context; one is async too."""

    def draft(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"], config)]}

    def revise(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke([*state["messages"], ("user", "again")])]}

    async def arevise(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke([*state["messages"], ("user", "again")], config)]}

    graph = StateGraph(MessagesState)
    graph.add_node("draft", draft)
    graph.add_node("revise", RunnableLambda(revise, arevise))
    graph.add_edge(START, "draft")
    graph.add_edge("draft", "revise")
    return graph.compile(checkpointer=InMemorySaver())


def answers(state: dict[str, Any]) -> list[AIMessage]:
    return [message for message in state["messages"] if isinstance(message, AIMessage)]


async def test_a_graphs_thread_is_the_conversation_of_its_nodes(llm: ChatCopySpec) -> None:
    graph = graph_of(llm)
    state = graph.invoke({"messages": [("user", "hi")]}, THREAD)
    assert [session(answer) for answer in answers(state)] == ["t-1", "t-1"]
    state = await graph.ainvoke({"messages": [("user", "hi")]}, {"configurable": {"thread_id": "t-2"}})
    assert [session(answer) for answer in answers(state)] == ["t-2", "t-2"]
    parts = graph.stream({"messages": [("user", "ho")]}, THREAD, stream_mode="messages")
    last = [message for message, _ in parts if message.response_metadata.get("finish_reason")]
    assert [session(message) for message in last] == ["t-1", "t-1"]


def test_a_graphs_second_run_reuses_its_first(make_engine: MakeEngine) -> None:
    text = "the quick brown fox jumps over the lazy dog, " * 5
    llm = ChatCopySpec(engine=make_engine(lambda prompt: text))
    graph = graph_of(llm)
    graph.invoke({"messages": [("user", "write")]}, THREAD)
    second = answers(graph.invoke({"messages": [("user", "more")]}, THREAD))[-2]
    assert second.usage_metadata is not None
    assert second.usage_metadata["input_token_details"]["cache_read"] > len(text)
    assert second.response_metadata["copyspec"]["copied_share"] > 0.5
    other = answers(graph.invoke({"messages": [("user", "more")]}, {"configurable": {"thread_id": "t-2"}}))[0]
    assert other.usage_metadata is not None
    assert other.usage_metadata["input_token_details"]["cache_read"] < 40


def test_parallel_nodes_share_the_conversation(llm: ChatCopySpec) -> None:
    graph = StateGraph(MessagesState)
    for number in range(4):

        def node(state: MessagesState, number: int = number) -> dict[str, Any]:
            return {"messages": [llm.invoke([("user", f"part {number}")])]}

        graph.add_node(f"node-{number}", node)
        graph.add_edge(START, f"node-{number}")
    found = answers(graph.compile().invoke({"messages": []}, THREAD))
    assert {answer.text for answer in found} == {f"PART {number}" for number in range(4)}
    assert {session(answer) for answer in found} == {"t-1"}


@pytest.mark.parametrize("prediction", [TEXT, {"type": "content", "content": TEXT}], ids=["text", "openai"])
async def test_an_answer_is_copied_from_its_prediction(make_engine: MakeEngine, prediction: object) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT))
    plain = llm.invoke("hi", session_id="a")
    predicted = llm.invoke("hi", session_id="b", prediction=prediction)
    again = await llm.bind(prediction=prediction).ainvoke("hi", session_id="c")
    passes = [answer.response_metadata["copyspec"]["num_forward_passes"] for answer in (plain, predicted, again)]
    assert plain.text == predicted.text == again.text == TEXT
    assert passes[1] == passes[2] < passes[0] / 2


async def test_conversations_that_name_a_pool_copy_from_each_other(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT))
    alone = llm.invoke("hi", session_id="a").response_metadata["copyspec"]["num_forward_passes"]
    llm.invoke("hi", session_id="b", memory_pool="team")
    shared = (await llm.ainvoke("hi", session_id="c", memory_pool="team")).response_metadata["copyspec"]
    stranger = llm.invoke("hi", session_id="d").response_metadata["copyspec"]
    assert shared["num_forward_passes"] < alone / 2
    assert stranger["num_forward_passes"] > alone / 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_history_that_is_trimmed_loses_no_source(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT if "Write" in prompt else "Fine."), max_tokens=400)
    history = InMemoryChatMessageHistory()
    trim = trim_messages(max_tokens=1, strategy="last", token_counter=len)
    chain = RunnableWithMessageHistory(trim | llm, lambda session_id: history)
    undrafted = RunnableWithMessageHistory(trim | llm.bind(drafter="none"), lambda session_id: history)
    thread: Any = {"configurable": {"session_id": "s-1"}}
    chain.invoke([HumanMessage(f"Note this: {TEXT}")], thread)
    drafted = chain.invoke([HumanMessage("Write it.")], thread)
    plain = undrafted.invoke([HumanMessage("Write it.")], thread)
    assert drafted.text == plain.text == TEXT
    assert drafted.usage_metadata["input_tokens"] < 100  # the text is in no prompt any more
    passes = [answer.response_metadata["copyspec"]["num_forward_passes"] for answer in (drafted, plain)]
    assert passes[0] < passes[1] / 3
    assert {span.source for span in llm.explain(drafted).spans} >= {"earlier_prompt"}
    assert len(history.messages) == 6


# Where nothing names the conversation


def cached(message: Any) -> int:
    return int(message.usage_metadata["input_token_details"]["cache_read"])


async def test_who_shows_the_whole_talk_goes_on_with_its_kv_on_every_path(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT))
    asked = [HumanMessage("Write it.")]
    parts = [chunk async for chunk in llm.astream(asked)]
    firsts = [llm.invoke(asked), await llm.ainvoke(asked), reduce(add, llm.stream(asked)), reduce(add, parts)]
    for first in firsts:
        assert cached(first) == 0
        back = messages_from_dict(json.loads(json.dumps(messages_to_dict([first]))))[0]
        for shown in (first, back, AIMessage(first.text), AIMessage([{"type": "text", "text": TEXT}])):
            again = llm.bind().invoke([*asked, shown, HumanMessage("Again.")])
            assert cached(again) >= first.usage_metadata["total_tokens"] - 1
            assert again.response_metadata["copyspec"]["session_id"] is None


def test_callers_of_one_model_meet_nothing_of_each_other(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT), include_explanation=True)
    llm.invoke([HumanMessage(TEXT + " Ann's PIN is swordfish.")])
    for guess in ("swordfish", "swordfist"):
        answer = llm.invoke([HumanMessage(TEXT[:40] + f" Ann's PIN is {guess}.")])
        assert cached(answer) == 0
        assert {span.source for span in llm.explain(answer).spans} <= {"prompt", "answer", "frequent"}
    stranger = llm.invoke("hi")
    assert "swordfish" not in json.dumps(messages_to_dict([stranger]))
    assert not any(span.source.startswith("earlier") for span in llm.explain(stranger).spans)


def test_a_stream_that_nobody_read_to_its_end_is_not_continued(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT), drafter="none")
    stream = llm.stream([HumanMessage("Write it.")])
    begun = next(stream)
    stream.close()
    assert cached(llm.invoke([HumanMessage("Write it."), AIMessage(begun.text), HumanMessage("Go on.")])) == 0


def test_an_answer_out_of_a_cache_says_nothing_of_the_conversation_it_was_written_in(make_engine: MakeEngine) -> None:
    secret = "the vault code is 8714-2290-5531"
    llm = ChatCopySpec(
        engine=make_engine(["Fine.", f"Well, {secret}."]), cache=InMemoryCache(), include_explanation=True
    )
    llm.invoke(f"Note: {secret}, and Ann holds the key.", THREAD)
    first = llm.invoke("Which?", THREAD)
    again = llm.invoke("Which?", {"configurable": {"thread_id": "t-2"}})
    assert "Ann" in json.dumps(first.response_metadata)
    assert first.text == again.text
    assert not {"Ann", "t-1"} & set(json.dumps(again.response_metadata).replace('"', " ").split())
    assert "Ann" not in json.dumps(again.response_metadata)


def test_what_comes_with_an_answer_is_small_unless_it_is_asked_for(make_engine: MakeEngine) -> None:
    llm = ChatCopySpec(engine=make_engine(lambda prompt: TEXT))
    small = llm.invoke(f"Repeat: {TEXT}").response_metadata["copyspec"]
    assert not {"token_ids", "written", "segments"} & small.keys()
    assert len(json.dumps(small)) < 600
    assert not any(isinstance(value, str) and len(value) > 16 for row in small["copies"] for value in row)
    whole = llm.invoke(f"Repeat: {TEXT}", include_token_ids=True).response_metadata["copyspec"]
    assert bytes(whole["token_ids"][:-1]).decode() == TEXT
