"""Structured prediction: what comes out fits the class, in every form, whatever the model; streams show it grow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator

from copyspec_engine import ConfigError, Engine
from llama_index.llms.copyspec import CopySpec, CopySpecCompletion

MakeEngine = Callable[..., Engine]

FORMS = ("structured_predict", "astructured_predict", "stream_structured_predict", "astream_structured_predict")


class Part(BaseModel):
    kind: Literal["bolt", "nut"]
    sizes: list[Literal[4, 6, 8]] = Field(min_length=1, max_length=2)


class Order(BaseModel):
    """What to send."""

    urgent: bool
    parts: list[Part] = Field(min_length=1, max_length=2)


class Compact(Order):
    """Written without white space between its parts, of which a model without a will of its own would write a lot."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"x-guidance": {"whitespace_flexible": False}})


WANTED = Order(urgent=True, parts=[Part(kind="bolt", sizes=[4, 6]), Part(kind="nut", sizes=[8])])
PROMPT = PromptTemplate("An order of {what}.")


async def predict(llm: Any, form: str, output_cls: type[Order] = Order, **options: Any) -> list[Any]:
    given = getattr(llm, form)(output_cls, PROMPT, llm_kwargs=options, what="{bolts}")
    if form.startswith("a"):
        given = await given
    if "stream" not in form:
        return [given]
    return [part async for part in given] if form.startswith("a") else list(given)


@pytest.mark.parametrize("form", FORMS)
async def test_the_answer_is_an_object_of_the_class(make_engine: MakeEngine, form: str) -> None:
    engine = make_engine(lambda prompt: WANTED.model_dump_json())
    assert (await predict(CopySpec(engine=engine), form))[-1] == WANTED
    assert (await predict(CopySpecCompletion(llm=CopySpec(engine=engine)), form))[-1] == WANTED


@pytest.mark.parametrize("form", FORMS)
async def test_any_model_gives_an_object_of_the_class(bundled: Engine, form: str) -> None:
    """The bundled model knows nothing of orders: the grammar alone makes it one."""
    llm = CopySpec(engine=bundled, max_tokens=150)
    drafted, plain = [(await predict(llm, form, Compact, drafter=drafter))[-1] for drafter in ("adaptive", "none")]
    assert isinstance(drafted, Order)
    assert drafted == plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output_cls", [int, dict[str, int], {"type": "object"}], ids=str)
async def test_what_is_no_pydantic_class_is_refused_by_name(
    make_engine: MakeEngine, form: str, output_cls: Any
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"output_cls={output_cls!r} but expected a subclass")):
        await predict(CopySpec(engine=make_engine([])), form, output_cls)


@pytest.mark.parametrize("form", FORMS[2:])
async def test_a_stream_gives_the_object_as_it_grows(make_engine: MakeEngine, form: str) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: WANTED.model_dump_json()), drafter="none")
    objects = await predict(llm, form)
    assert objects[-1] == WANTED
    assert len(objects) > 5
    counts = [len(getattr(part, "parts", None) or ()) for part in objects]
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2}


MODES = {
    "default": PydanticProgramMode.DEFAULT,
    "function": PydanticProgramMode.FUNCTION,
    "llm": PydanticProgramMode.LLM,
}


def in_mode(make_engine: MakeEngine, write_call: Any, mode: str) -> CopySpec:
    json_text = WANTED.model_dump_json()
    answers = {
        "default": json_text,
        "function": write_call("Order", **WANTED.model_dump()),
        "llm": f"Here it is: {json_text} That is all.",
    }
    return CopySpec(engine=make_engine(lambda prompt: answers[mode]), pydantic_program_mode=MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_that_is_cut_off_says_so(
    make_engine: MakeEngine, write_call: Any, form: str, mode: str
) -> None:
    llm = in_mode(make_engine, write_call, mode)
    wanted = r"cut off after 40 tokens \(finish_reason='length'\) but expected a whole Order: raise max_tokens"
    with pytest.raises(ConfigError, match=wanted):
        await predict(llm, form, max_tokens=40)
    if mode != "function":
        with pytest.raises(ConfigError, match=wanted):
            await predict(CopySpecCompletion(llm=llm, pydantic_program_mode=MODES[mode]), form, max_tokens=40)
    late = r"cut off after \d+ tokens \(finish_reason='timeout'\) but expected a whole Order: raise timeout"
    with pytest.raises(ConfigError, match=late):
        await predict(llm, form, timeout=1e-6)


@pytest.mark.parametrize("mode", ["default", "llm"])
@pytest.mark.parametrize("form", FORMS[:2])
async def test_an_object_that_is_whole_is_taken_from_an_answer_that_was_cut_off(
    make_engine: MakeEngine, write_call: Any, form: str, mode: str
) -> None:
    llm = in_mode(make_engine, write_call, mode)
    text = WANTED.model_dump_json() if mode == "default" else f"Here it is: {WANTED.model_dump_json()} That"
    size = len(llm.tokenizer(text))
    assert (await predict(llm, form, max_tokens=size))[-1] == WANTED


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")  # LlamaIndex's StructuredLLM calls it
async def test_a_structured_llm_says_so_too(make_engine: MakeEngine, write_call: Any, mode: str) -> None:
    llm = in_mode(make_engine, write_call, mode).as_structured_llm(Order)
    asked = [ChatMessage("hi")]
    with pytest.raises(ConfigError, match="raise max_tokens"):
        llm.chat(asked, max_tokens=20)
    with pytest.raises(ConfigError, match="raise max_tokens"):
        llm.complete("hi", max_tokens=20)
    with pytest.raises(ConfigError, match="raise max_tokens"):
        list(llm.stream_chat(asked, max_tokens=20))
    with pytest.raises(ConfigError, match="raise max_tokens"):
        await llm.achat(asked, max_tokens=20)
    with pytest.raises(ConfigError, match="raise max_tokens"):
        [part async for part in await llm.astream_chat(asked, max_tokens=20)]


async def test_a_call_that_is_asked_for_and_cut_off_says_so(make_engine: MakeEngine, write_call: Any) -> None:
    llm = in_mode(make_engine, write_call, "function")
    tool = get_function_tool(Order)
    wanted = r"cut off after 30 tokens .* but expected a whole call: raise max_tokens"
    with pytest.raises(ConfigError, match=wanted):
        llm.predict_and_call([tool], "go", max_tokens=30)
    with pytest.raises(ConfigError, match=wanted):
        await llm.apredict_and_call([tool], "go", max_tokens=30)
    raw: Any = llm.chat_with_tools([tool], "go", max_tokens=30).raw
    (invalid,) = raw["copyspec"]["invalid_tool_calls"]
    assert re.search(wanted, invalid["error"])
    with pytest.raises(ConfigError, match=r"a whole Order: raise max_tokens"):
        FunctionCallingProgram.from_defaults(output_cls=Order, llm=llm, prompt=PROMPT)(
            what="x", llm_kwargs={"max_tokens": 30, "object_class": Order}
        )


async def test_a_number_that_may_go_on_is_not_whole(make_engine: MakeEngine) -> None:
    class Count(RootModel[int]):
        pass

    llm = CopySpec(engine=make_engine(lambda prompt: "1234567"), drafter="none")
    whole = llm.structured_predict(Count, PROMPT, what="x")
    size = len(llm.tokenizer("1234567"))
    assert whole.root == 1234567
    with pytest.raises(ConfigError, match="raise max_tokens"):
        llm.structured_predict(Count, PROMPT, {"max_tokens": size - 1}, what="x")


def test_what_a_validator_refuses_is_refused(make_engine: MakeEngine) -> None:
    class Even(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def _even(cls, number: int) -> int:
            if number % 2:
                raise ValueError("odd")
            return number

    with pytest.raises(ValidationError, match="odd"):
        CopySpec(engine=make_engine(lambda prompt: '{"number": 3}')).structured_predict(Even, PROMPT, what="x")


def test_the_prompt_shows_the_schema_and_is_not_changed(make_engine: MakeEngine) -> None:
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return WANTED.model_dump_json()

    template = ChatPromptTemplate(message_templates=[ChatMessage("{what} as {{x}}")])
    before = template.model_copy(deep=True)
    llm = CopySpec(engine=make_engine(answer), system_prompt="be brief")
    llm.structured_predict(Order, template, what="bolts")
    assert template.message_templates == before.message_templates
    assert prompts[0].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nbolts as")
    assert '"enum": ["bolt", "nut"]' in prompts[0]


class _Recorder(BaseEventHandler):
    names: list[str] = Field(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        self.names.append(type(event).__name__)


@pytest.mark.parametrize("form", FORMS)
async def test_events_frame_the_call(make_engine: MakeEngine, form: str) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: WANTED.model_dump_json()))
    root, recorder = get_dispatcher(), _Recorder()
    root.add_event_handler(recorder)
    objects = await predict(llm, form)
    root.event_handlers.remove(recorder)
    names = [name.removeprefix("LLM").removesuffix("Event") for name in recorder.names]
    assert names[:2] == ["StructuredPredictStart", "ChatStart"]
    assert names[-1] == "StructuredPredictEnd"
    assert names.count("ChatEnd") == 1
    assert names.count("StructuredPredictInProgress") == (len(objects) if "stream" in form else 0)


@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")  # LlamaIndex's StructuredLLM calls it
async def test_a_structured_llm_answers_with_json(make_engine: MakeEngine) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: WANTED.model_dump_json())).as_structured_llm(Order)
    asked = [ChatMessage('like {"urgent": false}')]
    responses = [
        llm.chat(asked),
        await llm.achat(asked),
        list(llm.stream_chat(asked))[-1],
        [response async for response in await llm.astream_chat(asked)][-1],
    ]
    for response in responses:
        assert response.raw == WANTED
        assert Order.model_validate_json(response.message.content) == WANTED
    assert llm.complete("an order").raw == WANTED


@pytest.mark.parametrize("form", FORMS)
async def test_the_mode_of_function_calls_works_too(make_engine: MakeEngine, write_call: Any, form: str) -> None:
    answer = write_call("Order", **WANTED.model_dump())
    llm = CopySpec(engine=make_engine(lambda prompt: answer), pydantic_program_mode=PydanticProgramMode.FUNCTION)
    assert (await predict(llm, form))[-1] == WANTED


@pytest.mark.parametrize("form", FORMS[:2])
async def test_the_mode_of_text_works_too(make_engine: MakeEngine, form: str) -> None:
    answer = f"Here it is: {WANTED.model_dump_json()}"
    llm = CopySpec(engine=make_engine(lambda prompt: answer), pydantic_program_mode=PydanticProgramMode.LLM)
    assert (await predict(llm, form))[-1] == WANTED


def test_a_program_of_function_calls_runs(make_engine: MakeEngine, write_call: Any) -> None:
    llm = CopySpec(engine=make_engine(lambda prompt: write_call("Order", **WANTED.model_dump())))
    program = FunctionCallingProgram.from_defaults(output_cls=Order, llm=llm, prompt=PROMPT)
    assert program(what="bolts") == WANTED
    assert list(program.stream_call(what="bolts"))[-1] == WANTED


def test_a_response_format_holds_for_chats_and_prompts(bundled: Engine) -> None:
    llm = CopySpec(engine=bundled, max_tokens=100)
    compact = {"x-guidance": {"whitespace_flexible": False}}
    wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": [[1, 2], [3, 4]], **compact}}}
    assert llm.chat([ChatMessage("hi")], response_format=wanted).message.content in ("[1,2]", "[3,4]")
    assert llm.complete("hi", formatted=True, response_format=wanted).text in ("[1,2]", "[3,4]")
    with pytest.raises(ConfigError, match="a Grammar, or"):
        llm.chat([ChatMessage("hi")], response_format={"type": "yaml"})
