"""Query and chat engines that repeat text on the scripted model: they run, and what they repeat is copied."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import GuidelineEvaluator
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetryGuidelineQueryEngine, RetryQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import BaseModel

from copyspec_engine import ConfigError, Engine, EngineStoppedError
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

MakeEngine = Callable[..., Engine]

RULES = [
    "".join(f"- rule {page}.{row}: {(page * 97 + row * 7919) % 9973} boxes at most\n" for row in range(6))
    for page in range(3)
]
NODES = [TextNode(text=text, id_=f"page-{page}") for page, text in enumerate(RULES)]
FEEDBACK = '{"passing": false, "feedback": "Say please."}'
PASSED = '{"passing": true, "feedback": "Good."}'


def between(text: str, before: str, after: str) -> str:
    return text.rsplit(before, 1)[1].split(after, 1)[0]


def quote(prompt: str) -> str:
    """A model that quotes: the rules it is shown, behind the answer that it is to refine or has given badly."""
    lines = sorted(set(re.findall(r"- rule .* boxes at most", prompt)))
    found = "".join(f"{line}\n" for line in lines)
    return f"The rules are:\n{found}"


@pytest.fixture
def both(make_engine: MakeEngine) -> Callable[..., list[Any]]:
    """What a run gives, the same with and without drafting; and drafting has saved passes."""

    def outcome(reply: Callable[[str], str], run: Callable[[CopySpec], list[Any]]) -> list[Any]:
        results, rates = [], []
        for drafter in ("adaptive", "none"):
            engine = make_engine(reply, drafter=drafter, max_model_len=16_384)
            results.append(run(CopySpec(engine=engine)))
            rates.append(engine.metrics().tokens_per_forward)
        assert results[0] == results[1]
        assert rates[0] > 1.5 * rates[1] == 1.5
        return results[0]

    return outcome


@pytest.fixture(autouse=True)
def _no_llm_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)


def index() -> VectorStoreIndex:
    return VectorStoreIndex(NODES, embed_model=MockEmbedding(embed_dim=4))


@pytest.mark.parametrize("mode", [ResponseMode.REFINE, ResponseMode.COMPACT, ResponseMode.TREE_SUMMARIZE])
def test_a_response_mode_runs_and_copies(both: Any, mode: ResponseMode) -> None:
    def run(llm: CopySpec) -> list[str]:
        engine = SummaryIndex(NODES).as_query_engine(llm=llm, response_mode=mode)
        return [str(engine.query("Which rules?")), str(engine.query("Which rules?"))]

    first, again = both(quote, run)
    assert first == again == quote("".join(RULES))


async def test_refining_repeats_the_answer_and_copies_it(make_engine: MakeEngine) -> None:
    engine = make_engine(quote)
    query_engine = SummaryIndex(NODES).as_query_engine(llm=CopySpec(engine=engine), response_mode=ResponseMode.REFINE)
    assert str(await query_engine.aquery("Which rules?")) == quote("".join(RULES))
    metrics = engine.metrics()
    assert metrics.finished == {"stop": 3}  # one answer, refined twice
    assert metrics.tokens_per_forward > 5


async def test_a_streamed_query_is_the_whole_one(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(quote))
    response = SummaryIndex(NODES).as_query_engine(llm=llm, streaming=True).query("Which rules?")
    assert "".join(response.response_gen) == quote("".join(RULES))
    streamed = await SummaryIndex(NODES).as_query_engine(llm=llm, streaming=True, use_async=True).aquery("Which rules?")
    assert "".join([text async for text in streamed.async_response_gen()]) == quote("".join(RULES))


class Rule(BaseModel):
    page: int


TEXT, OBJECT, FILTERED = {}, {"output_cls": Rule}, {"structured_answer_filtering": True}
SYNTHESIZERS = [
    *((mode, TEXT) for mode in ResponseMode if mode not in (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)),
    *((mode, OBJECT) for mode in (ResponseMode.REFINE, ResponseMode.COMPACT, ResponseMode.TREE_SUMMARIZE)),
    *((mode, FILTERED) for mode in (ResponseMode.REFINE, ResponseMode.COMPACT)),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("mode", "form"), SYNTHESIZERS)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # of calls beside the failed one
async def test_no_synthesizer_swallows_an_error(
    make_engine: MakeEngine, mode: ResponseMode, form: dict[str, Any], streaming: bool
) -> None:
    if streaming and "accumulate" in mode:
        pytest.skip("it cannot stream")
    engine, closed = make_engine(quote), make_engine(quote)
    closed.close()
    nodes = [NodeWithScore(node=node) for node in NODES]
    for llm, error in (
        (CopySpec(engine=engine, logit_bias={10**6: 1.0}), ConfigError),
        (CopySpec(engine=closed), EngineStoppedError),
    ):
        synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, streaming=streaming, **form)
        with pytest.raises(error):
            "".join(getattr(synthesizer.synthesize("Which rules?", nodes), "response_gen", ()))
        with pytest.raises(error):
            [text async for text in (await synthesizer.asynthesize("Which rules?", nodes)).async_response_gen()]


LINES = "".join(f"- 'item' {number * 7919 % 9973}:\n\n\t\"it's\" häßlich, \\\\n {number}\n" for number in range(120))


@pytest.mark.parametrize("system_prompt", [None, "Be brief, and say it in one sentence. " * 4])
@pytest.mark.parametrize("max_tokens", [5, 60])
@pytest.mark.parametrize("view", [CopySpec, CopySpecCompletion])
def test_what_the_metadata_promise_fits(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, view: type, max_tokens: int, system_prompt: str | None
) -> None:
    engine = make_engine(lambda prompt: "It's 5.", max_model_len=3000)
    chat = CopySpec(engine=engine, max_tokens=max_tokens, system_prompt=system_prompt)
    llm = chat if view is CopySpec else CopySpecCompletion(llm=chat, system_prompt=system_prompt)
    monkeypatch.setattr(Settings, "_prompt_helper", None)
    monkeypatch.setattr(Settings, "tokenizer", chat.tokenizer)
    nodes = [NodeWithScore(node=TextNode(text=LINES))]
    for mode in ("compact", "refine", "tree_summarize", "simple_summarize", "accumulate", "compact_accumulate"):
        synthesizer = get_response_synthesizer(llm=llm, response_mode=ResponseMode(mode))
        assert synthesizer.synthesize("Which items are ugly?", nodes) is not None


def test_a_list_of_texts_is_shown_as_its_texts(make_engine: MakeEngine) -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "x"

    nodes = [NodeWithScore(node=TextNode(text="one's\ntwo"))]
    llm = CopySpec(engine=make_engine(reply))
    get_response_synthesizer(llm=llm, response_mode=ResponseMode.SIMPLE_SUMMARIZE).synthesize("Which?", nodes)
    assert "\none's\ntwo\n" in prompts[0]


def test_a_retry_repeats_the_bad_answer_and_copies_it(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(prompt: str) -> str:
        if "constructive criticism" in prompt:
            return PASSED if "Please:" in prompt else FEEDBACK
        return quote(prompt).replace("The rules", "Please: the rules" if "bad answer" in prompt else "The rules")

    def run(llm: CopySpec) -> list[str]:
        monkeypatch.setattr(Settings, "_llm", llm)  # the engine's query transformation takes no other
        engine = index().as_query_engine(llm=llm, similarity_top_k=3)
        evaluator = GuidelineEvaluator(llm=llm, guidelines="Be polite.")
        return [
            str(kind(engine, evaluator).query("Which rules?")) for kind in (RetryQueryEngine, RetryGuidelineQueryEngine)
        ]

    for answer in both(reply, run):
        assert answer == quote("".join(RULES)).replace("The rules", "Please: the rules")


def test_a_condensed_question_repeats_the_conversation(both: Any) -> None:
    def reply(prompt: str) -> str:
        if "<Follow Up Message>" in prompt:
            return f"Which of these rules is new? {between(prompt, 'assistant: ', chr(10) * 2)}"
        return quote(prompt)

    def run(llm: CopySpec) -> list[str]:
        engine = CondenseQuestionChatEngine.from_defaults(
            index().as_query_engine(llm=llm, similarity_top_k=3),
            llm=llm,
            memory=ChatMemoryBuffer.from_defaults(llm=llm),
        )
        return [str(engine.chat("Which rules?")), str(engine.chat("And which is new?"))]

    first, second = both(reply, run)
    assert first == quote("".join(RULES))
    assert RULES[0] in second


@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine, SimpleChatEngine])
def test_a_chat_engine_runs_and_copies(both: Any, kind: Any) -> None:
    def run(llm: CopySpec) -> list[str]:
        sources = {} if kind is SimpleChatEngine else {"retriever": index().as_retriever(similarity_top_k=3)}
        history = [ChatMessage(RULES[0]), ChatMessage(role="assistant", content="I see.")]
        memory = ChatMemoryBuffer.from_defaults(llm=llm, chat_history=history)
        engine = kind.from_defaults(llm=llm, memory=memory, **sources)
        answers = [str(engine.chat("Which rules?")), "".join(engine.stream_chat("Again, please.").response_gen)]
        return [*answers, str(engine.chat("Once more."))]

    answers = both(quote, run)
    assert len(answers) == 3
    assert all(RULES[0] in answer for answer in answers)


async def test_an_async_chat_engine_streams(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(quote))
    engine = ContextChatEngine.from_defaults(
        llm=llm, memory=ChatMemoryBuffer.from_defaults(llm=llm), retriever=index().as_retriever(similarity_top_k=3)
    )
    stream = await engine.astream_chat("Which rules?")
    assert "".join([text async for text in stream.async_response_gen()]) == quote("".join(RULES))
