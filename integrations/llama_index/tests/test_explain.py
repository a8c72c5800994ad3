"""`CopySpec.explain` and `.memory`: what was copied from where, and what a conversation remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse

from copyspec_engine import ConfigError, Engine
from llama_index.llms.copyspec import CopySpec

from .conftest import Ways

PAGE = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind this at all; nor do I."
HISTORY = [ChatMessage("Be brief.", role="system"), ChatMessage(PAGE), ChatMessage("Repeat the page.")]
MakeEngine = Callable[..., Engine]


def llm_of(engine: Engine) -> CopySpec:
    return CopySpec(engine=engine)


@pytest.mark.parametrize("way", Ways.ALL)
async def test_a_span_says_which_message_and_character_it_was_copied_from(make_engine: MakeEngine, way: str) -> None:
    llm = llm_of(make_engine([f"It says: {PAGE}"]))
    asked: Any = HISTORY if "chat" in way else PAGE
    *_, response = await Ways.ask(llm, way, asked)
    explanation = llm.explain(response)
    assert explanation.text == f"It says: {PAGE}"
    long = [span for span in explanation.spans if span.stop - span.start > 16]
    message = 1 if "chat" in way else 0
    assert {(span.message, (span.offset or 0) - span.start) for span in long} == {(message, -9)}
    assert explanation.copied_share > 0.5


def test_an_explanation_outlives_json(make_engine: MakeEngine) -> None:
    llm = llm_of(make_engine([PAGE]))
    response = llm.chat(HISTORY)
    raw = json.loads(json.dumps(response.raw["copyspec"]))  # type: ignore[index]
    assert CopySpec.explain(response.model_copy(update={"raw": {"copyspec": raw}})) == llm.explain(response)


def test_responses_of_others_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="Got response of type str but expected a ChatResponse or CompletionResponse"):
        CopySpec.explain("x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not say where it came from"):
        CopySpec.explain(CompletionResponse(text="Hello."))
    response = llm_of(make_engine([PAGE])).chat(HISTORY)
    changed = ChatResponse(message=ChatMessage("Short.", role="assistant"), raw=response.raw)
    with pytest.raises(ConfigError, match="text was changed"):
        CopySpec.explain(changed)


def test_a_conversation_can_be_looked_at_and_cleared(make_engine: MakeEngine) -> None:
    llm = llm_of(make_engine(["Yes.", "No."]))
    llm.chat([ChatMessage("One.")], session_id="1")
    llm.chat([ChatMessage("Two.")])
    memory = llm.memory("1")
    assert memory.session_id == "1"
    assert "One." in memory.export()
    assert "Two." not in memory.export()
    assert memory.clear()
    assert len(memory) == 0
    with pytest.raises(ConfigError, match="Got no conversation but expected its id"):
        llm.memory()
    with pytest.raises(ConfigError, match="Got no conversation"):  # not that of the LLM instead
        llm.model_copy(update={"session_id": "1"}).memory("")
