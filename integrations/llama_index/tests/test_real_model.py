"""Chats, agents and query engines on a model that was trained: the same tokens with drafts and without, call by call.

What the model says is its own affair, so that no test expects a sentence of it; forms, parsing and copies are ours.
"""

from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core import Settings
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel, Field

from copyspec_engine import Engine
from llama_index.llms.copyspec import CopySpec

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # LlamaIndex's workflows list pydantic's old names
]

Compare = Callable[[Callable[[str], Any]], tuple[Any, list[Any]]]
Model = Callable[..., CopySpec]


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
