"""Chains, agents and graphs on a model that was trained: each call writes the same tokens with drafts and without.

What the model says is its own affair, so that no test expects a sentence of it; forms, parsing and copies are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel, Field

from copyspec_engine import Engine
from langchain_copyspec import ChatCopySpec

pytestmark = pytest.mark.real_model

Compare = Callable[[Callable[[str], Any]], tuple[Any, list[Any]]]
Model = Callable[..., ChatCopySpec]

DOCUMENT = "The meeting is on Monday at 9.\nAnna brings the plans.\nThe room is 214 on the second floor."


@tool
def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"{city}: sunny, 21 degrees"


@tool
def note(text: str) -> str:
    """Keep a note."""
    return "noted"


@pytest.fixture
def model(smollm2: Engine) -> Model:
    """A model by its name: the engine's configuration is that of the shared one."""

    def make(drafter: str = "adaptive", **options: Any) -> ChatCopySpec:
        options = {"max_tokens": 24, "cache_salt": "tests of LangChain", **options}
        llm = ChatCopySpec(engine=smollm2.config, drafter=drafter, **options)
        assert llm.model == "smollm2"
        return llm

    return make


def stats(message: Any) -> dict[str, Any]:
    return dict(message.response_metadata["copyspec"])


def assert_clean(text: str) -> None:
    """Neither marks of the chat template nor white space before the text."""
    assert text == text.lstrip()
    assert "<|" not in text
    assert "tool_call>" not in text


def test_the_profile_is_known_before_the_model_is_loaded() -> None:
    profile = ChatCopySpec(model="smollm2").profile
    assert profile is not None
    assert profile["max_input_tokens"] == 8192
    assert (profile["tool_calling"], profile["tool_choice"], profile["structured_output"]) == ("by prompt", True, True)


def test_a_stream_joined_is_the_answer(model: Model, same_when_drafted: Compare) -> None:
    def scenario(drafter: str) -> tuple[AIMessage, Any]:
        llm = model(drafter)
        chunks = list(llm.stream("What is the capital of France?"))
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        return llm.invoke("What is the capital of France?"), total

    (whole, streamed), _ = same_when_drafted(scenario)
    assert streamed.content == whole.content
    assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert whole.response_metadata["finish_reason"] == "stop"  # at <|im_end|>, which is no part of the text
    assert_clean(str(whole.content))


def test_an_agent_calls_the_tool_that_it_must_and_answers(model: Model, same_when_drafted: Compare) -> None:
    @wrap_model_call  # type: ignore[arg-type]
    def first_the_weather(request: Any, handler: Any) -> Any:
        is_first = not isinstance(request.messages[-1], ToolMessage)
        return handler(request.override(tool_choice="weather" if is_first else "none"))

    def scenario(drafter: str) -> list[Any]:
        middleware: Any = [first_the_weather]
        agent: Any = create_agent(model(drafter), [weather, note], middleware=middleware, checkpointer=InMemorySaver())
        thread = {"configurable": {"thread_id": f"agent {drafter}"}}
        return list(agent.invoke({"messages": [("user", "Is it sunny in Oslo?")]}, thread)["messages"])

    messages, outputs = same_when_drafted(scenario)
    assert len(outputs) == 2
    _, called, *results, answer = messages
    assert called.content == ""
    assert not called.invalid_tool_calls
    assert called.tool_calls
    for call, result in zip(called.tool_calls, results, strict=True):
        assert call["name"] == "weather"
        assert call["args"]["city"] in ("Rome", "Oslo")
        assert (result.content, result.tool_call_id) == (f"{call['args']['city']}: sunny, 21 degrees", call["id"])
    assert stats(called)["tool_calling"] == "by prompt"
    assert stats(called)["copied_share"] > 0.3  # names of tools and arguments stand in the prompt
    assert answer.text
    assert_clean(answer.text)


def test_tools_are_told_in_the_system_message_and_left_to_the_model(
    model: Model, smollm2: Engine, same_when_drafted: Compare
) -> None:
    chat = [SystemMessage("Be brief."), HumanMessage("Hello! Who are you?")]
    answer, outputs = same_when_drafted(lambda drafter: model(drafter).bind_tools([weather, note]).invoke(chat))
    prompt = smollm2.decode(outputs[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou have functions at hand.")
    assert prompt.count("<|im_start|>") == 3
    assert '<tool_call>[{"name": ' in prompt  # as the larger models of this family were taught
    assert prompt.endswith("<|im_start|>user\nHello! Who are you?<|im_end|>\n<|im_start|>assistant\n")
    assert bool(answer.text) != bool(answer.tool_calls or answer.invalid_tool_calls)
    assert_clean(answer.text)


class Item(BaseModel):
    name: str = Field(max_length=12)
    amount: int = Field(ge=0, le=99)


class Order(BaseModel):
    """An order."""

    size: Literal["größer", "kleiner"]
    items: list[Item] = Field(min_length=1, max_length=2)


def test_an_object_is_valid_whole_and_streamed(model: Model, same_when_drafted: Compare) -> None:
    asked = "Two apples and one plum, größer please."

    def whole(drafter: str) -> dict[str, Any]:
        return dict(model(drafter, max_tokens=100).with_structured_output(Order, include_raw=True).invoke(asked))

    found, _ = same_when_drafted(whole)
    assert found["parsing_error"] is None
    assert found["parsed"] == Order.model_validate_json(found["raw"].text)
    assert found["parsed"].size in ("größer", "kleiner")
    *_, streamed = model(max_tokens=100).with_structured_output(Order).stream(asked)
    assert streamed == found["parsed"]


def test_a_rewrite_copies_and_another_thread_sees_nothing_of_it(model: Model, same_when_drafted: Compare) -> None:
    def scenario(drafter: str) -> tuple[list[AIMessage], AIMessage]:
        llm = model(drafter, max_tokens=40, cache_salt=None)
        thread: Any = {"configurable": {"thread_id": f"rewrite {drafter}"}}
        chat: list[Any] = [HumanMessage(f"Repeat this text, with Tuesday for Monday:\n\n{DOCUMENT}")]
        answers = [llm.invoke(chat, thread)]
        chat += [answers[0], HumanMessage("Repeat it once more, with 10 for 9.")]
        answers.append(llm.invoke(chat, thread))
        other: Any = {"configurable": {"thread_id": f"stranger {drafter}"}}
        return answers, llm.invoke("Which room is it?", other, max_tokens=12)

    ((first, second), stranger), _ = same_when_drafted(scenario)
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"] - 1
    assert first.usage_metadata["input_token_details"]["cache_read"] == 0
    assert min(stats(answer)["copied_share"] for answer in (first, second)) > 0.3
    assert stranger.usage_metadata["input_token_details"]["cache_read"] == 0
    sources = {span.source for span in ChatCopySpec.explain(stranger).spans}
    assert sources <= {"prompt", "answer", "frequent"}
    threads = [model().memory(f"{name} adaptive").export() for name in ("rewrite", "stranger")]
    assert ["Anna brings the plans" in texts for texts in threads] == [True, False]


async def test_calls_at_once_get_what_single_ones_get(model: Model) -> None:
    questions = [f"What is {number} + {number}?" for number in range(2, 6)]
    llm = model(max_tokens=10)
    together = await llm.abatch(questions)
    alone = [llm.invoke(question, drafter="none") for question in questions]
    assert [answer.content for answer in together] == [answer.content for answer in alone]
    assert len({answer.content for answer in together}) > 1


# Retrieval that corrects itself

PAGES = ["The library opens at 9.", "Parking costs 4 euros a day.", "The museum is closed on Mondays."]


class WordRetriever(BaseRetriever):
    """The page that shares most words with the question."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        words = set(query.lower().split())
        return [Document(max(PAGES, key=lambda page: len(words & set(page.lower().split()))))]


class Grade(BaseModel):
    """Whether a text answers a question."""

    answers_it: Literal["yes", "no"]


class State(TypedDict, total=False):
    question: str
    page: str
    grades: list[str]
    answer: str


def corrective_rag(llm: ChatCopySpec) -> Any:
    """Retrieve, grade, then answer or ask otherwise, at most once."""
    grader, retriever = llm.with_structured_output(Grade), WordRetriever()

    def retrieve(state: State) -> State:
        return {"page": retriever.invoke(state["question"])[0].page_content}

    def grade(state: State) -> State:
        asked = f"Text: {state['page']}\nQuestion: {state['question']}\nDoes the text answer the question?"
        found: Any = grader.invoke(asked)
        return {"grades": [*state.get("grades", []), found.answers_it]}

    def rewrite(state: State) -> State:
        return {"question": llm.invoke(f"Ask this in other words: {state['question']}").text}

    def answer(state: State) -> State:
        return {"answer": llm.invoke(f"{state['page']}\n{state['question']} Answer briefly.").text}

    graph = StateGraph(State)
    for node in (retrieve, grade, rewrite, answer):
        graph.add_node(node.__name__, node)  # type: ignore[arg-type]
    graph.add_edge(START, "retrieve")
    graph.add_edge("retrieve", "grade")
    graph.add_conditional_edges(
        "grade", lambda state: "answer" if state["grades"][-1] == "yes" or len(state["grades"]) > 1 else "rewrite"
    )
    graph.add_edge("rewrite", "retrieve")
    graph.add_edge("answer", END)
    return graph.compile()


def test_retrieval_that_corrects_itself(model: Model, same_when_drafted: Compare) -> None:
    question = "When is the museum closed?"
    state, outputs = same_when_drafted(lambda drafter: corrective_rag(model(drafter)).invoke({"question": question}))
    assert state["grades"] in (["yes"], ["no", "yes"], ["no", "no"])
    assert len(outputs) == {1: 2, 2: 4}[len(state["grades"])]
    assert (state["question"] == question) == (len(state["grades"]) == 1)
    assert state["page"] in PAGES
    assert_clean(state["answer"])
    assert state["answer"]
