"""Pydantic AI: `python -m scripts.conformance.pydantic_ai_client URL MODEL`."""

from __future__ import annotations

from pydantic_ai import (
    Agent,
    ModelAuthenticationError,
    ModelContextWindowExceededError,
    ModelNotFoundError,
    NativeOutput,
    PromptedOutput,
    ThinkingPart,
    ToolOutput,
)
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from scripts.conformance.asked import ANN, CALL, SUNNY, WORDS, Kind, Person, weather
from scripts.conformance.behaviours import KEY, Answer, Behaviours, Place, same

BEHAVIOURS = Behaviours()


def model(place: Place, kind: Answer = OpenAIChatModel, key: str = KEY) -> Answer:
    """The server's model."""
    return kind(place.model, provider=OpenAIProvider(base_url=place.url, api_key=key))


def agent(place: Place, kind: Answer = OpenAIChatModel, **options: Answer) -> Answer:
    """An agent over it."""
    settings = {"temperature": 0.0, "max_tokens": 400 if place.is_scripted else 60}
    return Agent(model(place, kind), model_settings=settings, **options)


@BEHAVIOURS.any_model
async def chat(place: Place) -> None:
    """A run gives an answer and its usage, and another one goes on from it."""
    first = await agent(place).run("Name a river.")
    assert first.output
    assert first.usage.output_tokens > 0
    second = await agent(place).run("And another one.", message_history=first.all_messages())
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.cache_read_tokens > 0


@BEHAVIOURS.any_model
async def stream(place: Place) -> None:
    """A stream adds up to the whole answer."""
    whole = await agent(place).run("Name a colour.")
    async with agent(place).run_stream("Name a colour.") as streamed:
        parts = [part async for part in streamed.stream_text(delta=True)]
        assert streamed.usage.output_tokens > 0
    same("".join(parts), whole.output)


@BEHAVIOURS.scripted
async def tools(place: Place) -> None:
    """A tool is called, and its result gives an answer; whole and streamed."""
    own = agent(place, tools=[weather])
    same((await own.run(CALL)).output, SUNNY)
    async with own.run_stream(CALL) as streamed:
        same(await streamed.get_output(), SUNNY)
    same((await agent(place, OpenAIResponsesModel, tools=[weather]).run(CALL)).output, SUNNY)


@BEHAVIOURS.scripted
async def objects(place: Place) -> None:
    """An object as a tool's call, as a JSON schema and as a prompt says it, for chats and responses."""
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        for output, text in (
            (ToolOutput(Person), f"call final_result {ANN}"),
            (NativeOutput(Person), f"say {ANN}"),
            (PromptedOutput(Person), f"say {ANN}"),
        ):
            same((await agent(place, kind, output_type=output).run(text)).output, Person(name="Ann", age=7))


@BEHAVIOURS.any_model
async def forms(place: Place) -> None:
    """An object of any model fits its class, by a forced call and by a JSON schema."""
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        for output in (ToolOutput(Kind), NativeOutput(Kind)):
            found = await agent(place, kind, output_type=output).run('call final_result {"yes": true}')
            assert isinstance(found.output, Kind)


@BEHAVIOURS.scripted
async def object_streamed(place: Place) -> None:
    """An object grows as it is streamed."""
    async with agent(place, output_type=NativeOutput(Person)).run_stream(f"say {ANN}") as streamed:
        *_, last = [part async for part in streamed.stream_output(debounce_by=None)]
    same(last, Person(name="Ann", age=7))


@BEHAVIOURS.scripted
async def reasoning(place: Place) -> None:
    """Reasoning is a part of its own, for chats and responses."""
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        answer = await agent(place, kind).run("think hm: four")
        (thought,) = [part for part in answer.new_messages()[-1].parts if isinstance(part, ThinkingPart)]
        same(answer.output, "four")
        same([thought.content] if thought.content else (thought.provider_details or {})["raw_content"], ["hm"])


@BEHAVIOURS.any_model
async def response(place: Place) -> None:
    """Responses, whole and streamed, and one that goes on from another by its id."""
    own = agent(place, OpenAIResponsesModel)
    first = await own.run("Name a colour.")
    async with own.run_stream("Name a colour.") as streamed:
        same(await streamed.get_output(), first.output)
    before = {"openai_previous_response_id": first.new_messages()[-1].provider_response_id}
    second = await own.run("And another one.", model_settings=before)
    assert second.usage.input_tokens > first.usage.input_tokens


@BEHAVIOURS.any_model
async def session(place: Place) -> None:
    """The header X-Session-ID names the conversation."""
    settings = {"extra_headers": {"X-Session-ID": "pydantic-ai"}}
    await agent(place).run(WORDS, model_settings=settings)
    again = await agent(place).run(f"{WORDS} And more.", model_settings=settings)
    assert again.usage.cache_read_tokens > 5


@BEHAVIOURS.any_model
async def errors(place: Place) -> None:
    """Errors have their classes: key, model, and too long a prompt."""
    wrong: list[tuple[Answer, str, type[Exception]]] = [
        (model(place, key="wrong"), "hi", ModelAuthenticationError),
        (model(Place(place.url, "gpt-0")), "hi", ModelNotFoundError),
        (model(place), "word " * 9_000, ModelContextWindowExceededError),
        (model(place, OpenAIResponsesModel), "word " * 9_000, ModelContextWindowExceededError),
    ]
    for asked, text, kind in wrong:
        try:
            await Agent(asked).run(text)
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    BEHAVIOURS.main("pydantic-ai-slim")
