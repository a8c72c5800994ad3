"""Chats, agents and query engines on a model that was trained: the same tokens with drafts and without, call by call.

What the model says is its own affair, so that no test expects a sentence of it; forms, parsing and copies are ours.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from copyspec_engine import Engine
from llama_index.llms.copyspec import CopySpec

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LlamaIndex's workflows list pydantic's old names
]

Compare = Callable[[Callable[[str], Any]], tuple[Any, list[Any]]]
Model = Callable[..., CopySpec]

PAGES = ["The library opens at 9.", "Parking costs 4 euros a day.", "The museum is closed on Mondays."]
NODES = [TextNode(text=text, id_=str(number)) for number, text in enumerate(PAGES)]


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"{city}: sunny, 21 degrees"


def note(text: str) -> str:
    """Keeps a note."""
    return "noted"


TOOLS = [FunctionTool.from_defaults(weather, return_direct=True), FunctionTool.from_defaults(note)]


@pytest.fixture
def model(smollm2: Engine) -> Model:
    """A model by its name: the engine's configuration is that of the shared one."""

    def make(drafter: str = "adaptive", **options: Any) -> CopySpec:
        options = {"max_tokens": 24, "cache_salt": "tests of LlamaIndex", **options}
        llm = CopySpec(engine=smollm2.config, drafter=drafter, **options)
        assert llm.model == "smollm2"
        return llm

    return make


@pytest.fixture(autouse=True)
def _no_llm_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)


def assert_clean(text: str) -> None:
    """Neither marks of the chat template nor white space before the text."""
    assert text
    assert text == text.lstrip()
    assert "<|" not in text
    assert "tool_call>" not in text


def test_the_metadata_are_known_before_the_model_is_loaded() -> None:
    metadata = CopySpec(model="smollm2").metadata
    assert metadata.context_window == 8192
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model


def test_a_stream_joined_is_the_answer(model: Model, same_when_drafted: Compare) -> None:
    asked = [ChatMessage("What is the capital of France?")]

    def scenario(drafter: str) -> tuple[str, str, str]:
        llm = model(drafter)
        streamed = "".join(part.delta or "" for part in llm.stream_chat(asked))
        return llm.chat(asked).message.content or "", streamed, llm.complete(str(asked[0].content)).text

    (whole, streamed, completed), outputs = same_when_drafted(scenario)
    assert whole == streamed == completed
    assert {output.finish_reason for output in outputs} == {"stop"}  # at <|im_end|>, which is no part of the text
    assert_clean(whole)


class Item(BaseModel):
    name: str = Field(max_length=12)
    amount: int = Field(ge=0, le=99)


class Order(BaseModel):
    """An order."""

    size: Literal["größer", "kleiner"]
    items: list[Item] = Field(min_length=1, max_length=2)


def test_an_object_is_valid_whole_and_streamed(model: Model, same_when_drafted: Compare) -> None:
    asked = PromptTemplate("Two apples and one plum, größer please.")
    found, outputs = same_when_drafted(lambda drafter: model(drafter, max_tokens=100).structured_predict(Order, asked))
    assert found == Order.model_validate_json(outputs[0].text)
    assert found.size in ("größer", "kleiner")
    *_, streamed = model(max_tokens=100).stream_structured_predict(Order, asked)
    assert streamed == found


def test_a_tool_that_must_be_called_is_called(model: Model, same_when_drafted: Compare) -> None:
    def scenario(drafter: str) -> Any:
        return model(drafter, max_tokens=40).predict_and_call(TOOLS, "Is it sunny in Oslo?", tool_choice="weather")

    found, outputs = same_when_drafted(scenario)
    assert len(outputs) == 1
    (source,) = found.sources
    assert source.tool_name == "weather"
    assert source.raw_input["kwargs"]["city"] in ("Rome", "Oslo")
    assert found.response == weather(source.raw_input["kwargs"]["city"])


def test_an_agent_calls_the_tool_that_it_must(model: Model, same_when_drafted: Compare) -> None:
    def scenario(drafter: str) -> str:
        async def run() -> str:
            agent = FunctionAgent(tools=TOOLS, llm=model(drafter, max_tokens=40), initial_tool_choice="weather")  # type: ignore[arg-type]
            return str(await agent.run("Is it sunny in Oslo?"))

        return asyncio.run(run())

    said, _ = same_when_drafted(scenario)
    assert said in (weather("Rome"), weather("Oslo"))


@pytest.mark.parametrize(("mode", "calls"), [(ResponseMode.REFINE, 3), (ResponseMode.TREE_SUMMARIZE, 1)])
def test_three_pages_are_summarised(model: Model, same_when_drafted: Compare, mode: ResponseMode, calls: int) -> None:
    nodes = [NodeWithScore(node=node) for node in NODES]

    def scenario(drafter: str) -> str:
        synthesizer = get_response_synthesizer(llm=model(drafter, max_tokens=16), response_mode=mode)
        return str(synthesizer.synthesize("When is the museum closed?", nodes))

    said, outputs = same_when_drafted(scenario)
    assert len(outputs) == calls
    assert said.strip() == outputs[-1].text.strip()
    assert_clean(said)


def test_a_conversation_reuses_what_was_read_and_keeps_it_to_itself(model: Model, same_when_drafted: Compare) -> None:
    def scenario(drafter: str) -> list[Any]:
        llm, own, other = model(drafter, cache_salt=None, max_tokens=12), f"li {drafter}", f"other {drafter}"
        chat = [ChatMessage("Repeat: Anna brings the plans to room 214.")]
        first = llm.chat(chat, session_id=own)
        chat += [first.message, ChatMessage("Repeat it once more.")]
        return [first, llm.chat(chat, session_id=own), llm.chat([ChatMessage("Which room?")], session_id=other)]

    (first, second, stranger), _ = same_when_drafted(scenario)
    cached = [found.raw["usage"]["cached_tokens"] for found in (first, second, stranger)]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= first.raw["usage"]["total_tokens"] - 1
    assert {span.source for span in CopySpec.explain(stranger).spans} <= {"prompt", "answer", "frequent"}
    conversations = [model().memory(name).export() for name in ("li adaptive", "other adaptive")]
    assert ["Anna brings" in texts for texts in conversations] == [True, False]


async def test_calls_at_once_get_what_single_ones_get(model: Model) -> None:
    questions = [f"What is {number} + {number}?" for number in range(2, 6)]
    llm = model(max_tokens=10)
    together = await asyncio.gather(*(llm.acomplete(question) for question in questions))
    alone = [llm.complete(question, drafter="none") for question in questions]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) > 1


class Grade(BaseModel):
    """Whether a text answers a question."""

    answers_it: Literal["yes", "no"]


def corrective_rag(llm: CopySpec, question: str) -> tuple[str, list[str]]:
    """Retrieve, grade, then answer or ask otherwise, at most once; the answer and the grades."""
    retriever = VectorStoreIndex(NODES, embed_model=MockEmbedding(4)).as_retriever(similarity_top_k=1)
    grades: list[str] = []
    while True:
        page = retriever.retrieve(question)[0].text
        asked = PromptTemplate("Text: {page}\nQuestion: {question}\nDoes the text answer the question?")
        grades.append(llm.structured_predict(Grade, asked, page=page, question=question).answers_it)
        if grades[-1] == "yes" or len(grades) > 1:
            return llm.complete(f"{page}\n{question} Answer briefly.").text, grades
        question = llm.complete(f"Ask this in other words: {question}").text


def test_retrieval_that_corrects_itself(model: Model, same_when_drafted: Compare) -> None:
    (said, grades), outputs = same_when_drafted(lambda drafter: corrective_rag(model(drafter), "When is it closed?"))
    assert grades in (["yes"], ["no", "yes"], ["no", "no"])
    assert len(outputs) == 2 * len(grades)
    assert_clean(said)
