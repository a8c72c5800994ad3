"""`ChatCopySpec.explain` and `.memory`: what was copied from where, and what a conversation remembers."""

from __future__ import annotations

import json
import pickle
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    messages_from_dict,
    messages_to_dict,
)
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from rich.console import Console

from copyspec_engine import ConfigError, EngineConfig, Explanation
from copyspec_engine.testing import scripted_engine
from langchain_copyspec import ChatCopySpec

DOCUMENT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind this at all; nor do I."
HISTORY: list[BaseMessage] = [SystemMessage("Be brief."), HumanMessage(DOCUMENT), HumanMessage("Repeat the document.")]


def check(messages: list[BaseMessage], answer: AIMessage, explanation: Explanation) -> None:
    """The text at the place that a span names is the span's."""
    assert explanation.text == answer.text
    for span in explanation.spans:
        if span.message is not None:
            assert span.offset is not None
            there = str(messages[span.message].text)[span.offset :][: span.stop - span.start]
            assert there == explanation.text[span.start : span.stop]


def test_an_answer_says_which_message_it_was_copied_from() -> None:
    llm = ChatCopySpec(engine=scripted_engine([f"It says: {DOCUMENT}"]))
    answer = llm.invoke(HISTORY)
    explanation = llm.explain(answer)
    check(HISTORY, answer, explanation)
    long = [span for span in explanation.spans if span.stop - span.start > 16]
    assert {(span.message, (span.offset or 0) - span.start) for span in long} == {(1, -9)}
    assert explanation.copied_share > 0.5


def test_explanations_outlive_pickles_json_and_checkpoints() -> None:
    llm = ChatCopySpec(engine=scripted_engine([DOCUMENT]))
    answer = llm.invoke(HISTORY)
    serializer = JsonPlusSerializer()
    copies = (
        pickle.loads(pickle.dumps(answer)),
        messages_from_dict(json.loads(json.dumps(messages_to_dict([answer]))))[0],
        serializer.loads_typed(serializer.dumps_typed(answer)),
    )
    for copy in copies:
        assert ChatCopySpec.explain(copy) == llm.explain(answer)


async def test_streams_add_up_to_the_same_explanation() -> None:
    def fresh() -> ChatCopySpec:
        return ChatCopySpec(engine=scripted_engine([DOCUMENT]))

    whole = fresh().invoke(HISTORY)
    streamed = reduce(add, fresh().stream(HISTORY))
    chunks = [chunk async for chunk in fresh().astream(HISTORY)]
    awaited = await fresh().ainvoke(HISTORY)
    for answer in (streamed, reduce(add, chunks), awaited):
        assert isinstance(answer, AIMessage)
        assert ChatCopySpec.explain(answer) == ChatCopySpec.explain(whole)
    assert isinstance(chunks[0], AIMessageChunk)
    with pytest.raises(ConfigError, match="does not say where it came from"):
        ChatCopySpec.explain(chunks[0])


def test_what_the_call_did_not_say_comes_from_memory() -> None:
    llm = ChatCopySpec(engine=scripted_engine(["Yes.", DOCUMENT, DOCUMENT]))
    llm.invoke(HISTORY[:2], config={"configurable": {"thread_id": "1"}})
    answer = llm.invoke("Again!", config={"configurable": {"thread_id": "1"}})
    remembered = [span for span in llm.explain(answer).spans if span.source == "earlier_prompt"]
    assert sum(span.stop - span.start for span in remembered) > 16
    assert all(span.message is None and span.offset is None for span in remembered)
    other = llm.explain(llm.invoke("Again!", config={"configurable": {"thread_id": "2"}}))
    assert not any(span.source.startswith("earlier") for span in other.spans)


def test_nothing_drafted_is_nothing_copied() -> None:
    llm = ChatCopySpec(engine=scripted_engine([DOCUMENT], EngineConfig(model="scripted", drafter="none")))
    assert llm.explain(llm.invoke(HISTORY)) == Explanation(DOCUMENT, ())


def test_messages_of_others_and_changed_ones_are_refused() -> None:
    llm = ChatCopySpec(engine=scripted_engine([DOCUMENT]))
    with pytest.raises(ConfigError, match="does not say where it came from"):
        llm.explain(AIMessage("Hello."))
    answer = llm.invoke(HISTORY)
    with pytest.raises(ConfigError, match="text was changed"):
        llm.explain(answer.model_copy(update={"content": "Short."}))


def test_a_conversation_can_be_looked_at_and_cleared() -> None:
    llm = ChatCopySpec(engine=scripted_engine(["Yes.", "No."]))
    llm.invoke("One.", config={"configurable": {"thread_id": "1"}})
    llm.invoke("Two.")
    memory = llm.memory(config={"configurable": {"thread_id": "1"}})
    assert memory.session_id == llm.memory("1").session_id == "1"
    assert [text.text[-15:] for text in memory.texts()] == ["start|>assistant\n"[-15:], "Yes.<|im_end|>"[-15:]]
    assert memory.clear()
    assert len(memory) == 0
    with pytest.raises(ConfigError, match="Got no conversation but expected its id"):
        llm.memory()
    with pytest.raises(ConfigError, match="Got no conversation"):  # not that of the model instead
        ChatCopySpec(engine=llm.engine, session_id="1").memory("")


def test_an_explanation_is_shown_in_colour() -> None:
    llm = ChatCopySpec(engine=scripted_engine([DOCUMENT]))
    console = Console(record=True, width=200, force_terminal=True)
    console.print(llm.explain(llm.invoke(HISTORY)))
    shown = console.export_text(styles=True)
    assert "\x1b[32m" in shown
    assert "message 1, from character" in shown


@pytest.mark.parametrize("message", ["x", None, {"role": "assistant"}])
def test_what_is_no_message_cannot_be_explained(message: Any) -> None:
    with pytest.raises(ConfigError, match="expected the AIMessage"):
        ChatCopySpec.explain(message)
