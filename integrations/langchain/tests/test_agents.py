"""Real agents and graphs: the conversation arrives, copy sources survive, drafting changes no output."""

from __future__ import annotations

import asyncio
import json
import operator
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ClearToolUsesEdit, ContextEditingMiddleware, SummarizationMiddleware
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel

from copyspec_engine import ConfigError, Engine
from langchain_copyspec import ChatCopySpec, conversation

MakeEngine = Callable[..., Engine]
Scenario = Callable[[ChatCopySpec], list[AIMessage]]

TEXT = " ".join(f"{number * 7919 % 9973:04d}" for number in range(60))
"""A text that does not repeat itself."""
THREAD: RunnableConfig = {"configurable": {"thread_id": "t-1"}}


@tool
def read_file(path: str) -> str:
    """Read a file."""
    if path == "missing":
        raise FileNotFoundError("there is no such file")
    return TEXT


@tool
def note(text: str) -> str:
    """Keep a note."""
    return "noted"


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def turns(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of the messages in a rendered prompt."""
    parts = prompt.removesuffix("<|im_start|>assistant\n").split("<|im_start|>")[1:]
    return [
        (part.partition("\n")[0], part.partition("\n")[2].removesuffix("\n").removesuffix("<|im_end|>"))
        for part in parts
    ]


def stats(message: Any) -> dict[str, Any]:
    return dict(message.response_metadata["copyspec"])


def answers(messages: list[Any]) -> list[AIMessage]:
    return [message for message in messages if isinstance(message, AIMessage)]


def same_without_drafts(make_engine: MakeEngine, reply: Callable[[str], str], scenario: Scenario) -> list[AIMessage]:
    """The scenario's answers, after the same scenario without drafting gave the same ones in more passes."""
    engine = make_engine(reply, max_model_len=32768)
    drafted = scenario(ChatCopySpec(engine=engine, include_token_ids=True))
    undrafted = make_engine(reply, max_model_len=32768)
    plain = scenario(ChatCopySpec(engine=undrafted, include_token_ids=True, drafter="none"))
    assert [stats(answer)["token_ids"] for answer in drafted] == [stats(answer)["token_ids"] for answer in plain]
    passes = [sum(stats(answer)["num_forward_passes"] for answer in found) for found in (drafted, plain)]
    assert passes[0] < passes[1] / 2
    assert engine.metrics().num_running == 0
    return drafted


# create_agent


def agent_reply(prompt: str) -> str:
    role, text = turns(prompt)[-1]
    if role == "tool":
        return f"It says: {text}" if text == TEXT else "Done."
    if "note" in text:
        return call("note", text=TEXT)
    return call("read_file", path="missing" if "missing" in text else "a.txt")


def run_agent(llm: ChatCopySpec, *, middleware: Any = (), rounds: int = 3) -> list[Any]:
    agent: Any = create_agent(llm, [read_file, note], checkpointer=InMemorySaver(), middleware=middleware)
    state: dict[str, Any] = {}
    for question in ["Read a.txt", "Write a note of it", "Read it again", *["And again"] * 9][:rounds]:
        state = agent.invoke({"messages": [("user", question)]}, THREAD)
    return list(state["messages"])


def test_an_agent_with_tools_over_several_turns(make_engine: MakeEngine) -> None:
    found = same_without_drafts(make_engine, agent_reply, lambda llm: answers(run_agent(llm)))
    assert [len(answer.tool_calls) for answer in found] == [1, 0, 1, 0, 1, 0]
    assert {stats(answer)["session_id"] for answer in found} == {"t-1"}
    assert found[-1].text == f"It says: {TEXT}"
    assert stats(found[2])["copied_share"] > 0.5  # the note's text is copied from the tool's result
    for answer in found[1:]:
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0


needs_config_in_async = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="LangChain's agents hand models no config in async code of Python 3.10"
)


@pytest.mark.parametrize("is_async", [False, pytest.param(True, marks=needs_config_in_async)])
async def test_an_agents_stream_carries_arguments_in_pieces(make_engine: MakeEngine, is_async: bool) -> None:
    agent: Any = create_agent(ChatCopySpec(engine=make_engine(agent_reply), drafter="none"), [note])
    asked = {"messages": [("user", "note")]}
    if is_async:
        found = [chunk async for chunk, _ in agent.astream(asked, THREAD, stream_mode="messages")]
    else:
        found = [chunk for chunk, _ in agent.stream(asked, THREAD, stream_mode="messages")]
    pieces = [chunk for chunk in found if getattr(chunk, "tool_call_chunks", None)]
    arguments = "".join(piece["args"] or "" for chunk in pieces for piece in chunk.tool_call_chunks)
    assert json.loads(arguments) == {"text": TEXT}
    assert len(pieces) > len(TEXT) / 2


async def test_an_agents_conversation_can_be_named_around_it_in_async_code(make_engine: MakeEngine) -> None:
    agent: Any = create_agent(ChatCopySpec(engine=make_engine(agent_reply)), [note])
    with conversation("named"):
        state = await agent.ainvoke({"messages": [("user", "note")]})
    assert {stats(answer)["session_id"] for answer in answers(state["messages"])} == {"named"}


def test_a_tools_error_is_a_message_that_the_model_answers(make_engine: MakeEngine) -> None:
    from langchain.agents.middleware import wrap_tool_call

    @wrap_tool_call  # type: ignore[arg-type]
    def explain(request: Any, handler: Any) -> Any:
        try:
            return handler(request)
        except FileNotFoundError as error:
            return ToolMessage(f"Error: {error}", tool_call_id=request.tool_call["id"], status="error")

    agent: Any = create_agent(ChatCopySpec(engine=make_engine(agent_reply)), [read_file], middleware=[explain])
    messages = agent.invoke({"messages": [("user", "Read missing")]})["messages"]
    assert messages[-2].status == "error"
    assert messages[-1].text == "Done."


def test_a_call_that_was_cut_off_is_not_carried_out(make_engine: MakeEngine) -> None:
    carried_out: list[str] = []

    @tool
    def write(text: str) -> str:
        """Write a text."""
        carried_out.append(text)
        return "written"

    llm = ChatCopySpec(engine=make_engine(lambda prompt: call("write", text=TEXT)), max_tokens=100)
    agent: Any = create_agent(llm, [write])
    for streaming in (False, True):
        llm.streaming = streaming
        messages = agent.invoke({"messages": [("user", "go")]})["messages"]
        assert len(messages[-1].invalid_tool_calls) == 1
    assert carried_out == []


class Report(BaseModel):
    """What was read."""

    path: str
    length: int


def test_an_agents_answer_has_the_form_that_was_asked_for(make_engine: MakeEngine) -> None:
    def reply(prompt: str) -> str:
        role, text = turns(prompt)[-1]
        return json.dumps({"path": "a.txt", "length": len(text)}) if role == "tool" else call("read_file", path="a.txt")

    llm = ChatCopySpec(engine=make_engine(reply))
    assert llm.profile is not None
    assert llm.profile["structured_output"]
    agent: Any = create_agent(llm, [read_file], response_format=Report)
    state = agent.invoke({"messages": [("user", "Read a.txt")]})
    assert state["structured_response"] == Report(path="a.txt", length=len(TEXT))


# Histories that are shortened


def test_a_summary_loses_no_copy_source(make_engine: MakeEngine) -> None:
    def reply(prompt: str) -> str:
        if "context extraction" in prompt.lower() or "<messages>" in prompt:
            return "They read a file."
        text = turns(prompt)[-1][1]
        if "recall" in text:
            return TEXT
        return agent_reply(prompt)

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        middleware = SummarizationMiddleware(llm, trigger=("messages", 4), keep=("messages", 1))
        agent: Any = create_agent(llm, [read_file], checkpointer=InMemorySaver(), middleware=[middleware])
        first = agent.invoke({"messages": [("user", "Read a.txt")]}, THREAD)["messages"]
        second = agent.invoke({"messages": [("user", "recall the file")]}, THREAD)["messages"]
        assert TEXT not in str(second[:-1])  # the file is in the prompt no more
        return [*answers(first), second[-1]]

    found = same_without_drafts(make_engine, reply, scenario)
    assert found[-1].text == TEXT
    assert stats(found[-1])["copied_share"] > 0.5


def test_cleared_tool_results_stay_copy_sources(make_engine: MakeEngine) -> None:
    cleared: list[bool] = []

    def reply(prompt: str) -> str:
        role, text = turns(prompt)[-1]
        if "recall" in text:
            cleared.append("[cleared]" in prompt and TEXT not in prompt)
            return TEXT
        if role == "tool":
            return "Done."
        return call("note", text="short") if "note" in text else call("read_file", path="a.txt")

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        edits = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=50, keep=1)])
        agent: Any = create_agent(llm, [read_file, note], checkpointer=InMemorySaver(), middleware=[edits])
        agent.invoke({"messages": [("user", "Read a.txt")]}, THREAD)
        agent.invoke({"messages": [("user", "Take a note")]}, THREAD)
        return [agent.invoke({"messages": [("user", "recall the file")]}, THREAD)["messages"][-1]]

    assert stats(same_without_drafts(make_engine, reply, scenario)[0])["copied_share"] > 0.5
    assert cleared == [True, True]


# Graphs


class Draft(TypedDict, total=False):
    topic: str
    draft: str
    feedback: str
    rounds: Annotated[list[AIMessage], operator.add]


def test_an_evaluator_optimizer_copies_drafts_that_are_in_no_prompt(make_engine: MakeEngine) -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return f"Version {prompt.count('feedback')}: {TEXT}"

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        def optimize(state: Draft) -> Draft:
            answer = llm.invoke(f"Write about {state['topic']}. {state.get('feedback', '')}")
            return {"draft": answer.text, "rounds": [answer]}

        def evaluate(state: Draft) -> Draft:
            return {"feedback": state.get("feedback", "") + " feedback: better"}

        graph = StateGraph(Draft)
        graph.add_node("optimize", optimize)
        graph.add_node("evaluate", evaluate)
        graph.add_edge(START, "optimize")
        graph.add_conditional_edges("optimize", lambda state: "evaluate" if len(state["rounds"]) < 3 else END)
        graph.add_edge("evaluate", "optimize")
        return list(graph.compile().invoke({"topic": "numbers"}, THREAD)["rounds"])

    found = same_without_drafts(make_engine, reply, scenario)
    assert not any(TEXT in prompt for prompt in prompts)
    assert [stats(answer)["copied_share"] > 0.8 for answer in found] == [False, True, True]


def test_a_self_refine_chain(make_engine: MakeEngine) -> None:
    def reply(prompt: str) -> str:
        text = turns(prompt)[-1][1]
        if text.startswith("Criticise"):
            return "Shorten it."
        return TEXT[: len(TEXT) - 5 * prompt.count("Shorten it.")]

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        write = ChatPromptTemplate.from_template("Write.") | llm
        criticise = ChatPromptTemplate.from_template("Criticise: {draft}") | llm
        refine = ChatPromptTemplate.from_template("Refine {draft} by {critique}") | llm
        found = [write.invoke({}, THREAD)]
        for _ in range(2):
            critique = criticise.invoke({"draft": found[-1].text}, THREAD)
            found.append(refine.invoke({"draft": found[-1].text, "critique": critique.text}, THREAD))
        return found

    found = same_without_drafts(make_engine, reply, scenario)
    assert TEXT.startswith(found[-1].text)
    assert stats(found[-1])["copied_share"] > 0.8


def test_retrieval_with_self_correction(make_engine: MakeEngine) -> None:
    def reply(prompt: str) -> str:
        text = turns(prompt)[-1][1]
        if text.startswith("Check"):
            return "wrong" if "guess" in text else "right"
        quoted = re.search(r"Context: (.*)", text)
        assert quoted is not None
        return quoted[1] if "Correct" in text else f"A guess, then {quoted[1]}"

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        store = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
        store.add_documents([Document(f"{part}: {TEXT[part * 60 : part * 60 + 59]}") for part in range(4)])
        context = store.as_retriever(search_kwargs={"k": 1}).invoke(f"2: {TEXT[120:179]}")[0].page_content
        found: list[AIMessage] = []
        verdict = ""
        while verdict != "right":
            order = "Correct yourself." if verdict else "Answer."
            found.append(llm.invoke(f"{order}\nContext: {context}", THREAD))
            verdict = llm.invoke(f"Check: {found[-1].text}", THREAD).text
        assert found[-1].text == context
        return found

    assert len(same_without_drafts(make_engine, reply, scenario)) == 2


def test_a_document_that_is_rewritten_again_and_again(make_engine: MakeEngine) -> None:
    def reply(prompt: str) -> str:
        document, step = turns(prompt)[-2][1], turns(prompt)[-1][1]
        return document.replace("0", step)

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        document, found = TEXT, []
        for step in "xyz":
            found.append(llm.invoke([HumanMessage(document), HumanMessage(step)], THREAD, prediction=document))
            document = found[-1].text.replace(step, "0")
        return found

    found = same_without_drafts(make_engine, reply, scenario)
    assert all(stats(answer)["tokens_per_forward"] > 2 for answer in found)


def test_parallel_nodes_share_one_engine(make_engine: MakeEngine) -> None:
    class State(TypedDict):
        found: Annotated[list[AIMessage], operator.add]

    def scenario(llm: ChatCopySpec) -> list[AIMessage]:
        graph = StateGraph(State)
        for number in range(4):
            graph.add_node(f"n{number}", lambda state, number=number: {"found": [llm.invoke(f"{number} {TEXT}")]})
            graph.add_edge(START, f"n{number}")
        found = graph.compile().invoke({"found": []}, THREAD)["found"]
        return sorted(found, key=lambda answer: str(answer.text))

    found = same_without_drafts(make_engine, lambda prompt: turns(prompt)[-1][1], scenario)
    assert [answer.text for answer in found] == [f"{number} {TEXT}" for number in range(4)]
    assert {stats(answer)["session_id"] for answer in found} == {"t-1"}


# Many at once


async def test_32_calls_at_once_get_each_its_own_answer(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo, rate_limiter=InMemoryRateLimiter(requests_per_second=1e6, max_bucket_size=64))
    found = await asyncio.gather(*(llm.ainvoke(f"question {number}") for number in range(32)))
    assert [answer.text for answer in found] == [f"QUESTION {number}" for number in range(32)]
    assert echo.metrics().num_running == 0


async def test_an_abandoned_stream_frees_its_slots(make_engine: MakeEngine) -> None:
    engine = make_engine(lambda prompt: "word " * 1500, drafter="none")
    llm = ChatCopySpec(engine=engine)
    streams = [llm.astream("go") for _ in range(8)]
    await asyncio.gather(*(anext(stream) for stream in streams))
    assert engine.metrics().num_running == 8
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    metrics = engine.metrics()
    assert (metrics.num_running, metrics.num_waiting, metrics.num_kv_slots_running) == (0, 0, 0)


async def test_a_conversation_can_be_named_by_the_context(echo: Engine) -> None:
    llm = ChatCopySpec(engine=echo, session_id="field")
    with conversation("outer"):
        with conversation("inner"):
            assert stats(llm.invoke("hi"))["session_id"] == "inner"
            assert stats(llm.batch(["hi", "ho"])[1])["session_id"] == "inner"
            assert stats((await llm.abatch(["hi"]))[0])["session_id"] == "inner"
            assert stats(llm.invoke("hi", THREAD))["session_id"] == "t-1"
        assert stats(list(llm.stream("hi"))[-1])["session_id"] == "outer"
    assert stats(llm.invoke("hi"))["session_id"] == "field"
    with pytest.raises(ConfigError, match="session_id=''"), conversation(""):
        pass
